"""Makes, names, protects and removes clones of files by FICLONE; knows no domain.

A clone is made as a file without a name (O_TMPFILE, open(2)), which goes away with the process,
and gets its name by linkat(2), which never replaces a file, once it is whole and durable: what has
the name is whole. It carries a mark (mark.py), so that whose it is can be told without the journal.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import struct

from snapd_vm import mark, storage
from snapd_vm.errors import MethodNotSupported, NameInUse, NoSpace, SnapdError, StorageFailed
from snapd_vm.model import Tag

RESERVE = 1 << 20
"""Bytes that must be free: the clone takes none of its own but for its map, and a guest that
overwrites what is shared needs new room at once."""

# linux/fs.h, as on x86 and arm; the flags are an int although the numbers say long, ioctl_iflags(2)
_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("qQQQ")  # struct file_clone_range, ioctl_ficlonerange(2)
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FLAGS = struct.Struct("I4x")
_IMMUTABLE = 0x00000010
_NOCOW = 0x00800000

# The list of rights comes first: chmod(2) then takes the right to write from all who are in it.
_COPIED = ("system.posix_acl_access", "security.selinux")
_NOT_ABLE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.EISDIR, errno.ETXTBSY)

_able: dict[tuple[int, int], bool] = {}


def is_possible(folder: str) -> bool:
    """Whether files of the folder's file system can be cloned there; False where it can't be told.

    Tried with two empty files without a name, once for each file system: a file system that can't
    says so before it looks at them, and one that can has nothing to do.
    """
    try:
        key = (os.stat(folder).st_dev, os.statvfs(folder).f_fsid)
        if key not in _able:
            _able[key] = _try_empty(folder)
        return _able[key]
    except OSError:  # read-only, full, gone: it may be otherwise the next time
        return False


def _try_empty(folder: str) -> bool:
    one = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        other = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.ioctl(other, _FICLONE, one)
        finally:
            os.close(other)
    except OSError as error:
        if error.errno in _NOT_ABLE:
            return False
        raise
    finally:
        os.close(one)
    return True


def open_image(folder: int, name: str, identity: storage.FileId) -> int:
    """A descriptor to read the image `name` in the folder; not of anything put in its place.

    Raises StorageFailed.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        raise StorageFailed(f"The image {name} can't be opened: {error.strerror}.") from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or (found.st_dev, found.st_ino) != (
        identity.device,
        identity.inode,
    ):
        os.close(fd)
        raise StorageFailed(f"The image {name} was replaced meanwhile; try again.")
    return fd


def make(folder: int, origin: int, tag: Tag) -> int:
    """An empty file without a name in the folder, ready to be a clone of `origin`; a descriptor.

    It has the origin's owner, security label, list of rights and mode, without any right to write,
    and our mark. Raises MethodNotSupported, NoSpace and StorageFailed.
    """
    fd = _unnamed(folder, origin, origin, 0o444)
    try:
        if not mark.put(fd, mark.Kind.CLONE, tag):
            raise MethodNotSupported(
                "The file system of the disk's image keeps no trusted attributes; use another "
                "method, such as qemu."
            )
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise _refusal(error) from error
        raise
    return fd


def make_image(folder: int, snapshot: int, like: int) -> int:
    """The same, ready to be a clone of `snapshot` and to take the place of the image `like`.

    It has that image's owner, security label, list of rights and mode, and no mark, as it is no
    snapshot. Raises MethodNotSupported, NoSpace and StorageFailed.
    """
    return _unnamed(folder, snapshot, like, 0o777)


def _unnamed(folder: int, origin: int, like: int, rights: int) -> int:
    fd = -1
    try:
        # In a folder given by its descriptor; O_TMPFILE names the folder, not the file.
        fd = os.open(f"/proc/self/fd/{folder}", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        found = os.fstat(like)
        # btrfs clones only between files that both have checksums, or both have none.
        wanted, own = _flags(origin), _flags(fd)
        if (wanted ^ own) & _NOCOW:
            _set_flags(fd, own ^ _NOCOW)
        os.fchown(fd, found.st_uid, found.st_gid)
        for name in _COPIED:
            try:
                value = os.getxattr(like, name)
            except OSError:  # none, or a file system without any
                continue
            os.setxattr(fd, name, value)
        os.fchmod(fd, found.st_mode & rights)
    except BaseException as error:
        if fd != -1:
            os.close(fd)
        if isinstance(error, OSError):
            raise _refusal(error) from error
        raise
    return fd


def try_with(folder: int, origin: int, tag: Tag) -> None:
    """Do all that a clone needs with the origin's first block, and leave nothing.

    Raises what the real thing would.
    """
    fd = make(folder, origin, tag)
    try:
        block = os.fstatvfs(origin).f_bsize
        length = block if os.fstat(origin).st_size > block else 0  # 0: up to the end
        fcntl.ioctl(fd, _FICLONERANGE, _CLONE_RANGE.pack(origin, 0, length, 0))
    except OSError as error:
        raise _refusal(error) from error
    finally:
        os.close(fd)


def share(origin: int, clone: int) -> None:
    """FICLONE: let the clone have the origin's contents, those in the page cache too.

    Takes the more time the more is not yet written and the more fragments there are. Raises NoSpace
    and StorageFailed.
    """
    try:
        fcntl.ioctl(clone, _FICLONE, origin)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _refusal(error) from error
        raise StorageFailed(f"The image can't be cloned: {error.strerror}.") from error


def give_name(folder: int, clone: int, name: str) -> None:
    """Make the clone durable and give it its name; never replaces a file.

    Raises NameInUse and StorageFailed.
    """
    try:
        os.fsync(clone)
        os.link(f"/proc/self/fd/{clone}", name, dst_dir_fd=folder)
        os.fsync(folder)
    except FileExistsError:
        raise NameInUse(f"There is a file {name} already; move it away.") from None
    except OSError as error:
        raise _refusal(error) from error


def protect(clone: int) -> bool:
    """Make it immutable, where the file system can; whether it is."""
    try:
        flags = _flags(clone)
        if not flags & _IMMUTABLE:
            _set_flags(clone, flags | _IMMUTABLE)
            os.fsync(clone)
    except OSError:
        return False
    return True


def open_own(name: str, uuid: str, inode: int, folder: int | None = None) -> int | None:
    """A descriptor of the clone of snapshot `uuid`; None if what is there is not it.

    Both the inode and the mark must be right: the mark alone can be copied with the file. Raises
    StorageFailed.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return None
        raise StorageFailed(f"{name} can't be opened: {error.strerror}.") from error
    try:
        own = os.fstat(fd).st_ino == inode and _marked_for(fd) == uuid
    except OSError as error:
        os.close(fd)
        raise StorageFailed(f"{name} can't be examined: {error.strerror}.") from error
    if own:
        return fd
    os.close(fd)
    return None


def remove(folder: int, name: str, uuid: str, inode: int) -> bool:
    """Remove the clone of snapshot `uuid`; False if it is not there. Raises StorageFailed."""
    fd = open_own(name, uuid, inode, folder)
    if fd is None:
        return False
    try:
        if is_protected(fd):
            _set_flags(fd, _flags(fd) & ~_IMMUTABLE)
        os.unlink(name, dir_fd=folder)
        os.fsync(folder)
    except OSError as error:
        raise StorageFailed(f"{name} can't be removed: {error.strerror}.") from error
    finally:
        os.close(fd)
    return True


def is_nocow(image: int) -> bool:
    """Whether it is written in place (chattr +C)."""
    return bool(_flags(image) & _NOCOW)


def is_protected(clone: int) -> bool:
    """Whether it is immutable."""
    try:
        return bool(_flags(clone) & _IMMUTABLE)
    except OSError:
        return False


def _marked_for(fd: int) -> str:
    """The UUID of the snapshot that the mark names, or ''."""
    try:
        found = json.loads(os.getxattr(fd, mark.ATTRIBUTE))
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return ""
        raise
    except ValueError:
        return ""
    return str(found.get("snapshot", "")) if isinstance(found, dict) else ""


def _flags(fd: int) -> int:
    """The inode's flags, ioctl_iflags(2); 0 where the file system has none."""
    try:
        answer: bytes = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(_FLAGS.size))
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
            return 0
        raise
    return int(_FLAGS.unpack(answer)[0])


def _set_flags(fd: int, flags: int) -> None:
    fcntl.ioctl(fd, _FS_IOC_SETFLAGS, _FLAGS.pack(flags))


def _refusal(error: OSError) -> SnapdError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace("There is no room for the clone in the disk's file system.")
    if error.errno in _NOT_ABLE:
        return MethodNotSupported(
            "The file system of the disk's image can't clone it; use another method, such as qemu."
        )
    return StorageFailed(f"The image can't be cloned: {error.strerror}.")
