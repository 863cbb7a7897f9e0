"""Makes, names and looks at qcow2 overlays as files; knows no domain.

An overlay is made under a draft name that no other program uses, read back, made durable, and only
then given its name by link(2), which never replaces a file.
"""

from __future__ import annotations

import json
import os

from snapd_vm import command, mark, qcow2
from snapd_vm.errors import InvalidName, NameInUse, NoSpace, StorageFailed
from snapd_vm.model import Tag
from snapd_vm.storage import FileId

_LONGEST_NAME = 255  # NAME_MAX of Linux's file systems
_COPIED_LABELS = ("security.selinux",)


def make(folder: int, draft: str, origin: str, origin_format: str, size: int, tag: Tag) -> FileId:
    """Make the overlay of `origin` as `draft` in the folder open at `folder`; its identity.

    Owner, mode and security label are the origin's; it is marked where the file system can. The
    header is read back, as libvirt believes it (REUSE_EXT), and file and folder are synced. On any
    error nothing is left. Raises StorageFailed, NoSpace and NameInUse.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(draft, flags, 0o600, dir_fd=folder)
    except OSError as error:
        raise _storage_error(draft, error) from error
    try:
        qcow2.write_new(fd, size, origin, origin_format)
        header = qcow2.read_header(fd)
        if (header.backing_file, header.backing_format, header.size) != (
            origin,
            origin_format,
            size,
        ):
            raise StorageFailed(f"The overlay of {origin} does not read as it was written.")
        _take_after(fd, origin)
        mark.put(fd, mark.Kind.OVERLAY, tag)
        os.fsync(fd)
        os.fsync(folder)
        found = os.fstat(fd)
        return FileId(found.st_dev, found.st_ino)
    except BaseException as error:
        os.unlink(draft, dir_fd=folder)
        if isinstance(error, OSError):
            raise _storage_error(draft, error) from error
        if isinstance(error, qcow2.NotQcow2 | ValueError):
            raise StorageFailed(f"The overlay of {origin} came out wrong: {error}.") from error
        raise
    finally:
        os.close(fd)


def _take_after(fd: int, origin: str) -> None:
    """Give the overlay the origin's owner, mode and security label."""
    found = os.stat(origin)
    os.fchown(fd, found.st_uid, found.st_gid)
    os.fchmod(fd, found.st_mode & 0o777)
    for name in _COPIED_LABELS:
        try:
            label = os.getxattr(origin, name)
        except OSError:  # no such label, or a file system without any
            continue
        os.setxattr(fd, name, label)


def give_name(folder: int, draft: str, name: str) -> None:
    """Give the draft its name; never replaces a file. Raises NameInUse and StorageFailed."""
    try:
        os.link(draft, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        os.unlink(draft, dir_fd=folder)
        os.fsync(folder)
    except FileExistsError:
        raise NameInUse(f"There is a file {name} already; choose another name.") from None
    except OSError as error:
        raise _storage_error(name, error) from error


def fit(path: str) -> str:
    """The path, if a file can be called so. Raises InvalidName."""
    if len(os.fsencode(os.path.basename(path))) > _LONGEST_NAME:
        raise InvalidName(
            f"The overlay's file name would be longer than {_LONGEST_NAME} bytes; choose a shorter "
            "name."
        )
    return path


def identity(folder: int, name: str) -> FileId | None:
    """The identity of the file `name` in the folder, a symlink not followed; None: not there."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return FileId(found.st_dev, found.st_ino)


def exists(folder: int, name: str) -> bool:
    """Whether anything, a broken symlink too, has that name in the folder."""
    return identity(folder, name) is not None


def written(path: str) -> bool:
    """Whether anything has been written to the overlay at `path`, its base not counted.

    Raises StorageFailed. The base is not opened to be read, and locks are not asked for (-U), as a
    running QEMU may hold it.
    """
    try:
        result = command.run(
            ["qemu-img", "map", "-U", "-f", "qcow2", "--output=json", path], timeout=120
        )
        extents = json.loads(result.stdout)
    except (command.CommandError, ValueError) as error:
        raise StorageFailed(f"The overlay {path} can't be examined: {error}.") from error
    return any(extent["depth"] == 0 and extent.get("present", True) for extent in extents)


def _storage_error(name: str, error: OSError) -> StorageFailed | NoSpace:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"There is no room for the overlay {name}.")
    return StorageFailed(f"The overlay {name} can't be made: {error.strerror}.")
