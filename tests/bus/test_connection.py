"""A bus that is not there, hangs up or gives the name to another: a clear error, and no hang."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from snapd_vm.bus.connection import open_connection
from snapd_vm.bus.contract import MANAGER
from snapd_vm.bus.remote import CallFailed, ConnectionLost, NameTaken, Remote
from snapd_vm.bus.served import DiskSnapshotBus
from tests.bus.clients import Client
from tests.bus.fakes import FakeEngine


async def test_no_bus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/nothing")
    with pytest.raises(ConnectionLost, match="can't be reached"):
        await DiskSnapshotBus().connect()


@pytest.mark.parametrize("address", ["", "nonsense", "tcp:host=x,port=y", "unix:tmpdir=/tmp"])
async def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
    with pytest.raises(ConnectionLost):
        await open_connection()


@pytest.mark.parametrize(
    "says", [b"", b"OK", b"REJECTED EXTERNAL\r\n", b"\xff\r\n", b"O" * 9000, b"OK 12\r\n"]
)
async def test_a_bus_that_hangs_up_during_the_authentication(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: bytes
) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n")
            writer.write(says)
            await writer.drain()
            writer.close()

    server = await asyncio.start_unix_server(hang_up, tmp_path / "socket")
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/socket")
    with pytest.raises(ConnectionLost):
        await open_connection(limit=5)
    server.close()
    await server.wait_closed()


async def test_a_bus_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        gone.set()

    server = await asyncio.start_unix_server(wait, tmp_path / "socket")
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/socket")
    with pytest.raises(ConnectionLost):
        await open_connection(limit=0.2)
    await asyncio.wait_for(gone.wait(), 5)
    server.close()
    await server.wait_closed()


async def test_a_name_that_another_has(served: DiskSnapshotBus) -> None:
    second = DiskSnapshotBus()
    await second.connect()
    with pytest.raises(NameTaken, match="stop that one"):
        await second.take_name()
    await second.close(1)


async def test_before_an_engine_is_served_calls_are_answered(
    address: str, connect: Callable[[], object]
) -> None:
    bus = DiskSnapshotBus()
    await bus.connect()
    await bus.take_name()
    client = await Client.connect(address)
    answer = await client.call(MANAGER, "FindDomain", "s", ["vm1"])
    assert answer.error_name == "org.freedesktop.DBus.Error.UnknownObject"
    client.close()
    await bus.close(1)


async def test_our_own_calls_fail_clearly() -> None:
    connection = await open_connection()
    nobody = Remote("org.example.Nobody", "/", "org.example.Nobody", "Call", "", "")
    with pytest.raises(CallFailed) as failed:
        await connection.call(nobody, [])
    assert failed.value.name in (
        "org.freedesktop.DBus.Error.ServiceUnknown",
        "org.freedesktop.DBus.Error.NameHasNoOwner",
        "org.freedesktop.DBus.Error.AccessDenied",
    )
    to_ourselves = Remote(connection.unique_name, "/", "org.example.Nobody", "Call", "", "")
    connection.on_call = lambda call: None
    with pytest.raises((TimeoutError, CallFailed)):
        await connection.call(to_ourselves, [], limit=0.1)
    assert connection._pending == {}
    await connection.close()
    with pytest.raises(ConnectionLost):
        await connection.call(nobody, [])
    connection.tell(nobody, [])
    await connection.close()


async def test_closing_twice_or_before_connecting_is_no_error(engine: FakeEngine) -> None:
    bus = DiskSnapshotBus()
    await bus.close(1)
    with pytest.raises(ConnectionLost):
        bus.serve(engine, "0")
    await bus.connect()
    bus.serve(engine, "0")
    await bus.close(1)
    await bus.close(1)
