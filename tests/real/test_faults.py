"""Storage, programs and files that fail: each has its error, and nothing is left over."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapd_vm import command
from snapd_vm.engine.journal import Step
from tests.lab.blockdev import Mounted
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import attempt, run
from tests.real.api import QUIESCE_REQUIRED, VDA, Api, ApiError
from tests.real.conftest import Connect
from tests.real.places import Places, image, refused, unchanged, with_image, world
from tests.real.test_crash import FAULTY, faulty

__all__ = ["faulty"]


@pytest.fixture
def places(lab: Lab) -> Iterator[Places]:
    """Domains of the test's own."""
    made = Places(lab)
    yield made
    made.forget()


@pytest.fixture
def small(lab: Lab) -> Iterator[Mounted]:
    """A small file system, without the room that ext4 keeps back for root."""
    made = lab.block.mounted("ext4", 24)
    run("tune2fs", "-m", "0", made.loop.device)
    yield made
    if lab.daemon.running:
        lab.daemon.stop()
    made.unmount()


def overlay_at(path: Path) -> str:
    """A method_xml that names it."""
    return f"<diskSnapshot method='qemu'><overlay file='{path}'/></diskSnapshot>"


# -- the overlay's folder ------------------------------------------------------------------------


@pytest.mark.parametrize("running", [False, True])
async def test_the_overlays_file_system_is_full(
    api: Api, places: Places, small: Mounted, running: bool
) -> None:
    guest = places.guest(with_image(image(small.path / "disk.qcow2")), start=running)
    await places.known(api)
    small.fill(1 << 20)
    assert "make room" in (await unchanged(api, guest, "NoSpace")).text
    small.drain()
    await api.create(guest)
    guest.remove()


async def test_it_fills_up_between_the_check_and_the_overlay(
    connect: Connect, faulty: Lab, places: Places, small: Mounted, guest: Guest
) -> None:
    flag = faulty.folder("flags") / "full"
    settings = {"qemu": {"overlay_dirs": [str(small.path)]}}
    faulty.daemon.start(settings, argv=(*FAULTY, "--at", Step.BEGUN, "--do", f"wait:{flag}"))
    api = await connect()
    before, files = world(guest), sorted(small.path.iterdir())
    method = overlay_at(small.path / "named")
    call = asyncio.create_task(api.create(guest, VDA, method, flags=QUIESCE_REQUIRED))
    await asyncio.to_thread(wait_until, "it has begun", flag.exists, 20)
    small.fill()
    flag.unlink()
    await refused(call, "NoSpace")
    small.drain()
    assert (world(guest), sorted(small.path.iterdir())) == (before, files)
    guest.writes_go_on()
    created = await api.create(guest, flags=QUIESCE_REQUIRED)
    assert created.ours("consistency") == "quiesced"


async def test_the_overlays_file_system_is_read_only(
    daemon: Lab, connect: Connect, places: Places, small: Mounted, guest: Guest
) -> None:
    daemon.daemon.stop()
    daemon.daemon.start({"qemu": {"overlay_dirs": [str(small.path)]}})
    api = await connect()
    off = places.guest(with_image(image(small.path / "disk.qcow2")))
    await places.known(api)
    small.set_read_only(True)
    assert "read-only" in (await unchanged(api, off, "StorageFailed")).text
    elsewhere = overlay_at(small.path / "named")
    assert "read-only" in (await unchanged(api, guest, "StorageFailed", method_xml=elsewhere)).text
    guest.writes_go_on()
    small.set_read_only(False)
    await api.create(off)
    off.remove()


async def test_the_overlays_folder_is_immutable(api: Api, places: Places) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    folder = guest.disk().path.parent
    run("chattr", "+i", folder)
    try:
        before = world(guest)
        await refused(api.create(guest), "StorageFailed")
        assert world(guest) == before
    finally:
        run("chattr", "-i", folder)
    await api.create(guest)


# -- the journal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [None, Step.BEGUN, Step.ARMED, Step.READ_BACK])
async def test_the_journals_file_system_fills_up(
    connect: Connect, faulty: Lab, small: Mounted, guest: Guest, step: Step | None
) -> None:
    """Before the Create, or in the midst of it; when there is room again, all is well."""
    flag = faulty.folder("flags") / "journal"
    argv = (*FAULTY, "--at", step, "--do", f"wait:{flag}") if step else DAEMON
    faulty.daemon.start({"state_dir": str(small.path / "state")}, argv=argv)
    api = await connect()
    before = world(guest)
    known = set(await api.snapshots_of(guest))
    if step is None:
        small.fill()
        error = await refused(api.create(guest, flags=QUIESCE_REQUIRED), "NoSpace")
    else:
        call = asyncio.create_task(api.create(guest, flags=QUIESCE_REQUIRED))
        await asyncio.to_thread(wait_until, "the step", flag.exists, 20)
        small.fill()
        flag.unlink()
        if step is Step.ARMED:  # nothing is written to the journal from there to the thaw
            with pytest.raises(ApiError) as caught:
                await call
            error = caught.value
            assert error.name == "NoSpace"
        else:
            error = await refused(call, "NoSpace")
    assert "journal" in error.text
    guest.writes_go_on()
    assert not guest.agent_says_frozen()
    assert world(guest) == before
    assert set(await api.snapshots_of(guest)) == known
    await refused(api.create(guest), "NoSpace", "Busy")
    small.drain()
    deadline = time.monotonic() + 30
    while True:
        try:
            await api.create(guest, flags=QUIESCE_REQUIRED)
            break
        except ApiError as again:
            assert again.name == "Busy", again
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
    faulty.daemon.stop()


class Ended:
    """A daemon that does not start: what it says, and its exit status."""

    def __init__(self, lab: Lab, config: dict[str, Any]) -> None:
        before = len(lab.daemon.log)
        lab.daemon.start(config, argv=DAEMON, wait=0)
        wait_until("the daemon ends", lambda: not lab.daemon.running, 40)
        self.status = lab.daemon.status
        self.lines = lab.daemon.log[before:].strip().splitlines()

    def check(self, *words: str) -> None:
        """Exit status 1, and one line that holds these words."""
        assert self.status == 1
        assert len(self.lines) == 1, self.lines
        for word in words:
            assert word in self.lines[0]


@pytest.mark.parametrize("why", ["read-only", "full", "a file", "below a file"])
def test_the_state_dir_can_not_be_written(faulty: Lab, small: Mounted, why: str) -> None:
    folder = small.path / "state"
    if why == "read-only":
        small.set_read_only(True)
    elif why == "full":
        small.fill()
    elif why == "a file":
        folder.write_text("")
    else:
        folder.write_text("")
        folder = folder / "state"
    Ended(faulty, {"state_dir": str(folder)}).check(str(folder))
    if why == "read-only":
        small.set_read_only(False)


def damage(file: Path, how: str) -> None:
    """Spoil a journal that a daemon has written."""
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if how == "version":
            db.execute("PRAGMA user_version=99")
        elif how == "row":
            db.execute("INSERT INTO operation VALUES ('u', 'd', '{\"tag\": 1')")
        elif how == "table":
            db.execute("DROP TABLE held")
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    size = file.stat().st_size
    if how == "garbage":
        file.write_bytes(b"\xff" * 20000)
    elif how == "cut off":
        with file.open("r+b") as data:
            data.truncate(size // 2)
    elif how == "a page":
        with file.open("r+b") as data:
            data.seek(4096)
            data.write(b"\xff" * (size - 4096))


@pytest.mark.parametrize("how", ["garbage", "cut off", "a page", "version", "row", "table"])
async def test_a_journal_that_is_corrupt(daemon: Lab, api: Api, places: Places, how: str) -> None:
    """It is told, and left for a person to look at: it may say which guests are frozen."""
    guest = places.guest()
    await places.known(api)
    await api.create(guest)
    daemon.daemon.stop()
    file = daemon.daemon.state_dir / "journal.sqlite3"
    damage(file, how)
    spoilt = file.read_bytes()
    Ended(daemon, {}).check("journal")
    assert file.read_bytes() == spoilt
    shutil.rmtree(daemon.daemon.state_dir)


# -- the configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"lock_timeout": 3}, "lock_timeout"),
        ({"qemu": {"overlay_dir": "/x"}}, "qemu.overlay_dir"),
        ({"lock_timeout_s": "3"}, "lock_timeout_s"),
        ({"qemu": {"overlay_dirs": ["relative"]}}, "qemu.overlay_dirs"),
    ],
)
def test_a_configuration_that_is_wrong(faulty: Lab, config: dict[str, Any], word: str) -> None:
    Ended(faulty, config).check(word, str(faulty.daemon.config_file))


# -- qemu-img ------------------------------------------------------------------------------------


def with_program(stand_in: Path, *argv: str) -> tuple[str, ...]:
    """A daemon to which alone `stand_in` is qemu-img."""
    program = shutil.which("qemu-img") or ""
    script = f'mount --bind "{stand_in}" {program}; exec "$@"'
    return ("unshare", "--mount", "--propagation", "slave", "sh", "-ec", script, "sh", *argv)


@pytest.mark.parametrize("how", ["is not there", "fails", "talks nonsense"])
async def test_qemu_img(connect: Connect, faulty: Lab, places: Places, how: str) -> None:
    """Create does without; what it can't look into then is not undone, and not lost sight of."""
    stand_in = faulty.folder("programs") / how.replace(" ", "-")
    stand_in.write_text(f"#!/bin/sh\necho nonsense; exit {int(how == 'fails')}\n")
    stand_in.chmod(0o644 if how == "is not there" else 0o755)
    argv = (*FAULTY, "--at", Step.ARMED, "--do", "raise")
    faulty.daemon.start({}, argv=with_program(stand_in, *argv))
    api = await connect()
    guest, other = places.guest(), places.guest()
    await places.known(api)
    before = world(guest)
    assert "A fault" in (await refused(api.create(guest), "StorageFailed")).text
    assert world(guest)[:2] == before[:2]
    assert "not been settled" in (await refused(api.create(guest), "Busy")).text
    await api.create(other)
    faulty.daemon.stop()
    faulty.daemon.start({}, argv=DAEMON)
    wait_until("it is settled", lambda: world(guest) == before, 30)
    api = await connect()
    await api.create(guest)


def test_a_program_that_hangs_is_ended_with_all_that_it_started() -> None:
    started = time.monotonic()
    unlike = 100000 + os.getpid()  # seconds that nobody else sleeps
    with pytest.raises(command.CommandError, match="did not end within 1 s"):
        command.run(["sh", "-c", f"sleep {unlike} & wait"], timeout=1)
    assert time.monotonic() - started < 20
    wait_until(
        "the end of what it started",
        lambda: attempt(["pgrep", "-f", f"^sleep {unlike}$"]).returncode == 1,
        10,
    )


# -- one at a time -------------------------------------------------------------------------------


async def test_a_second_create_waits_its_turn(connect: Connect, faulty: Lab, guest: Guest) -> None:
    flag = faulty.folder("flags") / "turn"
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.ARMED, "--do", f"wait:{flag}"))
    api, other = await connect(), await connect()
    first = asyncio.create_task(api.create(guest, name="turn-one"))
    await asyncio.to_thread(wait_until, "the step", flag.exists, 20)
    second = asyncio.create_task(other.create(guest, name="turn-two"))
    done, _ = await asyncio.wait([first, second], timeout=1)
    assert not done
    flag.unlink()
    one, two = await asyncio.gather(first, second)
    assert two.file == one.overlay


async def test_a_second_create_waits_no_longer_than_the_limit(
    connect: Connect, faulty: Lab, guest: Guest, places: Places
) -> None:
    flag = faulty.folder("flags") / "limit"
    argv = (*FAULTY, "--at", Step.ARMED, "--do", f"wait:{flag}")
    faulty.daemon.start({"lock_timeout_s": 2}, argv=argv)
    api, other = await connect(), await connect()
    apart = places.guest(DiskSpec(folder=places.folder(), filesystem=None, size_mib=16))
    await places.known(api)
    first = asyncio.create_task(api.create(guest))
    await asyncio.to_thread(wait_until, "the step", flag.exists, 20)
    started = time.monotonic()
    error = await refused(other.create(guest), "Busy")
    assert 1.5 < time.monotonic() - started < 15
    assert "2 s" in error.text
    await other.create(apart)  # nor does another domain wait
    assert not first.done()
    flag.unlink()
    assert (await first).ours("consistency") == "quiesced"
