"""A disk's image on a logical volume, and in the file system of a snapshot of one."""

from __future__ import annotations

import ctypes
import logging
import os

from snapd_vm.errors import NoSpace, StorageFailed
from snapd_vm.methods import chain, clone, cloneback, copyback
from snapd_vm.methods.folder import open_folder
from snapd_vm.methods.lvm import lvmmount, lvmsizes, lvmvolumes
from snapd_vm.methods.lvm.lvmtarget import LvmTarget

log = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)  # syncfs(2), which Python lacks


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


def checked(disk: str, one: LvmTarget) -> cloneback.Origin:
    """What a revert may go back to: snapshots must have room for a new copy in the same volume.

    Raises MethodNotSupported, NoSpace and StorageFailed.
    """
    origin = copyback.checked(origin_of(one), lambda: _open_file(one))
    lvs = lvmvolumes.report(one.vg)
    volume = next((lv for lv in lvs if lv.name == one.lv), None)
    if volume is None:
        raise StorageFailed(f"The logical volume {one.origin} is not there.")
    thick = [lv for lv in lvs if lv.is_snapshot and lv.origin == one.lv]
    lvmsizes.check_overwriting(volume, thick, origin.room)
    pool = next((lv for lv in lvs if lv.name == volume.pool), None)
    if pool is not None:
        free = lvmsizes.thin(disk, volume, pool).available
        if free < origin.room + lvmsizes.POOL_RESERVE:
            raise NoSpace(
                f"The thin pool of disk {disk} has {free} bytes left, and a copy of the image "
                f"takes {origin.room}; extend the pool or delete snapshots."
            )
    return origin


def origin_of(one: LvmTarget) -> cloneback.Origin:
    """What a revert of a file goes back to; copyback.fill copies it."""
    return copyback.origin(one.domain, one.image, one.format, lambda: _open_file(one))
