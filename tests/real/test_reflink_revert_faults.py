"""Reverts with method reflink that are refused, fail, are cancelled or killed.

All is as it was, or it is reverted.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from lxml import etree

from snapd_vm import storage
from snapd_vm.engine.journal import RevertStep
from snapd_vm.errors import PREFIX
from tests.lab.blockdev import Mounted
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real.api import Api
from tests.real.conftest import Connect
from tests.real.places import CONFIG, INACTIVE, Places, file_of, image, refused
from tests.real.test_crash import FAULTY, faulty, unnamed
from tests.real.test_delete import delete
from tests.real.test_reflink_files import QEMU, REFLINK, cloning, guest_on, raw
from tests.real.test_reflink_revert import all_ready, held, left, seen, stack
from tests.real.test_revert import places, revert
from tests.real.test_revert_faults import AS_IT_WAS, JOB, Halted, starts
from tests.real.test_revert_refused import kept, reader

__all__ = ["cloning", "faulty", "places"]

MIB = 1 << 20
GONE = "org.freedesktop.DBus.Error.NoReply"


# -- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", list(RevertStep))
async def test_killed_at(
    connect: Connect, faulty: Lab, places: Places, cloning: Mounted, step: RevertStep
) -> None:
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "kill"))
    api = await connect()
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    stacked = await stack(api, guest, path)
    sums, before = held(stacked), seen(path)
    definition = guest.domain.XMLDesc(INACTIVE)
    await refused(revert(api, stacked[0]), GONE)
    await asyncio.to_thread(wait_until, "it is dead", lambda: not faulty.daemon.running, 10)
    faulty.daemon.start({}, argv=DAEMON)
    await places.known(api)
    await all_ready(api, guest)
    assert held(stacked) == sums
    assert guest.domain.XMLDesc(INACTIVE) == definition
    assert sorted(os.listdir(path.parent)) == before[-1]
    if step in AS_IT_WAS:
        assert seen(path) == before
    else:
        assert path.read_bytes() == sums[0]
    starts(guest)
    await revert(api, stacked[1])
    assert path.read_bytes() == sums[1]
    for created in stacked:
        await delete(api, created)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("step", [s for s in RevertStep if s is not RevertStep.ENDED])
async def test_an_error_at(
    connect: Connect, faulty: Lab, places: Places, cloning: Mounted, step: RevertStep
) -> None:
    """It is undone, or it is done all the same: never said to be the one and the other."""
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "raise"))
    api = await connect()
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1)
    before = seen(path)
    if step is RevertStep.SWITCHED:
        await revert(api, created)
    else:
        await refused(revert(api, created), "StorageFailed")
    if step in AS_IT_WAS:
        assert seen(path) == before
    await all_ready(api, guest)
    assert not unnamed(faulty.daemon)
    await revert(api, created)
    assert path.read_bytes() == Path(created.file).read_bytes()
    assert sorted(os.listdir(path.parent)) == before[-1]


async def test_a_delete_that_fails_after_a_revert(
    api: Api, places: Places, cloning: Mounted
) -> None:
    """The snapshot stands, although the image is another file than the one it was taken of."""
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1)
    await revert(api, created)
    file = Path(created.file)
    made = next(one for one in (file, *file.parents) if one.name.startswith("snapd-vm-"))
    run("chattr", "+i", made.parent)
    try:
        await refused(delete(api, created), "StorageFailed")
    finally:
        run("chattr", "-i", made.parent)
    await all_ready(api, guest)
    await delete(api, created)


async def test_cancelled(connect: Connect, faulty: Lab, places: Places, cloning: Mounted) -> None:
    halted = Halted(faulty, RevertStep.ARMED)
    faulty.daemon.start({}, argv=halted.argv)
    api, other = await connect(), await connect()
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    before, there = seen(path), await api.snapshots_of(guest)
    call = await halted.begin(api, created)
    job = await halted.job(api)
    assert len(os.listdir(path.parent)) == 3
    cancel = asyncio.create_task(other.call(job, JOB, "Cancel"))
    await asyncio.sleep(0.2)  # nothing tells when the job has heard of it
    halted.flag.unlink()
    await cancel
    await refused(call, "Cancelled")
    assert (seen(path), await api.snapshots_of(guest)) == (before, there)
    assert (await api.properties(job, JOB))["Result"] == {"error": f"{PREFIX}Cancelled"}
    await revert(api, created)
    assert path.read_bytes() == Path(created.file).read_bytes()


@pytest.mark.parametrize("saved", [False, True])
async def test_a_domain_that_is_started_in_between_keeps_what_it_runs_on(
    connect: Connect, faulty: Lab, places: Places, cloning: Mounted, saved: bool
) -> None:
    halted = Halted(faulty, RevertStep.ARMED)
    faulty.daemon.start({}, argv=halted.argv)
    api = await connect()
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    before = seen(path)
    call = await halted.begin(api, created)
    guest.domain.create()
    if saved:
        guest.domain.managedSave()
    halted.flag.unlink()
    await refused(call, "InvalidState" if saved else "Busy")
    if saved:
        guest.domain.managedSaveRemove()
    else:
        guest.domain.destroy()
    assert path.stat().st_ino == before[0]
    assert path.read_bytes() == before[2]
    assert sorted(os.listdir(path.parent)) == before[-1]
    await revert(api, created)


async def test_a_domain_that_runs_on_what_was_to_be_discarded_keeps_it(
    connect: Connect, faulty: Lab, places: Places, cloning: Mounted
) -> None:
    """As where QEMU had opened it a moment before, and locked it only after the lock was gone."""
    faulty.daemon.start({}, argv=(*FAULTY, "--at", RevertStep.SWITCHED, "--do", "kill"))
    api = await connect()
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    before = seen(path)
    await refused(revert(api, created), GONE)
    await asyncio.to_thread(wait_until, "it is dead", lambda: not faulty.daemon.running, 10)
    old = next(path.parent.glob("*.discarded"))
    new = path.with_name("new")
    path.rename(new)
    old.rename(path)
    guest.domain.create()
    path.rename(old)
    new.rename(path)
    faulty.daemon.start({}, argv=DAEMON)
    await places.known(api)
    await all_ready(api, guest)
    assert path.stat().st_ino == before[0]
    assert sorted(os.listdir(path.parent)) == before[-1]


async def test_a_domain_that_runs_on_what_it_went_back_to_keeps_that(
    connect: Connect, faulty: Lab, places: Places, cloning: Mounted
) -> None:
    """Whoever reads what was discarded: the guest writes to the other one already."""
    faulty.daemon.start({}, argv=(*FAULTY, "--at", RevertStep.SWITCHED, "--do", "kill"))
    api = await connect()
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    before = seen(path)
    await refused(revert(api, created), GONE)
    await asyncio.to_thread(wait_until, "it is dead", lambda: not faulty.daemon.running, 10)
    now = path.stat().st_ino
    guest.domain.create()
    with reader(f"{created.file}.discarded"):
        faulty.daemon.start({}, argv=DAEMON)
        await places.known(api)
        await all_ready(api, guest)
    assert path.stat().st_ino == now != before[0]
    assert sorted(os.listdir(path.parent)) == before[-1]
    guest.domain.destroy()
    await revert(api, created)


@pytest.mark.parametrize("step", [RevertStep.ARMED, RevertStep.SWITCHED])
async def test_libvirtd_goes_away_and_comes_back(
    connect: Connect, faulty: Lab, places: Places, cloning: Mounted, step: RevertStep
) -> None:
    """Not reverted yet, it is undone; else what is left waits until libvirt can be asked."""
    halted = Halted(faulty, step)
    faulty.daemon.start({}, argv=halted.argv)
    api = await connect()
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1)
    before = seen(path)
    call = await halted.begin(api, created)
    await asyncio.to_thread(faulty.libvirtd.stop)
    halted.flag.unlink()
    await refused(call, "HypervisorUnavailable")
    await asyncio.to_thread(faulty.libvirtd.start)
    await all_ready(api, guest)
    if step is RevertStep.ARMED:
        assert seen(path) == before
    else:
        assert path.read_bytes() == Path(created.file).read_bytes()
    assert sorted(os.listdir(path.parent)) == before[-1]
    starts(guest)
    await revert(api, created)


# -- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "paused", "saved"])
async def test_a_domain_that_is_not_off(
    api: Api, places: Places, cloning: Mounted, state: str
) -> None:
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    guest.domain.create()
    if state == "paused":
        guest.domain.suspend()
    elif state == "saved":
        guest.domain.managedSave()
        await api.client.listen()
    says = "managedsave-remove" if state == "saved" else "shut it down"
    assert says in await left(api, guest, created, path, "InvalidState")
    if state == "saved":
        guest.domain.managedSaveRemove()
    else:
        guest.domain.destroy()
    await revert(api, created)


async def test_an_image_that_is_read_or_written_to(
    api: Api, places: Places, cloning: Mounted
) -> None:
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    with reader(str(path)) as pid:
        assert pid in await left(api, guest, created, path, "Busy")
    argv = ["qemu-io", "-f", "raw", str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as writer:
        await asyncio.to_thread(
            wait_until, "it is open", lambda: storage.write_locked(str(path)), 20
        )
        assert "writing" in await left(api, guest, created, path, "Busy")
        writer.kill()
    with reader(created.file):  # to read the snapshot is nothing that a revert disturbs
        await revert(api, created)


async def test_somebody_else_uses_the_image(api: Api, places: Places, cloning: Mounted) -> None:
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    other = await guest_on(api, places, path)
    assert other.name in await left(api, guest, created, path, "Busy")
    await places.unknown(api, other)
    linked = image(path.with_name("linked.qcow2"), path, "raw")
    assert "linked.qcow2" in await left(api, guest, created, path, "Busy")
    linked.unlink()
    await revert(api, created)


async def test_an_overlay_that_was_made_since(api: Api, places: Places, cloning: Mounted) -> None:
    """The image is a snapshot itself then, by qemu, and none may change."""
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    over = await api.create(guest, method_xml=QEMU, name="over")
    text = await left(api, guest, created, path, "InvalidState")
    assert "delete the snapshots" in text
    await revert(api, over)
    await left(api, guest, created, path, "InvalidState")
    await delete(api, over)
    assert file_of(guest) == str(path)
    await revert(api, created)
    assert path.read_bytes() == Path(created.file).read_bytes()


@pytest.mark.parametrize("how", ["another image", "no image", "no disk"])
async def test_a_disk_that_is_another_now(
    api: Api, places: Places, cloning: Mounted, how: str
) -> None:
    path, other = raw(cloning.path), raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    disk = etree.fromstring(guest.disk().xml)
    source = disk.find("source")
    assert source is not None
    if how == "another image":
        source.set("file", str(other))
        guest.domain.updateDeviceFlags(etree.tostring(disk, encoding="unicode"), CONFIG)
        contents = other.read_bytes()
        await left(api, guest, created, path, "InvalidState")
        assert other.read_bytes() == contents
    elif how == "no disk":
        guest.domain.detachDeviceFlags(guest.disk().xml, CONFIG)
        await left(api, guest, created, path, "InvalidState")
    else:
        path.unlink()
        await kept(api, guest, created, "StorageFailed")
        assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "symlink", "folder"])
@pytest.mark.parametrize("suffix", ["revert", "discarded"])
@pytest.mark.parametrize("late", [False, True])
async def test_a_foreign_file_of_its_name_is_left_alone(
    connect: Connect,
    faulty: Lab,
    places: Places,
    cloning: Mounted,
    kind: str,
    suffix: str,
    late: bool,
    tmp_path: Path,
) -> None:
    step = RevertStep.PREPARED if suffix == "revert" else RevertStep.ARMED
    halted = Halted(faulty, step)
    faulty.daemon.start({}, argv=halted.argv)
    api = await connect()
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    foreign, elsewhere = Path(f"{created.file}.{suffix}"), tmp_path / "elsewhere"

    def place() -> None:
        if kind == "file":
            foreign.write_text("somebody else's")
        elif kind == "symlink":
            foreign.symlink_to(elsewhere)
        else:
            foreign.mkdir()

    if late:
        before = seen(path)
        call = await halted.begin(api, created)
        place()
        halted.flag.unlink()
        error = await refused(call, "NameInUse", "StorageFailed")
        assert seen(path) == (*before[:-1], sorted([*before[-1], foreign.name]))
        assert error.text
    else:
        place()
        assert foreign.name in await left(api, guest, created, path, "NameInUse")
    assert foreign.is_symlink() == (kind == "symlink")
    assert kind != "file" or foreign.read_text() == "somebody else's"
    assert not elsewhere.exists()


@pytest.mark.parametrize("by", ["a file", "a symlink", "a fifo"])
@pytest.mark.parametrize("step", [RevertStep.BEGUN, RevertStep.ARMED])
async def test_an_image_that_is_replaced_after_the_check(
    connect: Connect,
    faulty: Lab,
    places: Places,
    cloning: Mounted,
    by: str,
    step: RevertStep,
) -> None:
    halted = Halted(faulty, step)
    faulty.daemon.start({}, argv=halted.argv)
    api = await connect()
    path, secret = raw(cloning.path), raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    files = sorted([*os.listdir(path.parent), "disk.old"])
    call = await halted.begin(api, created)
    path.rename(path.with_suffix(".old"))
    if by == "a file":
        path.write_bytes(b"another")
    elif by == "a symlink":
        path.symlink_to(secret)
    else:
        os.mkfifo(path)
    found, contents = path.lstat().st_ino, secret.read_bytes()
    halted.flag.unlink()
    await refused(call, "StorageFailed", "InvalidState")
    assert path.lstat().st_ino == found
    assert secret.read_bytes() == contents
    assert sorted(os.listdir(path.parent)) == files
    assert os.listdir(secret.parent) == [secret.name]


async def test_a_disk_that_is_given_another_image_meanwhile(
    connect: Connect, faulty: Lab, places: Places, cloning: Mounted
) -> None:
    halted = Halted(faulty, RevertStep.ARMED)
    faulty.daemon.start({}, argv=halted.argv)
    api = await connect()
    path, other = raw(cloning.path), raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    before, contents = seen(path), other.read_bytes()
    call = await halted.begin(api, created)
    disk = etree.fromstring(guest.disk().xml)
    source = disk.find("source")
    assert source is not None
    source.set("file", str(other))
    guest.domain.updateDeviceFlags(etree.tostring(disk, encoding="unicode"), CONFIG)
    halted.flag.unlink()
    await refused(call, "InvalidState")
    assert seen(path) == before
    assert other.read_bytes() == contents


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
async def test_a_folder_that_others_can_write(
    api: Api, places: Places, cloning: Mounted, mode: int
) -> None:
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    path.parent.chmod(mode)
    if mode == 0o775:
        os.chown(path.parent, 0, 23456)
    assert str(path.parent) in await left(api, guest, created, path, "MethodNotSupported")


async def test_an_image_that_can_not_be_replaced(
    api: Api, places: Places, cloning: Mounted
) -> None:
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    run("chattr", "+i", path)
    try:
        await left(api, guest, created, path, "StorageFailed")
    finally:
        run("chattr", "-i", path)
    await revert(api, created)


async def test_no_room(api: Api, lab: Lab, places: Places) -> None:
    made = lab.block.mounted("xfs", 300)
    try:
        path = raw(made.path)
        guest = await guest_on(api, places, path)
        (created,) = await stack(api, guest, path, 1, REFLINK)
        made.fill(leave=300 << 10)
        assert "bytes left" in await left(api, guest, created, path, "NoSpace")
        made.drain()
        await revert(api, created)
    finally:
        made.unmount()


async def test_the_room_ends_in_the_middle_of_the_clone(
    daemon: Lab, api: Api, lab: Lab, places: Places
) -> None:
    """The map of a snapshot in very many pieces is larger than what is left."""
    made = lab.block.mounted("xfs", 800)
    try:
        path = raw(made.path, size=800 * MIB)
        block = bytes(4096)
        with path.open("r+b") as file:
            for number in range(100_000):
                os.pwrite(file.fileno(), block, number * 8192)
            os.fsync(file.fileno())
        guest = await guest_on(api, places, path)
        created = await api.create(guest, method_xml=REFLINK)
        path.write_bytes(b"now")
        made.fill(leave=1200 << 10)
        assert "room" in await left(api, guest, created, path, "NoSpace")
        assert not unnamed(daemon.daemon)
        made.drain()
        await revert(api, created)
    finally:
        made.unmount()


@pytest.mark.parametrize("how", ["gone", "not ours", "read-only"])
async def test_a_clone_that_can_not_be_used(api: Api, lab: Lab, places: Places, how: str) -> None:
    made = lab.block.mounted("xfs", 300)
    try:
        path = raw(made.path)
        guest = await guest_on(api, places, path)
        (created,) = await stack(api, guest, path, 1, REFLINK)
        if how == "read-only":
            made.set_read_only(True)
        else:
            run("chattr", "-i", created.file)
            if how == "gone":
                os.unlink(created.file)
            else:
                os.removexattr(created.file, "trusted.snapd-vm")
        before = seen(path)
        await refused(revert(api, created), "StorageFailed")
        assert seen(path) == before
        made.set_read_only(False)
    finally:
        made.unmount()
