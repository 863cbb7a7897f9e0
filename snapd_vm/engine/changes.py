"""Carries out what changes a snapshot that stands, delete and revert, and tells of what came of it.

Runs on the asyncio loop; the work itself is in delete.py and revert.py. What could not be brought
to its end is its caller's to try again.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable

from snapd_vm.engine import delete, revert
from snapd_vm.engine.jobs import Jobs, Running
from snapd_vm.engine.journal import Kind, Operation
from snapd_vm.engine.shelf import Shelf
from snapd_vm.engine.world import World
from snapd_vm.errors import Cancelled, Internal, SnapdError
from snapd_vm.journald import MessageId, fields
from snapd_vm.model import Snapshot, SnapshotState, snapshot_path

log = logging.getLogger(__name__)

_STATES = {Kind.DELETE: SnapshotState.DELETING, Kind.REVERT: SnapshotState.REVERTING}


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an attempt; `open` is the operation where it is to be gone on with."""

    error: Exception | None = None
    open: Operation | None = None


class Changes:
    """See the top of the file. `refreshed` reads a domain again after it was changed."""

    def __init__(
        self,
        world: World,
        shelf: Shelf,
        jobs: Jobs,
        refreshed: Callable[[str], Awaitable[None]],
    ) -> None:
        self._world = world
        self._shelf = shelf
        self._jobs = jobs
        self._refreshed = refreshed

    async def attempt(self, operation: Operation, watch: Running) -> Outcome:
        """Carry out what was begun, for the first time."""
        return await self._attempt(operation, watch, again=False)

    async def again(self, operation: Operation) -> Outcome:
        """Take up what was broken off, as a job of who started it."""
        running = self._jobs.begin(
            str(operation.kind),
            domain_uuid=operation.tag.domain_uuid,
            disk=operation.drafts[0].target.disk,
            name=operation.tag.label,
            objects=(snapshot_path(operation.tag.uuid),),
            uid=operation.uid,
            cancelable=operation.kind is Kind.DELETE,
        )
        if operation.kind is Kind.DELETE:
            running.spoil()  # nobody knows how far it had come
        outcome = await self._attempt(operation, running, again=True)
        running.end(outcome.error, {})
        return outcome

    async def _attempt(self, operation: Operation, watch: Running, *, again: bool) -> Outcome:
        uuid = operation.tag.uuid
        former = self._shelf.get(uuid)
        state = operation.drafts[0].state
        self._shelf.replace(dataclasses.replace(former, state=_STATES[operation.kind]))
        try:
            if operation.kind is Kind.DELETE:
                await self._delete(operation, watch)
            elif not await self._revert(operation, watch, again=again):
                self._shelf.replace(dataclasses.replace(former, state=state))
        except revert.Unsettled as unsettled:
            self._failed(operation, unsettled.error)
            return Outcome(_told(unsettled.error), unsettled.operation)
        except Exception as error:
            self._failed(operation, error)
            if not await self._closed(operation, error, watch):
                return Outcome(_told(error), operation)
            await self._refreshed(operation.tag.domain_uuid)
            if operation.kind is Kind.DELETE:
                self._shelf.put_back(delete.kept(operation, [former], watch))
            else:
                self._shelf.replace(dataclasses.replace(former, state=state))
            return Outcome(_told(error))
        await self._shelf.look_at_domain(operation.tag.domain_uuid)  # nobody did meanwhile
        return Outcome()

    async def _closed(self, operation: Operation, error: Exception, watch: Running) -> bool:
        """Whether nothing is left to be done of an operation that failed."""
        if operation.kind is Kind.REVERT:
            return True  # or it is Unsettled
        if isinstance(error, Cancelled):
            return True
        all_of = self._shelf.of(operation.tag.domain_uuid)
        return await self._world.run(delete.give_up, self._world, operation, all_of, watch)

    async def _delete(self, operation: Operation, watch: Running) -> None:
        snapshot = operation.drafts[0]
        world, all_of = self._world, self._shelf.of(snapshot.domain_uuid)
        moved = await world.run(delete.carry_out, world, operation, all_of, watch)
        await self._refreshed(snapshot.domain_uuid)  # before anybody looks at the others again
        self._shelf.remove(snapshot.uuid)
        _log("deleted snapshot %s of disk %s of domain %s", MessageId.DELETED, snapshot)
        for other in moved:
            self._shelf.replace(other)
            self._shelf.warn(
                other, "source-moved", "The source to read has moved; ask for it again."
            )

    async def _revert(self, operation: Operation, watch: Running, *, again: bool) -> bool:
        """Whether the disk is reverted; one that was broken off may be undone instead."""
        snapshot = operation.drafts[0]
        world, all_of = self._world, self._shelf.of(snapshot.domain_uuid)
        if again:
            changed = await world.run(revert.settle, world, operation, all_of)
        else:
            changed = await world.run(revert.carry_out, world, operation, all_of, watch)
        await self._refreshed(snapshot.domain_uuid)
        for one in changed:
            self._shelf.replace(one)
        if changed:
            text = "went back to snapshot %s of disk %s of domain %s"
            _log(text, MessageId.REVERTED, snapshot)
        else:
            text = "undid the revert to snapshot %s of disk %s of domain %s, which was broken off"
            _log(text, MessageId.SETTLED, snapshot)
        return bool(changed)

    def _failed(self, operation: Operation, error: Exception) -> None:
        snapshot = operation.drafts[0]
        cancelled = isinstance(error, Cancelled)
        log.log(
            logging.INFO if cancelled else logging.ERROR,
            "%s of snapshot %s of domain %s %s: %s",
            operation.kind,
            snapshot.name,
            snapshot.domain_name,
            "was cancelled" if cancelled else "failed",
            error,
            extra=fields(MessageId.CANCELLED if cancelled else MessageId.FAILED, snapshot),
            exc_info=None if isinstance(error, SnapdError) else error,
        )


def _told(error: Exception) -> Exception:
    """What the caller is told; the log has the rest."""
    return error if isinstance(error, SnapdError) else Internal("The daemon made a mistake.")


def _log(text: str, message_id: MessageId, snapshot: Snapshot) -> None:
    disk = snapshot.target.disk
    log.info(text, snapshot.name, disk, snapshot.domain_name, extra=fields(message_id, snapshot))
