"""Delete: the snapshot goes, the disk's present contents and every other snapshot's stay.

Blocking functions for one worker thread; the engine holds the domain's lock around them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence

from snapd_vm.engine.journal import DeleteStep, Kind, Operation
from snapd_vm.engine.shelf import standing_of
from snapd_vm.engine.world import World
from snapd_vm.errors import Busy, Cancelled, InvalidState, NoSuchDomain, SnapdError
from snapd_vm.journald import MessageId, fields
from snapd_vm.methods.method import Reverts, Watch
from snapd_vm.model import Domain, Flags, Snapshot, SnapshotState, Tag, snapshot_path
from snapd_vm.virt import domainxml

log = logging.getLogger(__name__)

_NOTHING_TO_DO = (SnapshotState.MISSING, SnapshotState.DETACHED)
"""The storage is gone, or is nobody's that we know: the record alone is dropped."""


def tag_of(snapshot: Snapshot) -> Tag:
    """The tag under which the snapshot was made."""
    return Tag(
        snapshot.uuid,
        snapshot.name,
        snapshot.domain_uuid,
        snapshot.domain_name,
        snapshot.created_us,
    )


def begin(
    world: World,
    snapshot: Snapshot,
    others: Iterable[Snapshot],
    domains: Mapping[str, Domain],
    uid: int,
) -> Operation:
    """Check that it can be deleted, and write down that it will be. Raises SnapdErrors.

    `others` are the domain's other snapshots, `domains` all that there are, by UUID; `uid` is who
    asks.
    """
    tag = tag_of(snapshot)
    method = world.method(snapshot.target.method)
    if snapshot.state in (SnapshotState.DELETING, SnapshotState.REVERTING):
        raise Busy(f"The snapshot is {snapshot.state}; wait for its end.")
    standing = standing_of(method, snapshot.target, _now(world, domains, snapshot.domain_uuid))
    state = SnapshotState(standing.state)
    if state is SnapshotState.FAILED and not (standing.released or standing.removable):
        raise InvalidState(
            "A domain's definition names the image that the snapshot is; correct it first, or move "
            "the overlay away, if there is one and all that it holds is in that image."
        )
    dropped = state is not SnapshotState.READY and not standing.removable
    # A delete that goes on after a restart finds here that there is nothing to do.
    snapshot = dataclasses.replace(
        snapshot, state=SnapshotState.DETACHED if standing.released else state
    )
    if isinstance(method, Reverts):
        target = method.among(snapshot.target, [other.target for other in others])
        snapshot = dataclasses.replace(snapshot, target=target)
    if not dropped:
        method.check_delete(snapshot.target, tag)
    world.reach(DeleteStep.CHECKED)
    operation = Operation(tag, Flags(0), (snapshot,), kind=Kind.DELETE, uid=uid)
    world.journal.begin(operation)
    if dropped:
        log.warning(
            "the record of snapshot %s of disk %s of domain %s is dropped, and no file touched: %s",
            snapshot.name,
            snapshot.target.disk,
            snapshot.domain_name,
            standing.why or state,
            extra=fields(MessageId.STATE, snapshot, state=state),
        )
    world.reach(DeleteStep.BEGUN)
    return operation


def _now(world: World, domains: Mapping[str, Domain], uuid: str) -> Mapping[str, Domain]:
    """The domains with this one as libvirt has it now: an event may be on its way still."""
    try:
        return {**domains, uuid: world.hypervisor.read(uuid)}
    except NoSuchDomain:
        return {known: domain for known, domain in domains.items() if known != uuid}


def carry_out(
    world: World, operation: Operation, all_of: Sequence[Snapshot], watch: Watch
) -> Sequence[Snapshot]:
    """Do what was begun, again if need be; the other snapshots whose source has moved.

    `all_of` are all the domain's. Raises Cancelled with the operation closed, and all as `kept`
    says; other SnapdErrors with the operation open, to be called again.
    """
    snapshot = operation.drafts[0]
    method = world.method(snapshot.target.method)
    moves = snapshot.state not in _NOTHING_TO_DO  # else what lay on it still does
    if moves:
        try:
            method.delete(snapshot.target, operation.tag, watch)
        except Cancelled:
            world.journal.end(operation, [kept(operation, all_of, watch)], release=False)
            raise
    world.reach(DeleteStep.COMMITTED)
    moved = []
    for other in all_of:
        if not moves or other.uuid == snapshot.uuid or other.target.method != method.name:
            continue
        target = method.moved(snapshot.target, other.target)
        if target is not None:
            moved.append(_moved(other, snapshot, target))
    world.journal.deleted(operation, moved)
    world.reach(DeleteStep.ENDED)
    return moved


def _moved(other: Snapshot, into: Snapshot, target: object) -> Snapshot:
    """The other snapshot, which is read now where the deleted one was."""
    return dataclasses.replace(
        other,
        target=target,  # type: ignore[arg-type]  # a Target, see the caller
        format=into.format,
        backup_source=domainxml.with_attributes(
            into.backup_source,
            consistency=other.consistency,
            snapshot_path=snapshot_path(other.uuid),
        ),
    )


def kept(operation: Operation, all_of: Iterable[Snapshot], watch: Watch) -> Snapshot:
    """What a delete that did not come to its end has left of its snapshot, as its own record."""
    draft = operation.drafts[0]
    former = next(one for one in all_of if one.uuid == draft.uuid)
    if watch.spoilt or former.spoilt:
        return dataclasses.replace(former, state=SnapshotState.FAILED, spoilt=True)
    return dataclasses.replace(former, state=draft.state)


def give_up(world: World, operation: Operation, all_of: Iterable[Snapshot], watch: Watch) -> bool:
    """Close a delete that failed, where the snapshot still stands; whether that could be told."""
    snapshot = operation.drafts[0]
    try:
        if not world.method(snapshot.target.method).taken(snapshot.target, operation.tag):
            return False
        world.journal.end(operation, [kept(operation, all_of, watch)], release=False)
    except SnapdError:
        return False
    return True
