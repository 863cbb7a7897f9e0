"""A snapshot of a logical volume as it is there: found, removed, and what lvm broke off mended."""

from __future__ import annotations

from collections.abc import Sequence

from snapd_vm.errors import StorageFailed
from snapd_vm.methods.lvm import devicemapper, lvmmount, lvmtags, lvmvolumes
from snapd_vm.methods.lvm.lvmtarget import LvmTarget
from snapd_vm.methods.lvm.lvmvolumes import Lv


def ours(one: LvmTarget, lvs: Sequence[Lv]) -> Lv | None:
    """The snapshot's volume among those of its group, by its name and tag."""
    for lv in lvs:
        if (lv.vg_uuid, lv.name) == (one.vg_uuid, one.name):
            return lv if lvmtags.read(lv.tags).snapshot == one.snapshot else None
    return None


def remove(one: LvmTarget) -> bool:
    """Remove the snapshot, however far it was made; whether it was there."""
    _resume(one)
    if one.mount:
        lvmmount.unmount(one)
    found = ours(one, lvmvolumes.report(one.vg))
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
