"""The engine: domains, snapshots and operations in one place, behind service.Service.

Runs on the asyncio loop; blocking work goes to threads. Every operation is a task that the engine
holds, shielded from whoever asked for it. It knows the methods by their protocol alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from snapd_vm.engine import choice, create, delete, revert, select, stored
from snapd_vm.engine.create import Failed
from snapd_vm.engine.hearing import Hearing
from snapd_vm.engine.jobs import Jobs, Running
from snapd_vm.engine.journal import Operation, Step
from snapd_vm.engine.keeper import Keeper
from snapd_vm.engine.locks import DomainLocks
from snapd_vm.engine.service import Listener
from snapd_vm.engine.shelf import SPOILT, Shelf
from snapd_vm.engine.tasks import Tasks
from snapd_vm.engine.world import World
from snapd_vm.errors import (
    NOT_CONNECTED,
    Busy,
    HypervisorUnavailable,
    InvalidState,
    NoSuchDomain,
    SnapdError,
    StorageFailed,
    TimedOut,
)
from snapd_vm.journald import MessageId, fields
from snapd_vm.methods.method import Shows
from snapd_vm.model import (
    DiskReport,
    DiskRequest,
    Domain,
    Flags,
    Found,
    Job,
    Plan,
    Request,
    Result,
    Snapshot,
    SnapshotState,
    Tag,
    domain_path,
    snapshot_path,
)
from snapd_vm.virt.inventory import Inventory

log = logging.getLogger(__name__)
T = TypeVar("T")

Begin: TypeAlias = Callable[
    [World, Snapshot, Sequence[Snapshot], Mapping[str, Domain], int], Operation
]
"""Checks a delete or revert of a snapshot, and begins it: see delete.begin for what it is given."""

_AT_ONCE = 8
"""Creates at work at the same time; others wait. libvirtd serves 20 calls at a time in all, and
each hung agent holds one of them for as long as its timeout."""
_REST_S = 30.0
"""For libvirt, QEMU and the storage before a freeze: libvirt itself waits without limit for a QEMU
that hangs."""
_HANGS = "libvirt, QEMU or the storage do not answer; look at 'virsh domstate' and the host's log."
_PLANS_AT_ONCE = 4
"""Plans likewise; apart from Creates, so that they hold up none."""


class Engine:
    """See the top of the file; the documented members are those of service.Service."""

    def __init__(self, world: World, uri: str) -> None:
        self._world = world
        self._uri = uri
        self._inventory: Inventory | None = None
        self._locks = DomainLocks()
        self._reads = DomainLocks()
        self._shelf = Shelf(world, lambda: self.domains, lambda: self.connected)
        self._jobs = Jobs()
        self._keeper = Keeper(
            world, self._shelf, self._jobs, self._locks, lambda: self.connected, self._refreshed
        )
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._plan_slots = asyncio.Semaphore(_PLANS_AT_ONCE)
        self._tasks = Tasks()
        self.hearing = Hearing(world, self._shelf, self._keeper, self._tasks)

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
        return self._shelf.snapshots

    @property
    def jobs(self) -> Mapping[int, Job]:
        return self._jobs.jobs

    def subscribe(self, listener: Listener) -> None:
        self._shelf.listeners.append(listener)
        self._jobs.listeners.append(listener)

    def find(self, request: Request) -> Found:
        found = select.find(self.domains, request)
        if found.domain is None and not self.connected:
            return Found(error=HypervisorUnavailable(NOT_CONNECTED))  # it may well be there
        return found

    # -- start and end ---------------------------------------------------------------------------

    async def start(self, inventory: Inventory, limit: float) -> None:
        """Connect, read the journal and recover, for at most `limit` seconds.

        What can't be finished in that time stays closed (Busy) and is gone on with.
        """
        self._inventory = inventory
        await self._shelf.load()
        await self._keeper.load()
        first = self._tasks.spawn(self._first_recovery(inventory))
        _, late = await asyncio.wait([first], timeout=limit)
        if late:
            log.error("recovery has not ended within %g s and goes on", limit)
        self._tasks.spawn(self._shelf.keep_looking())
        self._tasks.spawn(self._shelf.keep_looking_ahead())

    async def _first_recovery(self, inventory: Inventory) -> None:
        """Connect and recover. Never cancelled: what runs in a thread would go on, unseen."""
        await inventory.start()
        self._tasks.spawn(self._keeper.keep_thawing())
        self._tasks.spawn(self._keeper.keep_settling())
        await self._keeper.tried.wait()

    def look_for_strays(self) -> None:
        """Tell, once, of our files that no record knows: beside all else, with libvirt there."""
        self._tasks.spawn(self._look_for_strays())

    async def _look_for_strays(self) -> None:
        from snapd_vm.engine import strays

        while True:
            await self.hearing.found.wait()
            try:
                count = await self._world.run(strays.look, self._world, dict(self.domains))
            except HypervisorUnavailable:  # again when libvirt is back
                self.hearing.found.clear()
                continue
            log.info("looked for our files that no record knows: %d", count)
            return

    def stop_taking(self) -> None:
        """Begin nothing new; what waits for its turn is refused."""
        self._tasks.closing = True

    async def close(self, limit: float) -> None:
        """Let what runs come to its end, for at most `limit` seconds."""
        await self._tasks.close(limit)
        if self._inventory is not None:
            await self._inventory.close()

    # -- Create and its kin ----------------------------------------------------------------------

    async def create(
        self, found: Sequence[Found], requests: Sequence[Request], uid: int
    ) -> Sequence[Snapshot]:
        uuid = _domain_of(found[0])
        pinned = [_pinned(one, request) for one, request in zip(found, requests, strict=True)]
        running = self._jobs.begin(
            "create",
            domain_uuid=uuid,
            disk=",".join(one.disk.target for one in found if one.disk is not None),
            name=requests[0].name,
            objects=(domain_path(uuid),),
            uid=uid,
            cancelable=True,
        )
        task = self._tasks.begin(
            self._as_job(running, self._create(uuid, pinned, running), _created)
        )
        programs = self._programs_s(uuid, requests)
        await asyncio.wait([task], timeout=self._patience + programs)
        if not task.done() and not running.give_up():
            config = self._world.config
            more = config.freeze_timeout_s + config.frozen_limit_s + _REST_S
            await asyncio.wait([task], timeout=more + programs)
            running.give_up(past_return=True)
        if not task.done():
            raise TimedOut(f"{_HANGS[:-1]}; what was begun is undone when they do.")
        return await asyncio.shield(task)

    async def delete(self, snapshot_uuid: str, uid: int) -> str:
        text = "A snapshot of the domain is being deleted; wait for its end."
        return await self._change("delete", delete.begin, snapshot_uuid, uid, text)

    async def revert(self, snapshot_uuid: str, uid: int) -> str:
        text = "A disk of the domain is being reverted; wait for its end."
        return await self._change("revert", revert.begin, snapshot_uuid, uid, text)

    async def _change(
        self, operation: str, begin: Begin, snapshot_uuid: str, uid: int, busy: str
    ) -> str:
        """A delete or revert as a job; `busy` is what other callers are told meanwhile."""
        snapshot = self._shelf.get(snapshot_uuid)
        running = self._jobs.begin(
            operation,
            domain_uuid=snapshot.domain_uuid,
            disk=snapshot.target.disk,
            name=snapshot.name,
            objects=(snapshot_path(snapshot_uuid),),
            uid=uid,
            cancelable=True,
        )
        work = self._changed(begin, snapshot_uuid, uid, busy, running)
        task = self._tasks.begin(self._as_job(running, work, lambda _disk: {}))
        return await asyncio.shield(task)

    async def cancel(self, number: int) -> None:
        await self._jobs.cancel(number)

    async def plan(self, found: Found, request: Request) -> Plan:
        uuid = _domain_of(found)
        programs = self._programs_s(uuid, [request])
        return await self._patiently(self._plan(uuid, _pinned(found, request)), programs)

    async def disks(self, domain_uuid: str) -> Sequence[DiskReport]:
        self._require_connection()
        programs = self._programs_s(domain_uuid, [])
        return await self._patiently(self._disks(domain_uuid), programs)

    async def set_method(self, found: Found, request: Request, method_xml: str) -> None:
        pinned = _pinned(found, request)
        await self._patiently(self._set_method(pinned, method_xml))

    async def stored_method(self, found: Found, request: Request) -> str:
        self._require_connection()
        return await self._patiently(self._stored_method(_pinned(found, request)))

    async def backup_source(self, snapshot_uuid: str) -> str:
        program = self._program_s(self._shelf.get(snapshot_uuid))
        return await self._patiently(self._backup_source(snapshot_uuid), program)

    async def _backup_source(self, snapshot_uuid: str) -> str:
        snapshot = self._shelf.get(snapshot_uuid)
        await self._refreshed(snapshot.domain_uuid)
        snapshot = await self._shelf.look(snapshot)
        if snapshot.state is SnapshotState.DELETING:
            raise Busy("The snapshot is being deleted, and its contents with it.")
        if snapshot.state is SnapshotState.MISSING:
            raise StorageFailed("The snapshot's storage is gone; there is nothing to read.")
        if snapshot.spoilt:
            raise InvalidState(SPOILT)
        if snapshot.state is SnapshotState.FAILED:
            raise InvalidState(
                "A domain's definition names, or somebody has changed, the image that the "
                "snapshot is, or it has overflowed, so that its contents are not sure; the "
                "daemon's log says which."
            )
        method: object = self._world.methods.get(snapshot.target.method)
        if isinstance(method, Shows):
            await self._world.run(method.show, snapshot.target)
        return snapshot.backup_source

    async def modified_disk(self, snapshot_uuid: str) -> str:
        snapshot = self._shelf.get(snapshot_uuid)
        await self._refreshed(snapshot.domain_uuid)
        domain = self.domains.get(snapshot.domain_uuid)
        disk = domain.disk(snapshot.target.disk) if domain is not None else None
        if not snapshot.modified_disk or disk is None:
            return snapshot.modified_disk
        return disk.xml

    async def _create(
        self, uuid: str, requests: Sequence[Request], watch: Running
    ) -> Sequence[Snapshot]:
        world = self._world
        async with self._locks.hold(uuid, world.config.lock_timeout_s, watch):
            self._require_connection()
            self.hearing.resumed.discard(uuid)
            remembered = [self.find(request) for request in requests]
            known = self._shelf.of(uuid)
            try:
                async with self._slot():
                    taken = await world.run(
                        create.take,
                        world,
                        uuid,
                        requests,
                        known,
                        remembered,
                        lambda: uuid in self.hearing.resumed,
                        watch,
                    )
            except Failed as failed:
                await self._keeper.undo(failed)
                raise failed.error from None
            operation = taken.operation
            held = taken.holding if taken.held else None
            if held is not None:
                self._keeper.hold(held)
            if watch.cancelled:  # nobody waits for it any more
                error = TimedOut("It took so long that its caller was told it had failed.")
                await self._keeper.undo(Failed(error, operation, held))
                raise error
            # What an earlier freeze, which may come late, has left in the journal stays there.
            release = taken.holding is not None and not self._keeper.holds(uuid)
            try:
                await world.run(world.journal.end, operation, taken.snapshots, release=release)
            except SnapdError as error:
                await self._keeper.undo(Failed(error, operation, held))
                raise
            world.reach(Step.ENDED)
            for snapshot in taken.snapshots:
                log.info(
                    "created snapshot %s of disk %s of domain %s: %s",
                    snapshot.name,
                    snapshot.target.disk,
                    snapshot.domain_name,
                    snapshot.consistency,
                    extra=fields(MessageId.CREATED, snapshot, frozen_us=snapshot.frozen_us),
                )
                self._shelf.add(snapshot)
            # Memory is true before the caller is answered.
            if self._inventory is None or not self._inventory.replace(
                remembered[0].domain, taken.domain
            ):
                await self._refreshed(uuid)
            return taken.snapshots

    async def _plan(self, uuid: str, request: Request) -> Plan:
        """Under the domain's lock, as Create is: both ask the agent, with a response timeout that
        is the domain's and not the caller's, and put back what they found."""
        world = self._world
        async with self._locks.hold(uuid, world.config.lock_timeout_s), self._plan_slots:
            self._require_connection()
            known = self._shelf.of(uuid)
            return await world.run(choice.plan, world, uuid, request, known)

    async def _set_method(self, request: Request, method_xml: str) -> None:
        """Under the domain's lock: what is stored for its other disks is read and written again."""
        async with self._locks.hold(request.uuid, self._world.config.lock_timeout_s):
            self._require_connection()
            await self._world.run(stored.store, self._world, request, method_xml)
            await self._refreshed(request.uuid)

    async def _stored_method(self, request: Request) -> str:
        async with self._reads.hold(request.uuid, self._patience):
            return await self._world.run(stored.read, self._world, request)

    async def _disks(self, uuid: str) -> Sequence[DiskReport]:
        """One at a time for each domain, so that a QEMU that hangs takes one thread of ours."""
        async with self._reads.hold(uuid, self._patience):
            return await self._world.run(self._disk_reports, uuid)

    async def _changed(
        self, begin: Begin, snapshot_uuid: str, uid: int, busy: str, watch: Running
    ) -> str:
        world = self._world
        uuid = self._shelf.get(snapshot_uuid).domain_uuid
        async with self._locks.hold(uuid, world.config.lock_timeout_s, watch):
            self._require_connection()
            snapshot = self._shelf.get(snapshot_uuid)
            look = self._shelf.look(snapshot)
            snapshot = await self._patiently(look, self._program_s(snapshot))
            others = [one for one in self._shelf.of(uuid) if one.uuid != snapshot_uuid]
            domains = dict(self.domains)
            operation = await world.run(begin, world, snapshot, others, domains, uid)
            self._locks.block(uuid, busy)
            try:
                await self._keeper.change(operation, watch)
            finally:
                if not self._keeper.is_open(uuid):
                    self._locks.unblock(uuid)
        if not snapshot.modified_disk:  # the domain has used the same image all the time
            return ""
        domain = self.domains.get(uuid)
        disk = domain.disk(snapshot.target.disk) if domain is not None else None
        return disk.xml if disk is not None else ""

    async def _as_job(
        self,
        running: Running,
        work: Coroutine[Any, Any, T],
        result: Callable[[T], Result],
    ) -> T:
        """Run it, and let its job end with it."""
        try:
            value = await work
        except BaseException as error:
            running.end(error, {})
            raise
        running.end(None, result(value))
        return value

    def _disk_reports(self, uuid: str) -> Sequence[DiskReport]:
        world = self._world
        domain = world.hypervisor.read(uuid)
        tag = Tag("00000000-0000-0000-0000-000000000000", "NAME", uuid, domain.name, 0)
        reports = []
        for disk in domain.disks:
            request = Request(DiskRequest(disk.target), None, "", Flags(0))
            try:
                method, _, why = select.choose_reachable(world.methods, domain, disk, request, tag)
                job = world.hypervisor.running_job(uuid, disk.target)
                reports.append(DiskReport(disk, "" if job else method.name, job or why))
            except SnapdError as error:
                reports.append(DiskReport(disk, "", str(error)))
        return reports

    # -- small things ----------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """One of the places for Creates at work. Raises Busy where none is free in time."""
        limit = self._world.config.lock_timeout_s
        try:
            await asyncio.wait_for(self._slots.acquire(), limit)
        except TimeoutError:
            raise Busy(
                f"{_AT_ONCE} other operations have not ended within {limit:g} s; try again later."
            ) from None
        try:
            yield
        finally:
            self._slots.release()

    def _require_connection(self) -> None:
        self._tasks.require_open()
        if not self.connected:
            raise HypervisorUnavailable(NOT_CONNECTED)

    async def _refreshed(self, uuid: str) -> None:
        """Read the domain again now, so that memory is true before the caller is answered."""
        if self._inventory is not None:
            try:
                await self._inventory.refresh(uuid)
            except SnapdError as error:
                log.debug("domain %s was not read again: %s", uuid, error)

    async def _patiently(self, work: Coroutine[Any, Any, T], programs: float = 0) -> T:
        """The outcome of what may go on when nobody waits for it: it changes nothing, or lets a
        source be there. `programs` is from _programs_s or _program_s. Raises TimedOut.
        """
        task = self._tasks.begin(work)
        await asyncio.wait([task], timeout=self._patience + programs)
        if not task.done():
            raise TimedOut(_HANGS)
        return await asyncio.shield(task)

    @property
    def _patience(self) -> float:
        """Seconds that a caller waits for what can be undone: its turn, the agent, and the rest."""
        config = self._world.config
        return 2 * config.lock_timeout_s + config.agent_timeout_s + _REST_S

    def _programs_s(self, uuid: str, requests: Sequence[Request]) -> float:
        """Seconds that programs which are methods may take besides, where one is asked for, or
        stored for a disk of the domain: a run for each disk, and one for all.
        """
        domain = self.domains.get(uuid)
        stored = domain.methods if domain is not None else {}
        asked = [one.wanted_method.method for one in requests if one.wanted_method is not None]
        limits = [
            one.timeout_s
            for one in self._world.config.executable
            if one.name in asked or any(one.name in text for text in stored.values())
        ]
        return (max(len(requests), len(stored)) + 1) * max(limits, default=0)

    def _program_s(self, snapshot: Snapshot) -> float:
        """The same for a look at a snapshot that a program has made."""
        method, programs = snapshot.target.method, self._world.config.executable
        return max((one.timeout_s for one in programs if one.name == method), default=0)


def _domain_of(found: Found) -> str:
    if found.domain is None:
        raise found.error or NoSuchDomain("There is no such domain.")
    return found.domain.uuid


def _created(snapshots: Sequence[Snapshot]) -> Result:
    """The result of a Create's job: its XML names paths, and properties are open to all."""
    return {"snapshots": [snapshot_path(snapshot.uuid) for snapshot in snapshots]}


def _pinned(found: Found, request: Request) -> Request:
    """The request with the domain that was authorised, whatever becomes of its name."""
    return dataclasses.replace(request, uuid=_domain_of(found), domain="")
