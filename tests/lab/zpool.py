"""ZFS pools for tests, where the kernel has ZFS: on files, mounted below the folder of the run."""

from __future__ import annotations

import os
import uuid as uuids
from dataclasses import dataclass
from pathlib import Path

from tests.lab.deadline import wait_until
from tests.lab.lab import Lab
from tests.lab.program import attempt, run

NO_AUTOMOUNT = r"""
cp /usr/bin/env /root/env
printf '#!/bin/sh\n[ "$1" != mount ] || exit 1\nexec /root/env "$@"\n' > /root/fails
chmod 755 /root/fails
mount --bind /root/fails /usr/bin/env
"""
"""For bash, in a VM: the kernel can't mount a snapshot that somebody enters, as the `env mount` it
starts for that fails; until /usr/bin/env is unmounted."""


@dataclass(frozen=True)
class Pool:
    """A pool, whose datasets are mounted below `path`; to be destroyed."""

    name: str
    path: Path
    disk: Path

    def dataset(self, name: str, *options: str) -> Path:
        """A new file system of the pool; where it is mounted."""
        words = [word for option in options for word in ("-o", option)]
        run("zfs", "create", *words, f"{self.name}/{name}")
        return self.path / name

    def volume(self, name: str, size_mib: int = 64, *, thin: bool = True) -> Path:
        """A new volume; its device."""
        words = ["-s"] if thin else []
        run("zfs", "create", *words, "-V", f"{size_mib}M", f"{self.name}/{name}")
        device = Path(f"/dev/zvol/{self.name}/{name}")
        wait_until("the volume's device is there", device.exists, 30)
        return device

    def everything(self) -> list[str]:
        """All datasets and snapshots, with the number of their holds, and bookmarks."""
        argv = ("zfs", "list", "-H", "-t", "all", "-o", "name,userrefs", "-r", self.name)
        return sorted(run(*argv).splitlines())

    def snapshots(self) -> list[str]:
        """The names of all snapshots."""
        return run("zfs", "list", "-H", "-t", "snapshot", "-o", "name", "-r", self.name).split()

    def get(self, name: str, what: str) -> str:
        """A property's value."""
        return run("zfs", "get", "-H", "-p", "-o", "value", what, name).strip()

    def clear(self) -> None:
        """Take away all snapshots, with holds, clones and mounts, as a test that failed leaves."""
        for source in run("findmnt", "-n", "-l", "-t", "zfs", "-o", "SOURCE").split():
            if source.startswith(f"{self.name}/") and "@" in source:
                attempt(["umount", source])
        for name in self.snapshots():
            for row in run("zfs", "holds", "-H", name).splitlines():
                run("zfs", "release", row.split("\t")[1], name)
        for name in self.snapshots():
            attempt(["zfs", "destroy", "-R", name])

    def destroy(self) -> None:
        """Take it away before the run ends."""
        wait_until(
            "the pool is destroyed",
            lambda: attempt(["zpool", "destroy", "-f", self.name]).returncode == 0,
            30,
        )
        if self.disk.is_file():
            self.disk.unlink()


def make_pool(lab: Lab, size_mib: int = 1024, disk: Path | None = None) -> Pool:
    """A pool that QEMU's user can use too, without compression, so that its room can be told.

    It is on a file, unless it is given a device.
    """
    name = f"lab{uuids.uuid4().hex[:8]}"
    if disk is None:
        disk = lab.folder("pools") / f"{name}.img"
        disk.touch()
        os.truncate(disk, size_mib << 20)
    path = lab.folder(name)
    options = ("-O", "compression=off", "-O", f"mountpoint={path}", "-O", "atime=off")
    run("modprobe", "zfs")
    run("zpool", "create", "-f", *options, name, disk, timeout=120)
    path.chmod(0o755)
    return Pool(name, path, disk)
