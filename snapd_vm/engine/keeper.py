"""Keeps at what could not be finished: guests that may be frozen, operations not settled.

Runs on the asyncio loop; the work itself is in recovery.py. What is open keeps its domain closed
for writing calls (Busy), and is tried again until it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable

from snapd_vm.engine import recovery
from snapd_vm.engine.changes import Changes
from snapd_vm.engine.create import Failed
from snapd_vm.engine.jobs import Jobs, Running
from snapd_vm.engine.journal import Held, Kind, Operation
from snapd_vm.engine.locks import DomainLocks
from snapd_vm.engine.shelf import Shelf
from snapd_vm.engine.world import World
from snapd_vm.errors import HypervisorUnavailable, SnapdError
from snapd_vm.journald import MessageId, fields

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_LONGEST_RETRY_S = 30.0
_UNDO_WAIT_S = 20.0


class Keeper:
    """See the top of the file. `refreshed` reads a domain again after it was changed."""

    def __init__(
        self,
        world: World,
        shelf: Shelf,
        jobs: Jobs,
        locks: DomainLocks,
        connected: Callable[[], bool],
        refreshed: Callable[[str], Awaitable[None]],
    ) -> None:
        self._world = world
        self._shelf = shelf
        self._changes = Changes(world, shelf, jobs, refreshed)
        self._locks = locks
        self._connected = connected
        self._refreshed = refreshed
        self._operations: dict[str, Operation] = {}
        self._held: dict[str, Held] = {}
        self._settling: dict[str, asyncio.Task[None]] = {}
        self._changing: dict[str, asyncio.Lock] = {}
        self._wake = asyncio.Event()
        self._settle_now = asyncio.Event()
        self.thawed = asyncio.Event()
        self.tried = asyncio.Event()

    async def load(self) -> None:
        """Take what the journal says is open."""
        for operation in await self._world.run(self._world.journal.operations):
            self._leave_open(operation)
        for held in await self._world.run(self._world.journal.held):
            self._held[held.domain_uuid] = held

    def wake(self) -> None:
        """Try again now, as after libvirt came back."""
        self._wake.set()
        self._settle_now.set()

    def holds(self, domain_uuid: str) -> bool:
        """Whether the domain may be frozen still."""
        return domain_uuid in self._held

    async def keep_thawing(self) -> None:
        """Thaw whom we hold, now and whenever it is called for, for ever; each beside the others.

        `thawed` is set after the first attempt.
        """
        while True:
            self._wake.clear()
            if self._connected():
                held = list(self._held.values())
                for result in await asyncio.gather(
                    *(self._release_if_free(one) for one in held), return_exceptions=True
                ):
                    if isinstance(result, BaseException):
                        log.error("a thaw is tried again", exc_info=result)
            self.thawed.set()
            waits = _RETRY_S if self._held else None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), waits)

    async def keep_settling(self) -> None:
        """Settle what was begun, once the thaws were tried, for ever; `tried` after the first time.

        Each operation has a task of its own, as libvirt's calls wait for a QEMU that hangs for as
        long as it does. What can't be settled is tried again after a while, which grows.
        """
        await self.thawed.wait()
        pause = _RETRY_S
        while True:
            self._settle_now.clear()
            if self._connected():
                for uuid, operation in self._operations.items():
                    if uuid not in self._settling:
                        self._settling[uuid] = asyncio.create_task(self._try_to_settle(operation))
                if self._settling:
                    await asyncio.wait(list(self._settling.values()), timeout=_RETRY_S)
            if not self._settling:
                self.tried.set()
            pause = min(pause * 2, _LONGEST_RETRY_S) if self._operations else _RETRY_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settle_now.wait(), pause if self._operations else None)
                pause = _RETRY_S

    async def _try_to_settle(self, operation: Operation) -> None:
        try:
            if operation.kind is Kind.CREATE:
                done = await self._settle(operation, keep=not operation.failed)
            else:
                done = (await self._changes.again(operation)).open is None
        except Exception:  # one that can't be settled keeps no other from it
            log.exception("operation %s is tried again", operation.tag.uuid)
            return
        finally:
            del self._settling[operation.tag.uuid]
        if done:
            del self._operations[operation.tag.uuid]
            self._locks.unblock(operation.tag.domain_uuid)

    def is_open(self, domain_uuid: str) -> bool:
        """Whether an operation of the domain is still to be settled."""
        return any(o.tag.domain_uuid == domain_uuid for o in self._operations.values())

    def hold(self, held: Held) -> None:
        """Go on thawing this guest until its agent answers; the journal has it already."""
        known = self._held.get(held.domain_uuid)
        self._held[held.domain_uuid] = held if known is None else known.joined(held)
        self._wake.set()

    async def undo(self, failed: Failed) -> None:
        """Thaw, then undo; what can't be done now is gone on with."""
        operation = failed.operation
        uuid = operation.tag.domain_uuid
        log.error(
            "create %s of domain %s failed: %s",
            operation.tag.label,
            operation.tag.domain_name,
            failed.error,
            extra=fields(MessageId.FAILED, operation.drafts[0]),
        )
        if failed.held is not None:
            self.hold(failed.held)
        elif uuid not in self._held:  # it goes on, whatever becomes of the rest
            await self._write_off(uuid)
        # Before it is begun: a commit that is cut off is gone on with, and its snapshot not kept.
        lasting = dataclasses.replace(operation, failed=True)
        try:
            await self._world.run(self._world.journal.begin, lasting)
        except SnapdError as error:
            log.error("that it failed was not written down: %s", error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_UNDO_WAIT_S):
                await self._until_reachable(uuid)
                if uuid in self._held:
                    await self._release(self._held[uuid])
        if not await self._settle(lasting, keep=False):
            self._leave_open(lasting)

    async def _settle(self, operation: Operation, *, keep: bool) -> bool:
        """Settle an operation and write its end down; whether that could be done now."""
        world, tag = self._world, operation.tag
        try:
            standing = await world.run(recovery.settle, world, operation, keep=keep)
            release = tag.domain_uuid not in self._held
            await world.run(world.journal.end, operation, standing, release=release)
        except SnapdError as error:
            log.error(
                "create %s of domain %s is not settled: %s", tag.label, tag.domain_name, error
            )
            return False
        for snapshot in standing:
            self._shelf.add(snapshot)
        log.info(
            "settled create %s of domain %s: %s",
            tag.label,
            tag.domain_name,
            "the snapshot stands" if standing else "nothing is left of it",
            extra=fields(MessageId.SETTLED, standing[0] if standing else operation.drafts[0]),
        )
        await self._refreshed(tag.domain_uuid)
        await self._shelf.look_at_domain(tag.domain_uuid)  # it may have gone meanwhile
        return True

    async def change(self, operation: Operation, watch: Running) -> None:
        """Carry out a delete or revert that was begun, and tell of what has changed.

        Raises what it has failed with; the domain stays closed if it is to be gone on with.
        """
        uuid = operation.tag.domain_uuid
        releasing = self._changing[uuid] = asyncio.Lock()
        try:
            outcome = await self._changes.attempt(operation, watch)
        finally:
            async with releasing:  # a thaw that is under way ends before the next Create begins
                del self._changing[uuid]
        if outcome.open is not None:
            self._leave_open(outcome.open)
        if outcome.error is not None:
            raise outcome.error

    async def _release_if_free(self, held: Held) -> None:
        """Thaw, unless a Create is at work on the domain, which thaws by itself."""
        uuid = held.domain_uuid
        async with self._locks.attempt(uuid) as free:
            if free:
                await self._release(held)
            elif uuid in self._changing:
                async with (releasing := self._changing[uuid]):
                    if self._changing.get(uuid) is releasing:
                        await self._release(held)

    async def _release(self, held: Held) -> None:
        world, uuid = self._world, held.domain_uuid
        limit = world.config.agent_timeout_s
        free = await world.run(recovery.thaw, world.hypervisor, held, limit)
        if free and await self._write_off(uuid) and self._held.get(uuid) is held:
            del self._held[uuid]

    async def _write_off(self, uuid: str) -> bool:
        """Write down that the domain goes on; whether that could be done. Else it is thawed once
        more, which does no harm.
        """
        try:
            await self._world.run(self._world.journal.release, uuid)
        except SnapdError as error:
            log.error("that domain %s goes on was not written down: %s", uuid, error)
            return False
        return True

    def _leave_open(self, operation: Operation) -> None:
        self._operations[operation.tag.uuid] = operation
        self._locks.block(
            operation.tag.domain_uuid,
            "An earlier snapshot of the domain has not been settled; see the daemon's log.",
        )
        self._settle_now.set()

    async def _until_reachable(self, uuid: str) -> None:
        """Wait until libvirt answers; what is known of the connection may be old news."""
        while True:
            try:
                await self._world.run(self._world.hypervisor.read, uuid)
                return
            except HypervisorUnavailable:
                await asyncio.sleep(0.1)
            except SnapdError:
                return
