"""What holds a disk: files, devices and folders, looked at and never changed.

A path that is looked at here comes from libvirt or from the configuration; one that a caller named
has been compared with those before.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from snapd_vm import qcow2
from snapd_vm.errors import Busy, MethodNotSupported, StorageFailed

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, len, pid
_OFD_GETLK, _OFD_SETLK = 36, 37  # F_OFD_GETLK and its kin, which Python 3.11's fcntl lacks
_WRITE_BYTE = 101
_NO_WRITER_BYTE = 201


@dataclass(frozen=True, slots=True)
class FileId:
    """What a path stands for, whatever its name: device and inode, or a device's number."""

    device: int
    inode: int


def file_id(path: str) -> FileId | None:
    """The identity of the file or device behind `path` (symlinks followed), or None."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    if stat.S_ISBLK(found.st_mode):
        return FileId(found.st_rdev, 0)  # two device nodes of one number are one device
    return FileId(found.st_dev, found.st_ino)


def backing_chain(path: str, limit: int = 1024) -> Iterator[str]:
    """The local files below the qcow2 image `path`, nearest first, read from the headers.

    Stops at an image that is not qcow2, can't be read, or after `limit` files; and at a base that
    the header above it declares raw, whose content is a guest's and may look like anything. A
    guest can't write the header of an image that is declared qcow2.
    """
    for _ in range(limit):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError):
            return
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                return
            header = qcow2.read_header(fd)
        except (OSError, qcow2.NotQcow2):
            return
        finally:
            os.close(fd)
        path = qcow2.backing_path(path, header)
        if not path:
            return
        yield path
        if header.backing_format == "raw":
            return


def virtual_size(path: str, image_format: str) -> int:
    """The size in bytes of the disk in the image at `path`, "raw" or "qcow2", as QEMU sees it.

    QEMU rounds a raw file up to whole sectors of 512 bytes. Raises StorageFailed.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StorageFailed(f"The image {path} can't be opened: {error.strerror}.") from error
    try:
        if image_format == "qcow2":
            return qcow2.read_header(fd).size
        return -(-os.lseek(fd, 0, os.SEEK_END) // 512) * 512
    except (OSError, qcow2.NotQcow2) as error:
        raise StorageFailed(f"The image {path} can't be read: {error}.") from error
    finally:
        os.close(fd)


@contextmanager
def open_folder(
    folder: str,
    owners: Collection[int],
    groups: Collection[int],
    advice: str = "use method qemu with an overlay in a folder of qemu.overlay_dirs",
) -> Iterator[int]:
    """A descriptor of `folder`, reached without a symlink, in which only `owners` can write.

    The folder's real path is walked from the root, one component at a time, each opened with
    O_NOFOLLOW and checked: owned by one of `owners` (uids), writable by no group outside `groups`
    and by no others unless it is sticky and not the last. Raises MethodNotSupported with the reason
    and StorageFailed where a component can't be opened.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open("/", flags)
    try:
        parts = [part for part in os.path.realpath(folder).split("/") if part]
        for index, part in enumerate(parts):
            try:
                inner = os.open(part, flags, dir_fd=fd)
            except OSError as error:
                raise StorageFailed(
                    f"The folder {folder} can't be opened: {error.strerror}."
                ) from error
            os.close(fd)
            fd = inner
            last = index == len(parts) - 1
            if not _kept(fd, owners, groups, last):
                who = "root and QEMU's user" if set(owners) - {0} else "root"
                raise MethodNotSupported(
                    f"The folder {folder} can be changed by others than {who}; {advice}."
                )
        yield fd
    finally:
        os.close(fd)


def _kept(fd: int, owners: Collection[int], groups: Collection[int], last: bool) -> bool:
    found = os.fstat(fd)
    sticky = bool(found.st_mode & stat.S_ISVTX) and not last
    if found.st_uid not in owners:
        return False
    if found.st_mode & stat.S_IWGRP and found.st_gid not in groups and not sticky:
        return False
    if found.st_mode & stat.S_IWGRP and _has_acl(fd) and not sticky:
        return False  # what looks like the group's right is the most that the list gives, acl(5)
    return not found.st_mode & stat.S_IWOTH or sticky


def _has_acl(fd: int) -> bool:
    try:
        return bool(os.getxattr(fd, "system.posix_acl_access"))
    except OSError:
        return False


def space_available(folder: str) -> int:
    """Bytes that QEMU's user can still write to the file system of `folder` (statvfs(3)).

    Raises StorageFailed.
    """
    found = _file_system(folder)
    return found.f_bavail * found.f_frsize


def space_below(folder: str, percent: int) -> bool:
    """Whether less than this share of the file system of `folder` is left to QEMU's user.

    Raises StorageFailed.
    """
    found = _file_system(folder)
    return found.f_bavail * 100 < found.f_blocks * percent


def read_only(folder: str) -> bool:
    """Whether the file system of `folder` is mounted read-only. Raises StorageFailed."""
    return bool(_file_system(folder).f_flag & os.ST_RDONLY)


def _file_system(folder: str) -> os.statvfs_result:
    try:
        return os.statvfs(folder)
    except OSError as error:
        raise StorageFailed(f"The folder {folder} can't be examined: {error.strerror}.") from error


def write_locked(path: str) -> bool:
    """Whether a QEMU or qemu-img has the image open for writing, as its image locks tell.

    QEMU holds a lock on byte 100 + n for each permission n that it uses, 1 being to write
    (raw_apply_lock_bytes in QEMU's block/file-posix.c); asking takes none (F_OFD_GETLK, fcntl(2)).
    Of a block device it is not known: QEMU's device node is one of its own mount namespace.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _WRITE_BYTE, 1, 0)
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(fd, _OFD_GETLK, question))
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(fd)
    return bool(kind != fcntl.F_UNLCK)


@contextmanager
def kept_from_writers(path: str) -> Iterator[None]:
    """Keep every QEMU and qemu-img from opening the image for writing; raises Busy if one has.

    The lock is that of a QEMU which shares no writing: on byte 200 + n, see `write_locked`. QEMU
    locks first and looks then, as is done here, so that one of two always sees the other. Where the
    file system has no locks, QEMU has none either.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StorageFailed(f"The image {path} can't be opened: {error.strerror}.") from error
    try:
        with contextlib.suppress(OSError):
            lock = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, _NO_WRITER_BYTE, 1, 0)
            fcntl.fcntl(fd, _OFD_SETLK, lock)
        if write_locked(path):
            raise Busy("The disk's image is open for writing; shut the domain down first.")
        yield
    finally:
        os.close(fd)


def reader_of(path: str, uuid: str) -> str:
    """Who has the file or device open, in words, besides the QEMU of domain `uuid`; '' : nobody.

    With `uuid` '' no QEMU is left out. Looks at every process's descriptors (proc(5), /proc/PID/fd)
    and at what the kernel has stacked on it: loop devices and block holders (sysfs).
    """
    wanted = file_id(path)
    if wanted is None:
        return ""
    for loop in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if file_id(_backing(loop)) == wanted:
                return f"the loop device {loop.parent.parent.name}"
    if wanted.inode == 0:
        major, minor = os.major(wanted.device), os.minor(wanted.device)
        for holder in Path(f"/sys/dev/block/{major}:{minor}/holders").glob("*"):
            return f"the block device {holder.name}"
    for process in _others():
        if not any(_descriptors(process, wanted)):
            continue
        with contextlib.suppress(OSError):
            argv = (process / "cmdline").read_bytes().split(b"\0")
            if uuid and b"-uuid" in argv and uuid.encode() in argv:  # libvirt starts QEMU so
                continue
            return named(process)
    return ""


def claimed(path: str) -> bool:
    """Whether the kernel uses the block device, or a part of it: a mount, or another device.

    Raises StorageFailed where it can't be opened.
    """
    try:
        # Of a block device, O_EXCL alone asks for what only one may have at a time; open(2).
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise StorageFailed(f"{path} can't be opened: {error.strerror}.") from error
    return False


def device_user(path: str) -> str:
    """Who has the block device open or claims it, in words; '': nobody. Raises StorageFailed."""
    return reader_of(path, "") or ("a mount, or another device" if claimed(path) else "")


def writer_of(path: str) -> str:
    """The same without those that have it open to read only. Raises StorageFailed."""
    if claimed(path):
        return device_user(path)
    wanted = file_id(path)
    for process in _others() if wanted is not None else ():
        with contextlib.suppress(OSError):
            if any(_writes(fd) for fd in _descriptors(process, wanted)):
                return named(process)
    return ""


def _writes(fd: Path) -> bool:
    """Whether a descriptor is open for writing (proc(5), /proc/PID/fdinfo, `flags` in octal)."""
    lines = (fd.parent.parent / "fdinfo" / fd.name).read_text().splitlines()
    flags = next((int(line[6:], 8) for line in lines if line.startswith("flags:")), os.O_RDWR)
    return flags & os.O_ACCMODE != os.O_RDONLY


def reader_in(device: int) -> str:
    """Who has a file open, or a folder in use, on this device (st_dev), in words; '': nobody.

    The device is that of a whole file system, or of a subvolume. See `reader_of`.
    """
    for loop in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if os.stat(_backing(loop)).st_dev == device:
                return f"the loop device {loop.parent.parent.name}"
    for process in _others():
        if _is_in(process, device):
            with contextlib.suppress(OSError):
                return named(process)
    return ""


def _others() -> Iterator[Path]:
    """The folders of all other processes (proc(5))."""
    own = str(os.getpid())
    return (process for process in Path("/proc").glob("[0-9]*") if process.name != own)


def _backing(loop: Path) -> str:
    """The file of a loop device; its name may be of any bytes."""
    return os.fsdecode(loop.read_bytes().removesuffix(b"\n"))


def named(process: Path) -> str:
    """The process of this folder in /proc, in words. Raises OSError where it has ended."""
    name = (process / "comm").read_text(errors="replace").strip()  # which it gives itself
    printable = "".join(letter if letter.isprintable() else "?" for letter in name)
    return f"{printable} (process {process.name})"


def _is_in(process: Path, device: int) -> bool:
    places = [str(process / "cwd"), str(process / "root")]
    with contextlib.suppress(OSError), os.scandir(process / "fd") as entries:
        places += [entry.path for entry in entries]
    for place in places:
        with contextlib.suppress(OSError):  # it has ended, or it is none of ours to look at
            if os.stat(place).st_dev == device:
                return True
    return False


def _descriptors(process: Path, wanted: FileId | None) -> Iterator[Path]:
    """Those by which a process has the file open."""
    with contextlib.suppress(OSError), os.scandir(process / "fd") as entries:
        for entry in entries:  # OSError: it has ended, or it is none of ours to look at
            if file_id(entry.path) == wanted:
                yield Path(entry.path)
