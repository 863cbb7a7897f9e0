"""A Delete that takes its time: the limit of its bandwidth, its Job's progress, and Cancel."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest
from lxml import etree

from snapd_vm.model import ROOT_PATH
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real import images
from tests.real.api import NAME, QUIESCE_REQUIRED, Api, ApiError
from tests.real.conftest import Connect
from tests.real.places import refused
from tests.real.test_crash import active_file, files_of
from tests.real.test_delete import chain_of, delete, marks

JOB = f"{NAME}.Job"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
MIB = 1 << 20
BANDWIDTH = 8
FILLED = 40


@pytest.fixture
async def limited(daemon: Lab, connect: Connect) -> Api:
    """A client of a daemon whose deletes write 8 MiB/s."""
    daemon.daemon.stop()
    daemon.daemon.start({"qemu": {"commit_bandwidth": BANDWIDTH}})
    api = await connect()
    await api.client.listen()
    return api


@pytest.fixture
async def large(lab: Lab) -> AsyncIterator[Guest]:
    """A guest with room to fill."""
    guest = await asyncio.to_thread(lab.guest, [DiskSpec(size_mib=128)])
    yield guest
    guest.remove()


async def job_of(api: Api, path: str) -> str:
    """The path of the job that works on a snapshot, waited for."""
    async with asyncio.timeout(20):
        while True:
            added = await api.client.heard("InterfacesAdded", 20)
            told = {name: row for name, row in added.body[1].items() if name == JOB}
            if told and told[JOB]["Objects"].value == [path]:
                return str(added.body[0])


async def jobs(api: Api) -> list[str]:
    """The paths of all jobs."""
    call = api.call(ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects")
    return [path for path, found in (await call)[0].items() if JOB in found]


async def progress_of(api: Api, job: str, above: float) -> float:
    """Its progress, once it is above this."""
    async with asyncio.timeout(30):
        while (found := (await api.properties(job, JOB))["Progress"]) <= above:
            await asyncio.sleep(0.02)
    return float(found)


def progress_told(api: Api, job: str) -> list[float]:
    """What the job's signals said of its progress, in their order."""
    changes = [s for s in api.client.signals if s.path == job and s.member == "PropertiesChanged"]
    return [s.body[1]["Progress"].value for s in changes if "Progress" in s.body[1]]


def written_to(overlay: str) -> int:
    return os.stat(overlay).st_blocks * 512


async def test_a_limited_delete_takes_its_time_and_its_job_tells_how_far_it_is(
    limited: Api, large: Guest
) -> None:
    api = limited
    (created,) = await chain_of(api, large, 1)
    large.fill("vda", "much", FILLED)
    large.sync()
    size = written_to(created.overlay)
    assert size > FILLED * MIB
    began = time.monotonic()
    deleting = asyncio.create_task(delete(api, created))
    job = await job_of(api, created.snapshot)
    told = await api.properties(job, JOB)
    assert (told["Operation"], told["Cancelable"]) == ("delete", True)
    await deleting
    took = time.monotonic() - began
    assert size / (BANDWIDTH * MIB) - 0.2 < took < size / (BANDWIDTH * MIB) + 10
    completed = await api.client.heard("Completed", path=job)
    assert (completed.path, completed.body) == (job, [True, ""])
    rises = progress_told(api, job)
    assert len(rises) >= 3
    assert all(a < b for a, b in pairwise(rises))
    assert rises[-1] == 1.0
    assert (await api.properties(job, JOB))["Bytes"] >= FILLED * MIB
    large.writes_go_on()
    assert marks(large, 1) == ["text-0", "text-1"]
    assert len(images.chain(active_file(large))) == 1


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_a_cancelled_delete_leaves_the_disk_and_the_other_snapshots_as_they_were(
    limited: Api, large: Guest, tmp_path: Path, which: int
) -> None:
    """The snapshot's own contents are not: the commit writes into what it is."""
    api = limited
    chain = []
    for number in range(3):
        large.write("vda", f"mark{number}", f"text-{number}")
        chain.append(await api.create(large, name=f"s{number}", flags=QUIESCE_REQUIRED))
        if number == which:
            large.fill("vda", "much", FILLED)
            large.sync()
    large.write("vda", "mark3", "text-3")
    gone, others = chain[which], [created for created in chain if created is not chain[which]]
    before = {c.snapshot: images.checksum(c.file, c.ours("format"), tmp_path) for c in others}
    files, active = files_of(large), active_file(large)
    whole_chain = images.chain(active)

    deleting = asyncio.create_task(delete(api, gone))
    job = await job_of(api, gone.snapshot)
    assert await progress_of(api, job, 0.1) < 0.9
    await refused(api.backup_source(gone.snapshot), "Busy")
    await api.call(job, JOB, "Cancel")
    error = await refused(deleting, "Cancelled")
    assert "/" not in error.text
    completed = await api.client.heard("Completed", path=job)
    assert completed.body[0] is False

    assert "<mirror" not in large.domain.XMLDesc()
    assert not large.domain.blockJobInfo("vda")
    assert (files_of(large), active_file(large), active_file(large, 2)) == (files, active, active)
    assert images.chain(active) == whole_chain
    large.writes_go_on()
    assert marks(large, 3) == [f"text-{n}" for n in range(4)]
    for created in others:
        assert images.checksum(created.file, "qcow2", tmp_path) == before[created.snapshot]

    warning = await api.client.heard("Warning")
    assert (warning.path, warning.body[0]) == (gone.snapshot, "spoilt")
    assert "/" not in warning.body[1]
    states = {path: row["State"] for path, row in (await api.snapshots_of(large)).items()}
    assert states == {c.snapshot: "failed" if c is gone else "ready" for c in chain}
    await refused(api.backup_source(gone.snapshot), "InvalidState")
    large.domain.suspend()  # it is looked at again for such an event, and stays what it is
    large.domain.resume()
    await refused(api.backup_source(gone.snapshot), "InvalidState")
    for created in others:
        await api.backup_source(created.snapshot)

    await delete(api, gone)  # it can be deleted still
    assert set(await api.snapshots_of(large)) == set(before)
    for path, checksum in before.items():
        source = etree.fromstring(await api.backup_source(path))
        assert images.checksum(source.get("file") or "", "qcow2", tmp_path) == checksum
    assert marks(large, 3) == [f"text-{n}" for n in range(4)]


async def test_what_is_spoilt_stays_so_when_the_daemon_is_started_anew(
    limited: Api, large: Guest, lab: Lab, connect: Connect
) -> None:
    (created,) = await chain_of(limited, large, 1)
    large.fill("vda", "much", FILLED)
    large.sync()
    deleting = asyncio.create_task(delete(limited, created))
    job = await job_of(limited, created.snapshot)
    await progress_of(limited, job, 0.1)
    await limited.call(job, JOB, "Cancel")
    await refused(deleting, "Cancelled")
    await asyncio.to_thread(lab.daemon.restart)
    api = await connect()
    assert (await api.snapshots_of(large))[created.snapshot]["State"] == "failed"
    await refused(api.backup_source(created.snapshot), "InvalidState")
    await delete(api, created)
    assert marks(large, 1) == ["text-0", "text-1"]


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_daemon_that_was_killed_takes_the_commit_up_again_as_a_job(
    daemon: Lab, connect: Connect, large: Guest, cancelled: bool
) -> None:
    """To be cancelled, it must last longer than the 20 s that a start waits for what it mends."""
    daemon.daemon.stop()
    daemon.daemon.start({"qemu": {"commit_bandwidth": 2 if cancelled else BANDWIDTH}})
    api = await connect()
    await api.client.listen()
    (created,) = await chain_of(api, large, 1)
    large.fill("vda", "much", 2 * FILLED if cancelled else FILLED)
    large.sync()
    deleting = asyncio.create_task(delete(api, created))
    await progress_of(api, await job_of(api, created.snapshot), 0.1)
    await asyncio.to_thread(daemon.daemon.kill)
    with pytest.raises(ApiError):
        await deleting
    assert large.domain.blockJobInfo("vda")  # QEMU goes on by itself
    await asyncio.to_thread(daemon.daemon.start)
    (job,) = await jobs(api)
    told = await api.properties(job, JOB)
    assert (told["Operation"], told["StartedByUID"]) == ("delete", 0)
    assert told["Objects"] == [created.snapshot]
    if cancelled:
        assert 0 < told["Progress"] < 1
        await api.call(job, JOB, "Cancel")
        assert not large.domain.blockJobInfo("vda")
        assert (await api.snapshots_of(large))[created.snapshot]["State"] == "failed"
    else:
        assert not await api.snapshots_of(large)
    assert len(images.chain(active_file(large))) == (2 if cancelled else 1)
    assert active_file(large) == active_file(large, 2)
    assert marks(large, 1) == ["text-0", "text-1"]


async def test_a_commit_that_somebody_ended_while_no_daemon_ran_has_spoilt_the_snapshot(
    limited: Api, large: Guest, lab: Lab, connect: Connect
) -> None:
    (created,) = await chain_of(limited, large, 1)
    large.fill("vda", "much", FILLED)
    large.sync()
    deleting = asyncio.create_task(delete(limited, created))
    await progress_of(limited, await job_of(limited, created.snapshot), 0.1)
    await asyncio.to_thread(lab.daemon.kill)
    with pytest.raises(ApiError):
        await deleting
    domain = large.domain
    domain.blockJobAbort("vda")
    scratch = lab.folder("scratch")
    scratch.chmod(0o777)  # QEMU makes its socket there
    server = f"<server transport='unix' socket='{scratch}/socket'/>"
    disks = f"<disks><disk name='vda' type='file'><scratch file='{scratch}/vda'/></disk></disks>"
    domain.backupBegin(f"<domainbackup mode='pull'>{server}{disks}</domainbackup>", None)
    await asyncio.to_thread(lab.daemon.start)  # the delete can't be gone on with
    api = await connect()
    assert (await api.snapshots_of(large))[created.snapshot]["State"] == "failed"
    assert domain.blockJobInfo("vda")["type"] == 5  # the backup, which nobody has touched
    await refused(api.backup_source(created.snapshot), "InvalidState")
    domain.abortJob()
    await delete(api, created)
    assert marks(large, 1) == ["text-0", "text-1"]
    assert len(images.chain(active_file(large))) == 1


async def test_a_delete_that_runs_out_of_room_spoils_its_snapshot_and_nothing_else(
    daemon: Lab, connect: Connect, lab: Lab
) -> None:
    small, elsewhere = lab.block.mounted("ext4", 128), lab.folder("elsewhere")
    daemon.daemon.stop()
    settings = {"commit_bandwidth": BANDWIDTH, "overlay_dirs": [str(elsewhere)]}
    daemon.daemon.start({"qemu": settings})
    api = await connect()
    await api.client.listen()
    guest = await asyncio.to_thread(lab.guest, [DiskSpec(size_mib=128, folder=small.path)])
    guest.write("vda", "mark", "before")
    named = f"<diskSnapshot method='qemu'><overlay file='{elsewhere}/over.qcow2'/></diskSnapshot>"
    created = await api.create(guest, method_xml=named)
    guest.fill("vda", "much", FILLED)
    guest.sync()
    active = active_file(guest)
    deleting = asyncio.create_task(delete(api, created))
    await progress_of(api, await job_of(api, created.snapshot), 0.1)
    small.fill()
    error = await refused(deleting, "NoSpace")
    assert "make room" in error.text
    assert active_file(guest) == active_file(guest, 2) == active
    assert guest.state == "running"
    guest.writes_go_on()
    assert (await api.snapshots_of(guest))[created.snapshot]["State"] == "failed"
    assert (await api.client.heard("Warning")).body[0] == "spoilt"
    await refused(delete(api, created), "NoSpace")
    small.drain()
    await delete(api, created)
    assert guest.read("vda", "mark") == "before"
    guest.writes_go_on()
    guest.remove()
    small.unmount()


async def test_a_guest_that_writes_faster_than_the_limit_does_not_keep_the_delete_from_ending(
    daemon: Lab, connect: Connect, large: Guest
) -> None:
    daemon.daemon.stop()
    daemon.daemon.start({"qemu": {"commit_bandwidth": 1}})
    api = await connect()
    await api.client.listen()
    (created,) = await chain_of(api, large, 1)
    large.fill("vda", "some", 4)
    large.sync()
    deleting = asyncio.create_task(delete(api, created))
    job = await job_of(api, created.snapshot)
    await asyncio.to_thread(large.fill, "vda", "more", 50)
    async with asyncio.timeout(35):
        await deleting
    rises = progress_told(api, job)  # although there is more and more to do
    assert all(a < b for a, b in pairwise(rises))
    assert marks(large, 1) == ["text-0", "text-1"]


async def test_off_the_limit_holds_too(limited: Api, large: Guest) -> None:
    (created,) = await chain_of(limited, large, 1)
    large.fill("vda", "much", FILLED)
    large.poweroff()
    size = written_to(created.overlay)
    began = time.monotonic()
    deleting = asyncio.create_task(delete(limited, created))
    job = await job_of(limited, created.snapshot)
    with pytest.raises(ApiError) as error:
        await limited.call(job, JOB, "Cancel")
    assert error.value.name == "InvalidState"
    await deleting
    assert time.monotonic() - began > size / (BANDWIDTH * MIB) - 0.5
    large.start()
    assert marks(large, 1) == ["text-0", "text-1"]
