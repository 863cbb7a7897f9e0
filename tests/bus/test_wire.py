"""Messages are cut out of the stream as they come, and one that can't be read costs no other."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd_vm.bus.connection import decode
from snapd_vm.bus.reader import Reader
from snapd_vm.bus.wire import (
    Frames,
    HeaderUnreadable,
    Incoming,
    StreamBroken,
    read_message,
    with_entries,
)
from snapd_vm.bus.writer import Writer
from tests.bus.clients import marshalled


def message(member: str = "Hello", serial: int = 7) -> bytes:
    call = Message("a.b", "/x", "c.d", member, signature="su", body=["text", 5])
    return marshalled(call, serial)


def big_endian() -> bytes:
    """A call of member M at path /x."""
    fields = b"\1\1o\0" + struct.pack(">I", 2) + b"/x\0" + b"\0" * 5
    fields += b"\3\1s\0" + struct.pack(">I", 1) + b"M\0"
    head = b"B\1\5\1" + struct.pack(">III", 0, 9, len(fields))
    return head + fields + b"\0" * (-(len(head) + len(fields)) % 8)


def test_a_message_is_read_in_any_pieces() -> None:
    data = message() + message("Second") + big_endian()
    for size in (1, 7, 16, 100, 1000):
        frames, read = Frames(), []
        for start in range(0, len(data), size):
            frames.feed(data[start : start + size])
            while (one := frames.next()) is not None:
                read.append((one.member, one.path, one.little_endian))
        assert read == [("Hello", "/x", True), ("Second", "/x", True), ("M", "/x", False)]


def test_flags_are_kept() -> None:
    read = read_message(big_endian())
    assert not read.wants_reply
    assert read.interactive
    assert read.serial == 9


def test_an_unreadable_header_is_skipped() -> None:
    bad = bytearray(message())
    bad[16 + 2] = ord("x")
    frames = Frames()
    frames.feed(bytes(bad) + message("Second"))
    following = frames.next()
    assert following is not None
    assert following.member == "Second"


def test_too_many_header_fields_are_not_read() -> None:
    field = b"\x20\1u\0" + struct.pack("<I", 1)
    fields = field * 100
    frame = b"l\1\0\1" + struct.pack("<III", 0, 1, len(fields)) + fields
    with pytest.raises(HeaderUnreadable):
        read_message(frame)


@pytest.mark.parametrize("data", [b"x" * 16, b"l\1\0\1" + struct.pack("<III", 1 << 30, 1, 0)])
def test_what_is_no_stream_of_messages_ends_it(data: bytes) -> None:
    frames = Frames()
    frames.feed(data)
    with pytest.raises(StreamBroken):
        frames.next()


@settings(max_examples=5000, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 299), st.integers(0, 255))
def test_no_bytes_raise_anything_else(noise: bytes, at: int, value: int) -> None:
    changed = bytearray(message())
    changed[at % len(changed)] = value
    for data in (noise, b"l\1\0\1" + noise, bytes(changed) + noise):
        frames = Frames()
        frames.feed(data)
        try:
            while frames.next() is not None:
                pass
        except StreamBroken:
            pass


def test_entries_that_are_put_together_are_the_whole() -> None:
    values = {"a" * n: "b" * (n * 3 % 7) for n in range(1, 20)}

    def answer(body: dict[str, str]) -> bytes:
        reply = Message(
            destination=":1.5",
            message_type=MessageType.METHOD_RETURN,
            reply_serial=3,
            signature="a{ss}",
            body=[body],
        )
        return marshalled(reply, 7)

    entries = [read_message(answer({k: v})).body[8:] for k, v in values.items()]
    whole, joined = read_message(answer(values)), read_message(with_entries(answer({}), entries))
    assert decode(joined, "a{ss}") == [values]
    assert joined.body == whole.body


async def test_a_full_socket_is_waited_for() -> None:
    here, there = socket.socketpair()
    here.setblocking(False)
    errors: list[Exception] = []
    writer = Writer(here, errors.append)
    sent = [bytes([n % 256]) * 10_000 for n in range(500)]
    for data in sent:
        writer.write(data)
    loop = asyncio.get_running_loop()
    there.setblocking(False)
    received = b""
    while len(received) < 5_000_000:
        received += await asyncio.wait_for(loop.sock_recv(there, 1 << 20), 5)
    assert received == b"".join(sent)
    assert errors == []
    there.close()
    for data in sent:
        writer.write(data)
    assert [type(error) for error in errors] == [BrokenPipeError]
    here.close()


async def test_a_flood_leaves_turns_to_others() -> None:
    here, there = socket.socketpair()
    here.setblocking(False)
    loop = asyncio.get_running_loop()
    taken: list[int] = []
    done = asyncio.Event()

    def take(one: Incoming) -> None:
        taken.append(one.serial)
        until = loop.time() + 0.001
        while loop.time() < until:
            pass
        if one.serial == 200:
            done.set()

    reader = Reader(here, take, lambda error: None)
    loop.add_reader(here.fileno(), reader.readable)
    there.sendall(b"".join(message(serial=n) for n in range(1, 201)))
    longest, before = 0.0, loop.time()
    while not done.is_set():
        await asyncio.sleep(0)
        longest, before = max(longest, loop.time() - before), loop.time()
    assert taken == list(range(1, 201))
    assert longest < 0.05
    reader.stop()
    loop.remove_reader(here.fileno())
    here.close()
    there.close()
