"""A private dbus-daemon of type system, and on it: the served surface, an engine, polkit, clients.

Runs as any user; what needs root or other users is in the tests that use the lab.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from dbus_next.aio.message_bus import MessageBus

from snapd_vm.bus.served import DiskSnapshotBus
from tests.bus.clients import Client
from tests.bus.fakes import FakeEngine, StandInPolkit

CHECKOUT = Path(__file__).parents[2]
VERSION = "9.8.7"
CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={folder}/socket</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
    <allow send_destination="org.freedesktop.PolicyKit1"/>
  </policy>
  <policy user="{user}">
    <allow own="org.example.DiskSnapshot"/>
    <allow own="org.freedesktop.PolicyKit1"/>
  </policy>
  <include>{checkout}/data/org.example.DiskSnapshot.conf</include>
  <limit name="max_replies_per_connection">4096</limit>
</busconfig>
"""


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running bus."""
    if shutil.which("dbus-daemon") is None:
        pytest.skip("needs dbus-daemon (package dbus)")
    folder = tmp_path_factory.mktemp("bus")
    config = folder / "system.conf"
    config.write_text(CONFIG.format(folder=folder, user=os.getuid(), checkout=CHECKOUT))
    daemon = subprocess.Popen(
        ["dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--print-address"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert daemon.stdout is not None
    try:
        yield daemon.stdout.readline().strip()
    finally:
        daemon.terminate()
        daemon.wait(5)
        daemon.stdout.close()


@pytest.fixture(autouse=True)
def system_bus(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it the system bus of this process."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def polkit(address: str) -> AsyncIterator[StandInPolkit]:
    """A polkit that says yes unless the test says otherwise."""
    bus = await MessageBus(bus_address=address).connect()
    stand_in = StandInPolkit(bus)
    await stand_in.begin()
    yield stand_in
    Client(bus).close()


@pytest.fixture
async def served(engine: FakeEngine, polkit: StandInPolkit) -> AsyncIterator[DiskSnapshotBus]:
    """The surface, with its name taken."""
    bus = DiskSnapshotBus()
    await bus.connect()
    bus.serve(engine, VERSION)
    await bus.take_name()
    yield bus
    await bus.close(1)


@pytest.fixture
async def connect(address: str) -> AsyncIterator[Callable[[], Awaitable[Client]]]:
    """Makes clients, and closes them."""
    clients: list[Client] = []

    async def make() -> Client:
        clients.append(await Client.connect(address))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
    await asyncio.sleep(0)


@pytest.fixture
async def client(served: DiskSnapshotBus, connect: Callable[[], Awaitable[Client]]) -> Client:
    """A client of the served surface."""
    return await connect()
