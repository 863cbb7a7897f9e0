"""A snapshot of a logical volume as it is there: found, removed, and what lvm broke off mended."""

from __future__ import annotations

from collections.abc import Sequence

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
    resume(one)
    if one.mount:
        lvmmount.unmount(one)
    found = ours(one, lvmvolumes.report(one.vg))
    if found is None:
        return False
    lvmvolumes.remove(found)
    return True


def activate(one: LvmTarget) -> None:
    """Have a device for the snapshot, which has none after the host's start. Raises SnapdErrors."""
    if devicemapper.device_number(one.device) is None:
        devicemapper.load_target("thin-pool" if one.thin else "snapshot")
        lvmvolumes.activate(one.vg, one.name)


def suspended(path: str) -> bool:
    """Whether a volume's device stands still."""
    number = devicemapper.device_number(path)
    return number is not None and devicemapper.is_suspended(number)


def resume(one: LvmTarget) -> None:
    """Let volume and snapshot go on where an lvm that was killed has left them standing still."""
    for path, name in ((one.origin, one.lv), (one.device, one.name)):
        if suspended(path):
            lvmvolumes.refresh(one.vg, name)
