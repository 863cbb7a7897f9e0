"""btrfs subvolumes: which one holds a file, and read-only snapshots of it; knows no domain.

What is looked up goes through libbtrfsutil's Python binding (python3-btrfsutil). The two calls that
wait for the disk, to take and to remove a snapshot, are made to the same library past the binding:
that keeps Python's lock while they last, and with it the timer that lets a frozen guest go.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid as uuids
from dataclasses import dataclass
from typing import Any

from snapd_vm import mounts, storage
from snapd_vm.errors import (
    MethodNotSupported,
    NameInUse,
    NoSpace,
    NotUnderDisk,
    SnapdError,
    StorageFailed,
)
from snapd_vm.mounts import Mount

ROOT_INODE = 256
"""Of every subvolume's root folder (BTRFS_FIRST_FREE_OBJECTID, linux/btrfs_tree.h)."""

_READ_ONLY = 1 << 1  # BTRFS_UTIL_CREATE_SNAPSHOT_READ_ONLY, btrfsutil.h
_IS_READ_ONLY = 1 << 0  # BTRFS_ROOT_SUBVOL_RDONLY, of a subvolume's flags
_SYNC = 0x9408  # BTRFS_IOC_SYNC, linux/btrfs.h
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Subvolume:
    """The subvolume that holds a file.

    `roots` are the paths at which its root folder can be reached, that on the file's own mount
    first; `inside` is the file's path below them. `file_system` is the device's number by which the
    table of mounts tells file systems apart, `device` that of the subvolume's own files.
    """

    uuid: str
    roots: tuple[str, ...]
    inside: str
    file_system: int
    device: int

    @property
    def root(self) -> str:
        """The path of its root folder."""
        return self.roots[0]


def holding(fd: int, path: str) -> Subvolume | None:
    """The subvolume of the file open at `fd`, whose real path is `path`; None: it is not on btrfs.

    Raises MethodNotSupported where the library is missing, or no mount shows the subvolume's root;
    and StorageFailed.
    """
    mount = mounts.mount_of(fd)
    if mount.type != "btrfs":
        return None
    binding = _binding()
    try:
        number = binding.subvolume_id(fd)
        place = "/" + os.fsdecode(binding.subvolume_path(fd, number))
        uuid = str(uuids.UUID(bytes=binding.subvolume_info(fd, number).uuid))
        device = os.fstat(fd).st_dev
    except OSError as error:
        raise StorageFailed(f"The subvolume of {path} can't be found: {error}.") from error
    below_mount = _below(mount.point, path)
    inside = None
    if below_mount is not None:
        inside = _below(place, os.path.normpath(os.path.join(mount.root, below_mount)))
    roots = tuple(_roots(mount, place, device))
    if not inside or not roots:
        raise MethodNotSupported(
            f"The subvolume of {path} has no mount that shows its root; mount it, or use another "
            "method."
        )
    return Subvolume(uuid, roots, inside, mount.device, device)


def _roots(own: Mount, place: str, device: int) -> list[str]:
    """Where the root of the subvolume `place` of the mount's file system can be reached."""
    found = []
    for mount in (own, *mounts.table()):
        rest = _below(mount.root, place)
        if mount.device != own.device or rest is None:
            continue
        path = os.path.normpath(os.path.join(mount.point, rest))
        try:
            seen = os.stat(path, follow_symlinks=False)
        except OSError:
            continue
        if (seen.st_ino, seen.st_dev) == (ROOT_INODE, device) and path not in found:
            found.append(path)
    return found


def _below(folder: str, path: str) -> str | None:
    """The path relative to a folder that it is in or is ('' then); None: it is not."""
    if path == folder:
        return ""
    prefix = folder.rstrip("/") + "/"
    return path[len(prefix) :] if path.startswith(prefix) else None


def check_named(subvolume: Subvolume | None, named: str, disk: str) -> None:
    """Raise NotUnderDisk unless `named`, a caller's path, is where this subvolume's root is.

    The path is compared with those that the table of mounts gives, and never followed.
    """
    if subvolume is None:
        raise NotUnderDisk(f"Disk {disk} is not in a btrfs subvolume.")
    if named not in subvolume.roots:
        raise NotUnderDisk(
            f"Disk {disk} is not in that subvolume but in {subvolume.root}; name that, or none."
        )


def open_root(path: str, uuid: str) -> int:
    """A descriptor of the root folder of the subvolume that has this UUID. Raises StorageFailed."""
    try:
        fd = os.open(path, _FOLDER)
    except OSError as error:
        raise StorageFailed(f"The subvolume {path} can't be opened: {error.strerror}.") from error
    try:
        if os.fstat(fd).st_ino != ROOT_INODE or _info(fd)[0] != uuid:
            raise StorageFailed(f"The subvolume {path} was replaced meanwhile; try again.")
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_root(path: str) -> bool:
    """Whether the root folder of some subvolume is there, and not merely a point to mount it."""
    try:
        return os.stat(path, follow_symlinks=False).st_ino == ROOT_INODE
    except OSError:
        return False


def write_out(fd: int) -> None:
    """Write what the file system has not written yet, which a snapshot would do. Raises NoSpace
    and StorageFailed.
    """
    try:
        fcntl.ioctl(fd, _SYNC)
    except OSError as error:
        raise _refusal(error) from error


def load() -> None:
    """Have the library at hand. Raises MethodNotSupported."""
    _binding()
    _library()


def take(root: int, folder: int, name: str) -> None:
    """A read-only snapshot `name`, in `folder`, of the subvolume whose root is open at `root`.

    It is durable when this returns. Raises NameInUse, NoSpace and StorageFailed.
    """
    path = os.fsencode(f"/proc/self/fd/{folder}/{name}")
    if _library().btrfs_util_create_snapshot_fd(root, path, _READ_ONLY, None, None):
        raise _refusal(_last_error())


def remove(folder: int, name: str) -> None:
    """Remove the subvolume `name` in `folder`, durably. Raises StorageFailed."""
    if _library().btrfs_util_delete_subvolume_fd(folder, os.fsencode(name), 0):
        raise StorageFailed(f"The snapshot {name} can't be removed: {_last_error().strerror}.")
    os.fsync(folder)  # commits the removal of a subvolume, btrfs_record_snapshot_destroy()


def open_snapshot(folder: int, name: str, source: str) -> tuple[int, str] | None:
    """A descriptor of the root of the snapshot `name`, and its UUID; None: there is none.

    It is one only if it is read-only and was taken of the subvolume that has the UUID `source`.
    Raises StorageFailed.
    """
    try:
        fd = os.open(name, _FOLDER, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise StorageFailed(f"{name} can't be opened: {error.strerror}.") from error
    try:
        if os.fstat(fd).st_ino == ROOT_INODE:
            uuid, parent, read_only = _info(fd)
            if read_only and parent == source:
                return fd, uuid
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def user(root: int) -> str:
    """Who uses the snapshot whose root is open at `root`, in words; '': nobody."""
    device = os.fstat(root).st_dev
    for mount in mounts.table():
        if mount.type == "btrfs":
            try:
                if os.stat(mount.point).st_dev == device:
                    return f"a mount on {mount.point}"
            except OSError:
                continue
    return storage.reader_in(device)


def _info(fd: int) -> tuple[str, str, bool]:
    """UUID, UUID of what it is a snapshot of, whether it is read-only."""
    try:
        info = _binding().subvolume_info(fd)
    except OSError as error:
        raise StorageFailed(f"The subvolume can't be examined: {error}.") from error
    uuid, parent = (str(uuids.UUID(bytes=raw)) for raw in (info.uuid, info.parent_uuid))
    return uuid, parent, bool(info.flags & _IS_READ_ONLY)


def _binding() -> Any:
    try:
        import btrfsutil
    except ImportError as error:
        raise _missing() from error
    return btrfsutil


def _library() -> Any:
    import ctypes

    try:
        return ctypes.CDLL("libbtrfsutil.so.1", use_errno=True)
    except OSError as error:
        raise _missing() from error


def _missing() -> MethodNotSupported:
    return MethodNotSupported(
        "Method btrfs needs libbtrfsutil for Python; install python3-btrfsutil, or use another "
        "method."
    )


def _last_error() -> OSError:
    import ctypes

    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _refusal(error: OSError) -> SnapdError:
    if error.errno == errno.EEXIST:
        return NameInUse("There is something of the snapshot's name already; move it away.")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace("There is no room for the snapshot in the disk's file system.")
    if error.errno == errno.ETXTBSY:
        return MethodNotSupported(
            "The subvolume has a swap file in use, so that it can't be snapshotted; use another "
            "method."
        )
    return StorageFailed(f"The subvolume can't be snapshotted: {error.strerror}.")
