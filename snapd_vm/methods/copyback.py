"""Copies an image out of a snapshot's file system, for a revert by cloneback.py.

For where blocks can't be shared before the point of no return: a snapshot of a dataset, or of a
volume with a file system, is another file system than the image's.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable

from snapd_vm.errors import Cancelled, NoSpace, StorageFailed
from snapd_vm.methods import clone, cloneback
from snapd_vm.methods.folder import open_folder
from snapd_vm.methods.method import Watch
from snapd_vm.model import Tag, Target

_PIECE = 8 << 20


def origin(
    domain: str, image: str, image_format: str, open_file: Callable[[], int]
) -> cloneback.Origin:
    """What a disk goes back to, where `fill` does the copying between prepare and switch.

    `open_file` gives a descriptor of the image in the snapshot; it raises SnapdErrors.
    """
    return cloneback.Origin(
        domain,
        image,
        image_format,
        lambda _: open_file(),
        fill=lambda _snapshot, _draft: None,
    )


def checked(copied: cloneback.Origin, open_file: Callable[[], int]) -> cloneback.Origin:
    """The same with the room that the copy takes, for cloneback.check; the image must be whole.

    Raises MethodNotSupported and StorageFailed.
    """
    held = open_file()
    room = os.fstat(held).st_blocks * 512 + clone.RESERVE
    cloneback.check_whole(held, copied.format)
    return dataclasses.replace(copied, room=room)


def fill(
    hypervisor: cloneback.Hypervisor,
    copied: cloneback.Origin,
    target: Target,
    tag: Tag,
    watch: Watch,
) -> None:
    """Let what will take the image's place have the contents of the snapshot's file.

    Raises Cancelled, NoSpace and StorageFailed.
    """
    with open_folder(hypervisor, copied.folder) as folder:
        draft = cloneback.open_draft(folder, target, tag)
        try:
            held = copied.open_in(folder)
            if held is None:
                raise StorageFailed("The snapshot's file is gone; there is nothing to go back to.")
            try:
                copy(held, draft, watch)
            finally:
                os.close(held)
        finally:
            os.close(draft)


def copy(source: int, to: int, watch: Watch) -> None:
    """Let the second file, which is empty, have the contents of the first, holes as holes; durably.

    The kernel shares the blocks where it can (ZFS's block cloning). Raises Cancelled, NoSpace and
    StorageFailed.
    """
    found = os.fstat(source)
    total, done, end = found.st_blocks * 512, 0, 0
    try:
        os.ftruncate(to, found.st_size)
        while (begin := _data(source, end)) is not None:
            end = os.lseek(source, begin, os.SEEK_HOLE)
            while begin < end:
                if watch.cancelled:
                    raise Cancelled("The revert was cancelled; the disk is as it was.")
                part = _copy_piece(source, to, begin, min(_PIECE, end - begin))
                begin += part
                done += part
                watch.progress(min(done, total), total)
        os.fsync(to)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("There is no room to copy the snapshot's file; make some.") from error
        raise StorageFailed(f"The snapshot's file can't be copied: {error.strerror}.") from error


def _data(fd: int, offset: int) -> int | None:
    """Where the next data begin, or None."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def _copy_piece(source: int, to: int, offset: int, length: int) -> int:
    """How much was copied, at least one byte."""
    try:
        part = os.copy_file_range(source, to, length, offset, offset)
        if part:
            return part
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    piece = os.pread(source, length, offset)
    if not piece:
        raise OSError(errno.EIO, "it ends too early")
    return os.pwrite(to, piece, offset)
