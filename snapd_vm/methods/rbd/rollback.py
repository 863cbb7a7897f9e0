"""Brings an RBD image back to a snapshot: Ceph copies its contents over the image's.

All snapshots stay as they are, newer ones too, so nothing is refused for their sake. What the image
held is overwritten from the first moment on. So a rollback that was begun is gone on with, after a
crash as after an error, until it is done; what the image's metadata says tells how far it came.
The image is locked meanwhile, which keeps a domain that is started nevertheless from writing to it.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Protocol

from snapd_vm.errors import Busy, InvalidState, NoSuchDomain
from snapd_vm.methods import off
from snapd_vm.methods.image import revert_of
from snapd_vm.methods.method import Record, Watch
from snapd_vm.methods.rbd import rbduse
from snapd_vm.methods.rbd.cluster import Clusters, Session
from snapd_vm.methods.rbd.rbdtarget import RbdTarget, place_of
from snapd_vm.model import Domain, Target

log = logging.getLogger(__name__)

_KEY = "snapd-vm-revert"
_STEP_S = 60.0


class Hypervisor(off.Hypervisor, Protocol):
    """What is needed of the hypervisor; blocking, raises SnapdErrors."""

    def read(self, uuid: str) -> Domain: ...


def check(hypervisor: Hypervisor, clusters: Clusters, target: Target) -> Target:
    """See Reverts.check_revert."""
    found = RbdTarget.of(target)
    _check_domain(hypervisor, target, found)
    with clusters.session(found.place.access) as session:
        rbduse.refuse_any(session, found)
    return dataclasses.replace(target, data={**target.data, "revert": {"armed": False}})


def _check_domain(hypervisor: Hypervisor, target: Target, found: RbdTarget) -> None:
    """The domain is off, and its disk still this image. Raises InvalidState."""
    domain = hypervisor.read(found.domain)
    off.check_off(hypervisor, domain)
    disk = domain.disk(target.disk)
    place = place_of(disk.source_xml) if disk is not None else None
    if str(place) != str(found.place):
        raise InvalidState(f"Disk {target.disk} is not the image {found.place} any more.")


def prepare(clusters: Clusters, target: Target, record: Record) -> Target:
    """See Reverts.prepare_revert. What a revert that no journal knows has left is forgotten."""
    forget(clusters, target)
    target = dataclasses.replace(target, data={**target.data, "revert": {"armed": True}})
    record([target])
    return target


def forget(clusters: Clusters, target: Target) -> None:
    """See Forgets.forget_revert."""
    found = RbdTarget.of(target)
    with clusters.session(found.place.access) as session:
        session.ask("mark", image=found.place.words, key=_KEY, value="")


def roll_back(hypervisor: Hypervisor, clusters: Clusters, target: Target, watch: Watch) -> None:
    """See Reverts.revert."""
    found = RbdTarget.of(target)
    watch.past_return()
    with clusters.session(found.place.access) as session:
        session.ask("lock", image=found.place.words)
        try:
            _check_domain(hypervisor, target, found)
            _copy(session, found, watch)
        finally:
            session.ask("disarm")


def settle(hypervisor: Hypervisor, clusters: Clusters, target: Target) -> bool:
    """See Reverts.settle_revert."""
    found = RbdTarget.of(target)
    if not revert_of(target).get("armed"):
        return False
    with clusters.session(found.place.access) as session:
        how = session.ask("info", image=found.place.words, key=_KEY)["said"]
        if how == f"done {found.snapshot}":
            return True
        if how != f"begun {found.snapshot}":
            return False
        try:
            domain = hypervisor.read(found.domain)
        except NoSuchDomain:
            domain = None
        if domain is not None and domain.active:
            raise Busy(
                f"Domain {domain.name} was started on disk {target.disk}, which is half reverted; "
                "shut it off, and the revert goes on."
            )
        log.info("the rollback to %s is gone on with", found)
        session.ask("lock", image=found.place.words)
        try:
            _copy(session, found, None)
        finally:
            session.ask("disarm")
    return True


def _copy(session: Session, found: RbdTarget, watch: Watch | None) -> None:
    session.ask(
        "rollback",
        limit=_STEP_S,
        watch=watch,
        name=found.name,
        key=_KEY,
        begun=f"begun {found.snapshot}",
        done=f"done {found.snapshot}",
    )
    log.info("rolled back to %s", found)
