"""The method `zfs`: a snapshot of the dataset that holds the disk's file, or of its volume.

The domain goes on with its own disk and notices nothing. Disks in one pool are taken by one command
at one instant; those of one dataset share one snapshot, which goes with the last of them. What else
is in a dataset is held by the snapshot too, and never rolled back.

A snapshot has a hold of ours from the moment on at which it was seen to be whole, so that nobody's
cleanup script destroys it. Inside the freeze runs one program for each pool, `zfs snapshot`; not
the library's call, as what waits for a pool that is suspended can't be ended, and a daemon of which
a thread waits so can't be either.

An image that is not raw is taken if it is asked for: the engine stops the vCPUs, so that QEMU has
written out what it buffers.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence

from snapd_vm import command, storage
from snapd_vm.errors import Busy, MethodNotSupported, StorageFailed, TimedOut
from snapd_vm.methods import chain, taken
from snapd_vm.methods.folder import check_links, low_space
from snapd_vm.methods.method import BASE_IN_USE, Record, Standing, Stored, Watch
from snapd_vm.methods.recent import JUST_NOW_S, Recent
from snapd_vm.methods.zfs import zfsclaim, zfsdataset, zfsrevert, zfsstray, zfstags, zfsview
from snapd_vm.methods.zfs.zfstarget import ZfsTarget
from snapd_vm.model import Disk, Domain, Json, MethodRequest, Needs, Tag, Target

log = logging.getLogger(__name__)

_ROOM_S = 30.0
"""For so long a room is taken for what is there, where it is only for warnings."""


class Zfs:
    """See the top of the file."""

    name = "zfs"
    redirects = False

    def __init__(self, hypervisor: zfsrevert.Hypervisor, low_space_percent: int) -> None:
        self._hypervisor = hypervisor
        self._low_space_percent = low_space_percent
        self._listed = Recent(lambda dataset: zfsdataset.listed([dataset]))
        self._rooms = Recent(lambda dataset: zfsdataset.rooms([dataset])[dataset])

    def together(self, targets: Sequence[Target]) -> bool:
        """What is in one pool is taken at one instant."""
        return len({zfsdataset.pool_of(ZfsTarget.of(one).dataset) for one in targets}) == 1

    def suits(self, disk: Disk) -> str:
        """See Method."""
        return "a ZFS volume" if disk.type == "block" else f"a {disk.format} file on ZFS"

    def claim(
        self, domain: Domain, disk: Disk, request: MethodRequest | None, tag: Tag
    ) -> Target | None:
        """See Method. A dataset that the caller names is only compared with the disk's."""
        asked = request is not None
        named = request.options.get("dataset", "") if request is not None else ""
        try:
            return zfsclaim.claim(domain, disk, tag, asked=asked, named=named)
        except MethodNotSupported as error:
            if asked:
                raise
            log.debug("disk %s of domain %s: %s", disk.target, domain.name, error)
            return None

    def source(self, target: Target, disk: Disk) -> tuple[Disk, str]:
        """The same file inside the snapshot, or the clone's device."""
        one = ZfsTarget.of(target)
        return taken.with_source(disk, one.path, device=one.is_volume), one.format

    def size(self, target: Target) -> int:
        """The disk's size, as QEMU sees it."""
        one = ZfsTarget.of(target)
        return storage.virtual_size(one.declared if one.is_volume else one.image, one.format)

    def check_way(self, target: Target) -> None:
        """See Ways."""
        one = ZfsTarget.of(target)
        check_links(self._hypervisor, one.declared, one.image)

    def check(self, targets: Sequence[Target], tag: Tag) -> Needs:
        """See Method."""
        for target in targets:
            self.check_way(target)
        return zfsclaim.check([ZfsTarget.of(one) for one in targets])

    def prepare(self, targets: Sequence[Target], tag: Tag, record: Record) -> Sequence[Target]:
        """Nothing is made; what the host has not written yet is written now, and not frozen for."""
        disks = [ZfsTarget.of(target) for target in targets]
        for one in disks:
            zfsclaim.same(one)
        record(targets)
        zfsdataset.write_out(list({zfsdataset.pool_of(one.dataset) for one in disks}))
        return targets

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        """One command for each pool, and nothing else."""
        disks = {target.disk: ZfsTarget.of(target) for target in targets}
        uuids = {disk: one.snapshot for disk, one in disks.items()}
        pools: dict[str, list[str]] = {}
        for full in dict.fromkeys(one.full for one in disks.values()):
            pools.setdefault(zfsdataset.pool_of(full), []).append(full)
        for names in pools.values():
            zfsdataset.take(names, tag, uuids, _mark(tag))

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        """Whether the snapshot is there and holds the very disk; it is held here, and shown."""
        _end(tag)
        one = ZfsTarget.of(target)
        if not _is_there(one):
            return False
        zfsdataset.hold(one.full)
        if one.is_volume:
            zfsview.show(one)
            return True
        try:
            root = zfsview.open_root(one)
        except (StorageFailed, Busy, TimedOut) as error:
            log.warning("%s can't be read: %s", one.full, error)
            return False
        try:
            return _holds(root, one)
        finally:
            os.close(root)

    def undo(self, target: Target, tag: Tag, *, again: bool) -> bool:
        """See Method. A program that waited for its pool may have its way late, so it is ended."""
        _end(tag)
        one = ZfsTarget.of(target)
        if _remove(one):
            return True
        zfsdataset.refuse_absent(one.dataset)
        return False

    def check_delete(self, target: Target, tag: Tag) -> None:
        """Refused while anybody reads it, clones it or holds it, or a definition names it."""
        one = ZfsTarget.of(target)
        user = self._hypervisor.user_of(one.path, "", "", beside=False)
        if user:
            raise Busy(f"The snapshot is used by {user}.")
        user = zfsview.user(one)
        if user:
            raise Busy(f"The snapshot is being read by {user}; wait for its end.")
        if one.shared:
            return
        found = zfsdataset.look(one.full)
        clones = [name for name in found.clones if name != one.clone] if found else []
        if clones:
            raise Busy(f"The snapshot has the clone {clones[0]}; destroy that first.")
        holds = zfsdataset.other_holds(one.full)
        if holds:
            raise Busy(
                f"The snapshot {one.full} is held by others with the tag '{holds[0]}'; take that "
                "away with 'zfs release'."
            )

    def delete(self, target: Target, tag: Tag, watch: Watch) -> None:
        """Remove the snapshot, unless another disk's record is of it too."""
        watch.past_return()
        one = ZfsTarget.of(target)
        if not one.shared:
            _remove(one)

    def moved(self, deleted: Target, other: Target) -> Target | None:
        """No snapshot depends on another."""
        return None

    def check_revert(self, target: Target, tag: Tag, others: Sequence[Target]) -> Target:
        """See Reverts and zfsrevert.check."""
        if not _is_there(ZfsTarget.of(target)):
            raise StorageFailed("The snapshot is gone; there is nothing to go back to.")
        return zfsrevert.check(self._hypervisor, target, tag)

    def prepare_revert(self, target: Target, tag: Tag, record: Record) -> Target:
        """See Reverts and zfsrevert.prepare."""
        return zfsrevert.prepare(self._hypervisor, target, tag, record)

    def revert(self, target: Target, tag: Tag, watch: Watch) -> None:
        """See Reverts and zfsrevert.go_back."""
        zfsrevert.go_back(self._hypervisor, target, tag, watch)

    def settle_revert(self, target: Target, tag: Tag) -> bool:
        """See Reverts and zfsrevert.settle."""
        return zfsrevert.settle(self._hypervisor, target, tag)

    def reverted(self, target: Target, other: Target) -> Target | None:
        """See Reverts and zfsrevert.reverted."""
        return zfsrevert.reverted(target, other)

    def among(self, target: Target, others: Sequence[Target]) -> Target:
        """The Target with whether another disk's record is of the same snapshot."""
        own = ZfsTarget.of(target).full
        alike = [ZfsTarget.of(other).full for other in others if other.method == self.name]
        data: dict[str, Json] = {**target.data, "shared": own in alike}
        return dataclasses.replace(target, data=data)

    def state(self, target: Target, domains: Mapping[str, Domain]) -> str:
        """See Method."""
        return self.standing(target, domains).state

    def standing(self, target: Target, domains: Mapping[str, Domain]) -> Standing:
        """See Explains. A snapshot stands by itself, whatever becomes of its domain."""
        one = ZfsTarget.of(target)
        if not self._stands(one):
            return Standing("missing", f"{one.full} is not there, or not the one that was made")
        user = _user(one, domains.values())
        if user:
            why = f"{one.path} is that of {user}"
            return Standing("failed", why, "base-in-use", BASE_IN_USE)
        return Standing("ready")

    def files(self, target: Target) -> Sequence[str]:
        """The snapshot, as ZFS names it."""
        return [ZfsTarget.of(target).full]

    def show(self, target: Target) -> None:
        """See Shows."""
        zfsview.show(ZfsTarget.of(target))

    def stored(self, domains: Mapping[str, Domain]) -> Iterable[Stored]:
        """See Lists."""
        return zfsstray.stored(domains.values())

    def warnings(self, target: Target, domains: Mapping[str, Domain]) -> Mapping[str, str]:
        """See Warns: what the guest overwrites of what it shares with a snapshot needs new room."""
        one = ZfsTarget.of(target)
        domain = domains.get(one.domain)
        disk = domain.disk(target.disk) if domain is not None else None
        if disk is None or disk.path != one.declared:
            return {}
        if not one.is_volume:
            return low_space(target.disk, one.root, self._low_space_percent)
        room = self._rooms.get(one.dataset, _ROOM_S)
        if room.available * 100 >= (room.available + room.referenced) * self._low_space_percent:
            return {}
        return {
            "low-space": f"Disk {target.disk} is written to a pool with {room.available} bytes "
            "left for it, and the guest stops when there are none; make room, or delete snapshots."
        }

    def _stands(self, one: ZfsTarget) -> bool:
        """Whether it is there; only what is not seen among all of the dataset is looked at anew."""
        try:
            found = self._listed.get(one.dataset, JUST_NOW_S).get(one.full)
        except zfsdataset.NotThere:
            return False
        return _is_it(found, one) or _is_there(one)


def _end(tag: Tag) -> None:
    """Let no program of a Create that was broken off be at work any more. Raises Busy."""
    try:
        command.end_marked(_mark(tag))
    except command.CommandError as error:
        raise Busy(f"ZFS is at work on the snapshot still: {error}.") from error


def _mark(tag: Tag) -> str:
    return f"zfs-{tag.uuid}"


def _is_there(one: ZfsTarget) -> bool:
    """Whether the snapshot is there and is the one that was made, as its properties say."""
    return _is_it(zfsdataset.look(one.full), one)


def _is_it(found: zfstags.Found | None, one: ZfsTarget) -> bool:
    return found is not None and one.snapshot in found.snapshots.values()


def _holds(root: int, one: ZfsTarget) -> bool:
    """Whether the snapshot open at `root` has the file that the disk was, with its chain."""
    try:
        held = chain.open_inside(root, one.inside)
    except chain.Outside as error:
        log.warning("%s is not in the snapshot: %s", one.inside, error)
        return False
    try:
        if os.fstat(held).st_ino != one.held:
            log.warning("%s was replaced before it was taken", one.image)
            return False
    finally:
        os.close(held)
    chain.check(root, one.inside, one.format)
    return True


def _user(one: ZfsTarget, domains: Iterable[Domain]) -> str:
    """Whose disk, which can be written to, is in the snapshot or its clone, in words."""
    images = [
        (found, f"disk {disk.target} of domain {domain.name}")
        for domain in domains
        for disk in (*domain.disks, *domain.persistent_disks)
        if disk.path and not disk.readonly and (found := storage.file_id(disk.path)) is not None
    ]
    # Only now, as a snapshot is mounted by whoever asks for a file in it.
    device = zfsview.device(one)
    for found, user in images:
        if (found.device, found.inode == 0) == (device, one.is_volume):
            return user
    return ""


def _remove(one: ZfsTarget) -> bool:
    """Remove a snapshot with what shows it; False: it is not there. What is not ours stays."""
    if not _is_there(one):
        return False
    zfsview.hide(one)
    zfsdataset.release(one.full)
    return zfsview.destroy(one.full)
