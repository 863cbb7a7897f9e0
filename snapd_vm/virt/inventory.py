"""The domains that libvirt has, held in memory, kept true by its events; reconnects by itself.

Runs on the asyncio loop; what blocks runs in threads. It tells one listener of every change, and
knows nothing of snapshots or of the bus.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import libvirt

from snapd_vm.errors import NOT_CONNECTED, HypervisorUnavailable, NoSuchDomain, SnapdError
from snapd_vm.model import Domain
from snapd_vm.virt.connection import ConnectionPool, open_connection, snapd_error, start_event_loop
from snapd_vm.virt.hypervisor import read_domain

log = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0
_OPEN_LIMIT_S = 30.0

_REREAD_S = 30.0
"""libvirt tells nothing of a change to a definition alone (virDomainDetachDeviceFlags with
AFFECT_CONFIG); so all are read again this often."""


class InventoryListener(Protocol):
    """Who is told of changes, on the event loop."""

    def domain_added(self, domain: Domain) -> None: ...
    def domain_changed(self, old: Domain, new: Domain) -> None: ...
    def domain_removed(self, domain: Domain) -> None: ...
    def domain_resumed(self, uuid: str) -> None: ...
    def domain_stopped(self, uuid: str, clean: bool, ended: bool) -> None: ...
    def connection_changed(self, connected: bool) -> None: ...


class Inventory:
    """The domains by UUID, and whether libvirt is connected."""

    def __init__(
        self, uri: str, pool: ConnectionPool, executor: ThreadPoolExecutor, out: InventoryListener
    ) -> None:
        self.domains: dict[str, Domain] = {}
        self.connected = False
        self._uri = uri
        self._pool = pool
        self._executor = executor
        self._out = out
        self._loop = asyncio.get_running_loop()
        self._connection: libvirt.virConnect | None = None
        self._closed = asyncio.Event()
        self._reading: set[str] = set()
        self._again: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._first_try = asyncio.Event()
        self._opening: asyncio.Future[libvirt.virConnect] | None = None
        self._early: set[str] | None = None  # domains with events while all are being read
        self._ended: set[str] = set()  # domains whose guests were not what ended them

    async def start(self) -> None:
        """Connect and go on keeping connected; returns after the first try, whatever it gave."""
        start_event_loop()
        self._keeper = asyncio.create_task(self._keep_connected())
        await self._first_try.wait()

    async def close(self) -> None:
        """Stop keeping connected, and close the connection."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._disconnect()

    async def refresh(self, uuid: str) -> Domain:
        """Read a domain again now, tell of what changed, and return it. Raises NoSuchDomain."""
        connection = self._connection
        if connection is None:
            raise HypervisorUnavailable(NOT_CONNECTED)
        try:
            new: Domain = await self._run(_read, connection, uuid)
        except libvirt.libvirtError as error:
            translated = snapd_error(error)
            if isinstance(translated, NoSuchDomain):
                self._put(uuid, None)
            raise translated from error
        self._put(uuid, new)
        return new

    def replace(self, old: Domain | None, new: Domain) -> bool:
        """Take `new`, read by somebody else, in the place of `old`; whether it was.

        It is not where another reading has come since `old` was held, or is under way: that one
        may be newer, or older and come later.
        """
        if old is None or self.domains.get(new.uuid) is not old or new.uuid in self._reading:
            return False
        self._put(new.uuid, new)
        return True

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return await self._loop.run_in_executor(self._executor, function, *args)

    async def _keep_connected(self) -> None:
        delay = _FIRST_DELAY_S
        while True:
            try:
                await self._connect()
            except Exception as error:  # whatever it is, there is nothing but to try again
                log.log(
                    logging.WARNING if delay == _FIRST_DELAY_S else logging.DEBUG,
                    "libvirt at %s can't be reached: %s",
                    self._uri,
                    error,
                )
                self._first_try.set()
                await self._disconnect()
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LONGEST_DELAY_S)
                continue
            delay = _FIRST_DELAY_S
            self.connected = True
            log.info("connected to libvirt at %s, %d domains", self._uri, len(self.domains))
            self._out.connection_changed(True)
            self._first_try.set()
            await self._keep_reading()
            log.warning("the connection to libvirt at %s is lost", self._uri)
            self.connected = False
            self._out.connection_changed(False)
            await self._disconnect()

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._run(_close, connection)
        await self._run(self._pool.drop)

    async def _keep_reading(self) -> None:
        """Read all domains now and again, until the connection is closed."""
        while True:
            try:
                await asyncio.wait_for(self._closed.wait(), _REREAD_S)
                return
            except TimeoutError:
                pass
            try:
                found: list[str] = await self._run(_uuids, self._connection)
            except libvirt.libvirtError as error:
                log.debug("domains were not listed: %s", error)
                continue
            for uuid in {*found, *self.domains} - self._reading:
                self._reading.add(uuid)
                await self._reread_now(uuid)

    async def _open(self) -> libvirt.virConnect:
        """A new connection. libvirt.open has no limit of its own: one try is under way at most."""
        if self._opening is None:
            self._opening = self._loop.run_in_executor(self._executor, open_connection, self._uri)
        done, _ = await asyncio.wait([self._opening], timeout=_OPEN_LIMIT_S)
        if not done:
            raise TimeoutError("libvirt accepts the connection and does not answer")
        opening, self._opening = self._opening, None
        return opening.result()

    async def _connect(self) -> None:
        self._closed.clear()
        connection = await self._open()
        self._connection = connection
        self._early = set()
        if connection.getType().lower() == "test":
            self._pool.share(connection)
        await self._run(self._register, connection)
        found: list[Domain] = await self._run(_read_all, connection)
        for uuid in self.domains.keys() - {domain.uuid for domain in found}:
            self._put(uuid, None)
        for domain in found:
            self._put(domain.uuid, domain)
        early, self._early = self._early, None
        for uuid in early or ():  # what was read may be older than these events
            self._reread(uuid)

    def _register(self, connection: libvirt.virConnect) -> None:
        """Subscribe to the events that change what we hold; called in a thread."""

        def closed(_connection: object, reason: int, _opaque: object) -> None:
            self._post(self._on_closed, connection, reason)

        connection.registerCloseCallback(closed, None)
        optional = {
            libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE: self._event,
            libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2: self._event,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED: self._event,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED: self._event,
            libvirt.VIR_DOMAIN_EVENT_ID_DISK_CHANGE: self._event,
            libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE: self._event,
        }
        connection.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None
        )
        for event, callback in optional.items():
            try:
                connection.domainEventRegisterAny(None, event, callback, None)
            except libvirt.libvirtError as error:  # drivers without that event
                log.debug("no event %d: %s", event, error)

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        """From libvirt's thread to the loop; nothing is left to tell once the loop has closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _lifecycle(self, _c: object, domain: Any, event: int, detail: int, _o: object) -> None:
        self._post(self._on_lifecycle, domain.UUIDString(), event, detail)

    def _event(self, _c: object, domain: Any, *_rest: object) -> None:
        self._post(self._reread, domain.UUIDString())

    def _on_closed(self, connection: libvirt.virConnect, reason: int) -> None:
        if connection is self._connection:
            log.debug("libvirt closed the connection, reason %d", reason)
            self._closed.set()

    def _on_lifecycle(self, uuid: str, event: int, detail: int) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_RESUMED:
            self._out.domain_resumed(uuid)
        elif event == libvirt.VIR_DOMAIN_EVENT_SHUTDOWN:
            # QEMU ends by a signal, or because somebody asks its monitor for it. To libvirt the
            # domain was shut down all the same; its guest knows nothing of it.
            if detail == libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_HOST:
                self._ended.add(uuid)
                self._out.domain_stopped(uuid, False, True)  # before its images are let go
            else:
                self._ended.discard(uuid)
        elif event == libvirt.VIR_DOMAIN_EVENT_STARTED:
            self._ended.discard(uuid)
        elif event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            if detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED:
                log.info("domain %s was migrated away", uuid)
            # Saved and migrated are no more a shut down than destroyed or crashed: the file
            # systems were in use.
            ended = uuid in self._ended
            self._ended.discard(uuid)
            clean = detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN and not ended
            self._out.domain_stopped(uuid, clean, ended)
        self._reread(uuid)

    def _reread(self, uuid: str) -> None:
        """Read the domain again soon; events that come meanwhile cause one more reading."""
        if self._early is not None:
            self._early.add(uuid)
            return
        if uuid in self._reading:
            self._again.add(uuid)
            return
        self._reading.add(uuid)
        task = asyncio.create_task(self._reread_now(uuid))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reread_now(self, uuid: str) -> None:
        try:
            while True:
                self._again.discard(uuid)
                try:
                    await self.refresh(uuid)
                except NoSuchDomain:
                    pass
                except SnapdError as error:
                    log.debug("domain %s was not read: %s", uuid, error)
                if uuid not in self._again:
                    return
        finally:
            self._reading.discard(uuid)

    def _put(self, uuid: str, new: Domain | None) -> None:
        old = self.domains.get(uuid)
        if new is None:
            if old is not None:
                del self.domains[uuid]
                self._out.domain_removed(old)
        elif old is None:
            self.domains[uuid] = new
            self._out.domain_added(new)
        elif new != old:
            self.domains[uuid] = new
            self._out.domain_changed(old, new)


def _read(connection: libvirt.virConnect, uuid: str) -> Domain:
    return read_domain(connection.lookupByUUIDString(uuid))


def _uuids(connection: libvirt.virConnect) -> list[str]:
    return [domain.UUIDString() for domain in connection.listAllDomains()]


def _read_all(connection: libvirt.virConnect) -> list[Domain]:
    found = []
    for domain in connection.listAllDomains():
        try:
            found.append(read_domain(domain))
        except libvirt.libvirtError as error:  # gone between the two calls
            log.debug("domain %s was not read: %s", domain.name(), error)
        except SnapdError as error:  # which keeps nobody from the others
            log.warning("domain %s is not served: %s", domain.name(), error)
    return found


def _close(connection: libvirt.virConnect) -> None:
    try:
        connection.close()
    except libvirt.libvirtError as error:
        log.debug("closing the connection to libvirt: %s", error)
