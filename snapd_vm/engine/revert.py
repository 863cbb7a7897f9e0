"""Revert: the disk goes back to a snapshot; that one and every other stay as they are.

Blocking functions for one worker thread; the engine holds the domain's lock around them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

from snapd_vm.engine.delete import tag_of
from snapd_vm.engine.journal import Kind, Operation, RevertStep
from snapd_vm.engine.shelf import SPOILT
from snapd_vm.engine.world import World
from snapd_vm.errors import Busy, InvalidState, MethodNotSupported, StorageFailed
from snapd_vm.methods.method import Forgets, Reverts, Watch
from snapd_vm.model import Domain, Flags, Snapshot, SnapshotState, Target

log = logging.getLogger(__name__)


class Unsettled(Exception):
    """A revert has failed with `error`, and could not be brought to an end yet."""

    def __init__(self, error: Exception, operation: Operation) -> None:
        super().__init__(str(error))
        self.error = error
        self.operation = operation


def begin(
    world: World,
    snapshot: Snapshot,
    others: Sequence[Snapshot],
    _domains: Mapping[str, Domain],
    uid: int,
) -> Operation:
    """Check that the disk can go back to it, and write down that it will. Raises SnapdErrors.

    `others` are the domain's other snapshots, `uid` is who asks.
    """
    tag, method = tag_of(snapshot), _method(world, snapshot)
    if snapshot.spoilt:
        raise InvalidState(SPOILT)
    if snapshot.state is SnapshotState.FAILED:
        raise InvalidState(
            "A domain's definition names, or somebody has changed, the image that the snapshot is; "
            "the daemon's log says which, and a definition can be corrected."
        )
    if snapshot.state is SnapshotState.MISSING:
        raise StorageFailed("The snapshot's storage is gone; there is nothing to go back to.")
    if snapshot.state is SnapshotState.DETACHED:
        raise InvalidState(
            "The snapshot is not one of the domain's disk as it is now; somebody has changed the "
            "disk, and snapd-vm does not know what a revert would discard."
        )
    if snapshot.state is not SnapshotState.READY:
        raise Busy(f"The snapshot is {snapshot.state}; wait for its end.")
    beside = [other.target for other in others if other.target.disk == snapshot.target.disk]
    target = method.check_revert(snapshot.target, tag, beside)
    world.reach(RevertStep.CHECKED)
    draft = dataclasses.replace(snapshot, target=target)
    operation = Operation(tag, Flags(0), (draft,), kind=Kind.REVERT, uid=uid)
    world.journal.begin(operation)
    world.reach(RevertStep.BEGUN)
    return operation


def _method(world: World, snapshot: Snapshot) -> Reverts:
    method = world.method(snapshot.target.method)
    if not isinstance(method, Reverts):
        raise MethodNotSupported(
            f"Method {method.name} can't bring a disk back to a snapshot; copy the backup source "
            "over the disk instead."
        )
    return method


def carry_out(
    world: World, operation: Operation, all_of: Sequence[Snapshot], watch: Watch
) -> Sequence[Snapshot]:
    """Do what was begun; the snapshots of the disk that are different now, itself among them.

    `all_of` are all the domain's. Raises the first error with all as it was, or Unsettled.
    """
    draft = operation.drafts[0]
    method = _method(world, draft)

    def record(targets: Sequence[Target]) -> None:
        nonlocal operation
        operation = operation.with_targets(targets)
        world.journal.begin(operation)
        world.reach(RevertStep.PREPARED)

    try:
        target = method.prepare_revert(draft.target, operation.tag, record)
        world.reach(RevertStep.ARMED)
        method.revert(target, operation.tag, watch)
        world.reach(RevertStep.SWITCHED)
    except Exception as error:
        changed = settle(world, operation, all_of, error)
        if not changed:
            raise
        log.warning("the revert was done, though this was said of it: %s", error)
        return changed
    return settle(world, operation, all_of)


def settle(
    world: World,
    operation: Operation,
    all_of: Sequence[Snapshot],
    first: Exception | None = None,
) -> Sequence[Snapshot]:
    """Bring a revert to its end, however far it came, and write that down.

    The snapshots that are different now; none: it is undone. Raises Unsettled where that could not
    be done now, with the `first` error if there was one before; it may be called again.
    """
    draft = operation.drafts[0]
    try:
        method = _method(world, draft)
        if not operation.settled:
            if not method.settle_revert(draft.target, operation.tag):
                return _end(world, operation, [])
            world.reach(RevertStep.CLEARED)
            operation = dataclasses.replace(operation, settled=True)
            world.journal.begin(operation)
            world.reach(RevertStep.SETTLED)
        if isinstance(method, Forgets):
            method.forget_revert(draft.target)
        changed: list[Snapshot] = []
        for snapshot in all_of:
            target = method.reverted(draft.target, snapshot.target)
            if snapshot.uuid == draft.uuid:
                target = target or snapshot.target
                changed.append(dataclasses.replace(snapshot, target=target, state=draft.state))
            elif target is not None:
                changed.append(dataclasses.replace(snapshot, target=target))
        return _end(world, operation, changed)
    except Exception as error:
        raise Unsettled(first or error, operation) from error


def _end(world: World, operation: Operation, changed: Sequence[Snapshot]) -> Sequence[Snapshot]:
    world.journal.end(operation, changed, release=False)
    world.reach(RevertStep.ENDED)
    return changed
