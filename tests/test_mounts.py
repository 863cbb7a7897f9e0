"""mounts.py on the mounts of this host."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from snapd_vm import mounts
from snapd_vm.errors import StorageFailed


def test_a_mount_is_found_from_a_file_in_it(tmp_path: Path) -> None:
    point = tmp_path / "a b\\c"
    inner = tmp_path / "bound"
    point.mkdir()
    inner.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "some name", point], check=True)
    try:
        (point / "folder").mkdir()
        subprocess.run(["mount", "--bind", point / "folder", inner], check=True)
        try:
            found = _mount_of(point / "folder")
            assert (found.point, found.root) == (str(point), "/")
            assert (found.type, found.source) == ("tmpfs", "some name")
            assert "noexec" in found.options
            bound = _mount_of(inner)
            assert (bound.point, bound.root) == (str(inner), "/folder")
            assert bound.device == found.device == os.stat(point).st_dev
        finally:
            subprocess.run(["umount", inner], check=True)
    finally:
        subprocess.run(["umount", point], check=True)
    assert _mount_of(tmp_path) in mounts.table()


@pytest.mark.parametrize(
    "name", [b"a\rb", b"\x0b", "\x85".encode(), "\u2028".encode(), b"\xff", b"\n"]
)
def test_whatever_a_folder_is_called_on_which_somebody_mounts(tmp_path: Path, name: bytes) -> None:
    point = tmp_path / os.fsdecode(name)
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
    try:
        assert _mount_of(tmp_path) in mounts.table()
        assert _mount_of(point).point == str(point)
    finally:
        subprocess.run(["umount", point], check=True)


def test_a_mount_that_is_gone(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
        with pytest.raises(StorageFailed, match="mount is not"):
            mounts.mount_of(fd)
    finally:
        os.close(fd)


def _mount_of(path: Path) -> mounts.Mount:
    fd = os.open(path, os.O_RDONLY)
    try:
        return mounts.mount_of(fd)
    finally:
        os.close(fd)
