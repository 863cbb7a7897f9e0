"""Delete: the snapshot goes, the disk's present contents and every other snapshot's stay.

Blocking functions for one worker thread; the engine holds the domain's lock around them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from snapd_vm.engine.journal import DeleteStep, Kind, Operation
from snapd_vm.engine.world import World
from snapd_vm.errors import Busy, Cancelled, InvalidState, SnapdError
from snapd_vm.methods.method import Reverts, Watch
from snapd_vm.model import Flags, Snapshot, SnapshotState, Tag, snapshot_path
from snapd_vm.virt import domainxml

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


def begin(world: World, snapshot: Snapshot, others: Iterable[Snapshot], uid: int) -> Operation:
    """Check that it can be deleted, and write down that it will be. Raises SnapdErrors.

    `others` are the domain's other snapshots, `uid` is who asks.
    """
    tag = tag_of(snapshot)
    method = world.methods[snapshot.target.method]
    if snapshot.state is SnapshotState.FAILED:
        raise InvalidState(
            "A domain's definition names the image that the snapshot is; correct it first."
        )
    if snapshot.state not in (SnapshotState.READY, *_NOTHING_TO_DO):
        raise Busy(f"The snapshot is {snapshot.state}; wait for its end.")
    if isinstance(method, Reverts):
        target = method.among(snapshot.target, [other.target for other in others])
        snapshot = dataclasses.replace(snapshot, target=target)
    if snapshot.state is SnapshotState.READY:
        method.check_delete(snapshot.target, tag)
    world.reach(DeleteStep.CHECKED)
    operation = Operation(tag, Flags(0), (snapshot,), kind=Kind.DELETE, uid=uid)
    world.journal.begin(operation)
    world.reach(DeleteStep.BEGUN)
    return operation


def carry_out(
    world: World, operation: Operation, others: Iterable[Snapshot], watch: Watch
) -> Sequence[Snapshot]:
    """Do what was begun, again if need be; the other snapshots whose source has moved.

    Raises Cancelled with all as it was, and the operation closed; other SnapdErrors with the
    operation open, to be called again.
    """
    snapshot = operation.drafts[0]
    method = world.methods[snapshot.target.method]
    if snapshot.state not in _NOTHING_TO_DO:
        try:
            method.delete(snapshot.target, operation.tag, watch)
        except Cancelled:
            world.journal.end(operation, [], release=False)
            raise
    world.reach(DeleteStep.COMMITTED)
    moved = []
    for other in others:
        target = method.moved(snapshot.target, other.target)
        if other.uuid != snapshot.uuid and target is not None:
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


def give_up(world: World, operation: Operation) -> bool:
    """Close a delete that failed, where the snapshot still stands; whether that could be told."""
    snapshot = operation.drafts[0]
    try:
        if not world.methods[snapshot.target.method].taken(snapshot.target, operation.tag):
            return False
        world.journal.end(operation, [], release=False)
    except SnapdError:
        return False
    return True
