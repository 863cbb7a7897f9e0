"""Reverts that are refused, fail, are cancelled or killed: all is as it was, or it is reverted.

A further method that can revert is one more entry in METHODS.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapd_vm import storage
from snapd_vm.engine.journal import RevertStep
from snapd_vm.errors import PREFIX, Busy
from snapd_vm.model import ROOT_PATH
from tests.lab import allow
from tests.lab.blockdev import Mounted
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import attempt, run
from tests.real.api import NAME, SNAPSHOT, VDA, Api, Created
from tests.real.conftest import Connect
from tests.real.places import (
    INACTIVE,
    Places,
    file_of,
    image,
    refused,
    with_image,
    world,
)
from tests.real.test_crash import FAULTY, faulty
from tests.real.test_delete import DAEMON, delete
from tests.real.test_faults import small
from tests.real.test_revert import contents, places, put, revert, stack, whole

__all__ = ["faulty", "places", "small"]

JOB = f"{NAME}.Job"
METHODS = ("qemu",)
AS_IT_WAS = tuple(RevertStep)[: tuple(RevertStep).index(RevertStep.SWITCHED)]


async def kept(api: Api, guest: Guest, created: Created, *names: str) -> str:
    """The revert is refused with one of these errors, and nothing has changed; what it says."""
    before = world(guest), await api.snapshots_of(guest)
    error = await refused(revert(api, created), *names)
    assert (world(guest), await api.snapshots_of(guest)) == before
    return error.text


def starts(guest: Guest) -> None:
    """The definition is one that QEMU can run."""
    guest.domain.create()
    assert file_of(guest) == file_of(guest, INACTIVE)
    guest.domain.destroy()


@contextmanager
def reader(path: str) -> Iterator[str]:
    """A process that has the file open, and nobody else has; its id."""
    with open(path, "rb") as file:
        process = subprocess.Popen(["sleep", "60"], stdin=file)
    try:
        yield str(process.pid)
    finally:
        process.kill()
        process.wait()


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
    completed = await api.client.heard("Completed")
    assert completed.body == [False, "The operation was cancelled and undone."]
    ended = await api.properties(job, JOB)
    assert ended["Result"] == {"error": f"{PREFIX}Cancelled"}
    line = next(x for x in faulty.daemon.log.splitlines() if "was cancelled" in x)
    assert line.startswith("info:")
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
    completed = await api.client.heard("Completed")
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
    halted.flag.unlink()
    await refused(call, "HypervisorUnavailable")
    assert (await api.snapshots_of(guest))[created.snapshot]["State"] == "reverting"
    await refused(api.create(guest), "Busy")
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


# -- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "paused", "saved"])
async def test_a_domain_that_is_not_off(api: Api, places: Places, state: str) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    created = await api.create(guest)
    if state == "paused":
        guest.domain.suspend()
    elif state == "saved":
        guest.domain.managedSave()
        await api.client.listen()
    text = await kept(api, guest, created, "InvalidState")
    assert {"running": "shut it down", "paused": "shut it down", "saved": "managedsave-remove"}[
        state
    ] in text
    if state == "saved":
        guest.domain.managedSaveRemove()
    else:
        guest.domain.destroy()
    await revert(api, created)


async def test_a_domain_with_checkpoints(api: Api, places: Places) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    created = await api.create(guest)
    guest.domain.checkpointCreateXML("<domaincheckpoint><name>one</name></domaincheckpoint>")
    guest.destroy()
    assert "checkpoints" in await kept(api, guest, created, "InvalidState")


async def test_flags(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    call = api.call(created.snapshot, SNAPSHOT, "Revert", "u", 1)
    await refused(call, "org.freedesktop.DBus.Error.InvalidArgs")


async def test_without_the_right(api: Api, lab: Lab, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    before = world(guest)
    argv = ("call", NAME, created.snapshot, SNAPSHOT, "Revert", "u", "0")
    for rules in ("", allow("nobody", f"{NAME}.delete"), allow("backup", f"{NAME}.revert")):
        lab.polkit.rules(rules)
        done = lab.busctl(*argv, user="nobody")
        assert done.returncode != 0
        assert world(guest) == before
    lab.polkit.rules(allow("nobody", f"{NAME}.revert"))
    done = lab.busctl(*argv, user="nobody")
    assert done.returncode == 0, done.stderr
    lab.polkit.rules("")
    assert world(guest) != before


async def test_another_domain_uses_what_would_be_discarded(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    clone = image(places.folder() / "clone.qcow2", created.overlay)
    other = places.guest(with_image(clone))
    await places.known(api)
    assert other.name in await kept(api, guest, created, "Busy")
    await places.unknown(api, other)
    beside = image(Path(created.overlay).with_name("linked.qcow2"), created.overlay)
    assert "linked.qcow2" in await kept(api, guest, created, "Busy")
    beside.unlink()
    await revert(api, created)


async def test_what_would_be_discarded_is_being_read(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    with reader(created.overlay) as pid:
        assert pid in await kept(api, guest, created, "Busy")
    with open(created.file, "rb"):  # to read the snapshot is nothing that a revert disturbs
        await revert(api, created)


async def test_an_image_that_is_not_ours(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    foreign = image(Path(created.overlay).with_name("foreign.qcow2"), created.overlay)
    xml = guest.domain.XMLDesc(INACTIVE)
    connection: Any = guest.domain.connect()
    connection.defineXML(xml.replace(created.overlay, str(foreign)))
    text = await kept(api, guest, created, "InvalidState")
    assert "make a snapshot" in text
    xml = guest.domain.XMLDesc(INACTIVE)
    connection.defineXML(xml.replace(str(foreign), created.file))  # as from an old definition
    await until(api, guest, created, "failed")
    await refused(revert(api, created), "InvalidState")
    assert file_of(guest) == created.file
    assert os.path.exists(created.overlay)


async def until(api: Api, guest: Guest, created: Created, state: str) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    while (await api.snapshots_of(guest))[created.snapshot]["State"] != state:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)


async def test_no_room_for_the_overlay(api: Api, places: Places, small: Mounted) -> None:
    guest = places.guest(with_image(image(small.path / "disk.qcow2")))
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    small.fill(1 << 20)
    assert "make room" in await kept(api, guest, created, "NoSpace")
    small.drain()
    await revert(api, created)
    guest.remove()


async def test_no_room_for_what_a_delete_copies(
    api: Api, places: Places, small: Mounted, tmp_path: Path
) -> None:
    """The oldest goes, and a snapshot beside the chain needs what it had of it."""
    guest = places.guest(with_image(image(small.path / "disk.qcow2")))
    await places.known(api)
    put(file_of(guest), 9, count=6)
    stacked = await stack(api, guest, 2)
    sums = await contents(api, tmp_path, stacked)
    await revert(api, stacked[0])
    small.fill(3 << 20)
    error = await refused(delete(api, stacked[0]), "NoSpace")
    assert "make room" in error.text
    assert await contents(api, tmp_path, stacked) == sums
    small.drain()
    await delete(api, stacked[0])
    assert await contents(api, tmp_path, stacked[1:]) == sums[1:]
    await delete(api, stacked[1])
    guest.remove()


async def test_one_beside_the_chain_that_is_read_holds_up_the_delete_of_what_it_lies_on(
    api: Api, places: Places, tmp_path: Path
) -> None:
    guest = places.guest()
    await places.known(api)
    stacked = await stack(api, guest, 2)
    sums = await contents(api, tmp_path, stacked)
    await revert(api, stacked[0])
    with reader(stacked[1].file) as pid:
        for created in stacked:
            assert pid in (await refused(delete(api, created), "Busy")).text
    linked = image(Path(stacked[1].file).with_name("linked.qcow2"), stacked[1].file)
    assert "linked" in (await refused(delete(api, stacked[1]), "Busy")).text
    linked.unlink()
    assert await contents(api, tmp_path, stacked) == sums
    await delete(api, stacked[1])
    assert not os.path.exists(stacked[1].file)


async def test_an_image_with_snapshots_in_itself(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    run("qemu-img", "snapshot", "-c", "inner", created.overlay)
    assert "internal" in await kept(api, guest, created, "InvalidState")
    run("qemu-img", "snapshot", "-d", "inner", created.overlay)
    await revert(api, created)


def test_what_is_kept_from_writers_is_not_opened_by_qemu(places: Places) -> None:
    path = str(image(places.folder() / "held.qcow2"))
    with storage.kept_from_writers(path):
        assert attempt(["qemu-io", "-c", "write 0 512", path]).returncode != 0
        assert attempt(["qemu-io", "-r", "-c", "read 0 512", path]).returncode == 0
    assert attempt(["qemu-io", "-c", "write 0 512", path]).returncode == 0
    argv = ["qemu-io", "-c", "read 0 512", "-c", "sleep 60000", path]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as writer:
        wait_until("it has it open", lambda: storage.write_locked(path), 10)
        with pytest.raises(Busy), storage.kept_from_writers(path):
            pass
        writer.kill()


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
