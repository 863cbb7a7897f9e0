"""Create and Delete with method reflink on a real guest that writes, on XFS and on btrfs."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest

from tests.lab.blockdev import FileSystem, Mounted
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.process import open_files
from tests.lab.program import attempt, run
from tests.real import images
from tests.real.api import NO_QUIESCE, QUIESCE_REQUIRED, SNAPSHOT, Api, Created
from tests.real.places import refused
from tests.real.test_crash import unnamed

VDB = "<disk><target dev='vdb'/></disk>"
VDA = "<disk><target dev='vda'/></disk>"
DISKS = {"vda": VDA, "vdb": VDB}
MIB = 1 << 20


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def cloning(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """A file system that can clone."""
    filesystem: FileSystem = request.param
    made = lab.block.mounted(filesystem, 600)
    yield made
    made.unmount()


@pytest.fixture(scope="module")
def own(lab: Lab, cloning: Mounted) -> Iterator[Guest]:
    """A guest with two raw disks there: one past the host's page cache, and one through it."""
    running = lab.guest(
        [
            DiskSpec(format="raw", folder=cloning.path, driver="cache='none'"),
            DiskSpec(format="raw", folder=cloning.path, driver="cache='writeback'"),
        ]
    )
    yield running
    running.remove()


def create(
    api: Api, own: Guest, disk: str = VDA, *, name: str = "", flags: int = 0
) -> Awaitable[Created]:
    """Create by reflink, which on btrfs is not the default."""
    return api.create(own, disk, "<diskSnapshot method='reflink'/>", name, flags)


async def delete(api: Api, created: Created) -> str:
    return str((await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0))[0])


def files(own: Guest) -> set[str]:
    return set(os.listdir(own.disk().path.parent))


def text_in(image: str, file: str) -> str:
    """What a file in an ext4 image holds; '' if it is not there."""
    return attempt(["debugfs", "-R", f"cat {file}", image], timeout=60).stdout.strip()


@pytest.mark.parametrize("target", ["vda", "vdb"])
async def test_a_clone_is_what_the_guest_had_and_stays_so(
    api: Api, own: Guest, tmp_path: Path, target: str
) -> None:
    before, xml = files(own), own.domain.XMLDesc()
    image = own.disk(target).path
    own.write(target, "mark", "before")
    created = await create(api, own, DISKS[target], name="nightly", flags=QUIESCE_REQUIRED)
    own.write(target, "mark", "after")
    path = Path(created.file)
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert (told["Method"], told["Format"], told["Size"]) == ("reflink", "raw", 64 * MIB)
    assert (told["State"], told["Consistency"], told["FrozenFilesystems"]) == (
        "ready",
        "quiesced",
        1,
    )
    assert created.modified_disk == ""
    assert own.domain.XMLDesc() == xml
    uuid = created.snapshot.rpartition("/_")[2].replace("_", "-")
    assert path == image.parent / f"snapd-vm-{uuid}"
    assert files(own) == before | {path.name}
    assert (created.ours("type"), created.ours("format")) == ("file", "raw")
    assert set(created.source.attrib) - {"file"} == {
        key for key in created.source.attrib if str(key).startswith("{https://example.org/")
    }
    assert images.is_clean(path)
    assert not images.needs_recovery(path)
    assert text_in(created.file, "mark") == "before"
    checksum = images.checksum(path, "raw", tmp_path)
    own.writes_go_on()
    own.fill(target, "filling", 4)
    assert images.checksum(path, "raw", tmp_path) == checksum
    with pytest.raises(PermissionError):
        path.open("r+b")
    with pytest.raises(PermissionError):
        path.unlink()
    like, is_like = image.stat(), path.stat()
    assert (is_like.st_uid, is_like.st_gid) == (like.st_uid, like.st_gid)
    assert stat.S_IMODE(is_like.st_mode) == stat.S_IMODE(like.st_mode) & 0o444
    mark = os.getxattr(path, "trusted.snapd-vm").decode()
    assert all(word in mark for word in (uuid, own.uuid, own.name, "nightly"))
    assert await delete(api, created) == ""
    assert files(own) == before
    assert own.domain.XMLDesc() == xml
    assert not await api.snapshots_of(own)
    assert own.read(target, "mark") == "after"
    own.writes_go_on()


@pytest.mark.parametrize("target", ["vda", "vdb"])
async def test_quiesced_clones_are_clean_and_others_need_recovery(
    daemon: Lab, api: Api, own: Guest, target: str
) -> None:
    before = files(own)
    for number in range(6):
        own.write(target, f"mark{number}", "there")
        made = await create(api, own, DISKS[target], flags=QUIESCE_REQUIRED)
        crash = await create(api, own, DISKS[target], flags=NO_QUIESCE)
        assert images.is_clean(Path(made.file))
        assert not images.needs_recovery(Path(made.file))
        assert text_in(made.file, f"mark{number}") == "there"
        assert crash.ours("consistency") == "crash"
        assert images.needs_recovery(Path(crash.file))
        await delete(api, made)
        await delete(api, crash)
    assert files(own) == before
    assert not unnamed(daemon.daemon)


async def test_a_clone_that_is_being_read_is_not_deleted(api: Api, own: Guest) -> None:
    created = await create(api, own)
    with subprocess.Popen(["tail", "-f", created.file], stdout=subprocess.DEVNULL) as reader:
        try:
            wait_until("it reads", lambda: created.file in open_files(reader.pid), 10)
            error = await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "Busy")
        finally:
            reader.kill()
    assert f"tail (process {reader.pid})" in error.text
    loop = run("losetup", "--find", "--show", "--read-only", created.file).strip()
    error = await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "Busy")
    assert os.path.basename(loop) in error.text
    run("losetup", "-d", loop)
    wait_until(
        "it is detached", lambda: not Path(f"/sys/block/{loop[5:]}/loop/backing_file").exists(), 10
    )
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "ready"
    await delete(api, created)
    assert not os.path.exists(created.file)
    with pytest.raises(Exception, match=r"NoSuchSnapshot|UnknownObject|UnknownMethod"):
        await delete(api, created)


async def test_the_guest_that_reads_its_own_snapshot_keeps_it(api: Api, own: Guest) -> None:
    created = await create(api, own)
    disk = (
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{created.file}'/><target dev='vdc' bus='virtio'/><readonly/></disk>"
    )
    own.domain.attachDeviceFlags(disk, 2)  # VIR_DOMAIN_AFFECT_CONFIG
    try:
        error = await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "Busy")
        assert "vdc" in error.text
    finally:
        own.domain.detachDeviceFlags(disk, 2)
    await delete(api, created)


async def test_paused_off_and_destroyed(api: Api, own: Guest) -> None:
    before = files(own)
    made = []
    try:
        own.domain.suspend()
        made.append(await create(api, own, name="paused"))
        own.domain.resume()
        own.writes_go_on()
        own.poweroff()
        made.append(await create(api, own, name="off", flags=QUIESCE_REQUIRED))
        own.start()
        own.writes_go_on()
        own.destroy()
        made.append(await create(api, own, name="destroyed"))
    finally:
        if own.state == "shutoff":
            own.start()
    assert [one.ours("consistency") for one in made] == ["paused", "offline", "crash"]
    assert images.is_clean(Path(made[1].file))
    assert not images.needs_recovery(Path(made[1].file))
    own.domain.suspend()
    await delete(api, made[0])
    own.domain.resume()
    own.poweroff()
    await delete(api, made[1])
    own.start()
    await delete(api, made[2])
    assert files(own) == before


async def test_a_clone_that_was_removed_by_hand_is_missing(api: Api, own: Guest) -> None:
    created = await create(api, own)
    run("chattr", "-i", created.file)
    os.unlink(created.file)
    await refused(api.backup_source(created.snapshot), "StorageFailed")
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "missing"
    foreign = Path(created.file)
    foreign.write_text("somebody else's")
    assert await delete(api, created) == ""
    assert foreign.read_text() == "somebody else's"
    foreign.unlink()
    assert not await api.snapshots_of(own)
