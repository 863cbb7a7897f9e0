"""Brings a disk back to a snapshot by the method zfs.

A file is copied from the snapshot into a file without a name, which then takes the image's place
(cloneback.py): a dataset is never rolled back, as that would roll back all else in it. A volume is
one disk and nothing else, so it is rolled back (`zfs rollback`), which is done at once or not at
all. It would destroy all newer snapshots, so where there are any it is refused, and none is harmed.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Protocol

from snapd_vm import storage
from snapd_vm.errors import (
    Busy,
    InvalidState,
)
from snapd_vm.methods import chain, cloneback, copyback, off
from snapd_vm.methods.image import revert_of
from snapd_vm.methods.method import Record, Watch
from snapd_vm.methods.zfs import zfsdataset, zfsplace, zfsview
from snapd_vm.methods.zfs.zfstarget import ZfsTarget
from snapd_vm.model import Domain, Tag, Target

log = logging.getLogger(__name__)

_NAMED = 5


class Hypervisor(cloneback.Hypervisor, Protocol):
    """What is needed of the hypervisor; blocking, raises SnapdErrors."""


def check(hypervisor: Hypervisor, target: Target, tag: Tag) -> Target:
    """See Reverts.check_revert."""
    one = ZfsTarget.of(target)
    if one.is_volume:
        return _check_volume(hypervisor, target, one)
    origin = copyback.checked(_origin(one), lambda: _open_file(one))
    return cloneback.check(hypervisor, origin, target, tag)


def _check_volume(hypervisor: Hypervisor, target: Target, one: ZfsTarget) -> Target:
    domain = hypervisor.read(one.domain)
    _same_volume(hypervisor, domain, target, one)
    newer = zfsdataset.newer(one.full)
    if newer:
        names = ", ".join(newer[:_NAMED]) + (" and others" if len(newer) > _NAMED else "")
        raise InvalidState(
            f"ZFS would destroy what is newer than the snapshot, which is {names}; delete that "
            "first, or copy the backup source over the disk instead."
        )
    user = hypervisor.user_of(one.declared, one.domain, target.disk)
    if user:
        raise Busy(f"The volume of disk {target.disk}, {one.dataset}, is also used by {user}.")
    _check_unused(target, one)
    written = zfsdataset.written_since(one.full)
    return dataclasses.replace(target, data={**target.data, "revert": {"written": written}})


def _same_volume(hypervisor: Hypervisor, domain: Domain, target: Target, one: ZfsTarget) -> None:
    """The domain is off, and its disk still this volume. Raises InvalidState."""
    off.check_off(hypervisor, domain)
    disk = domain.disk(target.disk)
    path = disk.path if disk is not None else ""
    if not zfsplace.is_volume(path) or zfsplace.volume_at(path) != one.dataset:
        raise InvalidState(f"Disk {target.disk} is not the volume {one.dataset} any more.")


def _check_unused(target: Target, one: ZfsTarget) -> None:
    """Nobody may have the volume open, or a part of it mounted: ZFS would roll back all the same.

    Raises Busy and StorageFailed.
    """
    user = storage.device_user(one.declared)
    if user:
        raise Busy(f"The volume of disk {target.disk}, {one.dataset}, is in use by {user}.")


def prepare(hypervisor: Hypervisor, target: Target, tag: Tag, record: Record) -> Target:
    """See Reverts.prepare_revert."""
    one = ZfsTarget.of(target)
    if one.is_volume:
        record([target])
        return target
    return cloneback.prepare(hypervisor, _origin(one), target, tag, record)


def go_back(hypervisor: Hypervisor, target: Target, tag: Tag, watch: Watch) -> None:
    """See Reverts.revert."""
    one = ZfsTarget.of(target)
    if one.is_volume:
        watch.past_return()
        _check_unused(target, one)
        # The last look is at the domain, as nothing keeps it from being started.
        _same_volume(hypervisor, hypervisor.read(one.domain), target, one)
        zfsdataset.roll_back(one.full)
        log.info("rolled back to %s", one.full)
        return
    origin = _origin(one)
    copyback.fill(hypervisor, origin, target, tag, watch)
    cloneback.switch(hypervisor, origin, target, tag, watch)


def settle(hypervisor: Hypervisor, target: Target, tag: Tag) -> bool:
    """See Reverts.settle_revert.

    Of a volume: after a rollback next to nothing was written since the snapshot. Where as much was
    as before, or more, it was not rolled back.
    """
    one = ZfsTarget.of(target)
    if not one.is_volume:
        return cloneback.settle(hypervisor, _origin(one), target, tag)
    before, now = revert_of(target)["written"], zfsdataset.written_since(one.full)
    return now == 0 or (isinstance(before, int) and now < before)


def reverted(target: Target, other: Target) -> Target | None:
    """See Reverts.reverted. Of a volume, all are what they were."""
    return None if ZfsTarget.of(target).is_volume else cloneback.reverted(target, other)


def _origin(one: ZfsTarget) -> cloneback.Origin:
    return copyback.origin(one.domain, one.image, one.format, lambda: _open_file(one))


def _open_file(one: ZfsTarget) -> int:
    """A descriptor of the image in the snapshot. Raises StorageFailed and MethodNotSupported."""
    root = zfsview.open_root(one)
    try:
        return chain.open_inside(root, one.inside)
    finally:
        os.close(root)
