"""A disk's image on a logical volume, and in the file system of a snapshot of one."""

from __future__ import annotations

import ctypes
import logging
import os

from snapd_vm.errors import Cancelled, MethodNotSupported, StorageFailed
from snapd_vm.methods import chain, clone, cloneback
from snapd_vm.methods.folder import open_folder
from snapd_vm.methods.lvm import lvmmount
from snapd_vm.methods.lvm.lvmtarget import LvmTarget
from snapd_vm.methods.method import Watch
from snapd_vm.model import Tag, Target

log = logging.getLogger(__name__)

_BLOCK = 4 << 20
_libc = ctypes.CDLL(None, use_errno=True)  # syncfs(2), which Python lacks


def check_alone(disk: str, one: LvmTarget) -> None:
    """Refuse a qcow2 image on a volume that has a part of itself elsewhere."""
    try:
        fd = os.open(one.origin, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageFailed(f"{one.origin} can't be opened: {error.strerror}.") from error
    try:
        alone = not chain.lies_on_others(fd, one.format)
    finally:
        os.close(fd)
    if not alone:
        raise MethodNotSupported(
            f"The image of disk {disk} has a backing file, which a snapshot of its logical volume "
            "does not hold; use method qemu."
        )


def write_out(hypervisor: cloneback.Hypervisor, one: LvmTarget) -> None:
    """Have written what the page cache holds, of a file system all. Raises StorageFailed."""
    try:
        if not one.image:
            fd = os.open(one.origin, os.O_RDONLY | os.O_CLOEXEC)
        else:
            with open_folder(hypervisor, os.path.dirname(one.image)) as folder:
                fd = clone.open_image(folder, os.path.basename(one.image), one.identity)
        try:
            if one.image and _libc.syncfs(fd) == -1:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageFailed(f"{one.origin} can't be written out: {error.strerror}.") from error


def holds_image(one: LvmTarget) -> bool:
    """Whether the very file that the disk was is in the snapshot, with its chain; mounts it."""
    lvmmount.mount(one)
    root = _root(one)
    try:
        fd = chain.open_inside(root, one.inside)
        try:
            if os.fstat(fd).st_ino != one.held:
                log.warning("%s was replaced before it was taken", one.image)
                return False
        finally:
            os.close(fd)
        chain.check(root, one.inside, one.format)
    except chain.Outside as error:
        log.warning("%s is not in the snapshot: %s", one.inside, error)
        return False
    finally:
        os.close(root)
    return True


def _root(one: LvmTarget) -> int:
    try:
        return os.open(one.mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageFailed(f"{one.mount} can't be opened: {error.strerror}.") from error


def _open_file(one: LvmTarget) -> int:
    root = _root(one)
    try:
        return chain.open_inside(root, one.inside)
    finally:
        os.close(root)


def origin_of(one: LvmTarget) -> cloneback.Origin:
    """What a revert of a file goes back to; it is copied by `copy`."""
    return cloneback.Origin(
        one.domain,
        one.image,
        one.format,
        lambda _: _open_file(one),
        fill=lambda _snapshot, _draft: None,
        room=_allocated(one) + clone.RESERVE,
    )


def _allocated(one: LvmTarget) -> int:
    try:
        return os.stat(one.file).st_blocks * 512
    except OSError:  # not mounted: settling needs no room
        return 0


def copy(hypervisor: cloneback.Hypervisor, target: Target, tag: Tag, watch: Watch) -> None:
    """Let what will take the image's place have the contents of the snapshot's file."""
    one = LvmTarget.of(target)
    with open_folder(hypervisor, os.path.dirname(one.image)) as folder:
        draft = cloneback.open_draft(folder, target, tag)
        try:
            held = _open_file(one)
            try:
                copy_sparse(held, draft, watch)
            finally:
                os.close(held)
        finally:
            os.close(draft)


def copy_sparse(source: int, to: int, watch: Watch) -> None:
    """Let an empty file have the contents of another, holes left holes.

    Raises Cancelled and StorageFailed.
    """
    size, at = os.fstat(source).st_size, 0
    try:
        os.ftruncate(to, size)
        while at < size:
            try:
                at = os.lseek(source, at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole follows
                break
            end = os.lseek(source, at, os.SEEK_HOLE)
            while at < end:
                if watch.cancelled:
                    raise Cancelled("The revert was cancelled; the disk is as it was.")
                piece = os.pread(source, min(_BLOCK, end - at), at)
                if not piece:
                    raise StorageFailed("The snapshot's file ends too early.")
                at += os.pwrite(to, piece, at)
                watch.progress(at, size)
        os.fsync(to)
    except OSError as error:
        raise StorageFailed(f"The snapshot can't be copied: {error.strerror}.") from error
