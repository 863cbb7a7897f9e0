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
from snapd_vm.engine.create import Failed
from snapd_vm.engine.journal import Held, Operation
from snapd_vm.engine.locks import DomainLocks
from snapd_vm.engine.shelf import Shelf
from snapd_vm.engine.world import World
from snapd_vm.errors import HypervisorUnavailable, SnapdError
from snapd_vm.journald import MessageId, fields

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_UNDO_WAIT_S = 20.0


class Keeper:
    """See the top of the file. `refreshed` reads a domain again after it was changed."""

    def __init__(
        self,
        world: World,
        shelf: Shelf,
        locks: DomainLocks,
        connected: Callable[[], bool],
        refreshed: Callable[[str], Awaitable[None]],
    ) -> None:
        self._world = world
        self._shelf = shelf
        self._locks = locks
        self._connected = connected
        self._refreshed = refreshed
        self._operations: dict[str, Operation] = {}
        self._held: dict[str, Held] = {}
        self._settling: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
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

    async def keep_recovering(self) -> None:
        """Thaw and settle, now and whenever it is called for, for ever; `tried` after the first."""
        try:
            while True:
                self._wake.clear()
                try:
                    await self._recover()
                except SnapdError as error:
                    log.error("recovery goes on later: %s", error)
                if not self._settling:
                    self.tried.set()
                waits = _RETRY_S if self._held or self._operations else None
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), waits)
        finally:
            for task in self._settling.values():
                task.cancel()

    async def _recover(self) -> None:
        """Thaw what is held and settle what was begun, as far as it can be done now.

        Each operation has a task of its own, as libvirt's calls wait for a QEMU that hangs for as
        long as it does, and no other guest is to stay frozen for that.
        """
        if not self._connected():
            return
        await asyncio.gather(*(self._release(held) for held in list(self._held.values())))
        for uuid, operation in self._operations.items():
            if uuid not in self._settling:
                self._settling[uuid] = asyncio.create_task(self._settle_open(operation))
        if self._settling:
            await asyncio.wait(list(self._settling.values()), timeout=_RETRY_S)

    async def _settle_open(self, operation: Operation) -> None:
        uuid = operation.tag.uuid
        try:
            if await self._settle(operation, keep=not operation.failed):
                del self._operations[uuid]
                self._locks.unblock(operation.tag.domain_uuid)
        finally:
            del self._settling[uuid]

    def hold(self, held: Held) -> None:
        """Go on thawing this guest until its agent answers; the journal has it already."""
        self._held.setdefault(held.domain_uuid, held)
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
        if failed.held:
            for held in await self._world.run(self._world.journal.held):
                if held.domain_uuid == uuid:
                    self.hold(held)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_UNDO_WAIT_S):
                await self._until_reachable(uuid)
                if uuid in self._held:
                    await self._release(self._held[uuid])
        lasting = dataclasses.replace(operation, failed=True)
        if not await self._settle(lasting, keep=False):
            self._leave_open(lasting)
            try:
                await self._world.run(self._world.journal.begin, lasting)
            except SnapdError as error:  # what it says of the operation has to do then
                log.error("that it failed was not written down: %s", error)

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

    async def _release(self, held: Held) -> None:
        if await self._world.run(recovery.thaw, self._world, held):
            await self._world.run(self._world.journal.release, held.domain_uuid)
            self._held.pop(held.domain_uuid, None)

    def _leave_open(self, operation: Operation) -> None:
        self._operations[operation.tag.uuid] = operation
        self._locks.block(
            operation.tag.domain_uuid,
            "An earlier snapshot of the domain has not been settled; see the daemon's log.",
        )
        self._wake.set()

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
