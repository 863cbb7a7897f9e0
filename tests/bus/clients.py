"""Clients of the tests: a plain dbus-next one, and one that writes what it likes on the socket."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message

from snapd_vm.bus import wire
from snapd_vm.bus.contract import BUS_NAME, PROPERTIES
from snapd_vm.model import ROOT_PATH

BUS = "org.freedesktop.DBus"


class Client:
    """A caller. Counts the answers to each of its calls, and keeps the signals that it hears."""

    def __init__(self, bus: MessageBus) -> None:
        self.bus = bus
        self.answers: Counter[int] = Counter()
        self.signals: list[Message] = []
        bus.add_message_handler(self._note)

    @classmethod
    async def connect(cls, address: str, fds: bool = False) -> Client:
        return cls(await MessageBus(bus_address=address, negotiate_unix_fd=fds).connect())

    @property
    def name(self) -> str:
        return str(self.bus.unique_name)

    def _note(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL:
            self.signals.append(message)
        elif message.reply_serial:
            self.answers[message.reply_serial] += 1

    async def listen(self, rule: str = f"type='signal',sender='{BUS_NAME}'") -> None:
        await self.call(BUS, "AddMatch", "s", [rule], path="/org/freedesktop/DBus", to=BUS)

    async def call(
        self,
        interface: str | None,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        path: str = ROOT_PATH,
        to: str = BUS_NAME,
        flags: MessageFlag = MessageFlag.NONE,
        limit: float = 20,
    ) -> Message:
        message = self.message(interface, member, signature, body, path, to, flags)
        async with asyncio.timeout(limit):
            answer = await self.bus.call(message)
        assert answer is not None
        return answer

    @staticmethod
    def message(
        interface: str | None,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        path: str = ROOT_PATH,
        to: str = BUS_NAME,
        flags: MessageFlag = MessageFlag.NONE,
    ) -> Message:
        fields: dict[str, Any] = {"interface": interface} if interface else {}
        return Message(
            destination=to,
            path=path,
            member=member,
            signature=signature,
            body=list(body),
            flags=flags,
            **fields,
        )

    async def properties(self, path: str, interface: str) -> dict[str, Any]:
        answer = await self.call(PROPERTIES, "GetAll", "s", [interface], path=path)
        assert answer.message_type is MessageType.METHOD_RETURN, answer.body
        return {name: variant.value for name, variant in answer.body[0].items()}

    async def heard(self, member: str, limit: float = 5, path: str = "") -> Message:
        """The first signal of this name, and from this object if one is named, waited for; it is
        then forgotten.
        """
        async with asyncio.timeout(limit):
            while True:
                for signal in self.signals:
                    if signal.member == member and path in ("", signal.path):
                        self.signals.remove(signal)
                        return signal
                await asyncio.sleep(0.005)

    def close(self) -> None:
        bus: Any = self.bus
        bus._finalize(None)
        bus._stream.close()
        bus._sock.close()


def marshalled(message: Message, serial: int, fds: bool = False) -> bytes:
    """A message as bytes, with this serial."""
    message.serial = serial
    anything: Any = message
    return bytes(anything._marshall(negotiate_unix_fd=fds))


class RawPeer:
    """A caller that speaks bytes. Authenticated, with its Hello said."""

    def __init__(self, address: str, fds: bool = False) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(address.partition("path=")[2].partition(",")[0])
        self.frames = wire.Frames()
        uid = str(os.getuid()).encode().hex().encode()
        self.socket.sendall(b"\0AUTH EXTERNAL " + uid + b"\r\n")
        assert self._line().startswith(b"OK")
        if fds:
            self.socket.sendall(b"NEGOTIATE_UNIX_FD\r\n")
            assert self._line().startswith(b"AGREE")
        self.socket.sendall(b"BEGIN\r\n")
        hello = Client.message(BUS, "Hello", path="/org/freedesktop/DBus", to=BUS)
        self.socket.sendall(marshalled(hello, 1))
        assert self.reply_to(1).kind == wire.METHOD_RETURN

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\r\n"):
            data = self.socket.recv(1)
            assert data, "the bus hung up"
            line += data
        return line

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        if fds:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            sent = self.socket.sendmsg([data], rights)
            data = data[sent:]
        self.socket.sendall(data)

    def read(self) -> wire.Incoming | None:
        """The next message, or None if the bus has cut us off."""
        while True:
            message = self.frames.next()
            if message is not None:
                return message
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.frames.feed(data)

    def reply_to(self, serial: int) -> wire.Incoming:
        while True:
            message = self.read()
            assert message is not None, "the bus hung up"
            if message.reply_serial == serial:
                return message

    def cut_off(self) -> bool:
        """Whether the bus hangs up on us before anything else comes."""
        while (message := self.read()) is not None:
            if message.kind != wire.SIGNAL:
                return False
        return True

    def close(self) -> None:
        self.socket.close()
