"""Nothing that a client sends ends the service, stalls it, or makes it grow."""

from __future__ import annotations

import asyncio
import gc
import os
import struct
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_vm.bus import wire
from snapd_vm.bus.contract import BUS_NAME, DISK_SNAPSHOT, MANAGER, OBJECT_MANAGER, PEER, PROPERTIES
from snapd_vm.bus.served import DiskSnapshotBus
from snapd_vm.model import ROOT_PATH, domain_path
from tests.bus.clients import Client, RawPeer, marshalled
from tests.bus.fakes import FakeEngine, StandInPolkit, make_domain, uuid

PATH = domain_path(uuid(1))
ERROR = "org.example.DiskSnapshot.Error."
STANDARD = "org.freedesktop.DBus.Error."
SERIAL = 42


def call(*arguments: Any, **more: Any) -> bytearray:
    message = Client.message(*arguments, **more)
    return bytearray(marshalled(message, SERIAL))


async def send(address: str, data: bytes, fds: list[int] | None = None) -> str | None:
    """The error name of the answer ("" for success); None if the bus cut the sender off."""

    def run() -> str | None:
        peer = RawPeer(address, fds=fds is not None)
        try:
            peer.send(data, fds or [])
            while (answer := peer.read()) is not None:
                if answer.reply_serial == SERIAL:
                    return answer.error_name
            return None
        except (BrokenPipeError, ConnectionResetError):
            return None
        finally:
            peer.close()

    return await asyncio.to_thread(run)


async def alive(client: Client) -> bool:
    answer = await client.call(MANAGER, "FindDomain", "s", ["vm1"], limit=5)
    return answer.message_type is MessageType.METHOD_RETURN


async def test_file_descriptors_are_not_taken(client: Client, address: str) -> None:
    data = call(MANAGER, "FindDomain", "s", ["vm1"])
    message = Client.message(PROPERTIES, "Set", "ssv", [MANAGER, "URI", Variant("h", 0)])
    message.unix_fds = [0]
    with_fd = marshalled(message, SERIAL, fds=True)
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull) as null:
        answer = await send(address, with_fd, [null.fileno()])
    assert answer not in ("", None)
    assert len(os.listdir("/proc/self/fd")) == before
    assert await send(address, bytes(data), []) == ""
    assert await alive(client)


@pytest.mark.parametrize("kind", [5, 6, 77, 255])
async def test_messages_of_unknown_type_are_ignored(
    client: Client, address: str, kind: int
) -> None:
    data = call(MANAGER, "FindDomain", "s", ["vm1"])
    data[1] = kind
    peer = await asyncio.to_thread(RawPeer, address)
    peer.send(bytes(data))
    assert await alive(client)
    peer.close()


@pytest.mark.parametrize("flags", [0x08, 0xF8, 0xFE])
async def test_unknown_flags_are_ignored(client: Client, address: str, flags: int) -> None:
    data = call(MANAGER, "FindDomain", "s", ["vm1"])
    data[2] = flags
    assert await send(address, bytes(data)) == ""
    assert await alive(client)


async def test_unknown_header_fields_are_ignored(client: Client, address: str) -> None:
    for field in (b"\x0a\1o\0\2\0\0\0/x\0", b"\x1e\1u\0\1\0\0\0", b"\x1e\2ay\0\0\0\0\1\0\0\0\x41"):
        data = bytes(call(MANAGER, "FindDomain", "s", ["vm1"]))
        (length,) = struct.unpack_from("<I", data, 12)
        head = data[: 16 + length]
        head += b"\0" * (-len(head) % 8) + field
        body = data[16 + length + (-length % 8) :]
        head = head[:12] + struct.pack("<I", len(head) - 16) + head[16:]
        assert await send(address, head + b"\0" * (-len(head) % 8) + body) == ""
        assert await alive(client)


@pytest.mark.parametrize(
    ("signature", "value"),
    [
        ("v", Variant("s", "x")),
        ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaay", []),
        ("(((((((((((((((((((((((((((((((i)))))))))))))))))))))))))))))))", None),
        ("a{t(ayg)}", {1: [b"x", "s"]}),
        ("h", 0),
        ("d", float("nan")),
        ("ag", ["a" * 30 + "i"] * 1000),
    ],
)
async def test_odd_signatures_are_wrong_arguments(
    client: Client, address: str, signature: str, value: Any
) -> None:
    if value is None:
        value = 1
        for _ in range(signature.count("(")):
            value = [value]
    for interface, member in ((MANAGER, "FindDomain"), (DISK_SNAPSHOT, "Create"), (PEER, "Ping")):
        data = call(interface, member, signature, [value])
        assert await send(address, bytes(data)) in (STANDARD + "InvalidArgs", None)
        assert await alive(client)


@pytest.mark.parametrize("depth", [10, 62, 100])
async def test_deep_variants_are_never_opened(client: Client, address: str, depth: int) -> None:
    value = Variant("s", "x")
    for _ in range(depth):
        value = Variant("v", value)
    answer = await send(address, bytes(call(PROPERTIES, "Set", "ssv", [MANAGER, "URI", value])))
    assert answer == (STANDARD + "PropertyReadOnly" if depth < 64 else None)
    assert await alive(client)


@pytest.mark.parametrize("bad", [b"vm\xff", b"vm\0", b"\xed\xa0\x80", b"\xc0\x80\x80"])
async def test_the_bus_cuts_off_who_sends_what_is_no_text(
    client: Client, address: str, bad: bytes
) -> None:
    data = bytes(call(MANAGER, "FindDomain", "s", ["@" * len(bad)]))
    assert await send(address, data.replace(b"@" * len(bad), bad)) is None
    assert await alive(client)


async def test_random_changes_to_a_call_harm_nobody_else(client: Client, address: str) -> None:
    original = bytes(call(DISK_SNAPSHOT, "Create", "sssu", ["<disk/>", "", "", 0], PATH))

    def run() -> None:
        for at in range(len(original)):
            for value in (0, 0xFF, original[at] ^ 1):
                peer = RawPeer(address)
                changed = bytearray(original)
                changed[at] = value
                with suppress(BrokenPipeError, ConnectionResetError):
                    peer.send(bytes(changed))
                peer.close()

    await asyncio.to_thread(run)
    assert await alive(client)


@pytest.mark.measures
async def test_ten_megabytes_are_refused_within_a_second(
    client: Client, engine: FakeEngine, polkit: StandInPolkit
) -> None:
    async def refused(at: int, path: str, error: str) -> None:
        body: list[Any] = ["<disk><target dev='vda'/></disk>", "", "", 0]
        body[at] = "<disk>" + "x" * 10_000_000
        begun = time.monotonic()
        answer = await client.call(DISK_SNAPSHOT, "Create", "sssu", body, path)
        assert answer.error_name == ERROR + error
        assert time.monotonic() - begun < 1
        assert len(answer.body[0]) < 1000

    async def round_of_calls() -> int:
        await refused(0, PATH, "InvalidXML")
        await refused(0, ROOT_PATH, "InvalidXML")
        await refused(1, PATH, "InvalidXML")
        await refused(2, PATH, "InvalidName")
        gc.collect()
        return resident()

    await round_of_calls()
    before = await round_of_calls()
    for _ in range(3):
        after = await round_of_calls()
    assert after - before < 5_000_000
    assert engine.calls == []
    assert polkit.questions == []


@pytest.mark.measures
async def test_a_flood_of_variants_takes_no_time(client: Client, address: str) -> None:
    item = b"\1y\0\7"
    body = item * (6 * 1024 * 1024)
    head = call(MANAGER, "FindDomain", "av", [[]])
    (length,) = struct.unpack_from("<I", head, 12)
    head = head[: 16 + length + (-length % 8)]
    struct.pack_into("<I", head, 4, len(body) + 4)
    data = bytes(head) + struct.pack("<I", len(body)) + body
    flood = asyncio.create_task(send(address, data))
    longest = await longest_stall(flood)
    assert await flood == STANDARD + "InvalidArgs"
    assert longest < 0.5
    assert await alive(client)


async def test_a_path_of_ten_megabytes(client: Client, address: str) -> None:
    path = ROOT_PATH + "/domain/_" + "a" * 10_000_000
    assert await send(address, bytes(call(PEER, "Ping", path=path))) == ""
    assert (
        await send(address, bytes(call(DISK_SNAPSHOT, "Create", path=path)))
        == STANDARD + "UnknownObject"
    )
    assert await alive(client)


async def test_signals_and_answers_that_nobody_asked_for_are_ignored(
    client: Client, served: DiskSnapshotBus, polkit: StandInPolkit, engine: FakeEngine
) -> None:
    """Not even one that says of itself that it comes from the bus."""
    polkit.verdict = None
    waiting = asyncio.create_task(
        client.call(
            DISK_SNAPSHOT, "Create", "sssu", ["<disk><target dev='vda'/></disk>", "", "", 0], PATH
        )
    )
    while not polkit.questions:
        await asyncio.sleep(0.002)
    forged = Message.new_signal(
        "/org/freedesktop/DBus",
        "org.freedesktop.DBus",
        "NameOwnerChanged",
        "sss",
        [client.name, client.name, ""],
    )
    forged.destination = BUS_NAME
    await client.bus.send(forged)
    for serial in range(1, 60):
        answer = Message(
            destination=BUS_NAME,
            message_type=MessageType.METHOD_RETURN,
            reply_serial=serial,
            signature="(bba{ss})",
            body=[[True, False, {}]],
        )
        await client.bus.send(answer)
    assert await alive(client)
    assert polkit.cancelled == []
    assert engine.calls == []
    waiting.cancel()


@pytest.mark.measures
async def test_a_flood_that_fills_the_socket_does_not_end_us(
    client: Client, engine: FakeEngine, address: str
) -> None:
    engine.domains = {uuid(n): make_domain(n) for n in range(100)}
    data = bytes(call(OBJECT_MANAGER, "GetManagedObjects"))

    def run() -> None:
        peer = RawPeer(address)
        peer.send(data * 300)
        for _ in range(300):
            answer = peer.read()
            while answer is not None and answer.kind == wire.SIGNAL:
                answer = peer.read()
            assert answer is not None
        peer.close()

    flood = asyncio.create_task(asyncio.to_thread(run))
    longest = await longest_stall(flood)
    await flood
    assert longest < 0.5
    engine.domains = {uuid(1): make_domain(1)}
    assert await alive(client)


async def test_losing_the_bus_is_told(
    connect: Callable[[], Awaitable[Client]], engine: FakeEngine, served: DiskSnapshotBus
) -> None:
    waiting = asyncio.create_task(served.lost())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert served._connection is not None
    served._connection._bus._sock.shutdown(2)
    assert "closed the connection" in await asyncio.wait_for(waiting, 5)
    engine.tell("connection_changed", True)


async def longest_stall(task: asyncio.Task[Any]) -> float:
    """The longest time in seconds that the loop took for a turn until the task was done."""
    longest = 0.0
    while not task.done():
        begun = time.monotonic()
        await asyncio.sleep(0.001)
        longest = max(longest, time.monotonic() - begun)
    return longest


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
