"""The client's end of the bus: one connection, calls, and failures as sentences for a person.

It knows D-Bus and the addresses of the contract; it does not know the command line, prints
nothing, and has no behaviour of the daemon's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageFlag, MessageType
from dbus_next.errors import AuthError, DBusError, InvalidAddressError
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_vm.errors import PREFIX

SERVICE = "org.example.DiskSnapshot"
ROOT = "/org/example/DiskSnapshot"
MANAGER = SERVICE + ".Manager"
DOMAIN = SERVICE + ".Domain"
SNAPSHOT = SERVICE + ".Snapshot"
JOB = SERVICE + ".Job"
_BUS = "org.freedesktop.DBus"

Objects = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""What GetManagedObjects says: path -> interface -> property -> value."""

_ABSENT = (
    "The snapd-vm service is not running: start it, for example with 'systemctl start snapd-vm'."
)
_HINTS = {
    "org.freedesktop.DBus.Error.ServiceUnknown": _ABSENT,
    "org.freedesktop.DBus.Error.NameHasNoOwner": _ABSENT,
    "org.freedesktop.DBus.Error.NoReply": (
        "The snapd-vm service left the bus before it answered: see its log, and 'snapd-vm list' for"
        " what came of the call."
    ),
    "org.freedesktop.DBus.Error.AccessDenied": (
        "The bus does not let you talk to the snapd-vm service: its D-Bus policy is not installed,"
        " or forbids it."
    ),
    "org.freedesktop.DBus.Error.UnknownObject": "The snapd-vm service no longer has this object.",
    "org.freedesktop.DBus.Error.UnknownMethod": (
        "The snapd-vm service does not know this call: it is of another version than the command."
    ),
}
_AGENT = "run this as root, or with a polkit authentication agent (for example pkttyagent)"


class CallError(Exception):
    """A call that did not succeed; `name` is the D-Bus error's, or empty where there is none."""

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal of the service, variants unpacked."""

    path: str
    member: str
    body: Sequence[Any]


@asynccontextmanager
async def connect(*, background: bool = False) -> AsyncIterator[Service]:
    """The service on the system bus, or where DBUS_SYSTEM_BUS_ADDRESS says. Raises CallError.

    `background` is for shell completion: it asks nobody for a password and starts no service.
    """
    # Without this flag polkit may not ask; with it, an agent that is there does.
    flags = MessageFlag.NO_AUTOSTART if background else MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
    try:
        bus: Any = await MessageBus(bus_type=BusType.SYSTEM).connect()
    except (OSError, EOFError, AuthError, InvalidAddressError, DBusError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CallError(
            f"The system bus can't be reached ({reason or type(error).__name__}): start it, or"
            " correct DBUS_SYSTEM_BUS_ADDRESS if it is set."
        ) from error
    gone = asyncio.ensure_future(bus.wait_for_disconnect())
    try:
        yield Service(bus, flags)
    finally:
        bus.disconnect()
        # A lost connection is told to the call under way; asyncio complains of an error, and of a
        # task, that nobody waits for.
        await asyncio.wait({gone})
        gone.exception()


class Service:
    """The snapd-vm service at the other end of a connection."""

    def __init__(self, bus: Any, flags: MessageFlag) -> None:
        """`flags` go with every call."""
        self._bus = bus
        self._flags = flags
        self._peer = ""
        self._subscribed = False

    async def call(
        self, path: str, interface: str, member: str, signature: str = "", *arguments: object
    ) -> list[Any]:
        """Calls a method and returns its out arguments, variants unpacked. No time limit.

        Raises CallError.
        """
        reply = await self._call(SERVICE, path, interface, member, signature, list(arguments))
        self._peer = str(reply.sender)
        body: list[Any] = _plain(reply.body)
        return body

    @asynccontextmanager
    async def listening(self, hear: Callable[[Signal], None]) -> AsyncIterator[None]:
        """Has `hear` told of the signals of the service that has answered us last.

        Raises CallError.
        """

        def handle(message: Message) -> None:
            # Anybody may send us a signal of this name; the bus says truly who it was.
            if message.message_type is MessageType.SIGNAL and message.sender == self._peer:
                hear(Signal(str(message.path), str(message.member), _plain(message.body)))

        self._bus.add_message_handler(handle)
        try:
            if not self._subscribed:
                rule = f"type='signal',sender='{SERVICE}',path_namespace='{ROOT}'"
                await self._call(_BUS, "/org/freedesktop/DBus", _BUS, "AddMatch", "s", [rule])
                self._subscribed = True
            yield
        finally:
            self._bus.remove_message_handler(handle)

    async def _call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: list[object],
    ) -> Message:
        """The answer to a call. Raises CallError."""
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=body,
            flags=self._flags,
        )
        try:
            reply: Message = await self._bus.call(message)
        except (EOFError, OSError) as error:
            raise CallError(
                "The system bus closed the connection: see the bus daemon's log."
            ) from error
        if reply.message_type is MessageType.ERROR:
            raise _failure(str(reply.error_name), reply.body)
        return reply

    async def find_domain(self, name_or_uuid: str) -> str:
        """The object path of a domain. Raises CallError."""
        path: str = (await self.call(ROOT, MANAGER, "FindDomain", "s", name_or_uuid))[0]
        return path

    async def objects(self) -> Objects:
        """Every domain and snapshot with its properties, in one call. Raises CallError."""
        interface = "org.freedesktop.DBus.ObjectManager"
        objects: Objects = (await self.call(ROOT, interface, "GetManagedObjects"))[0]
        return objects

    async def properties(self, path: str, interface: str) -> Mapping[str, Any]:
        """All properties of one interface of an object. Raises CallError."""
        everything: Mapping[str, Any] = (
            await self.call(path, "org.freedesktop.DBus.Properties", "GetAll", "s", interface)
        )[0]
        return everything


def _plain(value: Any) -> Any:
    """The value with every Variant in it unpacked."""
    if isinstance(value, Variant):
        return _plain(value.value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _failure(name: str, body: Sequence[Any]) -> CallError:
    """The failure that an error reply means, as one sentence that says what to do."""
    text = str(body[0]).strip() if body else ""
    if name in _HINTS:
        return CallError(_HINTS[name], name)
    if name.startswith(("org.freedesktop.DBus.Error.Spawn.", "org.freedesktop.systemd1.")):
        return CallError(f"The snapd-vm service could not be started: {text or name}", name)
    short = name.removeprefix(PREFIX)
    if short == "NotAuthorizedCanObtain":
        return CallError(f"{(text or 'Not authorized').rstrip('.')}: {_AGENT}.", name)
    return CallError(text or f"The service answered {short} and no more.", name)
