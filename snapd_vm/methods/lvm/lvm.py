"""The method `lvm`: a read-only snapshot of the logical volume that a disk is, or whose file system
holds the disk's file.

The snapshot is a volume of the same group, called `snapd-vm-` and the snapshot's UUID; its tags say
what it is of, so that it is found without the journal, and another of that name not taken for it.
Of a disk that is a file the snapshot's file system is mounted, for all on the host to read.

An lvcreate that is killed may leave the volume standing still, with all that is written to it. So
none is killed while there is hope, and after one that was, the volume is let go on first.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence

from snapd_vm import mounts, storage
from snapd_vm.config import LvmConfig
from snapd_vm.errors import (
    Busy,
    MethodNotSupported,
    NameInUse,
    SnapdError,
    StorageFailed,
)
from snapd_vm.methods import cloneback, copyback, taken
from snapd_vm.methods.folder import check_links
from snapd_vm.methods.lvm import (
    devicemapper,
    lvmclaim,
    lvmfile,
    lvmmount,
    lvmrevert,
    lvmsizes,
    lvmsnapshot,
    lvmstray,
    lvmtags,
    lvmvolumes,
)
from snapd_vm.methods.lvm.lvmtarget import LvmTarget
from snapd_vm.methods.lvm.lvmvolumes import Lv
from snapd_vm.methods.method import Record, Standing, Stored, Watch
from snapd_vm.methods.recent import JUST_NOW_S, Recent
from snapd_vm.model import Disk, Domain, Json, MethodRequest, Needs, Tag, Target

log = logging.getLogger(__name__)

_CREATE_S = 60.0
"""After which an lvcreate is killed; the guest goes on before that, by the engine's own timer. It
waits for udev several times, which may be slow; without that (--noudevsync) it fails for thick
snapshots, as it finds no device to clear.
"""
_FRESH_S = 5.0
"""For so long a report is taken for what is there, where it is only for warnings."""

_OVERFLOWED = "The snapshot has overflowed: its volume was full, and it is lost; delete it."


class Lvm:
    """See the top of the file; `mount_dir` is where snapshots are mounted."""

    name = "lvm"
    redirects = False

    def __init__(
        self,
        hypervisor: cloneback.Hypervisor,
        mount_dir: str,
        config: LvmConfig,
        low_space_percent: int,
    ) -> None:
        self._hypervisor = hypervisor
        self._mount_dir = os.path.realpath(mount_dir)  # as the table of mounts has it
        self._config = config
        self._low_space_percent = low_space_percent
        self._revert = lvmrevert.VolumeRevert(hypervisor)
        self._unasked: set[str] = set()  # snapshots that lvcreate was certainly not asked for
        self._reports = Recent(lvmvolumes.report)

    def together(self, targets: Sequence[Target]) -> bool:
        """lvm takes one volume after the other."""
        return len(targets) == 1

    def suits(self, disk: Disk) -> str:
        """See Method."""
        return f"a {disk.format} logical volume"

    def claim(
        self, domain: Domain, disk: Disk, request: MethodRequest | None, tag: Tag
    ) -> Target | None:
        """See Method and lvmclaim.py."""
        try:
            return lvmclaim.claim(domain, disk, request, tag, self._mount_dir)
        except MethodNotSupported as error:
            if request is not None:
                raise
            log.debug("disk %s of domain %s: %s", disk.target, domain.name, error)
            return None

    def source(self, target: Target, disk: Disk) -> tuple[Disk, str]:
        """The snapshot's device, or the file in its file system."""
        one = LvmTarget.of(target)
        return taken.with_source(disk, one.file, device=not one.mount), one.format

    def size(self, target: Target) -> int:
        """The disk's size, as QEMU sees it."""
        one = LvmTarget.of(target)
        return storage.virtual_size(one.image or one.origin, one.format)

    def check_way(self, target: Target) -> None:
        """See Ways."""
        one = LvmTarget.of(target)
        check_links(self._hypervisor, one.declared, one.image or os.path.realpath(one.origin))

    def check(self, targets: Sequence[Target], tag: Tag) -> Needs:
        """See Method."""
        for target in targets:
            one = LvmTarget.of(target)
            if one.image:
                lvmmount.check()
            self.check_way(target)
            if not one.active:
                taken.check_unwritten(one.image or os.path.realpath(one.origin))
        rooms = self._rooms(targets)
        return Needs(
            sum(room.needed for room in rooms),
            min(room.available for room in rooms),
            tuple(dict.fromkeys(warning for room in rooms for warning in room.warnings)),
        )

    def _rooms(self, targets: Sequence[Target]) -> Sequence[lvmsizes.Room]:
        """The room for each. Raises NoSpace, NameInUse and StorageFailed."""
        rooms, thick = [], dict[str, list[lvmsizes.Room]]()
        reports = {vg: lvmvolumes.report(vg) for vg in {LvmTarget.of(one).vg for one in targets}}
        for target in targets:
            one = LvmTarget.of(target)
            lvs = reports[one.vg]
            origin = next((lv for lv in lvs if lv.uuid == one.lv_uuid), None)
            if origin is None or origin.vg_uuid != one.vg_uuid or origin.name != one.lv:
                raise StorageFailed(f"The volume {one.origin} was renamed or replaced; try again.")
            if any(lv.name == one.name for lv in lvs):
                raise NameInUse(f"There is a volume {one.vg}/{one.name} already; rename it.")
            lvmsizes.refuse_partial(origin)
            if one.thin:
                pool = next((lv for lv in lvs if lv.name == origin.pool), None)
                if pool is None:
                    raise StorageFailed(f"The thin pool of {one.origin} is not to be found.")
                rooms.append(lvmsizes.thin(target.disk, origin, pool))
                continue
            size = lvmsizes.thick_size(origin, one.wanted, self._config)
            rooms.append(lvmsizes.thick(target.disk, origin, size))
            thick.setdefault(one.vg, []).append(rooms[-1])
        for vg, of_group in thick.items():
            lvmsizes.check_group(vg, of_group)
        return rooms

    def prepare(self, targets: Sequence[Target], tag: Tag, record: Record) -> Sequence[Target]:
        """Say how large each is to be; have the kernel load what it needs, and write what the host
        has not written yet, as lvcreate would have it done in the freeze.
        """
        prepared = []
        for target, room in zip(targets, self._rooms(targets), strict=True):
            one = LvmTarget.of(target)
            data: dict[str, Json] = {**target.data, "room": 0 if one.thin else room.needed}
            prepared.append(dataclasses.replace(target, data=data))
            self._unasked.add(one.snapshot)
        if not all(LvmTarget.of(one).thin for one in targets):  # the pool uses what a thin one does
            devicemapper.load_target("snapshot")
        record(prepared)
        for target in prepared:
            lvmfile.write_out(self._hypervisor, LvmTarget.of(target))
        return prepared

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        """One lvcreate each, and nothing else."""
        for target in targets:
            one, size = LvmTarget.of(target), target.data["room"]
            self._unasked.discard(one.snapshot)
            lvmvolumes.snapshot(
                one.vg,
                one.lv,
                one.name,
                size=size if isinstance(size, int) else 0,
                tags=lvmtags.made(one.snapshot, tag),
                limit=_CREATE_S,
                mark=one.name,
            )

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        """Whether the snapshot is there, and of the volume that was meant; its file is mounted."""
        one = LvmTarget.of(target)
        lvmvolumes.wait(one.vg, one.name)
        lvs = lvmvolumes.report(one.vg)
        found = lvmsnapshot.ours(one, lvs)
        if found is None or found.writable or lvmsnapshot.suspended(one.origin):
            return False
        if found.overflowed or not (found.is_thin if one.thin else found.is_snapshot):
            return False
        origin = next((lv for lv in lvs if lv.name == found.origin), None)
        # A thin one stands without its origin, which a revert takes away.
        if origin is None and not one.thin:
            return False
        if origin is not None and origin.name == one.lv and origin.uuid != one.lv_uuid:
            log.warning("%s was replaced before it was taken", one.origin)
            return False
        if one.thin:
            try:
                lvmsnapshot.activate(one)
            except SnapdError as error:  # lvcreate was killed before the kernel's pool was told
                log.warning("%s/%s is not whole: %s", one.vg, one.name, error)
                return False
        return not one.image or lvmfile.holds_image(one)

    def undo(self, target: Target, tag: Tag, *, again: bool) -> bool:
        """See Method. What lvcreate is still at work on is waited for."""
        one = LvmTarget.of(target)
        if one.snapshot in self._unasked:
            self._unasked.discard(one.snapshot)
            return False
        lvmvolumes.wait(one.vg, one.name)
        return lvmsnapshot.remove(one)

    def check_delete(self, target: Target, tag: Tag) -> None:
        """Refused while anybody reads it, has it mounted elsewhere, or a definition names it."""
        one = LvmTarget.of(target)
        for path in dict.fromkeys((one.file, one.device)):
            user = self._hypervisor.user_of(path, "", "", beside=False)
            if user:
                raise Busy(f"The snapshot is used by {user}.")
        number = devicemapper.device_number(one.device)
        if number is None:
            return
        reader = storage.reader_of(one.device, "")
        places = [m.point for m in mounts.table() if m.device == number and m.point != one.mount]
        if places:
            reader = f"the file system mounted at {places[0]}"
        elif not reader and one.mount:
            reader = storage.reader_in(number)
        if reader:
            raise Busy(f"The snapshot is being read by {reader}; wait for its end.")
        lvs = lvmvolumes.report(one.vg)
        above = next((lv for lv in lvs if lv.is_snapshot and lv.origin == one.name), None)
        if above is not None:
            raise Busy(f"The snapshot has one itself, {one.vg}/{above.name}; remove that first.")

    def delete(self, target: Target, tag: Tag, watch: Watch) -> None:
        """Unmount it, and remove the volume."""
        watch.past_return()
        lvmsnapshot.remove(LvmTarget.of(target))

    def moved(self, deleted: Target, other: Target) -> Target | None:
        """No snapshot depends on another."""
        return None

    def show(self, target: Target) -> None:
        """See Shows: active, and its file system mounted, again after the host's start."""
        one = LvmTarget.of(target)
        lvmsnapshot.activate(one)
        if one.mount:
            lvmmount.mount(one)

    def check_revert(self, target: Target, tag: Tag, others: Sequence[Target]) -> Target:
        """See Reverts, cloneback.py and lvmrevert.py. A file system is never rolled back."""
        one = LvmTarget.of(target)
        if not one.image:
            return self._revert.check(target)
        self.show(target)
        origin = lvmfile.checked(target.disk, one)
        return cloneback.check(self._hypervisor, origin, target, tag)

    def prepare_revert(self, target: Target, tag: Tag, record: Record) -> Target:
        """See Reverts."""
        one = LvmTarget.of(target)
        if not one.image:
            return self._revert.prepare(target, record)
        return cloneback.prepare(self._hypervisor, lvmfile.origin_of(one), target, tag, record)

    def revert(self, target: Target, tag: Tag, watch: Watch) -> None:
        """See Reverts."""
        one = LvmTarget.of(target)
        if not one.image:
            self._revert.revert(target, watch)
            return
        origin = lvmfile.origin_of(one)
        copyback.fill(self._hypervisor, origin, target, tag, watch)
        cloneback.switch(self._hypervisor, origin, target, tag, watch)

    def settle_revert(self, target: Target, tag: Tag) -> bool:
        """See Reverts."""
        one = LvmTarget.of(target)
        if not one.image:
            return self._revert.settle(target)
        return cloneback.settle(self._hypervisor, lvmfile.origin_of(one), target, tag)

    def reverted(self, target: Target, other: Target) -> Target | None:
        """Of a file, see cloneback.reverted; else all are what they were."""
        return cloneback.reverted(target, other) if LvmTarget.of(target).image else None

    def forget_revert(self, target: Target) -> None:
        """See Forgets."""
        if not LvmTarget.of(target).image:
            self._revert.forget(target)

    def among(self, target: Target, others: Sequence[Target]) -> Target:
        """No snapshot depends on another."""
        return target

    def state(self, target: Target, domains: Mapping[str, Domain]) -> str:
        """See Method."""
        return self.standing(target, domains).state

    def standing(self, target: Target, domains: Mapping[str, Domain]) -> Standing:
        """See Explains. A snapshot stands by itself, whatever becomes of its domain."""
        one = LvmTarget.of(target)
        try:
            standing = self._standing(one, self._reports.get(one.vg, JUST_NOW_S))
            if standing.state == "ready":
                return standing
            return self._standing(one, lvmvolumes.report(one.vg))  # nobody is told of what was
        except lvmvolumes.GroupAbsent as error:
            return Standing("missing", str(error))

    def _standing(self, one: LvmTarget, lvs: Sequence[Lv]) -> Standing:
        found = lvmsnapshot.ours(one, lvs)
        if found is None:
            there = any(lv.name == one.name for lv in lvs)
            how = "not the volume that was made" if there else "not there"
            return Standing("missing", f"{one.vg}/{one.name} is {how}")
        if found.overflowed or (found.is_snapshot and (found.data_percent or 0.0) >= 100.0):
            return Standing(
                "failed",
                f"{one.vg}/{one.name} has overflowed",
                "overflowed",
                _OVERFLOWED,
                removable=True,
            )
        if found.writable or not (found.is_thin if one.thin else found.is_snapshot):
            return Standing(
                "failed",
                f"{one.vg}/{one.name} is no read-only snapshot any more",
                "changed",
                "Somebody has changed the snapshot's volume, so that its contents are not sure; "
                "delete the snapshot.",
                removable=True,
            )
        return Standing("ready")

    def files(self, target: Target) -> Sequence[str]:
        """The snapshot's device."""
        return [LvmTarget.of(target).device]

    def stored(self, domains: Mapping[str, Domain]) -> Iterable[Stored]:
        """See Lists and lvmstray.py."""
        return lvmstray.stored()

    def warnings(self, target: Target, domains: Mapping[str, Domain]) -> Mapping[str, str]:
        """See Warns: a thick snapshot that is full is lost, and with a pool all its volumes."""
        one = LvmTarget.of(target)
        lvs = self._reports.get(one.vg, _FRESH_S)
        found = next((lv for lv in lvs if lv.name == one.name), None)
        if found is None:
            return {}
        if not one.thin:
            percent = found.data_percent or 0.0
            if found.overflowed:
                return {"overflowed": _OVERFLOWED}
            if not 0 < self._config.warn_percent <= percent:
                return {}
            return {
                "filling": f"The snapshot of disk {target.disk} is filled to {percent:.0f} %, and "
                "is lost when it is full; delete it, or extend its volume."
            }
        pool = next((lv for lv in lvs if lv.name == found.pool), None)
        if pool is None:
            return {}
        fullest = max(pool.data_percent or 0.0, pool.metadata_percent or 0.0)
        if not self._low_space_percent or fullest <= 100 - self._low_space_percent:
            return {}
        return {
            "low-space": f"Disk {target.disk} is written to a thin pool that is filled to "
            f"{fullest:.0f} %, and the guest gets errors or stops when it is full; extend it, or "
            "delete snapshots."
        }
