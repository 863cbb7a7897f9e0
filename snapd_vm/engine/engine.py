"""The engine: domains, snapshots and operations in one place, behind service.Service.

Runs on the asyncio loop; blocking work goes to threads. Every operation is a task that the engine
holds, shielded from whoever asked for it. It knows the methods by their protocol alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from snapd_vm.engine import create, recovery, select
from snapd_vm.engine.create import Failed
from snapd_vm.engine.journal import Held, Operation, Step
from snapd_vm.engine.locks import DomainLocks
from snapd_vm.engine.service import Listener
from snapd_vm.engine.world import World
from snapd_vm.errors import (
    Cancelled,
    HypervisorUnavailable,
    Internal,
    NoSuchDomain,
    NoSuchSnapshot,
    SnapdError,
    StorageFailed,
)
from snapd_vm.model import (
    DiskReport,
    DiskRequest,
    Domain,
    Flags,
    Found,
    Plan,
    Request,
    Snapshot,
    SnapshotState,
    Tag,
)
from snapd_vm.virt.inventory import Inventory

log = logging.getLogger(__name__)
T = TypeVar("T")

_RETRY_S = 1.0
_LOOK_S = 30.0
_UNDO_WAIT_S = 20.0
_AT_ONCE = 8
"""Creates at work at the same time; others wait. libvirtd serves 20 calls at a time in all, and
each hung agent holds one of them for as long as its timeout."""


class Engine:
    """See the top of the file; the documented members are those of service.Service."""

    def __init__(self, world: World, uri: str) -> None:
        self._world = world
        self._uri = uri
        self._inventory: Inventory | None = None
        self._listeners: list[Listener] = []
        self._snapshots: dict[str, Snapshot] = {}
        self._operations: dict[str, Operation] = {}
        self._held: dict[str, Held] = {}
        self._resumed: set[str] = set()
        self._locks = DomainLocks()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._work: set[asyncio.Task[Any]] = set()
        self._wake = asyncio.Event()
        self._closing = False

    # -- what the bus asks from memory -----------------------------------------------------------

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def connected(self) -> bool:
        return self._inventory is not None and self._inventory.connected

    @property
    def methods(self) -> Sequence[str]:
        return list(self._world.methods)

    @property
    def domains(self) -> Mapping[str, Domain]:
        return self._inventory.domains if self._inventory is not None else {}

    @property
    def snapshots(self) -> Mapping[str, Snapshot]:
        return self._snapshots

    def subscribe(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def find(self, request: Request) -> Found:
        return select.find(self.domains, request)

    # -- start and end ---------------------------------------------------------------------------

    async def start(self, inventory: Inventory, limit: float) -> None:
        """Connect, read the journal and recover, for at most `limit` seconds.

        What can't be finished in that time stays closed (Busy) and is gone on with.
        """
        self._inventory = inventory
        run = self._world.run
        self._snapshots = {s.uuid: s for s in await run(self._world.journal.snapshots)}
        for operation in await run(self._world.journal.operations):
            self._stays_open(operation)
        for held in await run(self._world.journal.held):
            self._held[held.domain_uuid] = held
        await inventory.start()
        try:
            await asyncio.wait_for(self._recover(), limit)
        except TimeoutError:
            log.error("recovery has not ended within %g s and goes on", limit)
        self._spawn(self._keep_recovering())
        self._spawn(self._keep_looking())

    async def close(self, limit: float) -> None:
        """Let what runs come to its end, for at most `limit` seconds; take nothing new."""
        self._closing = True
        if self._work:
            log.info("waiting for %d operations", len(self._work))
            await asyncio.wait(self._work, timeout=limit)
        for task in [*self._tasks, *self._work]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._work, return_exceptions=True)
        if self._inventory is not None:
            await self._inventory.close()

    # -- Create and its kin ----------------------------------------------------------------------

    async def create(self, found: Found, request: Request) -> Snapshot:
        uuid = _domain_of(found)
        return await self._shielded(self._create(uuid, _pinned(found, request)))

    async def plan(self, found: Found, request: Request) -> Plan:
        self._require_connection()
        uuid = _domain_of(found)
        request = _pinned(found, request)
        world = self._world
        choice = await world.run(create.choose, world, uuid, request, self._names(uuid))
        return await world.run(create.plan, world, choice, request.flags)

    async def disks(self, domain_uuid: str) -> Sequence[DiskReport]:
        self._require_connection()
        return await self._world.run(self._disk_reports, domain_uuid)

    async def backup_source(self, snapshot_uuid: str) -> str:
        snapshot = await self._look(self._snapshot(snapshot_uuid))
        if snapshot.state is SnapshotState.MISSING:
            raise StorageFailed("The snapshot's storage is gone; there is nothing to read.")
        return snapshot.backup_source

    async def modified_disk(self, snapshot_uuid: str) -> str:
        snapshot = self._snapshot(snapshot_uuid)
        domain = self.domains.get(snapshot.domain_uuid)
        disk = domain.disk(snapshot.target.disk) if domain is not None else None
        if not snapshot.modified_disk or disk is None:
            return snapshot.modified_disk
        return disk.xml

    async def _create(self, uuid: str, request: Request) -> Snapshot:
        world = self._world
        async with self._locks.hold(uuid, world.config.lock_timeout_s), self._slots:
            self._require_connection()
            self._resumed.discard(uuid)
            choice = await world.run(create.choose, world, uuid, request, self._names(uuid))
            try:
                operation, snapshots, held = await world.run(
                    create.take, world, choice, request.flags, lambda: uuid in self._resumed
                )
            except Failed as failed:
                await self._undo(failed)
                raise failed.error from None
            if held:
                self._hold(Held(uuid, choice.domain.name, None))
            try:
                await world.run(world.journal.end, operation, snapshots, release=not held)
            except SnapdError as error:
                await self._undo(Failed(error, operation, held=held))
                raise
            world.reach(Step.ENDED)
            for snapshot in snapshots:
                self._add(snapshot)
            await self._refreshed(uuid)
            return snapshots[0]

    def _disk_reports(self, uuid: str) -> Sequence[DiskReport]:
        world = self._world
        domain = world.hypervisor.read(uuid)
        tag = Tag("00000000-0000-0000-0000-000000000000", "NAME", uuid, domain.name, 0)
        reports = []
        for disk in domain.disks:
            request = Request(DiskRequest(disk.target), None, "", Flags(0))
            try:
                method, _, why = select.choose_method(world.methods, domain, disk, request, tag)
                job = world.hypervisor.running_job(uuid, disk.target)
                reports.append(DiskReport(disk, "" if job else method.name, job or why))
            except SnapdError as error:
                reports.append(DiskReport(disk, "", str(error)))
        return reports

    # -- failure and recovery --------------------------------------------------------------------

    async def _undo(self, failed: Failed) -> None:
        """Thaw, then undo; what can't be done now is done by `_keep_recovering`."""
        operation = failed.operation
        uuid = operation.tag.domain_uuid
        log.error("create %s of domain %s failed: %s", operation.tag.label, uuid, failed.error)
        if failed.held:
            await self._hold_again(uuid)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_UNDO_WAIT_S):
                await self._until_reachable(uuid)
                if uuid in self._held:
                    await self._release(self._held[uuid])
        lasting = dataclasses.replace(operation, failed=True)
        if not await self._settle(lasting, keep=False):
            await self._world.run(self._world.journal.begin, lasting)
            self._stays_open(lasting)

    async def _settle(self, operation: Operation, *, keep: bool) -> bool:
        """Settle an operation and write its end down; whether that could be done now."""
        world, uuid = self._world, operation.tag.domain_uuid
        try:
            standing = await world.run(recovery.settle, world, operation, keep=keep)
            release = uuid not in self._held
            await world.run(world.journal.end, operation, standing, release=release)
        except SnapdError as error:
            log.error(
                "create %s of domain %s is not settled: %s",
                operation.tag.label,
                operation.tag.domain_name,
                error,
            )
            return False
        for snapshot in standing:
            self._add(snapshot)
        log.info(
            "settled create %s of domain %s: %s",
            operation.tag.label,
            operation.tag.domain_name,
            "the snapshot stands" if standing else "nothing is left of it",
        )
        await self._refreshed(uuid)
        return True

    async def _recover(self) -> None:
        """Thaw what is held and settle what was begun, as far as it can be done now."""
        if not self.connected:
            return
        for held in list(self._held.values()):
            await self._release(held)
        for operation in list(self._operations.values()):
            if await self._settle(operation, keep=not operation.failed):
                del self._operations[operation.tag.uuid]
                self._locks.unblock(operation.tag.domain_uuid)

    async def _keep_recovering(self) -> None:
        while True:
            waits = _RETRY_S if self._held or self._operations else None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), waits)
            self._wake.clear()
            try:
                await self._recover()
            except SnapdError as error:
                log.error("recovery goes on later: %s", error)

    async def _release(self, held: Held) -> None:
        if await self._world.run(recovery.thaw, self._world, held):
            await self._world.run(self._world.journal.release, held.domain_uuid)
            self._held.pop(held.domain_uuid, None)

    def _hold(self, held: Held) -> None:
        self._held.setdefault(held.domain_uuid, held)
        self._wake.set()

    async def _hold_again(self, uuid: str) -> None:
        for held in await self._world.run(self._world.journal.held):
            if held.domain_uuid == uuid:
                self._hold(held)

    def _stays_open(self, operation: Operation) -> None:
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

    # -- snapshots on record ---------------------------------------------------------------------

    def _snapshot(self, uuid: str) -> Snapshot:
        snapshot = self._snapshots.get(uuid)
        if snapshot is None:
            raise NoSuchSnapshot("There is no such snapshot.")
        return snapshot

    def _names(self, domain_uuid: str) -> frozenset[str]:
        return frozenset(
            f"{s.target.disk}/{s.name}"
            for s in self._snapshots.values()
            if s.domain_uuid == domain_uuid
        )

    def _add(self, snapshot: Snapshot) -> None:
        self._snapshots[snapshot.uuid] = snapshot
        for listener in self._listeners:
            listener.snapshot_added(snapshot)

    async def _look(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the State that the storage and libvirt give it now."""
        domain = self.domains.get(snapshot.domain_uuid)
        method = self._world.methods.get(snapshot.target.method)
        if method is None or not self.connected:
            return snapshot
        found = SnapshotState(await self._world.run(method.state, snapshot.target, domain))
        current = self._snapshots.get(snapshot.uuid)
        if current is None or found is current.state:
            return current or snapshot
        new = dataclasses.replace(current, state=found)
        self._snapshots[new.uuid] = new
        log.warning("snapshot %s of %s is %s", new.name, new.domain_name, found)
        await self._world.run(self._world.journal.put, new)
        for listener in self._listeners:
            listener.snapshot_changed(current, new)
            if found is SnapshotState.FAILED:
                listener.warning(
                    new,
                    "base-in-use",
                    "A domain's definition names the image that the snapshot is; correct it, or "
                    "the next start loses what was written since.",
                )
        return new

    async def _keep_looking(self) -> None:
        while True:
            for snapshot in list(self._snapshots.values()):
                try:
                    await self._look(snapshot)
                except SnapdError as error:
                    log.warning("snapshot %s was not looked at: %s", snapshot.uuid, error)
            await asyncio.sleep(_LOOK_S)

    async def _look_at_domain(self, uuid: str) -> None:
        for snapshot in [s for s in self._snapshots.values() if s.domain_uuid == uuid]:
            await self._look(snapshot)

    # -- what the inventory tells ----------------------------------------------------------------

    def domain_added(self, domain: Domain) -> None:
        for listener in self._listeners:
            listener.domain_added(domain)
        self._spawn(self._look_at_domain(domain.uuid))

    def domain_changed(self, old: Domain, new: Domain) -> None:
        for listener in self._listeners:
            listener.domain_changed(old, new)
        self._spawn(self._look_at_domain(new.uuid))

    def domain_removed(self, domain: Domain) -> None:
        for listener in self._listeners:
            listener.domain_removed(domain)
        self._spawn(self._look_at_domain(domain.uuid))

    def domain_resumed(self, uuid: str) -> None:
        self._resumed.add(uuid)

    def domain_stopped(self, uuid: str, clean: bool) -> None:
        self._spawn(self._world.run(self._world.journal.stopped, uuid, clean=clean))

    def connection_changed(self, connected: bool) -> None:
        for listener in self._listeners:
            listener.connection_changed(connected)
        if connected:
            self._wake.set()

    # -- small things ----------------------------------------------------------------------------

    def _require_connection(self) -> None:
        if not self.connected:
            raise HypervisorUnavailable("libvirt is not connected; try again when it is back.")

    async def _refreshed(self, uuid: str) -> None:
        """Read the domain again now, so that memory is true before the caller is answered."""
        if self._inventory is not None:
            try:
                await self._inventory.refresh(uuid)
            except SnapdError as error:
                log.debug("domain %s was not read again: %s", uuid, error)

    async def _shielded(self, work: Coroutine[Any, Any, T]) -> T:
        """Run an operation to its end, whatever becomes of the caller's task."""
        if self._closing:
            work.close()
            raise Cancelled("The daemon is stopping; try again when it is back.")
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        task.add_done_callback(_consume)
        return await asyncio.shield(task)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_consume)
        return task


def _consume(task: asyncio.Task[Any]) -> None:
    """Log what nobody awaits any more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        if isinstance(error, SnapdError) and not isinstance(error, Internal):
            log.debug("an operation ended with: %s", error)
        else:
            log.error("an operation ended with a stray error", exc_info=error)


def _domain_of(found: Found) -> str:
    if found.domain is None:
        raise found.error or NoSuchDomain("There is no such domain.")
    return found.domain.uuid


def _pinned(found: Found, request: Request) -> Request:
    """The request with the domain that was authorised, whatever becomes of its name."""
    return dataclasses.replace(request, uuid=_domain_of(found), domain="")
