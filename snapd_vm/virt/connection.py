"""Connections to libvirt: the event loop's thread, one connection for events, a pool for calls.

libvirtd reads at most max_client_requests (5 by default) calls at a time from one connection, so a
few hung guest agents would hold up every other call on it, a thaw among them. Each call therefore
has a connection of its own for as long as it lasts, from a pool; it costs 5 ms to open one. A round
trip to libvirtd takes 0.2 ms on a busy machine, and a Create is made of many.

libvirtaio touches the asyncio loop from libvirt's threads and loses events; what works is libvirt's
default event loop in a thread, with callbacks handed over through call_soon_threadsafe.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator

import libvirt

from snapd_vm import errors

log = logging.getLogger(__name__)

_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_COUNT = 3
_IDLE_CONNECTIONS = 4
_KNOWN_DOMAINS = 64
_OPEN_LIMIT_S = 20.0
_HUNG_OPENINGS = 64

_loop_lock = threading.Lock()
_loop_started = False


def start_event_loop() -> None:
    """Start libvirt's default event loop in a thread of its own, once in a process.

    Must come before the first connection (virEventRegisterDefaultImpl). The thread is a daemon
    thread: it ends with the process.
    """
    global _loop_started
    with _loop_lock:
        if _loop_started:
            return
        libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it prints to stderr
        libvirt.virEventRegisterDefaultImpl()

        def turn() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        threading.Thread(target=turn, name="libvirt-events", daemon=True).start()
        _loop_started = True


def open_connection(uri: str) -> libvirt.virConnect:
    """A new connection with keep-alive on, so that a call to a hung libvirtd ends within 20 s.

    Raises libvirt.libvirtError.
    """
    connection = libvirt.open(uri)
    with contextlib.suppress(libvirt.libvirtError):  # drivers inside the process have none
        connection.setKeepAlive(_KEEPALIVE_INTERVAL_S, _KEEPALIVE_COUNT)
    return connection


class _Line:
    """A connection, and the domains that were looked up on it."""

    def __init__(self, connection: libvirt.virConnect) -> None:
        self.connection = connection
        self._domains: dict[str, libvirt.virDomain] = {}

    def domain(self, uuid: str) -> libvirt.virDomain:
        """The domain of this UUID; libvirt finds it by that alone, so it is looked up once.

        What it says without asking libvirt (its ID and name) may be old. Raises libvirtError.
        """
        found = self._domains.get(uuid)
        if found is None:
            if len(self._domains) >= _KNOWN_DOMAINS:
                self._domains.clear()
            found = self._domains[uuid] = self.connection.lookupByUUIDString(uuid)
        return found


class ConnectionPool:
    """Connections for calls, one each; safe to use from any thread."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lock = threading.Lock()
        self._idle: list[_Line] = []
        # Two connections to a test driver are two worlds, unless they are one object.
        self._shared: libvirt.virConnect | None = None
        self._hung = 0  # openings under way

    def share(self, connection: libvirt.virConnect) -> None:
        """Use `connection` for every call, where a second one would see other domains."""
        self._shared = connection

    @contextlib.contextmanager
    def connection(self) -> Iterator[libvirt.virConnect]:
        """A connection that nobody else uses meanwhile; errors of libvirt become SnapdErrors."""
        with self._line() as line:
            yield line.connection

    @contextlib.contextmanager
    def domain(self, uuid: str) -> Iterator[libvirt.virDomain]:
        """A domain on such a connection, for calls; its own ID and name may be old."""
        with self._line() as line:
            yield line.domain(uuid)

    @contextlib.contextmanager
    def _line(self) -> Iterator[_Line]:
        with translated():
            if self._shared is not None:
                yield _Line(self._shared)
                return
            with self._lock:
                taken = self._idle.pop() if self._idle else None
            if taken is not None and not _alive(taken.connection):
                _close(taken.connection)
                taken = None
            if taken is None:
                taken = _Line(self._open())
            try:
                yield taken
            finally:
                with self._lock:
                    keep = len(self._idle) < _IDLE_CONNECTIONS and _alive(taken.connection)
                    if keep:
                        self._idle.append(taken)
                if not keep:
                    _close(taken.connection)

    def _open(self) -> libvirt.virConnect:
        """A new connection within a limit, which libvirt.open has none of.

        A libvirtd that accepts and does not answer leaves a thread behind, until it goes on or
        ends; a few of those at the most.
        """
        with self._lock:
            if self._hung >= _HUNG_OPENINGS:
                raise LibvirtFailed("libvirt does not answer; try again later.", 0, lost=True)
            self._hung += 1
        answer: queue.SimpleQueue[libvirt.virConnect | BaseException] = queue.SimpleQueue()
        abandoned = threading.Event()

        def opening() -> None:
            try:
                found: libvirt.virConnect | BaseException = open_connection(self._uri)
            except BaseException as error:  # it is raised by whoever waits
                found = error
            with self._lock:
                self._hung -= 1
            answer.put(found)
            if abandoned.is_set() and not isinstance(found, BaseException):
                _close(found)

        threading.Thread(target=opening, name="libvirt-open", daemon=True).start()
        try:
            found = answer.get(timeout=_OPEN_LIMIT_S)
        except queue.Empty:
            abandoned.set()
            raise LibvirtFailed(
                f"libvirt has not answered for {_OPEN_LIMIT_S:g} s; try again later.", 0, lost=True
            ) from None
        if isinstance(found, BaseException):
            raise found
        return found

    def drop(self) -> None:
        """Close all idle connections, as after libvirtd went away."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._shared = None
        for line in idle:
            _close(line.connection)


def _alive(connection: libvirt.virConnect) -> bool:
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False


def _close(connection: libvirt.virConnect) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        connection.close()


class LibvirtFailed(errors.HypervisorUnavailable):
    """libvirt refused or failed a call; `code` is its virErrorNumber, `lost` a lost connection."""

    dbus_name = errors.HypervisorUnavailable.dbus_name

    def __init__(self, message: str, code: int, lost: bool) -> None:
        super().__init__(message)
        self.code = code
        self.lost = lost


LOST_DOMAINS = (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn libvirt.libvirtError into the SnapdError that a caller is told."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise snapd_error(error) from error


def snapd_error(error: libvirt.libvirtError) -> errors.SnapdError:
    """The SnapdError for an error of libvirt's; the mapping is on virErrorNumber."""
    code = error.get_error_code() or 0
    message = " ".join((error.get_error_message() or str(error)).split())
    lost = error.get_error_domain() in LOST_DOMAINS and code in (
        libvirt.VIR_ERR_SYSTEM_ERROR,
        libvirt.VIR_ERR_INTERNAL_ERROR,
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_RPC,
    )
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return errors.NoSuchDomain("The domain is not there any more.")
    if code in (libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_ERR_BLOCK_COPY_ACTIVE):
        return errors.Busy(f"libvirt is busy with the domain: {message}.")
    if "No space left on device" in message:
        return errors.NoSpace(f"libvirt has no room: {message}.")
    return LibvirtFailed(f"libvirt says: {message}.", code, lost)
