"""Method btrfs on real guests that write: what a snapshot bears, who uses it, sets, the library."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_vm.engine.journal import DeleteStep, Step
from snapd_vm.methods.btrfs import subvolume
from tests.lab.blockdev import Mounted
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.mounts import unmount
from tests.lab.program import run
from tests.lab.ring import read_ring
from tests.real import images
from tests.real.api import NO_QUIESCE, QUIESCE_REQUIRED, SNAPSHOT, Api, ApiError, Created
from tests.real.conftest import Connect
from tests.real.places import CONFIG, refused
from tests.real.test_crash import FAULTY, PLACE, faulty
from tests.real.test_delete import delete

__all__ = ["faulty"]

VDB = "<disk><target dev='vdb'/></disk>"
MIB = 1 << 20


@pytest.fixture(scope="module")
def btrfs(lab: Lab) -> Iterator[Mounted]:
    """The top of a file system."""
    made = lab.block.mounted("btrfs", 1500)
    yield made
    made.unmount()


@pytest.fixture(scope="module")
def own(lab: Lab, btrfs: Mounted) -> Iterator[Guest]:
    """A guest with three disks: two in one subvolume, past the page cache and through it, and one
    in another.
    """
    for name in ("vm", "other"):
        run("btrfs", "-q", "subvolume", "create", btrfs.path / name)
    vm, other = btrfs.path / "vm", btrfs.path / "other"
    running = lab.guest(
        [
            DiskSpec(format="raw", folder=vm, driver="cache='none'"),
            DiskSpec(format="raw", folder=vm, driver="cache='writeback'"),
            DiskSpec(format="raw", folder=other),
        ]
    )
    yield running
    running.remove()


def snapshots(btrfs: Mounted) -> list[str]:
    """The subvolumes that are read-only."""
    listed = run("btrfs", "subvolume", "list", "-r", btrfs.path).splitlines()
    return [line.partition(" path ")[2] for line in listed]


@pytest.fixture(autouse=True)
def nothing_left(btrfs: Mounted) -> Iterator[None]:
    """Take away what a test that failed has left, for the next one's sake."""
    yield
    for path in snapshots(btrfs):
        run("btrfs", "-q", "subvolume", "delete", btrfs.path / path)
    for place in btrfs.path.glob(f"*/{PLACE}"):
        shutil.rmtree(place)


def root_of(created: Created) -> Path:
    """The root folder of the snapshot."""
    return next(path for path in Path(created.file).parents if path.name.startswith("snapd-vm-"))


def text_in(image: str, file: str) -> str:
    return run("debugfs", "-R", f"cat {file}", image).strip()


async def test_what_a_snapshot_bears(api: Api, own: Guest, btrfs: Mounted) -> None:
    (btrfs.path / "vm" / "another-machine.raw").write_text("its contents")
    created = await api.create(own, name="nightly", flags=QUIESCE_REQUIRED)
    assert created.modified_disk == ""
    uuid = created.snapshot.rpartition("/_")[2].replace("_", "-")
    root = root_of(created)
    assert root.name == f"snapd-vm-{uuid}"
    assert root.parent.parent == btrfs.path / "vm" / PLACE
    assert run("btrfs", "property", "get", "-ts", root, "ro").strip() == "ro=true"
    mark = os.getxattr(root.parent, "trusted.snapd-vm").decode()
    assert all(word in mark for word in (uuid, own.uuid, own.name, "nightly"))
    assert (root / "another-machine.raw").read_text() == "its contents"
    with pytest.raises(OSError, match="Read-only"):
        (root / "another-machine.raw").write_text("changed")
    for path in (root.parent, root.parent.parent):
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o700)
    await delete(api, created)
    assert not snapshots(btrfs)
    assert (btrfs.path / "vm" / "another-machine.raw").read_text() == "its contents"


@pytest.mark.parametrize("disk", ["vda", "vdb"])
async def test_under_load_it_is_clean_or_recovers(
    api: Api, own: Guest, scratch: Path, disk: str
) -> None:
    xml = f"<disk><target dev='{disk}'/></disk>"
    for number in range(4):
        own.write(disk, f"mark{number}", "there")
        quiet = await api.create(own, xml, flags=QUIESCE_REQUIRED)
        crash = await api.create(own, xml, flags=NO_QUIESCE)
        assert images.is_clean(Path(quiet.file))
        assert not images.needs_recovery(Path(quiet.file))
        assert read_ring(images.raw_copy(quiet.file, "raw", scratch / "raw")).whole
        assert text_in(quiet.file, f"mark{number}") == "there"
        assert images.needs_recovery(Path(crash.file))
        for created in (quiet, crash):
            await delete(api, created)


async def test_whoever_reads_in_it_keeps_it(api: Api, own: Guest, btrfs: Mounted) -> None:
    (btrfs.path / "vm" / "more").write_text("held too")
    created = await api.create(own)
    root = root_of(created)
    for argv, cwd in ((["tail", "-f", str(root / "more")], None), (["sleep", "60"], root)):
        with subprocess.Popen(argv, cwd=cwd, stdout=subprocess.PIPE) as reader:
            if cwd is None:
                assert reader.stdout is not None
                reader.stdout.read(4)
            error = await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "Busy")
            assert f"(process {reader.pid})" in error.text
            reader.kill()
    loop = run("losetup", "--find", "--show", "--read-only", created.file).strip()
    error = await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "Busy")
    assert os.path.basename(loop) in error.text
    run("losetup", "-d", loop)
    detached = Path(f"/sys/block/{loop[5:]}/loop/backing_file")
    wait_until("it is detached", lambda: not detached.exists(), 10)
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "ready"
    await delete(api, created)
    assert not snapshots(btrfs)


async def test_a_mount_of_it_keeps_it(api: Api, lab: Lab, own: Guest, btrfs: Mounted) -> None:
    created = await api.create(own)
    point = lab.folder("mounted-snapshot")
    run("mount", "--bind", root_of(created), point)
    try:
        error = await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "Busy")
        assert str(point) in error.text
    finally:
        unmount(point)
    await delete(api, created)


async def test_states(api: Api, own: Guest, btrfs: Mounted) -> None:
    """As its storage, and the definitions, say each time."""
    created = await api.create(own)
    disk = (
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{created.file}'/><target dev='vdx' bus='virtio'/></disk>"
    )
    own.domain.attachDeviceFlags(disk, CONFIG)
    await refused(api.backup_source(created.snapshot), "InvalidState")
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "failed"
    await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "InvalidState")
    own.domain.detachDeviceFlags(disk, CONFIG)
    await api.disks(own)
    assert await api.backup_source(created.snapshot) == created.backup_source
    root = root_of(created)
    aside = root.with_name("aside")
    root.rename(aside)
    await refused(api.backup_source(created.snapshot), "StorageFailed")
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "missing"
    run("btrfs", "-q", "subvolume", "snapshot", "-r", btrfs.path / "vm", root)
    await refused(api.backup_source(created.snapshot), "StorageFailed")  # of the same subvolume
    assert await delete(api, created) == ""
    assert root.exists()
    assert aside.exists()
    for path in (root, aside):
        run("btrfs", "-q", "subvolume", "delete", path)
    root.parent.rmdir()
    root.parent.parent.rmdir()


async def test_paused_off_and_destroyed(api: Api, own: Guest, btrfs: Mounted) -> None:
    made = []
    try:
        own.domain.suspend()
        made.append(await api.create(own, name="paused"))
        own.domain.resume()
        own.poweroff()
        made.append(await api.create(own, name="off", flags=QUIESCE_REQUIRED))
        own.start()
        own.writes_go_on()
        own.destroy()
        made.append(await api.create(own, name="destroyed"))
    finally:
        if own.state == "shutoff":
            own.start()
    assert [one.ours("consistency") for one in made] == ["paused", "offline", "crash"]
    assert images.is_clean(Path(made[1].file))
    for created in made:
        await delete(api, created)
    assert not snapshots(btrfs)


# -- sets ----------------------------------------------------------------------------------------


async def test_disks_of_one_subvolume_share_one_snapshot(
    api: Api, own: Guest, btrfs: Mounted
) -> None:
    (_, one), (_, two) = await api.create_set(own, "vda", "vdb", name="both", flags=NO_QUIESCE)
    assert [made.ours("consistency") for made in (one, two)] == ["crash", "crash"]
    assert root_of(one) == root_of(two)
    assert len(snapshots(btrfs)) == 1
    first = Path(two.file).read_bytes()
    await delete(api, one)
    assert len(snapshots(btrfs)) == 1
    assert (await api.properties(two.snapshot, SNAPSHOT))["State"] == "ready"
    assert Path(two.file).read_bytes() == first
    await delete(api, two)
    assert not snapshots(btrfs)
    assert not (btrfs.path / "vm" / PLACE).exists()


async def test_disks_of_several_subvolumes_are_taken_with_the_vcpus_stopped(
    api: Api, own: Guest, btrfs: Mounted
) -> None:
    made = await api.create_set(own, "vda", "vdb", "vdc", flags=NO_QUIESCE)
    assert [created.ours("consistency") for _, created in made] == ["paused"] * 3
    assert len(snapshots(btrfs)) == 2
    own.writes_go_on()
    for _, created in made:
        await delete(api, created)
    assert not snapshots(btrfs)


@pytest.mark.parametrize(
    ("do", "step"),
    [
        *(("kill", step) for step in (Step.PREPARED, Step.ARMED, Step.SWITCHED, Step.READ_BACK)),
        *(("raise", step) for step in (Step.ARMED, Step.SWITCHED)),
    ],
)
async def test_a_set_is_whole_or_not_there(
    connect: Connect, faulty: Lab, own: Guest, btrfs: Mounted, step: Step, do: str
) -> None:
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", do))
    api = await connect()
    with pytest.raises(ApiError):
        await api.create_set(own, "vda", "vdb", "vdc")
    if do == "kill":
        wait_until("the daemon is dead", lambda: not faulty.daemon.running, 10)
        faulty.daemon.start({}, argv=DAEMON)
    stands = do == "kill" and step in (Step.SWITCHED, Step.READ_BACK)
    rows = await api.snapshots_of(own)
    assert len(rows) == (3 if stands else 0)
    assert len(snapshots(btrfs)) == (2 if stands else 0)
    assert own.state == "running"
    own.writes_go_on()
    for path in rows:
        await api.call(path, SNAPSHOT, "Delete", "u", 0)
    assert not snapshots(btrfs)
    assert not list(btrfs.path.glob(f"*/{PLACE}"))


@pytest.mark.parametrize("step", list(DeleteStep))
async def test_killed_while_one_of_a_set_is_deleted(
    connect: Connect, faulty: Lab, own: Guest, btrfs: Mounted, step: DeleteStep
) -> None:
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "kill"))
    api = await connect()
    (_, one), (_, two) = await api.create_set(own, "vda", "vdb")
    with pytest.raises(ApiError):
        await delete(api, one)
    await asyncio.to_thread(wait_until, "it is dead", lambda: not faulty.daemon.running, 10)
    faulty.daemon.start({}, argv=DAEMON)
    assert len(snapshots(btrfs)) == 1
    there = set(await api.snapshots_of(own))
    gone = step is not DeleteStep.CHECKED
    assert there == ({two.snapshot} if gone else {one.snapshot, two.snapshot})
    assert Path(two.file).exists()
    for path in there:
        await api.call(path, SNAPSHOT, "Delete", "u", 0)
    assert not snapshots(btrfs)


# -- the library ---------------------------------------------------------------------------------


def test_python_goes_on_while_a_snapshot_waits_for_the_disk(btrfs: Mounted) -> None:
    """As it must, or the timer that lets a guest go would wait as well."""
    vm = btrfs.path / "much"
    run("btrfs", "-q", "subvolume", "create", vm)
    root, folder = (os.open(path, os.O_RDONLY) for path in (vm, btrfs.path))
    longest, ended = 0.0, threading.Event()

    def tick() -> None:
        nonlocal longest
        last = time.monotonic()
        while not ended.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            longest, last = max(longest, now - last), now

    ticking = threading.Thread(target=tick)
    try:
        subvolume.load()
        with (vm / "unwritten").open("wb") as file:
            for _ in range(200):
                file.write(os.urandom(MIB))
        ticking.start()
        began = time.monotonic()
        subvolume.take(root, folder, "taken")
        took = time.monotonic() - began
    finally:
        ended.set()
        ticking.join()
        os.close(root)
    assert took > 0.1, "there was nothing to wait for"
    assert longest < took / 2, (longest, took)
    subvolume.remove(folder, "taken")
    os.close(folder)
    run("btrfs", "-q", "subvolume", "delete", vm)
