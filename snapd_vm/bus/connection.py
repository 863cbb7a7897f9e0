"""The connection to the system bus: the only import of dbus-next in the service.

dbus-next 0.2.3 does the address, the authentication, Hello and the marshalling. Its reader takes in
whatever anybody sends, its writer drops the connection on a full socket, and its line reader spins
for ever when the bus hangs up in the authentication: bus/reader.py, bus/writer.py and `_auth_line`
stand in their places. Decides nothing about calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dbus_next._private.marshaller import Marshaller
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageFlag, MessageType, NameFlag, RequestNameReply
from dbus_next.errors import AuthError
from dbus_next.message import Message
from dbus_next.signature import SignatureTree, Variant

from snapd_vm.bus import wire
from snapd_vm.bus.reader import Reader
from snapd_vm.bus.remote import (
    ADD_MATCH,
    ANSWER_LIMIT_S,
    BUS,
    GET_ID,
    LEAVING,
    REMOVE_MATCH,
    REQUEST_NAME,
    CallFailed,
    ConnectionLost,
    NameTaken,
    Remote,
)
from snapd_vm.bus.wire import Dictionary, Entry, Incoming, Typed, with_entries
from snapd_vm.bus.writer import Writer

log = logging.getLogger(__name__)


class Connection:
    """A connection to the system bus; make one with `open_connection`.

    `on_call` is given every method call, `on_leave` the unique name of everybody who leaves the bus
    while `watch_leaving(True)` holds. Neither may block.
    """

    def __init__(self, bus: Any) -> None:
        self.on_call: Callable[[Incoming], None] = self._not_served
        self.on_leave: Callable[[str], None] = lambda name: None
        self._bus = bus
        self._loop = asyncio.get_running_loop()
        self._reader = Reader(bus._sock, self._dispatch, bus._finalize)
        self._writer = Writer(bus._sock, bus._finalize)
        self._pending: dict[int, asyncio.Future[Incoming]] = {}
        self._lost: asyncio.Future[str] = self._loop.create_future()
        bus._message_reader = self._reader.readable
        bus._auth_readline = self._auth_line
        bus._disconnect_future.add_done_callback(self._disconnected)

    @property
    def unique_name(self) -> str:
        """Our unique name on the bus, such as :1.7."""
        return str(self._bus.unique_name)

    @property
    def connected(self) -> bool:
        """Whether messages can be sent."""
        return bool(self._bus.connected)

    async def lost(self) -> str:
        """Waits until the connection is gone, and says why."""
        return await asyncio.shield(self._lost)

    async def take_name(self, name: str) -> None:
        """Takes a name without queueing. Raises NameTaken, CallFailed, ConnectionLost."""
        (answer,) = await self.call(REQUEST_NAME, [name, NameFlag.DO_NOT_QUEUE.value])
        if RequestNameReply(answer) not in (
            RequestNameReply.PRIMARY_OWNER,
            RequestNameReply.ALREADY_OWNER,
        ):
            raise NameTaken(f"The name {name} is owned by another process; stop that one first.")

    def watch_leaving(self, wanted: bool) -> None:
        """Asks the bus to tell who leaves, or no more: one match rule, not waited for.

        The bus works off our messages in order, so that whatever is called after this is watched.
        """
        self.tell(ADD_MATCH if wanted else REMOVE_MATCH, [LEAVING])

    def emit(self, path: str, interface: str, member: str, signature: str, body: list[Any]) -> None:
        """Sends a signal to all who listen; to nobody if the connection is gone."""
        self._send(
            MessageType.SIGNAL, signature, body, path=path, interface=interface, member=member
        )

    def answer(self, call: Incoming, signature: str, body: Sequence[Any]) -> None:
        """Answers a call, if its sender waits. Raises ValueError for a body that does not fit.

        A body that is one wire.Dictionary is put together from what was marshalled before.
        """
        if call.wants_reply:
            to = {"destination": call.sender, "reply_serial": call.serial}
            self._send(MessageType.METHOD_RETURN, signature, body, **to)

    def answer_error(self, call: Incoming, name: str, text: str) -> None:
        """Answers a call with an error, if its sender waits."""
        if call.wants_reply:
            to = {"destination": call.sender, "reply_serial": call.serial}
            self._send(MessageType.ERROR, "s", [text], error_name=name, **to)

    async def call(
        self, method: Remote, body: Sequence[Any], limit: float = ANSWER_LIMIT_S
    ) -> list[Any]:
        """Calls a method and returns the arguments of its answer.

        `limit` in seconds. Raises CallFailed, TimeoutError, ConnectionLost.
        """
        if not self.connected:
            raise ConnectionLost("There is no connection to the system bus.")
        serial = self._bus.next_serial()
        future: asyncio.Future[Incoming] = self._loop.create_future()
        self._pending[serial] = future
        try:
            self._send_call(method, body, serial, MessageFlag.NONE)
            async with asyncio.timeout(limit):
                reply = await future
        finally:
            self._pending.pop(serial, None)
        if reply.kind == wire.ERROR:
            text = decode(reply, "s")[0] if reply.signature.startswith("s") else ""
            raise CallFailed(reply.error_name, text)
        if reply.signature != method.gives:
            raise CallFailed("", f"{method.member} was answered as {reply.signature!r}")
        return decode(reply, method.gives)

    def tell(self, method: Remote, body: Sequence[Any]) -> None:
        """Calls a method and asks for no answer."""
        self._send_call(method, body, self._bus.next_serial(), MessageFlag.NO_REPLY_EXPECTED)

    async def close(self, limit: float = 1.0) -> None:
        """Sends what waits to be sent, for at most `limit` seconds, and hangs up."""
        if self.connected:
            try:
                # The answer comes after everything before it has been written and taken.
                await self.call(GET_ID, [], limit)
            except (CallFailed, TimeoutError, ConnectionLost):
                log.warning("the bus did not take our last messages")
        self._reader.stop()
        self._writer.stop()
        self._bus._finalize(None)
        self._bus._stream.close()
        self._bus._sock.close()

    def _send_call(
        self, method: Remote, body: Sequence[Any], serial: int, flags: MessageFlag
    ) -> None:
        self._send(
            MessageType.METHOD_CALL,
            method.takes,
            body,
            destination=method.destination,
            path=method.path,
            interface=method.interface,
            member=method.member,
            flags=flags,
            serial=serial,
        )

    def _send(self, kind: MessageType, signature: str, body: Sequence[Any], **fields: Any) -> None:
        """Marshals, which may raise ValueError, and sends; does nothing when disconnected."""
        if not self.connected:
            return
        parts: list[bytes] = []
        if len(body) == 1 and isinstance(body[0], Dictionary):
            parts = [_marshalled(entry, signature) for entry in body[0].entries]
            body = [{}]
        message = Message(
            message_type=kind,
            signature=signature,
            body=[outgoing(value) for value in body],
            **{"serial": self._bus.next_serial(), **fields},
        )
        data = bytes(message._marshall())  # type: ignore[no-untyped-call]
        self._writer.write(with_entries(data, parts) if parts else data)

    def _dispatch(self, message: Incoming) -> None:
        if message.kind == wire.METHOD_CALL:
            self.on_call(message)
        elif message.kind in (wire.METHOD_RETURN, wire.ERROR):
            self._replied(message)
        elif message.sender == BUS and message.member == "NameOwnerChanged":
            # The bus itself fills in the sender: nobody else can send as the bus.
            name, _, new = decode(message, "sss")
            if not new and name.startswith(":"):
                self.on_leave(name)
        # Messages of other types are ignored, as the specification says.

    def _replied(self, message: Incoming) -> None:
        future = self._pending.get(message.reply_serial)
        if future is not None:
            if not future.done():
                future.set_result(message)
        elif not self._bus.unique_name:  # the answer to Hello, for dbus-next
            known: dict[str, Any] = {"error_name": message.error_name} if message.error_name else {}
            self._bus._on_message(
                Message(
                    message_type=MessageType(message.kind),
                    sender=message.sender,
                    reply_serial=message.reply_serial,
                    signature=message.signature,
                    body=decode(message, message.signature),
                    serial=message.serial,
                    **known,
                )
            )

    def _disconnected(self, future: asyncio.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        why = str(error) if error else "it was closed"
        for pending in self._pending.values():
            if not pending.done():
                pending.set_exception(ConnectionLost(f"The system bus is gone: {why}."))
        if not self._lost.done():
            self._lost.set_result(why)

    def _not_served(self, call: Incoming) -> None:
        self.answer_error(call, BUS + ".Error.UnknownObject", "Nothing is served here yet.")

    async def _auth_line(self) -> str:
        line = b""
        while not line.endswith(b"\r\n"):
            data = await self._loop.sock_recv(self._bus._sock, 1)
            if not data or len(line) > 4096:
                raise AuthError("the bus hung up while we authenticated")
            line += data
        return line[:-2].decode("ascii", "replace")


async def open_connection(limit: float = ANSWER_LIMIT_S) -> Connection:
    """Connects to the system bus (DBUS_SYSTEM_BUS_ADDRESS, else its usual socket).

    `limit` in seconds. Raises ConnectionLost.
    """
    bus: Any = MessageBus.__new__(MessageBus)
    try:
        bus.__init__(bus_type=BusType.SYSTEM)
    except (OSError, ValueError) as error:
        if hasattr(bus, "_sock"):  # it leaves its socket open when it can't connect
            bus._stream.close()
            bus._sock.close()
        raise ConnectionLost(f"The system bus can't be reached: {error}; start it.") from error
    connection = Connection(bus)
    try:
        async with asyncio.timeout(limit):
            await bus.connect()
    except (OSError, EOFError, TimeoutError, ValueError, AuthError) as error:
        await connection.close()
        raise ConnectionLost(f"The system bus did not accept us: {error!r}.") from error
    return connection


def decode(message: Incoming, signature: str) -> list[Any]:
    """Reads the first arguments of a body, of these types: those that the message says it has."""
    reader: Any = Unmarshaller(None)  # type: ignore[no-untyped-call]
    reader.buf = bytearray(message.body)
    reader.endian = ord("l") if message.little_endian else ord("B")
    try:
        return [reader.read_argument(kind) for kind in SignatureTree._get(signature).types]
    finally:
        # It holds bound methods of its own, a cycle: the body, of up to 32 MiB from anybody, would
        # stay until the collector comes round.
        reader.buf = bytearray()


def _marshalled(entry: Entry, signature: str) -> bytes:
    if not entry.marshalled:
        whole = Marshaller(signature, [{entry.key: outgoing(entry.value)}])  # type: ignore[no-untyped-call]
        entry.marshalled = bytes(whole.marshall()[8:])  # type: ignore[no-untyped-call]
    return entry.marshalled


def outgoing(value: Any) -> Any:
    """A value as dbus-next wants it: Typed becomes a Variant, tuples become lists.

    Text is made fit to be sent: the bus cuts off a sender of NUL or of lone surrogates, that is us.
    """
    if isinstance(value, str):
        text = str(value)
        if not text.isascii():
            text = text.encode("utf-8", "replace").decode()
        return text.replace("\0", "?")
    if isinstance(value, Typed):
        return Variant(value.signature, outgoing(value.value))
    if isinstance(value, Mapping):
        return {outgoing(key): outgoing(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [outgoing(item) for item in value]
    return value
