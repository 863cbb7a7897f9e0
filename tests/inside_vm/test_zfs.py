"""Method zfs on real pools, with domains that are only defined: what it makes, refuses and undoes.

Runs in the host VM, whose kernel has ZFS. One daemon serves for all tests but those with a fault.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import uuid as uuids
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_vm import command
from snapd_vm.engine.journal import DeleteStep, RevertStep, Step
from snapd_vm.methods.zfs import zfsclaim, zfsdataset, zfsplace
from snapd_vm.model import Disk, Domain, Tag
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.mounts import unmount
from tests.lab.program import attempt, run
from tests.lab.zpool import NO_AUTOMOUNT, Pool, make_pool
from tests.real.api import DOMAIN, SNAPSHOT, Api, ApiError, Created, path_of
from tests.real.conftest import Connect, connect, lab
from tests.real.other_driver import taken_by
from tests.real.places import CONFIG, Places, image, refused, unchanged, with_image

__all__ = ["connect", "lab"]

FAULTY = (sys.executable, "-m", "tests.real.faulty_daemon")
ZFS = "<diskSnapshot method='zfs'/>"
VDB = "<disk><target dev='vdb'/></disk>"
MIB = 1 << 20


@pytest.fixture(scope="module")
def pool(lab: Lab) -> Iterator[Pool]:
    made = make_pool(lab)
    yield made
    made.destroy()


@pytest.fixture
def places(lab: Lab) -> Iterator[Places]:
    made = Places(lab)
    yield made
    made.forget()


@pytest.fixture
async def api(lab: Lab, connect: Connect) -> Api:
    """A client, who is root, of the daemon without a fault."""
    return await serve(lab, connect, DAEMON)


@pytest.fixture(autouse=True)
def nothing_left(lab: Lab, pool: Pool) -> Iterator[None]:
    """A test leaves the pool as it was, but for datasets; what one that failed has left goes."""
    yield
    left = pool.snapshots()
    pool.clear()
    assert not left


async def serve(lab: Lab, connect: Connect, argv: tuple[str, ...]) -> Api:
    """A client of a daemon that was started so, or had been."""
    if not (lab.daemon.running and lab.daemon.argv == argv == DAEMON):
        if lab.daemon.running:
            lab.daemon.stop()
        shutil.rmtree(lab.daemon.state_dir, ignore_errors=True)
        lab.daemon.start({}, argv=argv, wait=90)
    return await connect()


async def again(lab: Lab, connect: Connect) -> Api:
    """A client of a daemon without a fault, started after one that was killed."""
    await asyncio.to_thread(wait_until, "it is dead", lambda: not lab.daemon.running, 60)
    lab.daemon.start({}, argv=DAEMON, wait=90)
    return await connect()


def raw(folder: Path, name: str = "disk.raw") -> Path:
    """A raw image of random bytes in a folder of its own there."""
    own = folder / uuids.uuid4().hex
    own.mkdir(mode=0o755)
    path = own / name
    path.write_bytes(os.urandom(2 * MIB))
    os.truncate(path, 16 * MIB)
    path.chmod(0o640)
    return path


def new(pool: Pool, *options: str) -> tuple[str, Path]:
    """A dataset of the test's own: its name, and where it is mounted."""
    name = f"vm{uuids.uuid4().hex[:8]}"
    return f"{pool.name}/{name}", pool.dataset(name, *options)


def volume(pool: Pool, *, thin: bool = True, size_mib: int = 16) -> tuple[str, Path]:
    """A volume of the test's own, with random bytes: its name and device."""
    name = f"vol{uuids.uuid4().hex[:8]}"
    device = pool.volume(name, size_mib, thin=thin)
    fill(device)
    return f"{pool.name}/{name}", device


def fill(device: Path, mib: int = 2) -> None:
    with device.open("r+b") as file:
        file.write(os.urandom(mib * MIB))
        os.fsync(file.fileno())


async def guest_on(api: Api, places: Places, *paths: Path) -> Guest:
    """A domain, off, with these raw disks."""
    specs = []
    for path in paths:
        if str(path).startswith("/dev/"):
            specs.append(DiskSpec(source=f"<source dev='{path}'/>", type="block", format="raw"))
        else:
            specs.append(with_image(path, "raw"))
    made = places.guest(*specs)
    await places.known(api)
    return made


async def delete(api: Api, created: Created) -> None:
    assert await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0) == [""]


async def revert(api: Api, created: Created) -> None:
    assert await api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0) == [""]


def uuid_of(created: Created) -> str:
    return created.snapshot.rpartition("/_")[2].replace("_", "-")


def named(name: str) -> str:
    return f"<diskSnapshot method='zfs'><dataset name='{name}'/></diskSnapshot>"


def holds(snapshot: str) -> list[str]:
    return [row.split("\t")[1] for row in run("zfs", "holds", "-H", snapshot).splitlines()]


# -- what it makes -------------------------------------------------------------------------------


async def test_a_file_in_a_dataset(api: Api, places: Places, pool: Pool) -> None:
    dataset, root = new(pool)
    path = raw(root)
    (root / "beside").write_text("is held too")
    guest = await guest_on(api, places, path)
    (row,) = await api.disks(guest)
    assert (row["method"], row["reason"]) == ("zfs", "the default for a raw file on ZFS")
    content = path.read_bytes()
    created = await api.create(guest, name="nightly")
    assert created.modified_disk == ""
    path.write_bytes(b"something else")
    snapshot = f"{dataset}@snapd-vm-{uuid_of(created)}"
    shown = root / ".zfs/snapshot" / f"snapd-vm-{uuid_of(created)}"
    assert created.file == str(shown / path.relative_to(root))
    assert Path(created.file).read_bytes() == content
    assert (shown / "beside").read_text() == "is held too"
    with pytest.raises(OSError, match="Read-only"):
        Path(created.file).write_text("changed")
    said = {key: pool.get(snapshot, f"org.snapd-vm:{key}") for key in ("label", "domain")}
    assert said == {"label": "nightly", "domain": guest.name}
    assert pool.get(snapshot, "org.snapd-vm:snapshots") == f"vda={uuid_of(created)}"
    assert holds(snapshot) == ["snapd-vm"]
    assert attempt(["zfs", "destroy", "-r", snapshot]).returncode != 0
    assert Path(created.file).read_bytes() == content
    assert await api.backup_source(created.snapshot) == created.backup_source
    await delete(api, created)
    assert not pool.snapshots()


async def test_a_volume(api: Api, places: Places, pool: Pool) -> None:
    dataset, device = volume(pool)
    before = pool.everything()
    guest = await guest_on(api, places, device)
    (row,) = await api.disks(guest)
    assert (row["method"], row["reason"]) == ("zfs", "the default for a ZFS volume")
    content = device.read_bytes()
    created = await api.create(guest, name="nightly")
    fill(device)
    assert created.ours("type") == "block"
    assert created.file == f"/dev/zvol/{pool.name}/snapd-vm-{uuid_of(created)}"
    assert Path(created.file).read_bytes() == content != device.read_bytes()
    assert run("blockdev", "--getro", created.file).strip() == "1"
    done = attempt(["dd", "if=/dev/zero", f"of={created.file}", "bs=4k", "count=1", "conv=fsync"])
    assert done.returncode != 0
    run("blockdev", "--setrw", created.file)  # what the driver says of it counts
    attempt(["dd", "if=/dev/zero", f"of={created.file}", "bs=4k", "count=1", "conv=fsync"])
    assert Path(created.file).read_bytes() == content
    run("blockdev", "--setro", created.file)
    assert holds(f"{dataset}@snapd-vm-{uuid_of(created)}") == ["snapd-vm"]
    assert pool.get(dataset, "snapdev") == "hidden"
    run("zfs", "destroy", created.file.removeprefix("/dev/zvol/"))  # it is made again
    assert await api.backup_source(created.snapshot) == created.backup_source
    assert Path(created.file).read_bytes() == content
    await delete(api, created)
    assert pool.everything() == before
    # By another name of the device, and qcow2 if it is asked for.
    run("qemu-img", "create", "-q", "-f", "qcow2", device.resolve(), "8M")
    spec = DiskSpec(source=f"<source dev='{device.resolve()}'/>", type="block")
    other = places.guest(spec)
    await places.known(api)
    assert [row["method"] for row in await api.disks(other)] == [""], "it has to be asked for"
    created = await api.create(other, method_xml=ZFS)
    assert created.ours("format") == "qcow2"
    await delete(api, created)
    assert pool.everything() == before


RULES = Path("/run/udev/rules.d/61-away.rules")  # after the one that gives volumes their names
AWAY = Path("/run/away")
RULE = f"""KERNEL!="zd*", GOTO="end"
ACTION=="add", RUN+="/bin/sh -c 'echo change > /sys%p/uevent; echo change > /sys%p/uevent'"
ACTION=="change", TEST=="{AWAY}", SYMLINK="", RUN+="/bin/sh -c 'sleep 2; rm {AWAY}'"
LABEL="end"
"""


async def test_a_device_is_handed_out_once_udev_has_done_with_it(
    api: Api, places: Places, pool: Pool
) -> None:
    """Its name goes again after it has come, and is given back, as it happens on a busy host."""
    _, device = volume(pool)
    guest = await guest_on(api, places, device)
    RULES.parent.mkdir(exist_ok=True)
    RULES.write_text(RULE)
    AWAY.touch()
    try:
        run("udevadm", "control", "--reload")
        created = await api.create(guest)
        assert not AWAY.exists()
        assert Path(created.file).exists()
    finally:
        RULES.unlink()
        run("udevadm", "control", "--reload")
        AWAY.unlink(missing_ok=True)
    await delete(api, created)


async def test_a_set_is_one_command_and_shares_what_is_in_one_dataset(
    api: Api, places: Places, pool: Pool
) -> None:
    (dataset, root), (_, device) = new(pool), volume(pool)
    before = pool.everything()
    one, two = raw(root), raw(root)
    guest = await guest_on(api, places, one, two, device)
    contents = [path.read_bytes() for path in (one, two, device)]
    made = [created for _, created in await api.create_set(guest, "vda", "vdb", "vdc", name="all")]
    for path in (one, two):
        path.write_bytes(b"something else")
    fill(device)
    assert [Path(created.file).read_bytes() for created in made] == contents
    assert len(pool.snapshots()) == 2
    ages = {pool.get(name, "createtxg") for name in pool.snapshots()}
    assert len(ages) == 1
    (shared,) = [name for name in pool.snapshots() if name.startswith(f"{dataset}@")]
    said = pool.get(shared, "org.snapd-vm:snapshots")
    assert said == " ".join(
        f"{disk}={uuid_of(created)}"
        for disk, created in zip(("vda", "vdb", "vdc"), made, strict=True)
    )
    await delete(api, made[0])
    assert len(pool.snapshots()) == 2
    assert Path(made[1].file).read_bytes() == contents[1]
    for created in made[1:]:
        await delete(api, created)
    assert pool.everything() == before


async def test_a_dataset_whose_root_no_mount_shows(
    api: Api, lab: Lab, connect: Connect, places: Places, pool: Pool
) -> None:
    """Its snapshot is mounted by us, and found and mounted again."""
    dataset, root = new(pool)
    path = raw(root)
    point = lab.folder(f"point{uuids.uuid4().hex}")
    run("mount", "--bind", path.parent, point)
    run("umount", root)
    try:
        guest = await guest_on(api, places, point / path.name)
        content = (point / path.name).read_bytes()
        created = await api.create(guest)
        (point / path.name).write_bytes(b"something else")
        assert created.file.startswith("/run/snapd-vm/zfs/")
        assert created.file.endswith(f"/{path.parent.name}/{path.name}")
        assert Path(created.file).read_bytes() == content
        found = run("findmnt", "-n", "-o", "OPTIONS", "-T", created.file)
        assert all(word in found for word in ("ro", "nosuid", "nodev", "noexec"))
        folder = Path(created.file).parents[1]
        run("umount", folder)  # as after a restart of the host
        lab.daemon.restart()
        api = await connect()
        assert await api.backup_source(created.snapshot) == created.backup_source
        assert Path(created.file).read_bytes() == content
        await delete(api, created)
        assert not folder.exists()
    finally:
        unmount(point)
        run("zfs", "mount", dataset)


@pytest.fixture
def no_automount() -> Iterator[None]:
    """See NO_AUTOMOUNT."""
    run("bash", "-euc", NO_AUTOMOUNT)
    yield
    run("umount", "/usr/bin/env")


async def test_a_snapshot_that_the_kernel_can_not_show(
    api: Api, lab: Lab, connect: Connect, places: Places, pool: Pool, no_automount: None
) -> None:
    """It is mounted by us in the same place, in the very Create, and found and mounted again."""
    dataset, root = new(pool)
    path, other = raw(root), raw(root)
    guest = await guest_on(api, places, path, other)
    before, content = pool.everything(), path.read_bytes()
    run("zfs", "snapshot", f"{dataset}@unseen")
    with pytest.raises(OSError, match="No such file"):
        (root / ".zfs/snapshot/unseen" / path.relative_to(root)).read_bytes()
    run("zfs", "destroy", f"{dataset}@unseen")
    pairs = await api.create_set(guest, "vda", "vdb")
    created = pairs[0][1]
    path.write_bytes(b"something else")
    (snapshot,) = pool.snapshots()
    folder = root / ".zfs/snapshot" / snapshot.partition("@")[2]
    assert created.file == str(folder / path.relative_to(root))
    assert Path(created.file).read_bytes() == content
    run("umount", folder)  # as after a restart of the host
    with pytest.raises(OSError, match="No such file"):
        Path(created.file).read_bytes()
    lab.daemon.restart()
    api = await connect()
    assert await api.backup_source(created.snapshot) == created.backup_source
    assert Path(created.file).read_bytes() == content
    await delete(api, created)
    assert Path(pairs[1][1].file).read_bytes() == other.read_bytes()
    with Path(pairs[1][1].file).open("rb"):
        await refused(delete(api, pairs[1][1]), "Busy")
    await delete(api, pairs[1][1])
    assert pool.everything() == before
    assert not run("findmnt", "-n", "-l", "-t", "zfs", "-o", "SOURCE").count("@")


async def test_a_chain_is_taken_if_it_is_wholly_in_the_dataset(
    api: Api, places: Places, pool: Pool
) -> None:
    _, root = new(pool)
    inside, outside = root / "base.qcow2", places.folder() / "base.qcow2"
    for base in (inside, outside):
        image(base)
    good = image(root / "good.qcow2", "base.qcow2")
    bad = image(root / "bad.qcow2", outside)
    absolute = image(root / "absolute.qcow2", inside)
    for path, right in ((good, True), (bad, False), (absolute, False)):
        guest = places.guest(with_image(path))
        await places.known(api)
        assert [row["method"] for row in await api.disks(guest)] == ["qemu"]
        if not right:
            await unchanged(api, guest, "MethodNotSupported", method_xml=ZFS)
            continue
        created = await api.create(guest, method_xml=ZFS)
        listed = run("qemu-img", "info", "-U", "--backing-chain", created.file)
        assert str(Path(created.file).parent / "base.qcow2") in listed
        error = await refused(
            api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0), "MethodNotSupported"
        )
        assert "backing file" in error.text
        await delete(api, created)


# -- who uses it ---------------------------------------------------------------------------------


async def test_delete_is_refused_while_somebody_uses_it(
    api: Api, places: Places, pool: Pool
) -> None:
    (dataset, root), (vol, device) = new(pool), volume(pool)
    guest = await guest_on(api, places, raw(root), device)
    file, block = await api.create(guest), await api.create(guest, VDB)
    for created, origin in ((file, dataset), (block, vol)):
        snapshot = f"{origin}@snapd-vm-{uuid_of(created)}"
        with subprocess.Popen(["tail", "-f", created.file], stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            reader.stdout.read(1)
            error = await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "Busy")
            assert f"(process {reader.pid})" in error.text
            reader.kill()
        run("zfs", "hold", "somebody else", snapshot)
        error = await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "Busy")
        assert "'somebody else'" in error.text
        run("zfs", "release", "somebody else", snapshot)
        run("zfs", "clone", snapshot, f"{pool.name}/theirs")
        error = await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "Busy")
        assert f"{pool.name}/theirs" in error.text
        run("zfs", "destroy", f"{pool.name}/theirs")
        sending = subprocess.Popen(["zfs", "send", snapshot], stdout=subprocess.PIPE)
        assert sending.stdout is not None
        sending.stdout.read(1)
        await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "Busy")
        sending.kill()
        sending.communicate()
        assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "ready"
        assert holds(snapshot) == ["snapd-vm"], "it is held as before"
        assert await api.backup_source(created.snapshot) == created.backup_source
        await delete(api, created)


async def test_states(api: Api, places: Places, pool: Pool) -> None:
    (dataset, root), (vol, device) = new(pool), volume(pool)
    guest = await guest_on(api, places, raw(root), device)
    for disk, origin in (("vda", dataset), ("vdb", vol)):
        created = await api.create(guest, f"<disk><target dev='{disk}'/></disk>")
        kind, attribute = ("block", "dev") if origin == vol else ("file", "file")
        xml = (
            f"<disk type='{kind}' device='disk'><driver name='qemu' type='raw'/>"
            f"<source {attribute}='{created.file}'/><target dev='vdx' bus='virtio'/></disk>"
        )
        guest.domain.attachDeviceFlags(xml, CONFIG)
        await refused(api.backup_source(created.snapshot), "InvalidState")
        await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "InvalidState")
        guest.domain.detachDeviceFlags(xml, CONFIG)
        await api.disks(guest)
        assert await api.backup_source(created.snapshot) == created.backup_source
        snapshot = f"{origin}@snapd-vm-{uuid_of(created)}"
        run("zfs", "release", "snapd-vm", snapshot)
        attempt(["zfs", "destroy", f"{pool.name}/snapd-vm-{uuid_of(created)}"])
        run("zfs", "destroy", snapshot)
        await refused(api.backup_source(created.snapshot), "StorageFailed")
        assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "missing"
        run("zfs", "snapshot", snapshot)  # somebody else's of that name
        await refused(api.backup_source(created.snapshot), "StorageFailed")
        await delete(api, created)
        assert pool.snapshots() == [snapshot]
        run("zfs", "destroy", snapshot)


# -- it goes back --------------------------------------------------------------------------------


async def test_a_file_goes_back_and_nothing_else_does(api: Api, places: Places, pool: Pool) -> None:
    _, root = new(pool)
    path, other = raw(root), raw(root)
    guest = await guest_on(api, places, path)
    one = await api.create(guest, name="one")
    first = path.read_bytes()
    path.write_bytes(os.urandom(3 * MIB))
    second = path.read_bytes()
    two = await api.create(guest, name="two")
    other.write_bytes(b"another machine's, later")
    os.chown(path, 12345, 23456)
    rights = path.stat().st_uid, path.stat().st_gid, path.stat().st_mode
    for created, content in ((one, first), (two, second), (one, first)):
        await revert(api, created)
        assert path.read_bytes() == content
        assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode) == rights
        assert os.listdir(path.parent) == [path.name]
        path.write_bytes(os.urandom(MIB))
    assert other.read_bytes() == b"another machine's, later"
    assert Path(one.file).read_bytes() == first
    assert Path(two.file).read_bytes() == second
    three = await api.create(guest, name="three")
    assert Path(three.file).read_bytes() == path.read_bytes()
    for created in (one, two, three):
        await delete(api, created)


async def test_a_volume_goes_back_where_no_snapshot_is_newer(
    api: Api, places: Places, pool: Pool
) -> None:
    dataset, device = volume(pool)
    guest = await guest_on(api, places, device)
    one = await api.create(guest, name="one")
    first = device.read_bytes()
    fill(device)
    second = device.read_bytes()
    two = await api.create(guest, name="two")
    fill(device)
    await revert(api, two)
    assert device.read_bytes() == second
    fill(device)
    third = device.read_bytes()
    before = pool.everything()
    error = await refused(api.call(one.snapshot, SNAPSHOT, "Revert", "u", 0), "InvalidState")
    assert f"{dataset}@snapd-vm-{uuid_of(two)}" in error.text
    run("zfs", "snapshot", f"{dataset}@theirs")
    error = await refused(api.call(two.snapshot, SNAPSHOT, "Revert", "u", 0), "InvalidState")
    assert f"{dataset}@theirs" in error.text
    run("zfs", "destroy", f"{dataset}@theirs")
    with device.open("rb") as file:
        holder = subprocess.Popen(["sleep", "60"], stdin=file)
    try:
        error = await refused(api.call(two.snapshot, SNAPSHOT, "Revert", "u", 0), "Busy")
        assert f"(process {holder.pid})" in error.text
    finally:
        holder.kill()
        holder.wait()
    assert (device.read_bytes(), pool.everything()) == (third, before)
    assert Path(one.file).read_bytes() == first
    await delete(api, two)
    await revert(api, one)
    assert device.read_bytes() == first
    await revert(api, one)
    await delete(api, one)


# -- tricks --------------------------------------------------------------------------------------


async def test_a_dataset_that_is_named(api: Api, places: Places, pool: Pool) -> None:
    (dataset, root), (vol, device) = new(pool), volume(pool)
    other, elsewhere = new(pool)
    raw(elsewhere)
    guest = await guest_on(api, places, raw(root), device)
    for right, disk in ((dataset, "vda"), (vol, "vdb")):
        xml = f"<disk><target dev='{disk}'/></disk>"
        for wrong in (
            *(other, pool.name, f"{right}x", right[:-1], f"{pool.name}/none", "tank", "proc/self"),
            *({dataset, vol} - {right}),
        ):
            error = await unchanged(api, guest, "NotUnderDisk", disk=disk, method_xml=named(wrong))
            assert right in error.text
        for odd in (f"{right}@x", f"{right}/", f"{pool.name}/../{right}", f"-r {right}", "", "/"):
            await unchanged(api, guest, "InvalidXML", disk=disk, method_xml=named(odd))
        created = await api.create(guest, xml, method_xml=named(right))
        await delete(api, created)
    link = places.folder() / "link.raw"
    link.symlink_to(raw(elsewhere))
    guest = await guest_on(api, places, link)
    await unchanged(api, guest, "NotUnderDisk", method_xml=named(dataset))
    created = await api.create(guest, method_xml=named(other))
    assert created.file.startswith(f"{elsewhere}/.zfs/")
    await delete(api, created)
    guest = await guest_on(api, places, raw(places.folder()))
    await unchanged(api, guest, "NotUnderDisk", method_xml=named(dataset))
    await unchanged(api, guest, "MethodNotSupported", method_xml=ZFS)


async def test_another_dataset_mounted_over_the_path_is_the_disks(
    api: Api, places: Places, pool: Pool
) -> None:
    (_, root), (other, elsewhere) = new(pool), new(pool)
    path = raw(root)
    guest = await guest_on(api, places, path)
    (elsewhere / path.name).write_bytes(b"x" * MIB)
    run("mount", "--bind", elsewhere, path.parent)
    try:
        created = await api.create(guest)
        assert created.file.startswith(f"{elsewhere}/.zfs/")
        assert pool.snapshots() == [f"{other}@snapd-vm-{uuid_of(created)}"]
        await delete(api, created)
    finally:
        unmount(path.parent)


@pytest.mark.parametrize("by", ["another file", "a mount", "another volume"])
async def test_a_path_that_changes_between_check_and_use(
    lab: Lab, connect: Connect, places: Places, pool: Pool, by: str, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    argv = (*FAULTY, "--at", Step.BEGUN, "--do", f"wait:{flag}")
    api = await serve(lab, connect, argv)
    (_, root), (_, elsewhere) = new(pool), new(pool)
    path = raw(root)
    if by == "another volume":
        path = places.folder() / "link"
        path.symlink_to(volume(pool)[1])
        guest = places.guest(DiskSpec(source=f"<source dev='{path}'/>", type="block", format="raw"))
        await places.known(api)
    else:
        guest = await guest_on(api, places, path)
    call = asyncio.create_task(api.create(guest, method_xml=ZFS))
    await asyncio.to_thread(wait_until, "it has come so far", flag.exists, 60)
    if by == "a mount":
        (elsewhere / path.name).write_bytes(path.read_bytes())
        run("mount", "--bind", elsewhere, path.parent)
    elif by == "another volume":
        path.unlink()
        path.symlink_to(volume(pool)[1])
    else:
        path.rename(path.with_suffix(".old"))
        path.write_bytes(b"another")
    flag.unlink()
    await refused(call, "StorageFailed", "MethodNotSupported")
    assert not await api.snapshots_of(guest)
    assert not pool.snapshots()
    if by == "a mount":
        unmount(path.parent)


# -- room ----------------------------------------------------------------------------------------


async def test_room(api: Api, places: Places, pool: Pool) -> None:
    (dataset, root), (_, thick) = new(pool), volume(pool, thin=False, size_mib=300)
    guest = await guest_on(api, places, raw(root), thick)
    plan = await api.plan(guest)
    assert 0 < plan["space_needed"] < plan["space_available"]
    assert "all else that is in the dataset" in " ".join(plan["warnings"])
    run("zpool", "sync", pool.name)  # or what is used says nothing of what was just written
    run("zfs", "set", f"quota={int(pool.get(dataset, 'used')) + (500 << 10)}", dataset)
    await unchanged(api, guest, "NoSpace")
    run("zfs", "set", "quota=none", dataset)
    plan = await api.plan(guest, VDB)  # what it holds is reserved for it once more
    assert plan["space_needed"] > 2 * MIB
    run(
        "zfs", "create", "-o", f"refreservation={plan['space_available'] - MIB}", f"{pool.name}/fat"
    )
    try:
        await unchanged(api, guest, "NoSpace", disk="vdb")
    finally:
        run("zfs", "destroy", f"{pool.name}/fat")
    created = await api.create(guest, VDB)
    await delete(api, created)


# -- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("do", "step"),
    [
        *(("kill", step) for step in (Step.PREPARED, Step.SWITCHED, Step.READ_BACK)),
        ("raise", Step.SWITCHED),
    ],
)
async def test_a_create_that_is_broken_off(
    lab: Lab, connect: Connect, places: Places, pool: Pool, step: Step, do: str
) -> None:
    """A set of a file and a volume: both stand, or nothing is left."""
    api = await serve(lab, connect, (*FAULTY, "--at", step, "--do", do))
    (_, root), (_, device) = new(pool), volume(pool)
    before = pool.everything()
    guest = await guest_on(api, places, raw(root), device)
    with pytest.raises(ApiError):
        await api.create_set(guest, "vda", "vdb")
    if do == "kill":
        api = await again(lab, connect)
    rows = await api.snapshots_of(guest)
    stands = do == "kill" and step in (Step.SWITCHED, Step.READ_BACK)
    assert [row["State"] for row in rows.values()] == ["ready"] * (2 if stands else 0)
    for path in rows:
        source = Created("", await api.backup_source(path))
        wanted = device if source.ours("type") == "block" else guest.disk("vda").path
        assert Path(source.file).exists(), wanted
        await api.call(path, SNAPSHOT, "Delete", "u", 0)
    assert pool.everything() == before


@pytest.mark.parametrize("step", [DeleteStep.BEGUN, DeleteStep.COMMITTED])
async def test_killed_in_a_delete(
    lab: Lab, connect: Connect, places: Places, pool: Pool, step: DeleteStep
) -> None:
    api = await serve(lab, connect, (*FAULTY, "--at", step, "--do", "kill"))
    _, device = volume(pool)
    before = pool.everything()
    guest = await guest_on(api, places, device)
    created = await api.create(guest)
    with pytest.raises(ApiError):
        await delete(api, created)
    api = await again(lab, connect)
    await gone(api, guest)
    assert pool.everything() == before


async def gone(api: Api, guest: Guest) -> None:
    """Wait until a delete that was broken off has come to its end."""
    deadline = asyncio.get_running_loop().time() + 60
    while await api.snapshots_of(guest):
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        *(("file", step) for step in (RevertStep.ARMED, RevertStep.SWITCHED)),
        *(("volume", step) for step in (RevertStep.PREPARED, RevertStep.SWITCHED)),
    ],
)
async def test_killed_in_a_revert(
    lab: Lab, connect: Connect, places: Places, pool: Pool, step: RevertStep, kind: str
) -> None:
    api = await serve(lab, connect, (*FAULTY, "--at", step, "--do", "kill"))
    path = raw(new(pool)[1]) if kind == "file" else volume(pool)[1]
    guest = await guest_on(api, places, path)
    created = await api.create(guest)
    taken = path.read_bytes()
    fill(path)
    later = path.read_bytes()
    with pytest.raises(ApiError):
        await revert(api, created)
    api = await again(lab, connect)
    deadline = asyncio.get_running_loop().time() + 60
    while {r["State"] for r in (await api.snapshots_of(guest)).values()} != {"ready"}:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.1)
    assert path.read_bytes() == (taken if step is RevertStep.SWITCHED else later)
    if kind == "file":
        assert os.listdir(path.parent) == [path.name]
    await revert(api, created)
    assert path.read_bytes() == taken
    await delete(api, created)


async def test_found_again_with_the_database_lost(
    lab: Lab, connect: Connect, api: Api, places: Places, pool: Pool, no_automount: None
) -> None:
    """What we have mounted of them too."""
    (_, root), (vol, device) = new(pool), volume(pool)
    before = pool.everything()
    guest = await guest_on(api, places, raw(root), device)
    await api.create_set(guest, "vda", "vdb", name="lost")
    run("zfs", "snapshot", f"{vol}@snapd-vm-{uuids.uuid4()}")  # without our properties
    lab.daemon.stop()
    shutil.rmtree(lab.daemon.state_dir)
    seen = len(lab.daemon.log)
    lab.daemon.start({}, argv=DAEMON, wait=90)
    end = "looked for our files that no record knows: "
    await asyncio.to_thread(wait_until, "it has looked", lambda: end in lab.daemon.log[seen:], 60)
    lines = [
        line for line in lab.daemon.log[seen:].splitlines() if "this would remove it: " in line
    ]
    assert len(lines) == 2, lines
    for line in lines:
        assert guest.name in line
        assert " snapshot lost " in line
        run("bash", "-c", line.partition("this would remove it: ")[2].partition(" MESSAGE_ID=")[0])
    (theirs,) = pool.snapshots()
    run("zfs", "destroy", theirs)
    assert pool.everything() == before


# -- the rest ------------------------------------------------------------------------------------


async def test_to_choose_starts_no_program(
    api: Api, places: Places, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dataset, root), (vol, device) = new(pool), volume(pool)
    path = raw(root)

    def run_nothing(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(command, "run", run_nothing)
    tag = Tag(str(uuids.uuid4()), "x", str(uuids.uuid4()), "web", 1)
    disks = (
        Disk("vda", "disk", "file", "raw", str(path), f"<source file='{path}'/>", ""),
        Disk("vdb", "disk", "block", "raw", str(device), f"<source dev='{device}'/>", ""),
    )
    domain = Domain(tag.domain_uuid, "web", -1, "shutoff", "test", True, disks)
    for disk, holder in zip(disks, (dataset, vol), strict=True):
        target = zfsclaim.claim(domain, disk, tag, asked=False, named="")
        assert target.data["dataset"] == holder
    assert zfsplace.volume_at(str(device.resolve())) == vol
    assert not zfsdataset.suspended()


async def test_an_encrypted_dataset_and_a_name_with_a_space(
    api: Api, places: Places, pool: Pool, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_bytes(os.urandom(32))
    options = ("encryption=on", "keyformat=raw", f"keylocation=file://{key}")
    _, root = new(pool, *options)
    name = f"v m{uuids.uuid4().hex[:6]}"
    run("zfs", "create", "-s", "-V", "16M", f"{pool.name}/{name}")
    device = Path(f"/dev/zvol/{pool.name}/{name.replace(' ', '+')}")
    await asyncio.to_thread(wait_until, "it is there", device.exists, 30)
    before = pool.everything()
    for path in (raw(root), device):
        guest = await guest_on(api, places, path)
        created = await api.create(guest)
        assert Path(created.file).read_bytes() == path.read_bytes()
        assert (await api.properties(path_of(guest), DOMAIN))["State"] == "shutoff"
        await delete(api, created)
    assert pool.everything() == before


@pytest.mark.parametrize("answers", [True, False])
async def test_a_pool_that_does_not_answer(
    lab: Lab, connect: Connect, places: Places, tmp_path: Path, answers: bool
) -> None:
    """One that only takes its time is waited for. Else the call ends all the same, and what ZFS was
    asked for comes late, and is taken back.
    """
    flag, loop = tmp_path / "flag", lab.block.loop(256)
    api = await serve(lab, connect, (*FAULTY, "--at", Step.ARMED, "--do", f"wait:{flag}"))
    name = f"slow{uuids.uuid4().hex[:6]}"
    sectors = run("blockdev", "--getsz", loop.device).strip()
    run("dmsetup", "create", name, "--table", f"0 {sectors} linear {loop.device} 0")
    slow = make_pool(lab, disk=Path(f"/dev/mapper/{name}"))
    try:
        guest = await guest_on(api, places, raw(new(slow)[1]))
        before = slow.everything()
        call = asyncio.create_task(api.create(guest))
        await asyncio.to_thread(wait_until, "it is to be taken", flag.exists, 60)
        run("dmsetup", "suspend", "--nolockfs", name)
        try:
            flag.unlink()
            if answers:
                await asyncio.sleep(12)
                assert not call.done()
            else:
                await refused(call, "TimedOut")
                error = await refused(api.create(guest), "Busy")
                assert "settled" in error.text
        finally:
            run("dmsetup", "resume", name)
        if answers:
            await delete(api, await call)
        deadline = asyncio.get_running_loop().time() + 90
        while slow.everything() != before:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.2)
        while True:
            try:
                created = await api.create(guest)
                break
            except ApiError as error:
                assert error.name == "Busy"
                assert asyncio.get_running_loop().time() < deadline
        await delete(api, created)
        assert slow.everything() == before
    finally:
        slow.destroy()
        run("dmsetup", "remove", "--retry", name)
        loop.detach()


# -- a driver without QEMU -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [("snapdir=hidden",), ("snapdir=visible",)])
async def test_a_file_in_a_domain_that_qemu_does_not_run(
    lab: Lab, connect: Connect, pool: Pool, options: tuple[str, ...]
) -> None:
    dataset, root = new(pool, *options)
    path = raw(root)
    before, content = pool.everything(), path.read_bytes()
    async with taken_by("zfs", lab, connect, "file", f"<source file='{path}'/>") as created:
        path.write_bytes(b"something else")
        assert Path(created.file).read_bytes() == content
        assert pool.snapshots() == [f"{dataset}@snapd-vm-{uuid_of(created)}"]
    assert pool.everything() == before


@pytest.mark.parametrize("thin", [True, False])
async def test_a_volume_in_a_domain_that_qemu_does_not_run(
    lab: Lab, connect: Connect, pool: Pool, thin: bool
) -> None:
    dataset, device = volume(pool, thin=thin)
    before, content = pool.everything(), device.read_bytes()
    async with taken_by("zfs", lab, connect, "block", f"<source dev='{device}'/>") as created:
        fill(device)
        assert Path(created.file).read_bytes() == content != device.read_bytes()
        assert f"{dataset}@snapd-vm-{uuid_of(created)}" in pool.snapshots()
    assert pool.everything() == before
