"""Two hundred domains, of libvirt's test driver: told in time, and so is what happens to them.

The figures are those of a daemon and a bus of their own; the client that measures reads bytes and
parses nothing, so that what is measured is not the client.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from snapd_vm.bus.connection import decode
from snapd_vm.bus.contract import BUS_NAME, OBJECT_MANAGER
from snapd_vm.bus.wire import Incoming
from snapd_vm.model import ROOT_PATH, domain_path
from tests.bus.clients import BUS, Client, RawPeer, marshalled
from tests.lab.deadline import wait_until
from tests.lab.lab import Lab
from tests.real.api import DOMAIN, NAME, QUIESCE_REQUIRED, VDA, ApiError, Created
from tests.real.conftest import Connect
from tests.real.window import Window

pytestmark = pytest.mark.measures

DOMAINS = 200
CREATES = 10
LASTING_S = 5
QEMU = "<diskSnapshot method='qemu'/>"
LAUNCHER = (sys.executable, "-m", "tests.real.many_domains_daemon")


def uuid_of(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def domain_xml(number: int) -> str:
    disks = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='/nowhere/d{number}-{target}.img'/><target dev='{target}' bus='virtio'/>"
        "</disk>"
        for target in ("vda", "vdb")
    )
    return (
        f"<domain type='test'><name>d{number}</name><uuid>{uuid_of(number)}</uuid>"
        "<memory>8192</memory><vcpu>1</vcpu><os><type>hvm</type></os>"
        f"<devices>{disks}</devices></domain>"
    )


@pytest.fixture(scope="module")
def many(lab: Lab) -> Iterator[Window]:
    """A daemon that has two hundred domains, and the window into it."""
    import shutil

    shutil.rmtree(lab.daemon.state_dir, ignore_errors=True)
    folder = lab.folder("many")
    node = folder / "node.xml"
    node.write_text(f"<node>{''.join(map(domain_xml, range(DOMAINS)))}</node>")
    path = folder / "window"
    lab.daemon.start({"uri": f"test://{node}"}, argv=(*LAUNCHER, "--window", path))
    window = Window(path)
    yield window
    window.close()
    lab.daemon.stop()


class Listener:
    """Hears the daemon's signals, and notes when each came, in a thread of its own."""

    def __init__(self, address: str) -> None:
        self.heard: list[tuple[float, Incoming]] = []
        self._peer = RawPeer(address)
        self._peer.socket.settimeout(None)
        rule = f"type='signal',sender='{BUS_NAME}'"
        match = Client.message(BUS, "AddMatch", "s", [rule], path="/org/freedesktop/DBus", to=BUS)
        self._peer.send(marshalled(match, 2))
        self._peer.reply_to(2)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with suppress(OSError):
            while (message := self._peer.read()) is not None:
                self.heard.append((time.monotonic(), message))

    def close(self) -> None:
        self._peer.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._peer.close()

    def first(self, told: tuple[str, str, str], after: int) -> float:
        """When the first such signal came, `after` so many signals."""

        def found() -> float | None:
            for at, message in self.heard[after:]:
                if saying(message) == told:
                    return at
            return None

        return wait_until(f"{told}", found, 5, 0.002)


def saying(message: Incoming) -> tuple[str, str, str]:
    """What a signal tells: its name, the object, and the State that it has now, if that changed."""
    if message.member != "PropertiesChanged":
        return message.member, decode(message, "o")[0], ""
    _, changed, _ = decode(message, "sa{sv}as")
    return message.member, message.path, changed["State"].value if "State" in changed else ""


def round_trips(address: str, number: int) -> list[float]:
    """Seconds from sending GetManagedObjects to having the whole answer, unparsed."""
    peer = RawPeer(address)
    times = []
    for serial in range(2, number + 2):
        call = marshalled(Client.message(OBJECT_MANAGER, "GetManagedObjects"), serial)
        begun = time.perf_counter()
        peer.send(call)
        answer = peer.reply_to(serial)
        times.append(time.perf_counter() - begun)
        assert len(answer.body) > DOMAINS * 200
    peer.close()
    return times


async def test_all_are_told_in_time(lab: Lab, many: Window, connect: Connect) -> None:
    raw = await asyncio.to_thread(round_trips, lab.address, 21)
    api = await connect()
    whole = []
    for _ in range(5):
        begun = time.perf_counter()
        answer = await api.call(ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects")
        whole.append(time.perf_counter() - begun)
    domains = {path: row for path, row in answer[0].items() if DOMAIN in row}
    assert sorted(row[DOMAIN]["Name"] for row in domains.values()) == sorted(
        f"d{n}" for n in range(DOMAINS)
    )
    print(
        f"GetManagedObjects of {DOMAINS} domains: first {raw[0] * 1e3:.1f} ms, "
        f"median {statistics.median(raw) * 1e3:.1f} ms of {min(raw) * 1e3:.1f} to "
        f"{max(raw) * 1e3:.1f}; parsed by dbus-next {statistics.median(whole) * 1e3:.1f} ms"
    )
    assert raw[0] < 0.1
    assert statistics.median(raw) < 0.1


async def test_an_event_is_told_in_time_while_creates_run(
    lab: Lab, many: Window, connect: Connect
) -> None:
    stop = asyncio.Event()
    created = 0

    async def create(number: int) -> None:
        nonlocal created
        api = await connect()
        while not stop.is_set():
            await api.call(domain_path(uuid_of(number)), NAME, "Create", "sssu", VDA, "", "", 0)
            created += 1

    creates = [asyncio.create_task(create(number)) for number in range(CREATES)]
    listener = Listener(lab.address)
    try:
        times = await asyncio.to_thread(changes, many, listener)
    finally:
        stop.set()
        await asyncio.gather(*creates)
        listener.close()
    print(
        f"{len(times)} events while {created} Creates ran: median "
        f"{statistics.median(times) * 1e3:.1f} ms, most {max(times) * 1e3:.1f} ms"
    )
    assert created > 5 * CREATES
    assert statistics.median(times) < 0.05
    assert sorted(times)[len(times) * 9 // 10] < 0.05, "the rest may meet a pause of the machine"


def changes(many: Window, listener: Listener) -> list[float]:
    """Seconds from before each change to its signal; at the end all is as it was."""
    times = []

    def told(path: str, member: str, state: str, name: str, **what: str) -> None:
        after = len(listener.heard)
        before = many.ask(name, **what)
        times.append(listener.first((member, path, state), after) - before)

    end = time.monotonic() + LASTING_S
    for number in itertools.cycle(range(CREATES, DOMAINS)):
        if time.monotonic() > end:
            break
        uuid = uuid_of(number)
        path = domain_path(uuid)
        for what, state in (("suspend", "paused"), ("resume", "running"), ("destroy", "shutoff")):
            told(path, "PropertiesChanged", state, "do", what=what, uuid=uuid)
        told(path, "InterfacesRemoved", "", "do", what="undefine", uuid=uuid)
        told(path, "InterfacesAdded", "", "define", xml=domain_xml(number))
        told(path, "PropertiesChanged", "running", "do", what="create", uuid=uuid)
    return times


async def test_create_on_a_driver_that_lacks_half_of_libvirt(
    many: Window, connect: Connect
) -> None:
    """No block jobs, no job statistics, no agent timeouts: none of these, and not an error."""
    api = await connect()
    path = domain_path(uuid_of(0))
    plan = (await api.call(path, DOMAIN, "Plan", "sssu", VDA, "", "", 0))[0]
    # The method takes nothing at one instant, so that the vCPUs are stopped; but nobody knows that
    # what this driver runs flushes its images then.
    assert (plan["method"], plan["consistency"]) == ("slow", "crash")
    modified, source = await api.call(path, NAME, "Create", "sssu", VDA, "", "half", 0)
    assert modified == ""
    assert "/nowhere/d0-vda.img" in source
    assert Created(modified, source).ours("consistency") == plan["consistency"]
    names = [r["Name"] for r in (await api.snapshots()).values() if r["DomainUUID"] == uuid_of(0)]
    assert "half" in names
    disks = (await api.call(path, DOMAIN, "Disks"))[0]
    assert [disk["method"] for disk in disks] == ["slow", "slow"]
    with pytest.raises(ApiError) as error:
        await api.call(path, NAME, "Create", "sssu", VDA, "", "", QUIESCE_REQUIRED)
    assert error.value.name == "AgentUnavailable"


async def test_one_that_is_off(many: Window, connect: Connect) -> None:
    api = await connect()
    uuid = uuid_of(1)
    await asyncio.to_thread(many.ask, "do", what="shutdown", uuid=uuid)
    args = (domain_path(uuid), NAME, "Create", "sssu", VDA, "", "off", QUIESCE_REQUIRED)
    await api.call(*args)
    rows = [row for row in (await api.snapshots()).values() if row["Name"] == "off"]
    assert [row["Consistency"] for row in rows] == ["offline"]
    await asyncio.to_thread(many.ask, "do", what="create", uuid=uuid)


@pytest.mark.parametrize("interface", [NAME, DOMAIN])
async def test_qemu_takes_no_domain_that_qemu_does_not_run(
    many: Window, connect: Connect, interface: str
) -> None:
    api = await connect()
    member = "Create" if interface == NAME else "Plan"
    with pytest.raises(ApiError) as error:
        await api.call(domain_path(uuid_of(2)), interface, member, "sssu", VDA, QEMU, "", 0)
    assert error.value.name == "MethodNotSupported"
    assert "QEMU" in error.value.text
