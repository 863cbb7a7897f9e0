"""Many Creates: a hundred at once on ten guests, and three hundred in a row on one daemon."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt
import pytest
from lxml import etree

from snapd_vm.bus.contract import OBJECT_MANAGER, PEER
from snapd_vm.engine.journal import Journal
from tests.bus.clients import Client, RawPeer, marshalled
from tests.lab.deadline import wait_until
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import attempt
from tests.real.api import QUIESCE_REQUIRED, ApiError, Created
from tests.real.conftest import Connect
from tests.real.test_crash import active_file, files_of
from tests.real.window import Window

pytestmark = [pytest.mark.timeout(300), pytest.mark.measures]

GUESTS = 10
AT_ONCE = 100
CLIENTS = 5
IN_A_ROW = 300
WARM_UP = 60
CHAIN = 2
RECORD_KIB = 15  # 6 to 12 were measured: the record itself, its object, SQLite's pages
FAILURES = 200
# A machine with two cores runs ten guests here: what is slow is the machine, and no agent is away.
PATIENT = {
    "agent_timeout_s": 30,
    "freeze_timeout_s": 30,
    "frozen_limit_s": 60,
    "lock_timeout_s": 200,
}


@dataclass(frozen=True)
class Observed:
    """A daemon that tells what it does."""

    lab: Lab
    window: Window
    record: Path


@pytest.fixture
def observed(lab: Lab) -> Iterator[Observed]:
    import shutil

    shutil.rmtree(lab.daemon.state_dir, ignore_errors=True)
    folder = lab.folder("observed")
    record, path = folder / "record", folder / "window"
    record.unlink(missing_ok=True)
    launcher = (sys.executable, "-m", "tests.real.observed_daemon")
    lab.daemon.start(PATIENT, argv=(*launcher, "--record", record, "--window", path))
    window = Window(path)
    yield Observed(lab, window, record)
    window.close()
    lab.daemon.stop()


@pytest.fixture(scope="module")
def ten(lab: Lab) -> Iterator[list[Guest]]:
    """Ten guests, each writing a little."""
    guests = [lab.guest(start=False) for _ in range(GUESTS)]
    for guest in guests:
        guest.domain.create()
    for guest in guests:
        guest.wait_up(180)
        guest.writer(True, pause_us=50_000)
    yield guests
    for guest in guests:
        guest.remove()


class Onlooker:
    """Asks for what is cheap all the time, from a thread of its own, and notes how long it took."""

    def __init__(self, address: str) -> None:
        self.times: list[float] = []
        self._peer = RawPeer(address)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Onlooker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(20)
        self._peer.close()

    def _ask(self) -> None:
        asked = itertools.cycle([(OBJECT_MANAGER, "GetManagedObjects"), (PEER, "Ping")])
        for serial, (interface, member) in enumerate(asked, 2):
            call = marshalled(Client.message(interface, member), serial)
            begun = time.monotonic()
            self._peer.send(call)
            self._peer.reply_to(serial)
            self.times.append(time.monotonic() - begun)
            if self._end.wait(0.02):
                return


def chain_of(path: str) -> list[str]:
    """The files of a backing chain, the active one first."""
    argv = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", path]
    done = attempt(argv, timeout=60)
    assert done.returncode == 0, done.stderr
    return [str(image["filename"]) for image in json.loads(done.stdout)]


def response_timeout(lab: Lab, guest: Guest) -> str | None:
    """What libvirt's status XML of the domain says; None: the default."""
    status = lab.run.folder / "libvirt/run/qemu" / f"{guest.name}.xml"
    return etree.parse(status).findtext("agentTimeout")


def open_times(record: Path) -> dict[str, list[tuple[float, float]]]:
    """By domain, from when to when each operation was open in the journal."""
    begun: dict[str, float] = {}
    found: dict[str, list[tuple[float, float]]] = {}
    for line in record.read_text().splitlines():
        row = json.loads(line)
        if row["what"] == "begin":
            begun[row["operation"]] = row["at"]
        else:
            times = found.setdefault(row["domain"], [])
            times.append((begun.pop(row["operation"]), row["at"]))
    assert not begun, "an operation was begun and not ended"
    return found


def most_at_once(times: list[tuple[float, float]]) -> int:
    """How many of these overlapped at most."""
    changes = sorted([(begin, 1) for begin, _ in times] + [(end, -1) for _, end in times])
    return max(itertools.accumulate(change for _, change in changes))


def test_what_overlaps_is_counted() -> None:
    """So that a `most_at_once` of 1 says something."""
    assert most_at_once([(0, 1), (1, 2), (3, 4)]) == 1
    assert most_at_once([(0, 2), (1, 3), (1.5, 1.6), (4, 5)]) == 3


def journal_is_at_rest(lab: Lab) -> bool:
    """Whether nothing is open in it, and no guest is held."""
    journal = Journal(lab.daemon.state_dir)
    try:
        return not journal.operations() and not journal.held()
    finally:
        journal.close()


async def test_a_hundred_at_once_on_ten_guests(
    observed: Observed, ten: list[Guest], connect: Connect
) -> None:
    lab = observed.lab
    origins = {guest.uuid: active_file(guest) for guest in ten}
    timeouts = {guest.uuid: response_timeout(lab, guest) for guest in ten}
    apis = [await connect() for _ in range(CLIENTS)]
    # Every second one leaves the name to the daemon, which makes it from the time.
    wanted = [
        (apis[n % CLIENTS], ten[n % GUESTS], f"load-{n}" if n % 2 else "", n % 4 // 2)
        for n in range(AT_ONCE)
    ]
    wanted.sort(key=lambda one: one[1].uuid)  # ten on one domain at once, from different clients
    started = time.monotonic()
    with Onlooker(lab.address) as onlooker:
        calls = [api.create(g, name=name, flags=flags) for api, g, name, flags in wanted]
        created = await asyncio.gather(*calls, return_exceptions=True)
    took = time.monotonic() - started
    assert [one for one in created if not isinstance(one, Created)] == []
    assert len({one.snapshot for one in created if isinstance(one, Created)}) == AT_ONCE

    by_domain = open_times(observed.record)
    assert {uuid: len(times) for uuid, times in by_domain.items()} == {
        guest.uuid: AT_ONCE // GUESTS for guest in ten
    }
    for times in by_domain.values():
        assert most_at_once(times) == 1
    at_once = most_at_once([one for times in by_domain.values() for one in times])
    assert at_once > 1, "domains wait for each other"

    print(
        f"{AT_ONCE} Creates on {GUESTS} guests in {took:.1f} s, at most {at_once} at once; "
        f"{len(onlooker.times)} cheap calls meanwhile: median "
        f"{statistics.median(onlooker.times) * 1e3:.1f} ms, most "
        f"{max(onlooker.times) * 1e3:.1f} ms"
    )
    assert statistics.median(onlooker.times) < 0.05
    assert max(onlooker.times) < 1

    assert journal_is_at_rest(lab)
    rows = await apis[0].snapshots()
    for guest in ten:
        guest.writes_go_on(30)
        assert not guest.agent_says_frozen()
        assert guest.state == "running"
        assert response_timeout(lab, guest) == timeouts[guest.uuid]
        live = active_file(guest)
        assert live == active_file(guest, 2)
        chain = chain_of(live)
        assert chain[-1] == origins[guest.uuid]
        assert len(chain) == len(set(chain)) == AT_ONCE // GUESTS + 1
        assert {os.path.basename(path) for path in chain} == files_of(guest)
        mine = [row for row in rows.values() if row["DomainUUID"] == guest.uuid]
        assert len({row["Name"] for row in mine}) == len(mine) == AT_ONCE // GUESTS
        assert {row["State"] for row in mine} == {"ready"}
        assert {row["Consistency"] for row in mine} == {"quiesced"}
    sources = [await apis[0].backup_source(path) for path in rows]
    assert len({etree.fromstring(source).get("file") for source in sources}) == AT_ONCE


async def test_one_name_at_once_is_taken_once(
    observed: Observed, ten: list[Guest], connect: Connect
) -> None:
    guest = ten[0]
    before = files_of(guest)
    apis = [await connect() for _ in range(CLIENTS)]
    calls = [api.create(guest, name="same") for api in apis * 2]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(one, Created) for one in answers) == 1
    errors = [one.name for one in answers if isinstance(one, ApiError)]
    assert errors == ["NameInUse"] * (len(calls) - 1)
    assert len(files_of(guest)) == len(before) + 1
    assert journal_is_at_rest(observed.lab)
    guest.writes_go_on()


async def test_a_hundred_plans_at_once_and_creates_among_them(
    observed: Observed, ten: list[Guest], connect: Connect
) -> None:
    """Each asks the agent with a response timeout that is the domain's, and puts it back."""
    lab = observed.lab
    timeouts = [response_timeout(lab, guest) for guest in ten]
    apis = [await connect() for _ in range(CLIENTS)]
    plans = [apis[n % CLIENTS].plan(ten[n % GUESTS]) for n in range(AT_ONCE)]
    creates = [apis[n % CLIENTS].create(ten[n % GUESTS]) for n in range(2 * GUESTS)]
    async with asyncio.timeout(100):
        planned, created = await asyncio.gather(asyncio.gather(*plans), asyncio.gather(*creates))
    assert {plan["consistency"] for plan in planned} == {"quiesced"}
    assert {one.ours("consistency") for one in created} == {"quiesced"}
    assert [response_timeout(lab, guest) for guest in ten] == timeouts
    for guest in ten:
        guest.writes_go_on(30)


@dataclass(frozen=True)
class Sample:
    """What a process has."""

    fds: int
    threads: int
    tasks: int
    resident_kib: int

    @classmethod
    def of(cls, observed: Observed) -> Sample:
        process = Path(f"/proc/{observed.lab.daemon.pid}")
        pages = int((process / "statm").read_text().split()[1])
        return cls(
            fds=len(os.listdir(process / "fd")),
            threads=len(os.listdir(process / "task")),
            tasks=observed.window.ask("tasks"),
            resident_kib=pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        )

    def flat_since(self, first: Sample, kib: int) -> bool:
        """Whether it is what it was; `kib` of memory may have come."""
        return (
            self.fds <= first.fds
            and self.tasks <= first.tasks
            and self.threads <= first.threads + 6  # a pool of 64 makes one when none is idle
            and self.resident_kib <= first.resident_kib + kib
        )


async def at_rest(observed: Observed) -> Sample:
    """What the daemon has when what it does after an answer has been done."""
    await asyncio.sleep(1)
    return Sample.of(observed)


def commit_all(guest: Guest) -> None:
    """Commit the whole chain into its base, and take the overlays away, as an operator would."""
    chain = chain_of(active_file(guest))
    domain = guest.domain
    domain.blockCommit("vda", chain[-1], None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)

    def ready() -> bool:
        mirror = etree.fromstring(domain.XMLDesc()).find("devices/disk/mirror")
        return mirror is not None and mirror.get("ready") == "yes"

    wait_until(f"the commit of {guest.name}", ready, 30)
    domain.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    assert active_file(guest) == chain[-1]
    for path in chain[:-1]:
        os.unlink(path)


@pytest.fixture
def own(lab: Lab) -> Iterator[Guest]:
    """A guest of the test's own, writing a little."""
    guest = lab.guest()
    guest.writer(True, pause_us=50_000)
    yield guest
    guest.remove()


async def test_three_hundred_in_a_row(observed: Observed, own: Guest, connect: Connect) -> None:
    """Their records stay, on the bus and in memory, and are all that may come."""
    api = await connect()
    samples: dict[int, Sample] = {}
    for number in range(1, IN_A_ROW + 1):
        await api.create(own, flags=QUIESCE_REQUIRED)
        if number % CHAIN == 0:
            await asyncio.to_thread(commit_all, own)
        if number % WARM_UP == 0:
            samples[number] = await at_rest(observed)
            print(f"after {number} Creates: {samples[number]}")
    assert len(await api.snapshots_of(own)) == IN_A_ROW
    assert journal_is_at_rest(observed.lab)
    own.writes_go_on()
    first, last = samples[WARM_UP], samples[IN_A_ROW]
    assert last.flat_since(first, RECORD_KIB * (IN_A_ROW - WARM_UP))


async def test_what_fails_leaves_nothing(observed: Observed, own: Guest, connect: Connect) -> None:
    """Each has its overlay made, its freeze refused, and all undone; no record stays."""
    api = await connect()
    own.bad_mount("vda")
    before = files_of(own)
    samples: dict[int, Sample] = {}
    for number in range(1, FAILURES + 1):
        with pytest.raises(ApiError) as error:
            await api.create(own, flags=QUIESCE_REQUIRED)
        assert error.value.name == "QuiesceFailed"
        if number % (FAILURES // 5) == 0:
            samples[number] = await at_rest(observed)
            print(f"after {number} failures: {samples[number]}")
    assert files_of(own) == before
    assert journal_is_at_rest(observed.lab)
    own.writes_go_on()
    assert samples[FAILURES].flat_since(samples[FAILURES // 5], 1024)
