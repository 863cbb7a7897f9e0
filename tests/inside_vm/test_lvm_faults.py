"""Method lvm, killed at every step and in the midst of lvm's own programs; the domains are off."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from snapd_vm.engine.journal import DeleteStep, RevertStep, Step
from tests.inside_vm.test_lvm import group, guest_on, nothing_left
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import attempt, run
from tests.lab.volumegroup import Group, fill, read
from tests.real.api import SNAPSHOT, Api, ApiError, Created
from tests.real.conftest import Connect, connect, lab
from tests.real.places import Places, refused
from tests.real.test_crash import FAULTY, faulty
from tests.real.test_delete import delete
from tests.real.test_revert import places, revert
from tests.real.test_revert_faults import AS_IT_WAS

__all__ = ["connect", "faulty", "group", "lab", "nothing_left", "places"]

GONE = "org.freedesktop.DBus.Error.NoReply"
KINDS = ("thick", "thin")
NEVER_WHILE_OFF = (Step.FROZEN, Step.THAWED, Step.STOPPED)
"""Steps that a Create of a domain that is off does not come to."""


def with_kinds(steps: list[Any]) -> list[Any]:
    """Each step, with the kinds of volumes in turn."""
    return list(zip(steps, cycle(KINDS), strict=False))


async def whole_or_nothing(
    api: Api, guest: Guest, group: Group, before: list[str], was: bytes
) -> str:
    """Assert that the snapshot is there and listed, or nothing of it; which of the two."""
    assert not group.suspended()
    snapshots = await api.snapshots_of(guest)
    if not snapshots:
        assert group.contents() == before
        return "nothing"
    ((path, told),) = snapshots.items()
    assert told["State"] == "ready"
    assert read(Created("", await api.backup_source(path)).file) == was
    assert len(group.contents()) == len(before) + 1
    return "snapshot"


async def dead(lab: Lab) -> None:
    await asyncio.to_thread(wait_until, "it is dead", lambda: not lab.daemon.running, 20)


@pytest.mark.parametrize(
    ("step", "kind"), with_kinds([s for s in Step if s not in NEVER_WHILE_OFF])
)
async def test_killed_at(
    connect: Connect, faulty: Lab, places: Places, group: Group, step: Step, kind: str
) -> None:
    device = group.device(kind)
    fill(device, 1)
    before, was = group.contents(), read(device)
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "kill"))
    api = await connect()
    guest = await guest_on(api, places, device)
    await refused(api.create(guest, name="killed"), GONE)
    await dead(faulty)
    faulty.daemon.start({}, argv=DAEMON)
    await places.known(api)
    outcome = await whole_or_nothing(api, guest, group, before, was)
    steps = list(Step)
    stands = steps.index(step) >= steps.index(Step.SWITCHED)
    assert outcome == ("snapshot" if stands else "nothing")
    created = await api.create(guest)
    assert read(created.file) == was
    for path in await api.snapshots_of(guest):
        await api.call(path, SNAPSHOT, "Delete", "u", 0)
    assert group.contents() == before


@pytest.mark.parametrize(("step", "kind"), with_kinds(list(DeleteStep)))
async def test_killed_in_a_delete_at(
    connect: Connect, faulty: Lab, places: Places, group: Group, step: DeleteStep, kind: str
) -> None:
    device = group.device(kind)
    before = group.contents()
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "kill"))
    api = await connect()
    guest = await guest_on(api, places, device)
    created = await api.create(guest)
    was = read(device)
    await refused(delete(api, created), GONE)
    await dead(faulty)
    faulty.daemon.start({}, argv=DAEMON)
    await places.known(api)
    outcome = await whole_or_nothing(api, guest, group, before, was)
    assert outcome == ("snapshot" if step is DeleteStep.CHECKED else "nothing")
    assert read(device) == was


@pytest.mark.parametrize(
    ("step", "kind"),
    [*with_kinds(list(RevertStep)), (RevertStep.ARMED, "thick"), (RevertStep.SWITCHED, "thin")],
)
async def test_killed_in_a_revert_at(
    connect: Connect, faulty: Lab, places: Places, group: Group, step: RevertStep, kind: str
) -> None:
    device = group.device(kind)
    fill(device, 2)
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "kill"))
    api = await connect()
    guest = await guest_on(api, places, device)
    created = await api.create(guest)
    wanted = read(device)
    fill(device, 2, 1)
    was, before = read(device), group.contents()
    await refused(revert(api, created), GONE)
    await dead(faulty)
    faulty.daemon.start({}, argv=DAEMON)
    await places.known(api)
    states = [row["State"] for row in (await api.snapshots_of(guest)).values()]
    assert states == ["ready"]
    assert read(device) == (was if step in AS_IT_WAS else wanted)
    assert read(created.file) == wanted
    assert [line.split()[:2] for line in group.contents()] == [line.split()[:2] for line in before]
    assert not any("snapd-vm.revert" in row["lv_tags"] for row in group.volumes().values())
    await revert(api, created)
    assert read(device) == wanted
    await delete(api, created)


# -- in the midst of a program ---------------------------------------------------------------------


def processes(name: str) -> list[int]:
    """The processes of this name."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                found.append(int(pid))
    return found


def kill_in(lab: Lab, program: str, when: Callable[[], object], after: float) -> bool:
    """Kill the daemon and the program that it runs, `after` seconds after this is so; whether."""
    deadline = time.monotonic() + 60
    while not processes(program):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    while not when():
        if not processes(program):
            return False
    time.sleep(after)
    killed = processes(program)
    for pid in killed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    lab.daemon.kill()
    return bool(killed)


@pytest.fixture
def standing(group: Group) -> Iterator[None]:
    """Let everything go on at the end, for the next test's sake."""
    yield
    for name in group.suspended():
        run("dmsetup", "resume", name)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_lvcreate_that_is_killed_leaves_all_or_nothing(
    connect: Connect, faulty: Lab, places: Places, group: Group, standing: None, kind: str
) -> None:
    """Whenever that is: one that only waits for udev has made it all. For while the volume stands
    still see test_lvm_method.py.
    """
    device = group.device(kind)
    fill(device, 1)
    faulty.daemon.start({}, argv=DAEMON)
    api = await connect()
    guest = await guest_on(api, places, device)
    before, was, kills = group.contents(), read(device), 0
    for when, after in [(group.suspended, 0.0), (lambda: True, 0.02), (lambda: True, 0.1)]:
        call = asyncio.create_task(api.create(guest))
        kills += await asyncio.to_thread(kill_in, faulty, "lvcreate", when, after)
        with suppress(ApiError):
            await call
        if faulty.daemon.running:
            faulty.daemon.kill()
        faulty.daemon.start({}, argv=DAEMON)
        await places.known(api)
        await whole_or_nothing(api, guest, group, before, was)
        for path in await api.snapshots_of(guest):
            await api.call(path, SNAPSHOT, "Delete", "u", 0)
        assert group.contents() == before
        fill(device, 1)  # it takes writes
        was = read(device)
    assert kills
    await delete(api, await api.create(guest))


async def test_the_thaw_after_the_daemons_end_lets_the_volume_go_on(
    connect: Connect, faulty: Lab, places: Places, group: Group, standing: None
) -> None:
    device = group.device("thin")
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.ARMED, "--do", "kill"))
    api = await connect()
    guest = await guest_on(api, places, device)
    await refused(api.create(guest), GONE)
    run("dmsetup", "suspend", device)  # as an lvcreate leaves it that is killed in the middle
    assert group.suspended()
    argv = [*DAEMON, "--thaw-held"]
    argv += ["--config", str(faulty.daemon.config_file)]
    done = attempt(argv, env=faulty.bus.env, timeout=120)
    assert (done.returncode, group.suspended()) == (0, []), done.stderr
    faulty.daemon.start({}, argv=DAEMON)
    await places.known(api)
    assert not await api.snapshots_of(guest)


async def test_an_lvcreate_that_outlives_the_daemon_is_waited_for(
    connect: Connect, faulty: Lab, places: Places, group: Group
) -> None:
    device = group.device("thick")
    faulty.daemon.start({}, argv=DAEMON)
    api = await connect()
    guest = await guest_on(api, places, device)
    before, was = group.contents(), read(device)
    call = asyncio.create_task(api.create(guest))
    await asyncio.to_thread(wait_until, "lvcreate runs", lambda: processes("lvcreate"), 30, 0.001)
    (pid,) = processes("lvcreate")
    os.kill(pid, signal.SIGSTOP)
    faulty.daemon.kill()
    await refused(call, GONE)
    begun = asyncio.create_task(asyncio.to_thread(faulty.daemon.start, {}, argv=DAEMON))
    await asyncio.sleep(8)
    os.kill(pid, signal.SIGCONT)
    await begun
    await places.known(api)
    assert await whole_or_nothing(api, guest, group, before, was) in ("snapshot", "nothing")
    assert not processes("lvcreate")


# -- started meanwhile -----------------------------------------------------------------------------


async def test_a_domain_that_is_started_before_the_switch(
    connect: Connect, faulty: Lab, places: Places, group: Group, tmp_path: Path
) -> None:
    device, flag = group.device("thin"), tmp_path / "flag"
    fill(device, 1)
    faulty.daemon.start({}, argv=(*FAULTY, "--at", RevertStep.ARMED, "--do", f"wait:{flag}"))
    api = await connect()
    guest = await guest_on(api, places, device)
    created = await api.create(guest)
    fill(device, 1, 1)
    was, before = read(device), group.contents()
    call = asyncio.create_task(revert(api, created))
    await asyncio.to_thread(wait_until, "it is armed", flag.exists, 60)
    guest.domain.createWithFlags(1)  # VIR_DOMAIN_START_PAUSED
    flag.unlink()
    await refused(call, "InvalidState")
    guest.domain.destroy()
    assert read(device) == was
    assert group.contents() == before
    await delete(api, created)
