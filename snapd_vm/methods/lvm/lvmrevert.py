"""Brings a disk that is a logical volume back to a snapshot of it; all snapshots stay.

Thin: a writable snapshot of the snapshot takes the volume's name, and the volume another, until it
is removed. Which volume has the name decides what came of it. Between the two renames none has, and
the disk is put back then.

Thick: what differs is copied from the snapshot over the volume. (lvm's own merge would use up the
snapshot.) What differs was overwritten since, so that the snapshot, and older ones, hold it already
and don't grow; newer ones do. The volume has a tag from before the first byte on, and another one
from after the last: a copy that was begun is gone on with until it is done, as the disk is neither
the one nor the other then; one that was not begun, or is done, may have been written to since.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from snapd_vm import storage
from snapd_vm.errors import (
    Busy,
    InvalidState,
    MethodNotSupported,
    NameInUse,
    NoSuchDomain,
    StorageFailed,
)
from snapd_vm.methods import off
from snapd_vm.methods.folder import links
from snapd_vm.methods.image import revert_of
from snapd_vm.methods.lvm import devicemapper, lvmsizes, lvmsnapshot, lvmtags, lvmvolumes
from snapd_vm.methods.lvm.lvmtarget import LvmTarget
from snapd_vm.methods.lvm.lvmvolumes import Lv
from snapd_vm.methods.method import Record, Watch
from snapd_vm.model import Domain, Json, Target

log = logging.getLogger(__name__)

_BLOCK = 4 << 20
_PAGE = 4096  # the least chunk of a thick snapshot: what is equal must not be written
_LOOK = 256 << 20  # bytes between two looks whether the domain is off still


class Hypervisor(off.Hypervisor, Protocol):
    """What is needed of the hypervisor; blocking, raises SnapdErrors."""

    def read(self, uuid: str) -> Domain: ...
    def user_of(self, path: str, uuid: str, target: str) -> str: ...


class VolumeRevert:
    """See the top of the file, and Reverts."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor

    def check(self, target: Target) -> Target:
        """See Reverts.check_revert."""
        one = LvmTarget.of(target)
        self._check_domain(target, one)
        user = self._hypervisor.user_of(one.origin, one.domain, target.disk)
        if user:
            raise Busy(f"The logical volume of disk {target.disk} is also used by {user}.")
        lvs = lvmvolumes.report(one.vg)
        origin = _named(lvs, one.lv)
        if origin is None or origin.vg_uuid != one.vg_uuid:
            raise StorageFailed(f"The logical volume {one.origin} is not there.")
        if origin.opened:
            reader = storage.reader_of(one.origin, "") or "somebody, or mounted"
            raise Busy(
                f"The logical volume {one.origin} of disk {target.disk} is in use by {reader}; "
                "wait for its end."
            )
        for name in (_draft(one), _kept(one)):
            if _named(lvs, name) is not None:
                raise NameInUse(f"There is a volume {one.vg}/{name} already; rename it.")
        beside = [lv for lv in lvs if lv.is_snapshot and lv.origin == one.lv]
        if one.thin:
            self._check_name(target, one)
            _check_thin(target.disk, lvs, origin, beside)
        else:
            _check_thick(one, origin, beside)
        plan: dict[str, Json] = {"armed": False, "discarded": origin.uuid}
        return dataclasses.replace(target, data={**target.data, "revert": plan})

    def prepare(self, target: Target, record: Record) -> Target:
        """See Reverts.prepare_revert."""
        one = LvmTarget.of(target)
        self.forget(target)  # as of a revert that no journal knows
        plan: dict[str, Json] = {**revert_of(target), "armed": True}
        target = dataclasses.replace(target, data={**target.data, "revert": plan})
        record([target])
        if one.thin:
            origin = _named(lvmvolumes.report(one.vg), one.lv)
            kept = [tag for tag in origin.tags if not lvmtags.is_ours(tag)] if origin else []
            tags = [lvmtags.reverting(one.snapshot), *kept]
            lvmvolumes.writable_thin(one.vg, one.name, _draft(one), tags)
        return target

    def revert(self, target: Target, watch: Watch) -> None:
        """See Reverts.revert."""
        one = LvmTarget.of(target)
        watch.past_return()
        self._check_domain(target, one)
        if one.thin:
            lvmvolumes.rename(one.vg, one.lv, _kept(one))
            lvmvolumes.rename(one.vg, _draft(one), one.lv)
        else:
            self._copy(one, watch)

    def settle(self, target: Target) -> bool:
        """See Reverts.settle_revert."""
        one = LvmTarget.of(target)
        if not revert_of(target).get("armed"):
            return False
        if one.thin:
            return self._settle_thin(one, str(revert_of(target)["discarded"]))
        return self._settle_thick(target, one)

    def forget(self, target: Target) -> None:
        """See Forgets.forget_revert."""
        one = LvmTarget.of(target)
        if not one.thin:
            lvmvolumes.retag(one.vg, one.lv, remove=lvmtags.reverted(one.snapshot))

    def _settle_thick(self, target: Target, one: LvmTarget) -> bool:
        origin = _named(lvmvolumes.report(one.vg), one.lv)
        if origin is None:
            raise StorageFailed(f"The logical volume {one.origin} is not there any more.")
        if lvmtags.reverted(one.snapshot) not in origin.tags:
            if lvmtags.reverting(one.snapshot) not in origin.tags:
                return False
            domain = self._domain(one)
            if domain is not None and domain.active:
                raise Busy(
                    f"Domain {domain.name} was started on disk {target.disk}, which is half "
                    "reverted; shut it off, and the revert goes on."
                )
            log.info("the revert of %s to %s is gone on with", one.origin, one.name)
            self._copy(one, None, begun=True)
        return True

    def _settle_thin(self, one: LvmTarget, discarded: str) -> bool:
        lvmvolumes.wait(one.vg, _draft(one))
        lvmsnapshot.resume(one)
        lvs = lvmvolumes.report(one.vg)
        present, tag = _named(lvs, one.lv), lvmtags.reverting(one.snapshot)
        old = next((lv for lv in lvs if lv.uuid == discarded), None)
        copy = next((lv for lv in lvs if tag in lv.tags), None)
        if old is not None and old.name == one.lv:
            if copy is not None and copy.name == _draft(one):
                lvmvolumes.remove(copy)
            return False
        if old is None and present is None:
            raise StorageFailed(f"The logical volume {one.origin} is not there any more.")
        if old is not None and (copy is None or copy.name != one.lv):  # between the renames
            if present is not None:
                raise StorageFailed(
                    f"There is another volume {one.origin} now; rename it, and the disk's own, "
                    f"{one.vg}/{old.name}, is put back."
                )
            lvmvolumes.rename(one.vg, old.name, one.lv)
            if copy is not None:
                lvmvolumes.remove(copy)
            return False
        if old is not None and copy is not None:
            domain = self._domain(one)
            if old.opened and domain is not None and domain.active:  # it was started meanwhile
                log.warning("domain %s runs on what was to be discarded, and keeps it", one.domain)
                lvmvolumes.rename(one.vg, one.lv, _draft(one))
                lvmvolumes.rename(one.vg, old.name, one.lv)
                lvmvolumes.remove(dataclasses.replace(copy, name=_draft(one)))
                return False
            if any(lv.is_snapshot and lv.origin == old.name for lv in lvs):
                raise Busy(
                    f"The volume {one.vg}/{old.name}, which the revert discards, has a snapshot; "
                    "remove that."
                )
            if old.name == _kept(one):  # else somebody wants to keep it
                lvmvolumes.remove(old)
        if copy is not None and copy.name == one.lv:
            lvmvolumes.retag(one.vg, one.lv, remove=tag)
        return True

    def _check_domain(self, target: Target, one: LvmTarget) -> None:
        """The domain is off, and its disk still this volume. Raises InvalidState."""
        domain = self._hypervisor.read(one.domain)
        off.check_off(self._hypervisor, domain)
        disk = domain.disk(target.disk)
        if disk is not None and (disk.type, disk.format) == ("block", one.format):
            number = devicemapper.device_number(disk.path)
            volume = devicemapper.volume_of(number) if number is not None else None
            if volume is not None and (volume.vg_uuid, volume.lv) == (one.vg_uuid, one.lv):
                return
        raise InvalidState(
            f"Disk {target.disk} is not the logical volume {one.origin} any more; delete the "
            "snapshots that another method has made of it since, and revert then."
        )

    def _check_name(self, target: Target, one: LvmTarget) -> None:
        """The definition must lead to the volume by its name, as another volume gets that."""
        disk = self._hypervisor.read(one.domain).disk(target.disk)
        names = set(devicemapper.names(one.vg, one.lv))
        if disk is not None and names.isdisjoint(links(disk.path)):
            raise MethodNotSupported(
                f"Disk {target.disk} is {disk.path}, which names not the logical volume but its "
                f"device, and that changes; let the domain have {one.origin}."
            )

    def _domain(self, one: LvmTarget) -> Domain | None:
        try:
            return self._hypervisor.read(one.domain)
        except NoSuchDomain:
            return None

    def _refuse_started(self, one: LvmTarget) -> None:
        """Raise InvalidState where the domain was started meanwhile; no lock keeps it from that."""
        domain = self._domain(one)
        if domain is not None and domain.active:
            raise InvalidState(
                f"Domain {domain.name} was started on a disk that is half reverted; shut it off, "
                "and the revert goes on."
            )

    def _copy(self, one: LvmTarget, watch: Watch | None, *, begun: bool = False) -> None:
        tag = lvmtags.reverting(one.snapshot)
        source, origin = _open(one.device, os.O_RDONLY), -1
        try:
            # Nobody may mount it, or use it below something else, meanwhile; open(2), O_EXCL.
            origin = _open(one.origin, os.O_RDWR | os.O_EXCL)
            size, looked, written = os.lseek(origin, 0, os.SEEK_END), 0, 0
            for at in range(0, size, _BLOCK):
                if at - looked >= _LOOK:
                    looked = at
                    if watch is not None:
                        watch.progress(at, size)
                    self._refuse_started(one)
                for place, data in differing(source, origin, at):
                    if not begun:
                        lvmvolumes.retag(one.vg, one.lv, add=tag)
                        begun = True
                    written += os.pwrite(origin, data, place)
            os.fsync(origin)
        except OSError as error:
            raise StorageFailed(
                f"The snapshot can't be copied to {one.origin}: {error.strerror}."
            ) from error
        finally:
            for fd in (source, origin):
                if fd != -1:
                    os.close(fd)
        if begun:  # the last of it may have been written under a guest, which is to be done again
            self._refuse_started(one)
        lvmvolumes.retag(one.vg, one.lv, add=lvmtags.reverted(one.snapshot), remove=tag)
        log.info("wrote %d bytes of %s to %s", written, one.name, one.origin)


def differing(source: int, origin: int, at: int) -> Iterator[tuple[int, bytes]]:
    """Where, from `at` on for a block, two files differ, and what the first has there; in whole
    pages, those that follow each other as one.
    """
    wanted, present = os.pread(source, _BLOCK, at), os.pread(origin, _BLOCK, at)
    if wanted == present:
        return
    begin = -1
    for page in range(0, len(wanted), _PAGE):
        same = wanted[page : page + _PAGE] == present[page : page + _PAGE]
        if same and begin != -1:
            yield at + begin, wanted[begin:page]
            begin = -1
        elif not same and begin == -1:
            begin = page
    if begin != -1:
        yield at + begin, wanted[begin:]


def _check_thin(disk: str, lvs: Sequence[Lv], origin: Lv, beside: Sequence[Lv]) -> None:
    if beside:
        names = ", ".join(f"{lv.vg}/{lv.name}" for lv in beside)
        raise MethodNotSupported(
            f"The logical volume of disk {disk} has snapshots that are not thin, {names}, which a "
            "revert would take away; remove them first."
        )
    pool = _named(lvs, origin.pool)
    if pool is None:
        raise StorageFailed(f"The thin pool of disk {disk} is not to be found.")
    lvmsizes.thin(disk, origin, pool)


def _check_thick(one: LvmTarget, origin: Lv, beside: Sequence[Lv]) -> None:
    """Snapshots that are newer get what the revert overwrites; they must have room for it."""
    own = next((lv for lv in beside if lv.name == one.name), None)
    if own is None or own.overflowed:
        raise StorageFailed("The snapshot is gone; there is nothing to go back to.")
    most = int(own.size * (own.data_percent or 0.0) / 100)
    lvmsizes.check_overwriting(origin, [lv for lv in beside if lv.name != one.name], most)


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise StorageFailed(f"{path} can't be opened: {error.strerror}.") from error


def _named(lvs: Sequence[Lv], name: str) -> Lv | None:
    return next((lv for lv in lvs if lv.name == name), None)


def _draft(one: LvmTarget) -> str:
    """The name of what is to take the volume's place."""
    return f"{one.name}.revert"


def _kept(one: LvmTarget) -> str:
    """The name that the volume has until it is removed."""
    return f"{one.name}.discarded"
