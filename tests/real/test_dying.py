"""QEMU that dies in the middle of a Create, and a libvirtd that is away when the daemon starts."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from snapd_vm.engine.journal import Step
from snapd_vm.model import ROOT_PATH
from tests.lab.daemon import DAEMON
from tests.lab.deadline import LabError, wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real import images
from tests.real.api import MANAGER, NO_QUIESCE, QUIESCE_REQUIRED, Api, ApiError
from tests.real.conftest import Connect
from tests.real.places import INACTIVE, Places, file_of, refused
from tests.real.test_crash import FAULTY, active_file, faulty, files_of
from tests.real.test_libvirtd import until_connected
from tests.real.test_quiesce import held_in

__all__ = ["faulty"]


@pytest.fixture
def places(lab: Lab) -> Iterator[Places]:
    """Domains of the test's own."""
    made = Places(lab)
    yield made
    made.forget()


@pytest.fixture
def own(lab: Lab, places: Places) -> Iterator[Guest]:
    """A guest of the test's own, to be damaged."""
    made = lab.guest([DiskSpec(folder=places.folder())])
    yield made
    made.control.close()
    with suppress(LabError):  # a transient one is gone
        made.remove()


def qemu_of(guest: Guest) -> int:
    """The pid of its QEMU."""
    marker = f"guest={guest.name},".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"{guest.name} has no QEMU")


def on_root(guest: Guest) -> str:
    """A disk_xml for the root object."""
    uuid = f"<uuid>{guest.uuid}</uuid>"
    return f"<domain>{uuid}<devices><disk><target dev='vda'/></disk></devices></domain>"


async def outcome(call: Awaitable[Any]) -> Any:
    """What the call ends with, whichever it is."""
    try:
        return await call
    except ApiError as error:
        return error


async def not_busy(api: Api, guest: Guest, timeout: float = 60) -> None:
    """Wait until nothing of an earlier Create keeps the domain closed."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            await api.create(guest, "<disk><target dev='vda'/><source file='/no'/></disk>")
        except ApiError as error:
            if error.name == "DiskMismatch":
                break
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)
    # That was told from memory; this is not.
    while True:
        try:
            await api.create(guest, method_xml="<diskSnapshot method='rbd'/>")
        except ApiError as error:
            if error.name == "MethodNotSupported":
                return
            assert error.name == "Busy", error
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


@pytest.mark.parametrize("flags", [0, QUIESCE_REQUIRED])
@pytest.mark.parametrize(
    "step", [Step.PREPARED, Step.ARMED, Step.FROZEN, Step.SWITCHED, Step.THAWED, Step.READ_BACK]
)
async def test_qemu_killed_at(
    connect: Connect, faulty: Lab, own: Guest, scratch: Path, step: Step, flags: int
) -> None:
    """The caller gets an error and nothing is left, or a snapshot that is what it is called."""
    own.write("vda", "mark", "before")
    own.sync()
    flag = faulty.folder("flags") / f"qemu-{step}-{flags}"
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", f"wait:{flag}"))
    api = await connect()
    files, file_before = files_of(own), active_file(own)
    call = asyncio.create_task(outcome(api.create(own, flags=flags)))
    await asyncio.to_thread(wait_until, "the step", flag.exists, 20)
    os.kill(qemu_of(own), signal.SIGKILL)
    own.wait_state("shutoff")
    flag.unlink()
    answer = await call
    await not_busy(api, own)
    snapshots = await api.snapshots_of(own)
    if isinstance(answer, ApiError):
        assert answer.name in ("HypervisorUnavailable", "QuiesceFailed", "StorageFailed"), answer
        assert not snapshots
        assert files_of(own) == files
        assert file_of(own, INACTIVE) == file_before
    else:
        # It was frozen through the switch only if it died after the thaw.
        whole = step in (Step.THAWED, Step.READ_BACK)
        assert answer.ours("consistency") == ("quiesced" if whole else "crash")
        raw = images.raw_copy(answer.file, answer.ours("format"), scratch / "raw")
        assert images.needs_recovery(raw) == (step in (Step.PREPARED, Step.ARMED))
        assert [row["State"] for row in snapshots.values()] == ["ready"]
        assert file_of(own, INACTIVE) == answer.overlay
        assert len(files_of(own)) == len(files) + 1
    wait_until("it is released", lambda: not held_in(faulty), 30)
    own.control.close()
    own.start()
    assert own.read("vda", "mark") == "before"
    assert (await api.create(own, flags=QUIESCE_REQUIRED)).ours("consistency") == "quiesced"


def known_to_libvirt(lab: Lab, guest: Guest) -> bool:
    """Whether libvirt has a domain of the guest's UUID."""
    domains = lab.hypervisor.connection().listAllDomains()
    return guest.uuid in [domain.UUIDString() for domain in domains]


@pytest.mark.parametrize("transient", [False, True])
async def test_qemu_killed_before_an_undo_that_would_lose_what_the_guest_wrote(
    connect: Connect, faulty: Lab, own: Guest, transient: bool
) -> None:
    """The caller is told of the error, and the snapshot stands, listed, with all data."""
    flag = faulty.folder("flags") / f"undo-{transient}"
    argv = (*FAULTY, "--at", Step.READ_BACK, "--do", f"raise-wait:{flag}")
    faulty.daemon.start({}, argv=argv)
    api = await connect()
    if transient:
        own.domain.undefine()
    base = active_file(own)
    call = asyncio.create_task(api.create(own, name="undone"))
    await asyncio.to_thread(wait_until, "the step", flag.exists, 20)
    own.write("vda", "mark", "after the switch")
    own.sync()
    overlay = active_file(own)
    assert overlay != base
    own.control.close()
    os.kill(qemu_of(own), signal.SIGKILL)
    if transient:
        wait_until("libvirt has dropped it", lambda: not known_to_libvirt(faulty, own), 30)
    else:
        own.wait_state("shutoff")
    flag.unlink()
    await refused(call, "StorageFailed")
    (path,) = await api.snapshots_of(own)
    row = (await api.snapshots_of(own))[path]
    assert row["Consistency"] in ("crash", "quiesced")
    assert images.info(overlay)["backing-filename"] == base
    if transient:
        assert row["State"] == "detached"
        return
    assert row["State"] == "ready"
    assert file_of(own, INACTIVE) == overlay
    await not_busy(api, own)
    own.start()
    assert own.read("vda", "mark") == "after the switch"


# -- libvirtd away -------------------------------------------------------------------------------


@pytest.fixture
def away(faulty: Lab) -> Iterator[Lab]:
    """A lab whose libvirtd a test takes away; it is there again afterwards."""
    yield faulty
    faulty.libvirtd.start()


async def connected(api: Api) -> Any:
    return (await api.properties(ROOT_PATH, MANAGER))["Connected"]


async def test_libvirtd_is_not_there_at_the_start(
    connect: Connect, away: Lab, guest: Guest
) -> None:
    away.libvirtd.stop()
    away.daemon.start({}, argv=DAEMON, wait=25)
    api = await connect()
    assert await connected(api) is False
    await refused(api.create_on_root(on_root(guest)), "HypervisorUnavailable")
    away.libvirtd.start()
    await until_connected(api, True)
    created = await api.create(guest, flags=QUIESCE_REQUIRED)
    assert created.ours("consistency") == "quiesced"


@pytest.mark.timeout(180)
async def test_libvirtd_hangs_at_the_start(connect: Connect, away: Lab, guest: Guest) -> None:
    """The name is held all the same, in the time that a bus or systemd waits, and SIGTERM works."""
    away.libvirtd.suspend()
    try:
        away.daemon.start({}, argv=DAEMON, wait=25)
        api = await connect()
        assert await connected(api) is False
        await refused(api.create_on_root(on_root(guest)), "HypervisorUnavailable")
        await asyncio.to_thread(away.daemon.stop, 60)
        away.daemon.start(wait=25)
    finally:
        away.libvirtd.resume()
    await until_connected(api, True, 60)
    await api.create(guest, flags=QUIESCE_REQUIRED)


async def test_an_operation_is_left_over_and_libvirtd_is_away(
    connect: Connect, away: Lab, own: Guest
) -> None:
    away.daemon.start({}, argv=(*FAULTY, "--at", Step.SWITCHED, "--do", "kill"))
    api = await connect()
    base = active_file(own)
    call = outcome(api.create(own, name="left", flags=QUIESCE_REQUIRED))
    assert isinstance(await call, ApiError)
    wait_until("the daemon is dead", lambda: not away.daemon.running, 10)
    own.stands_still()
    away.libvirtd.stop()
    away.daemon.start({}, argv=DAEMON, wait=25)
    api = await connect()
    assert held_in(away) == [own.uuid]
    await refused(api.create_on_root(on_root(own)), "Busy", "HypervisorUnavailable")
    away.libvirtd.start()
    await until_connected(api, True)
    own.writes_go_on(30)
    assert not own.agent_says_frozen()
    await not_busy(api, own)
    wait_until("it is released", lambda: not held_in(away), 30)
    (row,) = (await api.snapshots_of(own)).values()
    assert (row["Name"], row["State"], row["Consistency"]) == ("left", "ready", "crash")
    assert images.info(active_file(own))["backing-filename"] == base
    assert (await api.create(own, flags=QUIESCE_REQUIRED)).ours("consistency") == "quiesced"


async def test_what_is_not_settled_keeps_its_domain_busy_and_no_other(
    connect: Connect, away: Lab, own: Guest, guest: Guest
) -> None:
    """Here because its QEMU hangs: neither is another guest left frozen for as long as it does."""
    files = files_of(own)
    away.daemon.start({}, argv=(*FAULTY, "--at", Step.ARMED, "--do", "kill"))
    api = await connect()
    assert isinstance(await outcome(api.create(own)), ApiError)
    wait_until("the daemon is dead", lambda: not away.daemon.running, 10)
    pid = qemu_of(own)
    os.kill(pid, signal.SIGSTOP)
    flag = away.folder("flags") / "hung"
    try:
        argv = (*FAULTY, "--at", Step.SWITCHED, "--do", f"wait:{flag}")
        away.daemon.start({"freeze_timeout_s": 2, "agent_timeout_s": 2}, argv=argv, wait=25)
        api = await connect()
        assert "not been settled" in (await refused(api.create(own), "Busy")).text
        call = asyncio.create_task(api.create(guest))
        await asyncio.to_thread(wait_until, "the switch", flag.exists, 30)
        guest.stop_agent()
        flag.unlink()
        assert (await call).ours("consistency") == "crash"
        await asyncio.sleep(5)  # longer than the agent's timeout
        assert guest.uuid in held_in(away)
        guest.cont_agent()
        wait_until("it is released", lambda: guest.uuid not in held_in(away), 30)
        guest.writes_go_on()
        await refused(api.create(own), "Busy")
    finally:
        os.kill(pid, signal.SIGCONT)
    await not_busy(api, own)
    own.writes_go_on(60)
    assert not await api.snapshots_of(own)
    assert files_of(own) == files


async def test_a_qemu_that_hangs_keeps_no_caller_waiting_for_ever(
    connect: Connect, away: Lab, own: Guest, guest: Guest
) -> None:
    files, file_before = files_of(own), active_file(own)
    """libvirt's call for the switch waits for as long as QEMU hangs."""
    limits = ("lock_timeout_s", "agent_timeout_s", "freeze_timeout_s", "frozen_limit_s")
    away.daemon.start(dict.fromkeys(limits, 1), argv=None)
    api = await connect()
    pid = qemu_of(own)
    os.kill(pid, signal.SIGSTOP)
    try:
        call = asyncio.create_task(outcome(api.create(own, flags=NO_QUIESCE)))
        assert (await api.create(guest)).ours("consistency") == "quiesced"
        assert await api.disks(own) and await api.disks(guest)
        assert (await call).name == "TimedOut"
        await refused(api.create(own), "Busy")
    finally:
        os.kill(pid, signal.SIGCONT)
    await not_busy(api, own)
    own.writes_go_on(60)
    assert not await api.snapshots_of(own)
    assert (files_of(own), active_file(own)) == (files, file_before)
    assert len(await api.disks(own)) == len(own.disks)
