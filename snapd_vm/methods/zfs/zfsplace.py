"""Which ZFS dataset holds a disk, as the kernel tells: of a file the table of mounts, of a volume
the device itself. Looks and changes nothing, starts no program, and knows no domain.
"""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from snapd_vm import mounts
from snapd_vm.errors import MethodNotSupported, StorageFailed
from snapd_vm.mounts import Mount

_BLKZNAME = 0x8100127D  # _IOR(0x12, 125, char[256]), OpenZFS's sys/fs/zfs.h
_NAME = 256
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Place:
    """A file in a dataset. `root` is a folder that shows it, by the path `below`; `inside` is its
    path in the dataset, which is longer where that folder is not the dataset's own root.

    `snapshots` is the folder in which the kernel shows the dataset's snapshots; '': nowhere.
    """

    dataset: str
    root: str
    below: str
    inside: str
    snapshots: str


def of_file(fd: int, path: str) -> Place | None:
    """The place of the file open at `fd`, whose real path is `path`; None: it is not on ZFS.

    Raises MethodNotSupported where it is in a snapshot, and StorageFailed.
    """
    own = mounts.mount_of(fd)
    if own.type != "zfs":
        return None
    if "@" in own.source:
        raise MethodNotSupported(f"The image {path} is in a snapshot already, and never changes.")
    below = _below(own.point, path)
    if not below:
        raise MethodNotSupported(
            f"The image {path} is mounted by itself; use another method, such as qemu."
        )
    device = os.fstat(fd).st_dev
    inside = os.path.normpath(os.path.join(own.root, below)).lstrip("/")
    # The oldest first, where the dataset was mounted and not only bound: the kernel mounts its
    # snapshots there, which other mounts of it show only where mounts are shared.
    for mount in (*mounts.table(), own):
        if (mount.type, mount.source, mount.root) == ("zfs", own.source, "/"):
            path = os.path.join(mount.point, inside)
            if _is_on(mount.point, device) and _is_on(path, device):
                return Place(own.source, mount.point, inside, inside, _snapshots(mount))
    return Place(own.source, own.point, below, inside, "")


def _is_on(path: str, device: int) -> bool:
    """Whether nothing else is mounted there."""
    try:
        return os.stat(path, follow_symlinks=False).st_dev == device
    except OSError:
        return False


def _snapshots(mount: Mount) -> str:
    """Where the snapshots of the dataset mounted there are shown, if everybody can see them.

    The kernel mounts a snapshot when somebody enters it, in the host's own mount namespace.
    """
    path = os.path.join(mount.point, ".zfs/snapshot")
    if not (mount.receives or mounts.in_host()):
        return ""
    return path if os.path.isdir(path) else ""


def _below(folder: str, path: str) -> str | None:
    prefix = folder.rstrip("/") + "/"
    return path[len(prefix) :] if path.startswith(prefix) else None


def open_root(place: str, dataset: str) -> int:
    """A descriptor of a folder of this dataset, or of a snapshot's root. Raises StorageFailed."""
    try:
        fd = os.open(place, _FOLDER)
    except OSError as error:
        raise StorageFailed(f"The folder {place} can't be opened: {error.strerror}.") from error
    try:
        mount = mounts.mount_of(fd)
        if (mount.type, mount.source) != ("zfs", dataset):
            raise StorageFailed(f"The folder {place} is not in {dataset} any more.")
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_volume(path: str) -> bool:
    """Whether it is the device of a ZFS volume, and not of a partition of one."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return False
    if not stat.S_ISBLK(found.st_mode):
        return False
    device = _sysfs(found.st_rdev)
    return device.name.startswith("zd") and not (device / "partition").exists()


def volume_at(path: str) -> str:
    """The volume, or snapshot of one, whose device this is, as its driver says.

    Only for what `is_volume`. Raises StorageFailed.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            name: bytes = fcntl.ioctl(fd, _BLKZNAME, bytes(_NAME))
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageFailed(f"The volume {path} can't be examined: {error.strerror}.") from error
    return os.fsdecode(name.split(b"\0", 1)[0])


def is_read_only(device: int) -> bool:
    """Whether the block device of this number can't be written to."""
    try:
        return (_sysfs(device) / "ro").read_text().strip() == "1"
    except OSError:
        return False


def _sysfs(device: int) -> Path:
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
