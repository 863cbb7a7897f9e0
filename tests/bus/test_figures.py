"""Two hundred domains and as many snapshots are told in time, and so is an event."""

from __future__ import annotations

import asyncio
import statistics
import time

import pytest

from snapd_vm.bus.contract import DISK_SNAPSHOT, OBJECT_MANAGER
from snapd_vm.model import domain_path
from tests.bus.clients import Client, RawPeer, marshalled
from tests.bus.fakes import FakeEngine, make_domain, make_snapshot, uuid

pytestmark = pytest.mark.measures


def round_trips(address: str, number: int) -> list[float]:
    """Seconds from sending GetManagedObjects to having the whole answer, unparsed."""
    peer = RawPeer(address)
    times = []
    for serial in range(2, number + 2):
        message = Client.message(OBJECT_MANAGER, "GetManagedObjects")
        begun = time.perf_counter()
        peer.send(marshalled(message, serial))
        answer = peer.reply_to(serial)
        times.append(time.perf_counter() - begun)
        assert len(answer.body) > 100_000
    peer.close()
    return times


async def test_managed_objects_of_two_hundred_domains(
    client: Client, engine: FakeEngine, address: str
) -> None:
    engine.domains = {uuid(n): make_domain(n) for n in range(200)}
    snapshots = [make_snapshot(n) for n in range(200)]
    engine.snapshots = {snapshot.uuid: snapshot for snapshot in snapshots}
    times = await asyncio.to_thread(round_trips, address, 11)
    later = statistics.median(times[1:])
    print(f"GetManagedObjects: first {times[0] * 1000:.1f}, later {later * 1000:.1f} ms")
    assert times[0] < 0.1
    assert later < 0.03


async def test_an_event_while_creates_run(client: Client, engine: FakeEngine) -> None:
    await client.listen()
    engine.work = lambda: asyncio.sleep(0.1)  # the client is in this process too
    stop = asyncio.Event()

    async def create() -> None:
        disk = "<disk><target dev='vda'/></disk>"
        while not stop.is_set():
            path = domain_path(uuid(1))
            await client.call(DISK_SNAPSHOT, "Create", "sssu", [disk, "", "", 0], path)

    creates = [asyncio.create_task(create()) for _ in range(10)]
    times = []
    for n in range(50):
        begun = time.perf_counter()
        engine.tell("domain_added", make_domain(n))
        await client.heard("InterfacesAdded")
        times.append(time.perf_counter() - begun)
        await asyncio.sleep(0.01)
    stop.set()
    await asyncio.gather(*creates)
    print(f"event: median {statistics.median(times) * 1000:.1f}, most {max(times) * 1000:.1f} ms")
    assert sorted(times)[44] < 0.05, "the rest may meet a pause of the machine"
