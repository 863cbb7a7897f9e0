"""Messages as they come off the socket: framing and headers, with the body left as bytes.

dbus-next unmarshals every message whole before anybody looks at it: measured, 24 MiB of variants
from any local user stall it for 22 s and cost 850 MB; what it can't read ends the connection. So
bodies stay bytes until the guard knows that their signature is one it expects. The bus has
validated what it forwards (libdbus, `_dbus_validate_body_with_reason`). Knows nothing of dbus-next.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

METHOD_CALL, METHOD_RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_REPLY_EXPECTED = 0x1
ALLOW_INTERACTIVE_AUTHORIZATION = 0x4

FIXED_HEADER = 16
MESSAGE_LIMIT = 128 * 1024 * 1024
"""The specification's maximum, in bytes; a system bus forwards 32 MiB at most by default."""
FIELD_LIMIT = 64
"""Header fields looked at; the specification knows nine."""

PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY_SERIAL, DESTINATION, SENDER, SIGNATURE = range(1, 9)


class StreamBroken(Exception):
    """What comes off the socket is no stream of messages, and can't be followed any further."""


class HeaderUnreadable(Exception):
    """One message has a header that we can't read; the next one begins where it should."""


@dataclass(frozen=True, slots=True)
class Typed:
    """A value to be sent as a variant, with its D-Bus signature."""

    signature: str
    value: object


@dataclass(slots=True)
class Entry:
    """An entry of a Dictionary; once marshalled it is kept, for the next time."""

    key: str
    value: object
    marshalled: bytes = b""


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A dictionary that is the whole body of a message, made of entries that are often the same."""

    entries: Sequence[Entry]


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message with its body still unread. What the header does not say is empty, or 0."""

    kind: int
    flags: int
    serial: int
    body: bytes
    little_endian: bool
    sender: str = ""
    path: str = ""
    interface: str = ""
    member: str = ""
    signature: str = ""
    error_name: str = ""
    reply_serial: int = 0

    @property
    def wants_reply(self) -> bool:
        """Whether the sender waits for an answer."""
        return not self.flags & NO_REPLY_EXPECTED

    @property
    def interactive(self) -> bool:
        """Whether polkit may ask the person behind the call."""
        return bool(self.flags & ALLOW_INTERACTIVE_AUTHORIZATION)


class Frames:
    """Cuts the stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Takes what was read from the socket."""
        self._buffer += data

    def next(self) -> Incoming | None:
        """The next whole message, or None until more is fed. Raises StreamBroken.

        A message whose header can't be read is logged and skipped: the one after it may be good.
        """
        while (frame := self._cut()) is not None:
            try:
                return read_message(frame)
            except (HeaderUnreadable, struct.error, IndexError, UnicodeDecodeError) as error:
                log.warning("skipped a message of %d bytes: %s", len(frame), error)
        return None

    def _cut(self) -> bytes | None:
        if len(self._buffer) < FIXED_HEADER:
            return None
        order = byte_order(self._buffer[0])
        (body,) = struct.unpack_from(order + "I", self._buffer, 4)
        (fields,) = struct.unpack_from(order + "I", self._buffer, 12)
        size = _align(FIXED_HEADER + fields, 8) + body
        if size > MESSAGE_LIMIT:
            raise StreamBroken(f"a message of {size} bytes")
        if len(self._buffer) < size:
            return None
        frame = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        return frame


def byte_order(mark: int) -> str:
    """The `struct` prefix for a message that begins with this byte. Raises StreamBroken."""
    if mark == ord("l"):
        return "<"
    if mark == ord("B"):
        return ">"
    raise StreamBroken(f"a message begins with byte {mark}")


def read_message(frame: bytes) -> Incoming:
    """Reads the header of one whole message. Raises HeaderUnreadable, struct.error, IndexError."""
    order = byte_order(frame[0])
    kind, flags = frame[1], frame[2]
    serial, length = struct.unpack_from(order + "II", frame, 8)
    fields = _read_fields(frame, order, FIXED_HEADER + length)
    reply_serial = fields.get(REPLY_SERIAL, 0)

    def text(code: int) -> str:
        value = fields.get(code, "")
        if not isinstance(value, str):
            raise HeaderUnreadable(f"header field {code} is not text")
        return value

    return Incoming(
        kind=kind,
        flags=flags,
        serial=serial,
        body=frame[_align(FIXED_HEADER + length, 8) :],
        little_endian=order == "<",
        sender=text(SENDER),
        path=text(PATH),
        interface=text(INTERFACE),
        member=text(MEMBER),
        signature=text(SIGNATURE),
        error_name=text(ERROR_NAME),
        reply_serial=reply_serial if isinstance(reply_serial, int) else 0,
    )


def _read_fields(frame: bytes, order: str, end: int) -> dict[int, str | int]:
    """The header fields, `a(yv)` from byte 16 on; the known ones are of the types s, o, g and u."""
    found: dict[int, str | int] = {}
    at = FIXED_HEADER
    for _ in range(FIELD_LIMIT):
        at = _align(at, 8)
        if at >= end:
            return found
        code, signature_length = frame[at], frame[at + 1]
        kind = frame[at + 2 : at + 2 + signature_length]
        at += 3 + signature_length
        value: str | int
        if kind in (b"s", b"o"):
            at = _align(at, 4)
            (length,) = struct.unpack_from(order + "I", frame, at)
            value = frame[at + 4 : at + 4 + length].decode()
            at += length + 5
        elif kind == b"g":
            length = frame[at]
            value = frame[at + 1 : at + 1 + length].decode()
            at += length + 2
        elif kind == b"u":
            at = _align(at, 4)
            (value,) = struct.unpack_from(order + "I", frame, at)
            at += 4
        else:
            raise HeaderUnreadable(f"header field {code} is of an unknown type")
        found[code] = value
    raise HeaderUnreadable(f"more than {FIELD_LIMIT} header fields")


def with_entries(message: bytes, entries: Sequence[bytes]) -> bytes:
    """The message, whose body is an empty dictionary, with these entries in it.

    An entry begins at a multiple of 8 wherever it stands, so its bytes are always the same. The
    length of the array counts neither the padding before its first entry nor any after its last.
    """
    body = bytearray()
    for entry in entries:
        body += b"\0" * (-len(body) % 8) + entry
    head = message[:4] + struct.pack("<I", 8 + len(body)) + message[8:-8]
    return head + struct.pack("<II", len(body), 0) + body


def _align(offset: int, to: int) -> int:
    return (offset + to - 1) & ~(to - 1)
