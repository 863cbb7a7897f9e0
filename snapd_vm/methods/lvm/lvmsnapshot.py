"""A snapshot of a logical volume as it is there: found, removed, and what lvm broke off mended."""

from __future__ import annotations

from collections.abc import Sequence

from snapd_vm.errors import StorageFailed
from snapd_vm.methods.lvm import devicemapper, lvmmount, lvmtags, lvmvolumes
from snapd_vm.methods.lvm.lvmtarget import LvmTarget
from snapd_vm.methods.lvm.lvmvolumes import Lv


def ours(one: LvmTarget) -> tuple[Lv | None, Sequence[Lv]]:
    """The snapshot's volume, by its group, name and tag, and all of the group."""
    lvs = lvmvolumes.report(one.vg)
    for lv in lvs:
        if (lv.vg_uuid, lv.name) == (one.vg_uuid, one.name):
            own = lvmtags.read(lv.tags).snapshot == one.snapshot
            return (lv if own else None), lvs
    return None, lvs


def remove(one: LvmTarget) -> bool:
    """Remove the snapshot, however far it was made; whether it was there."""
    _resume(one)
    if one.mount:
        lvmmount.unmount(one)
    found, _ = ours(one)
    if found is None:
        return False
    try:
        lvmvolumes.remove(one.vg, one.name)
    except StorageFailed as error:
        if not found.pool or "File exists" not in str(error):
            raise
        lvmvolumes.forget(one.vg, found.pool, one.name)
        lvmvolumes.remove(one.vg, one.name)
    return True


def suspended(one: LvmTarget) -> bool:
    number = devicemapper.device_number(one.origin)
    return number is not None and devicemapper.is_suspended(number)


def _resume(one: LvmTarget) -> None:
    """Let the volume go on where an lvm that was killed has left it standing still."""
    if suspended(one):
        lvmvolumes.refresh(one.vg, one.lv)
