"""Reverts that fail, are cancelled or killed: all is as it was, or it is reverted.

A further method that can revert is one more entry in METHODS.
"""

from __future__ import annotations

import asyncio
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from snapd_vm.engine.journal import RevertStep
from snapd_vm.errors import PREFIX
from snapd_vm.model import ROOT_PATH
from tests.lab import allow
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real.api import NAME, SNAPSHOT, VDA, Api, Created
from tests.real.conftest import Connect
from tests.real.places import (
    INACTIVE,
    Places,
    file_of,
    refused,
    world,
)
from tests.real.test_crash import FAULTY, faulty
from tests.real.test_delete import delete
from tests.real.test_faults import small
from tests.real.test_revert import contents, places, revert, stack, until, whole

__all__ = ["faulty", "places", "small"]

JOB = f"{NAME}.Job"
METHODS = ("qemu",)
AS_IT_WAS = tuple(RevertStep)[: tuple(RevertStep).index(RevertStep.SWITCHED)]


def starts(guest: Guest) -> None:
    """The definition is one that QEMU can run."""
    guest.domain.create()
    assert file_of(guest) == file_of(guest, INACTIVE)
    guest.domain.destroy()


# -- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("to", [0, 1])
@pytest.mark.parametrize("step", list(RevertStep))
async def test_killed_at(
    connect: Connect,
    faulty: Lab,
    places: Places,
    tmp_path: Path,
    step: RevertStep,
    to: int,
    method: str,
) -> None:
    guest = places.guest(DiskSpec(folder=places.folder(), size_mib=16, filesystem=None))
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "kill"))
    api = await connect()
    await places.known(api)
    stacked = await stack(api, guest, 2, method)
    sums, present = await contents(api, tmp_path, stacked), whole(file_of(guest), tmp_path)
    before = world(guest)
    await refused(revert(api, stacked[to]), "org.freedesktop.DBus.Error.NoReply")
    await asyncio.to_thread(wait_until, "it is dead", lambda: not faulty.daemon.running, 10)
    faulty.daemon.start({}, argv=DAEMON)
    await places.known(api)
    assert await contents(api, tmp_path, stacked) == sums
    assert {row["State"] for row in (await api.snapshots_of(guest)).values()} == {"ready"}
    if step in AS_IT_WAS:
        assert world(guest) == before
        assert whole(file_of(guest), tmp_path) == present
    else:
        assert whole(file_of(guest), tmp_path) == sums[to]
        (files,) = world(guest)[2].values()
        (files_before,) = before[2].values()
        assert len(files) == len(files_before), "the new one in the place of the discarded one"
    starts(guest)
    await revert(api, stacked[to])
    assert whole(file_of(guest), tmp_path) == sums[to]
    for created in stacked:
        await delete(api, created)
    assert whole(file_of(guest), tmp_path) == sums[to]
    (files,) = world(guest)[2].values()
    assert files == [os.path.basename(file_of(guest))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [s for s in RevertStep if s is not RevertStep.ENDED])
async def test_an_error_at(
    connect: Connect, faulty: Lab, places: Places, tmp_path: Path, step: RevertStep, method: str
) -> None:
    """It is undone, or it is done all the same: never said to be the one and the other."""
    guest = places.guest()
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "raise"))
    api = await connect()
    await places.known(api)
    (created,) = await stack(api, guest, 1, method)
    before, there = world(guest), await api.snapshots_of(guest)
    if step is RevertStep.SWITCHED:
        await revert(api, created)
    else:
        await refused(revert(api, created), "StorageFailed")
    if step in AS_IT_WAS:
        assert (world(guest), await api.snapshots_of(guest)) == (before, there)
    deadline = asyncio.get_running_loop().time() + 20
    while {row["State"] for row in (await api.snapshots_of(guest)).values()} != {"ready"}:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)
    await revert(api, created)
    assert whole(file_of(guest), tmp_path) == whole(created.file, tmp_path)
    starts(guest)


@pytest.mark.parametrize("which", [0, 1])
async def test_a_delete_after_a_revert_killed_and_taken_up(
    connect: Connect, faulty: Lab, places: Places, tmp_path: Path, which: int
) -> None:
    guest = places.guest()
    faulty.daemon.start({}, argv=(*FAULTY, "--at", "delete-committed", "--do", "kill"))
    api = await connect()
    await places.known(api)
    stacked = await stack(api, guest, 2)
    sums = await contents(api, tmp_path, stacked)
    await revert(api, stacked[0])
    await refused(delete(api, stacked[which]), "org.freedesktop.DBus.Error.NoReply")
    await asyncio.to_thread(wait_until, "it is dead", lambda: not faulty.daemon.running, 10)
    faulty.daemon.start({}, argv=DAEMON)
    await places.known(api)
    other = stacked[1 - which]
    assert set(await api.snapshots_of(guest)) == {other.snapshot}
    assert await contents(api, tmp_path, [other]) == [sums[1 - which]]
    assert whole(file_of(guest), tmp_path) == sums[0]
    await delete(api, other)
    (files,) = world(guest)[2].values()
    assert len(files) == 1


# -- while it runs -------------------------------------------------------------------------------


class Halted:
    """A revert that waits at a step, and its job."""

    def __init__(self, lab: Lab, step: RevertStep) -> None:
        self.flag = lab.folder("flags") / f"revert-{step}"
        self.argv = (*FAULTY, "--at", step, "--do", f"wait:{self.flag}")

    async def begin(self, api: Api, created: Created) -> asyncio.Task[str]:
        await api.client.listen()
        call = asyncio.create_task(revert(api, created))
        await asyncio.to_thread(wait_until, "it waits", self.flag.exists, 20)
        return call

    async def job(self, api: Api) -> str:
        deadline = asyncio.get_running_loop().time() + 10
        while True:
            for signal in api.client.signals:
                if signal.member == "InterfacesAdded" and JOB in signal.body[1]:
                    return str(signal.body[0])
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.02)


async def test_cancelled(connect: Connect, faulty: Lab, places: Places, tmp_path: Path) -> None:
    guest = places.guest()
    halted = Halted(faulty, RevertStep.ARMED)
    faulty.daemon.start({}, argv=halted.argv)
    api, other = await connect(), await connect()
    await places.known(api)
    stacked = await stack(api, guest, 2)
    before, there = world(guest), await api.snapshots_of(guest)
    call = await halted.begin(api, stacked[0])
    job = await halted.job(api)
    told = await api.properties(job, JOB)
    assert (told["Operation"], told["Objects"]) == ("revert", [stacked[0].snapshot])
    assert (told["Cancelable"], told["StartedByUID"]) == (True, 0)
    assert (await api.snapshots_of(guest))[stacked[0].snapshot]["State"] == "reverting"
    for busy in (
        api.create(guest, VDA),
        delete(other, stacked[1]),
        revert(other, stacked[1]),
    ):
        error = await asyncio.wait_for(refused(busy, "Busy"), 5)  # at once
        assert "reverted" in error.text
    cancel = asyncio.create_task(other.call(job, JOB, "Cancel"))
    await asyncio.sleep(0.2)
    halted.flag.unlink()
    await cancel
    await refused(call, "Cancelled")
    assert (world(guest), await api.snapshots_of(guest)) == (before, there)
    completed = await api.client.heard("Completed", path=job)
    assert completed.body == [False, "The operation was cancelled and undone."]
    ended = await api.properties(job, JOB)
    assert ended["Result"] == {"error": f"{PREFIX}Cancelled"}
    said = [x for x in faulty.daemon.log.splitlines() if guest.name in x]
    assert said[-1].startswith("info:") and "was cancelled" in said[-1]
    await revert(api, stacked[0])
    starts(guest)


async def test_it_can_not_be_cancelled_once_the_disk_is_the_snapshots(
    connect: Connect, faulty: Lab, places: Places, tmp_path: Path
) -> None:
    guest = places.guest()
    halted = Halted(faulty, RevertStep.SWITCHED)
    faulty.daemon.start({}, argv=halted.argv)
    api, other = await connect(), await connect()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    call = await halted.begin(api, created)
    job = await halted.job(api)
    await refused(other.call(job, JOB, "Cancel"), "InvalidState")
    halted.flag.unlink()
    await call
    completed = await api.client.heard("Completed", path=job)
    assert completed.body == [True, ""]
    assert whole(file_of(guest), tmp_path) == whole(created.file, tmp_path)


@pytest.mark.parametrize("saved", [False, True])
async def test_a_domain_that_is_started_in_between_keeps_what_it_runs_on(
    connect: Connect, faulty: Lab, places: Places, saved: bool
) -> None:
    guest = places.guest()
    halted = Halted(faulty, RevertStep.ARMED)
    faulty.daemon.start({}, argv=halted.argv)
    api = await connect()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    before = world(guest)[2]
    call = await halted.begin(api, created)
    guest.domain.create()
    if saved:
        guest.domain.managedSave()
    halted.flag.unlink()
    await refused(call, "InvalidState" if saved else "Busy")
    assert file_of(guest) == file_of(guest, INACTIVE) == created.overlay
    assert world(guest)[2] == before
    if saved:
        guest.domain.managedSaveRemove()
    else:
        guest.domain.destroy()
    await revert(api, created)


@pytest.mark.parametrize("step", [RevertStep.BEGUN, RevertStep.ARMED, RevertStep.SWITCHED])
async def test_libvirtd_goes_away_and_comes_back(
    connect: Connect, faulty: Lab, places: Places, tmp_path: Path, step: RevertStep
) -> None:
    """What can't be settled now keeps the domain closed, and is settled when libvirt is back."""
    guest = places.guest()
    halted = Halted(faulty, step)
    faulty.daemon.start({}, argv=halted.argv)
    api = await connect()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    present, before = whole(file_of(guest), tmp_path), world(guest)
    call = await halted.begin(api, created)
    await asyncio.to_thread(faulty.libvirtd.stop)
    try:
        halted.flag.unlink()
        await refused(call, "HypervisorUnavailable")
        assert (await api.snapshots_of(guest))[created.snapshot]["State"] == "reverting"
        await refused(api.create(guest), "Busy")
    finally:
        await asyncio.to_thread(faulty.libvirtd.start)
    await until(api, guest, created, "ready")
    if step is RevertStep.SWITCHED:
        assert whole(file_of(guest), tmp_path) == whole(created.file, tmp_path)
        (files,) = world(guest)[2].values()
        assert len(files) == 2
    else:
        assert (whole(file_of(guest), tmp_path), world(guest)) == (present, before)
    starts(guest)
    await revert(api, created)


async def test_a_domain_that_runs_on_what_was_to_be_discarded_keeps_it(
    connect: Connect, faulty: Lab, places: Places
) -> None:
    """As where the file system has no locks: the definition says the new one, and QEMU the old."""
    guest = places.guest()
    faulty.daemon.start({}, argv=(*FAULTY, "--at", RevertStep.SWITCHED, "--do", "kill"))
    api = await connect()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    before, old = world(guest)[2], guest.domain.XMLDesc(INACTIVE)
    await refused(revert(api, created), "org.freedesktop.DBus.Error.NoReply")
    await asyncio.to_thread(wait_until, "it is dead", lambda: not faulty.daemon.running, 10)
    new = guest.domain.XMLDesc(INACTIVE)
    connection: Any = guest.domain.connect()
    connection.defineXML(old)
    guest.domain.create()
    connection.defineXML(new)
    assert file_of(guest) != file_of(guest, INACTIVE)
    faulty.daemon.start({}, argv=DAEMON)
    await places.known(api)
    assert file_of(guest) == file_of(guest, INACTIVE) == created.overlay
    assert world(guest)[2] == before
    assert (await api.snapshots_of(guest))[created.snapshot]["State"] == "ready"


async def test_what_is_taken_up_again_belongs_to_who_started_it(
    connect: Connect, faulty: Lab, places: Places
) -> None:
    guest = places.guest()
    faulty.daemon.start({}, argv=(*FAULTY, "--at", RevertStep.ARMED, "--do", "kill"))
    api = await connect()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    faulty.polkit.rules(allow("nobody", f"{NAME}.revert"))
    argv = ("call", NAME, created.snapshot, SNAPSHOT, "Revert", "u", "0")
    assert faulty.busctl(*argv, user="nobody").returncode != 0
    faulty.polkit.rules("")
    await asyncio.to_thread(wait_until, "it is dead", lambda: not faulty.daemon.running, 10)
    again = (*FAULTY, "--at", RevertStep.ENDED, "--do", "sleep:1.5")
    faulty.daemon.start({}, argv=again)
    await places.known(api)
    objects = (
        await api.call(ROOT_PATH, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
    )[0]
    (job,) = (found[JOB] for found in objects.values() if JOB in found)
    assert (job["Operation"], job["StartedByUID"]) == ("revert", pwd.getpwnam("nobody").pw_uid)
