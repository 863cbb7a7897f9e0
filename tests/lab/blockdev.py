"""Loop devices, and small file systems to be filled, made read-only or cloned on.

They lie below the run's folder, where the end of the run, and the next one's start, find them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.lab.mounts import detach, unmount
from tests.lab.program import run
from tests.lab.run import Run

FileSystem = Literal["ext4", "xfs", "btrfs"]
MKFS = {
    "ext4": ("mkfs.ext4", "-q"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
SMALLEST_MIB = {"ext4": 8, "xfs": 300, "btrfs": 114}


@dataclass(frozen=True)
class Loop:
    """A loop device with the file behind it."""

    device: Path
    file: Path

    def detach(self) -> None:
        """Take it away before the run ends."""
        detach(self.device)
        self.file.unlink()


@dataclass(frozen=True)
class Mounted:
    """A file system of its own on a loop device."""

    path: Path
    loop: Loop

    def fill(self, leave: int = 0) -> None:
        """Use up its room, but for about so many bytes."""
        with (self.path / "filling").open("ab") as file:
            chunk = self._free() - leave
            while chunk >= 4096:
                # by halves, as no file system says how much of its free room a single file can have
                with suppress(OSError):
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, chunk)
                chunk = min(chunk // 2, self._free() - leave)

    def _free(self) -> int:
        state = os.statvfs(self.path)
        return state.f_bavail * state.f_frsize

    def drain(self) -> None:
        """Give back what `fill` took, and at once: XFS frees what is unlinked in its own time."""
        filling = self.path / "filling"
        os.truncate(filling, 0)
        filling.unlink()

    def set_read_only(self, on: bool) -> None:
        """Remount it; nobody may have a file open for writing there."""
        run("mount", "-o", f"remount,{'ro' if on else 'rw'}", self.path)

    def unmount(self) -> None:
        """Take it away before the run ends."""
        unmount(self.path)
        self.loop.detach()


class BlockDevices:
    """Makes them for one run."""

    def __init__(self, run: Run) -> None:
        self._folder = run.path("block")
        self._number = 0

    def loop(self, size_mib: int = 64, *, read_only: bool = False) -> Loop:
        """A block device of zeros; its file is sparse."""
        self._number += 1
        file = self._folder / f"{self._number}.img"
        with file.open("wb") as image:
            image.truncate(size_mib << 20)
        options = ["--read-only"] if read_only else []
        return Loop(Path(run("losetup", "--find", "--show", *options, file).strip()), file)

    def mounted(self, filesystem: FileSystem = "ext4", size_mib: int = 0) -> Mounted:
        """A file system that QEMU's user can use too, as small as it can be if no size is given."""
        loop = self.loop(max(size_mib, SMALLEST_MIB[filesystem]))
        run(*MKFS[filesystem], loop.device)
        path = self._folder / f"{self._number}.{filesystem}"
        path.mkdir()
        run("mount", "-t", filesystem, loop.device, path)
        return Mounted(path, loop)
