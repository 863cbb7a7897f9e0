"""The copy that a revert makes of an image in a snapshot of another file system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from snapd_vm.errors import Cancelled, NoSpace
from snapd_vm.methods import copyback


class Watched:
    """A Watch that cancels after so many pieces."""

    def __init__(self, pieces: int = 1000) -> None:
        self.left, self.told = pieces, list[tuple[int, int]]()
        self.spoilt = False

    @property
    def cancelled(self) -> bool:
        return self.left <= 0

    def progress(self, done: int, total: int) -> None:
        self.left -= 1
        self.told.append((done, total))

    def past_return(self) -> None: ...

    def spoil(self) -> None: ...


def _sparse(path: Path) -> bytes:
    with path.open("wb") as file:
        for offset in (1 << 20, 9 << 20, 40 << 20):
            file.seek(offset)
            file.write(os.urandom(3 << 20))
        file.truncate((64 << 20) + 17)
    return path.read_bytes()


@pytest.mark.parametrize("refused", [0, errno.EXDEV, errno.EINVAL])
def test_a_copy_is_the_same_with_its_holes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(refused, "no")

    if refused:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    contents = _sparse(tmp_path / "a")
    watch = Watched()
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("wb") as to:
        copyback.copy(source.fileno(), to.fileno(), watch)
    assert (tmp_path / "b").read_bytes() == contents
    assert (tmp_path / "b").stat().st_blocks * 512 < 12 << 20
    done, total = watch.told[-1]
    assert done == total == (tmp_path / "a").stat().st_blocks * 512


def test_a_copy_is_cancelled_and_has_no_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _sparse(tmp_path / "a")
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("wb") as to:
        with pytest.raises(Cancelled):
            copyback.copy(source.fileno(), to.fileno(), Watched(1))

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, "copy_file_range", full)
        with pytest.raises(NoSpace):
            copyback.copy(source.fileno(), to.fileno(), Watched())
