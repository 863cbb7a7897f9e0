"""Where read-only snapshots of subvolumes are kept: each in a marked folder of its own.

A snapshot that is read-only bears no mark itself. Its folder, which only root can enter, bears ours
(mark.py) before it is taken, and its UUID from the time on at which it was seen to be whole.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from snapd_vm import mark, storage
from snapd_vm.errors import MethodNotSupported, NameInUse, NoSpace, StorageFailed
from snapd_vm.methods.btrfs import subvolume
from snapd_vm.methods.btrfs.subvolumetarget import SubvolumeTarget
from snapd_vm.model import Json, Tag

log = logging.getLogger(__name__)

DEFAULT = ".snapd-vm"
"""The folder, in the root of a subvolume, that its snapshots are in if no other is configured."""

_ADVICE = "give btrfs.snapshot_dir a folder of root's own"
_UUID = "trusted.snapd-vm.subvolume"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def check(place: str) -> str:
    """The folder that is there already of `place`, in which only root can write.

    It is the subvolume's root, where the default place is not made yet. Raises MethodNotSupported
    and StorageFailed.
    """
    there = place
    if os.path.basename(place) == DEFAULT and not os.path.lexists(place):
        there = os.path.dirname(place)
    with _open(there):
        return there


def make(one: SubvolumeTarget, tag: Tag) -> int:
    """The marked folder for a snapshot, and its place if need be; a descriptor of the folder.

    Raises NameInUse, NoSpace, MethodNotSupported and StorageFailed.
    """
    parent, base = os.path.split(one.place)
    try:
        if base == DEFAULT:
            with _open(parent) as fd, contextlib.suppress(FileExistsError):
                os.mkdir(base, 0o700, dir_fd=fd)
        with _open(one.place) as place:
            os.mkdir(one.folder, 0o700, dir_fd=place)
            made = os.open(one.folder, _FOLDER, dir_fd=place)
    except FileExistsError:
        raise NameInUse(f"There is {one.place}/{one.folder} already; move it away.") from None
    except OSError as error:
        raise _refusal(one, error) from error
    try:
        if not mark.put(made, mark.Kind.SUBVOLUME, tag):
            raise StorageFailed(f"The folder {one.place} keeps no trusted attributes.")
    except BaseException as error:
        os.close(made)
        if isinstance(error, OSError):
            raise _refusal(one, error) from error
        raise
    return made


@contextmanager
def opened(one: SubvolumeTarget) -> Iterator[int | None]:
    """A descriptor of the snapshot's root folder, if it is there and ours; else None.

    Ours: in a folder with our mark for it, read-only, a snapshot of that subvolume, and none that
    somebody has put in the place of ours. Raises StorageFailed and MethodNotSupported.
    """
    with _marked(one) as folder:
        found = None
        if folder is not None:
            found = subvolume.open_snapshot(folder, one.name, one.source)
        if found is None or folder is None:
            yield None
            return
        root, uuid = found
        try:
            yield root if _own_uuid(folder) in ("", uuid) else None
        finally:
            os.close(root)


def settle(one: SubvolumeTarget) -> None:
    """Write down the UUID of a snapshot that was seen to be whole, durably; once."""
    with _marked(one) as folder:
        if folder is None or _own_uuid(folder):
            return
        found = subvolume.open_snapshot(folder, one.name, one.source)
        if found is None:
            return
        root, uuid = found
        os.close(root)
        try:
            os.setxattr(folder, _UUID, uuid.encode())
            os.fsync(folder)
        except OSError as error:
            raise _refusal(one, error) from error


def remove(one: SubvolumeTarget) -> bool:
    """Remove a snapshot with its folder, and the default place once it is empty, durably.

    False: nothing of it is there. What is not ours is left alone. Raises StorageFailed and
    MethodNotSupported.
    """
    if not os.path.lexists(one.place):
        if not subvolume.is_root(one.root):
            raise StorageFailed(f"The subvolume {one.root} is not there; mount it.")
        return False
    with opened(one) as root:
        if root is not None:
            with _marked(one) as folder:
                if folder is not None:
                    subvolume.remove(folder, one.name)
                    log.info("removed %s", one.path)
    removed = root is not None
    with _open(one.place) as place:
        try:
            os.rmdir(one.folder, dir_fd=place)
            os.fsync(place)
            removed = True
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOTDIR):
                raise _refusal(one, error) from error
            log.warning("%s/%s holds what we did not make; left alone", one.place, one.folder)
    parent, base = os.path.split(one.place)
    if base == DEFAULT:
        with _open(parent) as fd, contextlib.suppress(OSError):  # not empty
            os.rmdir(base, dir_fd=fd)
    return removed


def listed(place: str) -> Iterator[tuple[str, Mapping[str, Json]]]:
    """The snapshots in marked folders of a place, and what the marks say."""
    try:
        folders = sorted(os.listdir(place))
    except OSError:
        return
    for folder in folders:
        said = mark.read(os.path.join(place, folder))
        if said.get("kind") == mark.Kind.SUBVOLUME:
            path = os.path.join(place, folder, f"snapd-vm-{said.get('snapshot')}")
            with contextlib.suppress(OSError):
                if os.stat(path, follow_symlinks=False).st_ino == subvolume.ROOT_INODE:
                    yield path, said


def _open(folder: str) -> AbstractContextManager[int]:
    return storage.open_folder(folder, {0}, {0}, _ADVICE)


@contextmanager
def _marked(one: SubvolumeTarget) -> Iterator[int | None]:
    """A descriptor of the snapshot's folder, if it is there and bears our mark for it."""
    if not os.path.lexists(os.path.join(one.place, one.folder)):
        yield None
        return
    with _open(one.place) as place:
        path = f"/proc/self/fd/{place}/{one.folder}"
        said = mark.read(path)
        if (said.get("kind"), f"snapd-vm-{said.get('snapshot')}") != (
            mark.Kind.SUBVOLUME,
            one.name,
        ):
            yield None
            return
        try:
            fd = os.open(one.folder, _FOLDER, dir_fd=place)
        except OSError as error:
            raise _refusal(one, error) from error
        try:
            yield fd
        finally:
            os.close(fd)


def _own_uuid(folder: int) -> str:
    """The UUID of the snapshot that was taken, as the folder says; '' before it was seen whole."""
    try:
        return os.getxattr(folder, _UUID).decode("ascii", "replace")
    except OSError:
        return ""


def _refusal(one: SubvolumeTarget, error: OSError) -> StorageFailed | NoSpace | MethodNotSupported:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace("There is no room for the snapshot in the disk's file system.")
    return StorageFailed(f"The folder {one.place} can't be used: {error.strerror}.")
