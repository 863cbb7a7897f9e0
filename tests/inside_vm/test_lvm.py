"""Method lvm on real volumes, with domains that are off: taken, shown, refused, warned of."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_vm.methods.recent import JUST_NOW_S
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.lab.volumegroup import MIB, Group, fill, read
from tests.real.api import SNAPSHOT, Api, Created
from tests.real.conftest import Connect, api, connect, daemon, lab
from tests.real.other_driver import taken_by
from tests.real.places import Places, refused, with_image
from tests.real.test_delete import delete
from tests.real.test_revert import places, revert

__all__ = ["api", "connect", "daemon", "lab", "places"]

LVM = "<diskSnapshot method='lvm'/>"


def on(device: Path | str, size: str = "") -> str:
    """The XML that names a device."""
    return f"<diskSnapshot method='lvm'><device path='{device}'/>{size}</diskSnapshot>"


@pytest.fixture(scope="module")
def group(lab: Lab) -> Iterator[Group]:
    """One for all tests, with a volume of each kind, and a file system on a third."""
    loop = lab.block.loop(1200)
    made = Group(loop.device)
    made.pool()
    made.linear("thick")
    made.thin("thin")
    yield made
    made.remove()
    loop.detach()


@pytest.fixture(autouse=True)
def nothing_left(group: Group) -> Iterator[None]:
    """Take away what a test that failed has left, for the next one's sake."""
    yield
    group.remove_volumes("thick", "thin", "pool")


@pytest.fixture(params=["thick", "thin"])
def device(group: Group, request: pytest.FixtureRequest) -> Path:
    """A volume of each kind, with something in it."""
    found = group.device(request.param)
    fill(found, 8)
    return found


async def guest_on(api: Api, places: Places, device: Path, image_format: str = "raw") -> Guest:
    """A domain that is off, whose disk is the device as it is."""
    spec = DiskSpec(
        format=image_format,  # type: ignore[arg-type]
        source=f"<source dev='{device}'/>",
        type="block",
        filesystem=None,
    )
    guest = places.guest(spec)
    await places.known(api)
    return guest


# -- taken -----------------------------------------------------------------------------------------


async def test_a_volume_is_taken_by_default(
    api: Api, places: Places, group: Group, device: Path
) -> None:
    before, was = group.contents(), read(device)
    guest = await guest_on(api, places, device)
    (row,) = await api.disks(guest)
    assert (row["method"], row["reason"]) == ("lvm", "the default for a raw logical volume")
    plan = await api.plan(guest)
    created = await api.create(guest, name="nightly")
    uuid = created.snapshot.rpartition("/_")[2].replace("_", "-")
    name = f"snapd-vm-{uuid}"
    assert created.modified_disk == ""
    assert created.source.get("dev") == f"/dev/{group.name}/{name}"
    assert created.ours("type") == "block"
    assert (created.ours("format"), created.ours("consistency")) == ("raw", "offline")
    assert plan["backup_source"].replace("snapd-vm-", "") != ""
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert (told["Size"], told["Format"], told["State"]) == (32 * MIB, "raw", "ready")
    seen = group.volumes()[name]
    assert seen["lv_attr"][1] == "r"
    assert seen["origin"] == device.name
    tags = seen["lv_tags"].split(",")
    assert {f"snapd-vm.snapshot={uuid}", "snapd-vm.name=nightly"} <= set(tags)
    assert f"snapd-vm.domain={guest.name}" in tags
    fill(device, 4)
    assert read(created.file) == was != read(device)
    with pytest.raises(OSError, match=r"not permitted|Read-only|denied"):
        fill(Path(created.file), 1)
    now = read(device)
    await delete(api, created)
    assert group.contents() == before
    assert read(device) == now


async def test_several_stand_beside_each_other(
    api: Api, places: Places, group: Group, device: Path
) -> None:
    guest, before = await guest_on(api, places, device), group.contents()
    made, sums = [], []
    for number in range(3):
        fill(device, 1, number)
        sums.append(read(device))
        made.append(await api.create(guest))
    await delete(api, made[1])
    assert [read(made[0].file), read(made[2].file)] == [sums[0], sums[2]]
    for created in (made[0], made[2]):
        await delete(api, created)
    assert group.contents() == before


async def test_a_qcow2_image_on_a_volume(
    api: Api, places: Places, group: Group, device: Path, tmp_path: Path
) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", device, "16M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", device)
    guest = await guest_on(api, places, device, "qcow2")
    (row,) = await api.disks(guest)
    assert row["method"] != "lvm"
    created = await api.create(guest, method_xml=LVM)
    assert created.ours("format") == "qcow2"
    assert (await api.properties(created.snapshot, SNAPSHOT))["Size"] == 16 * MIB
    run("qemu-io", "-f", "qcow2", "-c", "write -P 8 0 1M", device)
    run("qemu-img", "check", "-f", "qcow2", created.file)
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 7 0 1M", created.file)
    await delete(api, created)
    base = tmp_path / "base"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "16M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, device)
    error = await refused(api.create(guest, method_xml=LVM), "MethodNotSupported")
    assert "backing file" in error.text
    await refused(api.plan(guest, method_xml=on(device)), "NotUnderDisk")


async def test_a_set_is_all_or_nothing(api: Api, places: Places, group: Group) -> None:
    specs = [
        DiskSpec(
            format="raw",
            source=f"<source dev='{group.device(name)}'/>",
            type="block",
            filesystem=None,
        )
        for name in ("thick", "thin")
    ]
    guest, before = places.guest(*specs), group.contents()
    await places.known(api)
    rows = await api.create_set(guest, "vda", "vdb")
    assert len({created.file for _, created in rows}) == 2
    assert len(group.contents()) == len(before) + 2
    for _, created in rows:
        await delete(api, created)
    # The second fails when the first is taken: nothing of it is left.
    name = f"{group.name}/full"
    free = run("vgs", "--noheadings", "--units", "m", "--nosuffix", "-o", "vg_free", group.name)
    run("lvcreate", "-q", "-y", "-Wn", "-n", "full", "-L", f"{int(float(free)) - 8}M", group.name)
    await refused(api.create_set(guest, "vda", "vdb"), "NoSpace")
    run("lvremove", "-q", "-y", name)
    assert group.contents() == before


# -- sizes and room --------------------------------------------------------------------------------


async def test_how_large_it_is_and_no_room(
    daemon: Lab, api: Api, places: Places, group: Group, connect: Connect
) -> None:
    group.linear("large", 400)
    guest = await guest_on(api, places, group.device("large"))

    async def size(method_xml: str) -> int:
        created = await api.create(guest, method_xml=method_xml)
        name = created.file.rpartition("/")[2]
        words = ("lvs", "--noheadings", "--units", "m", "--nosuffix", "-o", "lv_size")
        mib = int(float(run(*words, f"{group.name}/{name}")))
        await delete(api, created)
        return mib

    assert await size(on("/dev/snapd-lab/large", "<size unit='MiB'>10</size>")) == 12
    plan = await api.plan(
        guest, method_xml="<diskSnapshot method='lvm'><size>9</size></diskSnapshot>"
    )
    assert plan["space_needed"] == 4 * MIB
    assert any("is lost when that is used up" in text for text in plan["warnings"])
    before = group.contents()
    run("lvcreate", "-q", "-y", "-Wn", "-n", "filler", "-L", "400M", group.name)
    error = await refused(api.create(guest), "NoSpace")
    assert "bytes free" in error.text
    await refused(api.plan(guest), "NoSpace")
    run("lvremove", "-q", "-y", f"{group.name}/filler")
    assert group.contents() == before
    daemon.daemon.stop()
    daemon.daemon.start({"lvm": {"snapshot_percent": 10, "snapshot_min_mib": 8}})
    api = await connect()
    assert await size("") == 40


async def test_a_thick_snapshot_that_fills_is_warned_of_and_then_failed(
    daemon: Lab, api: Api, places: Places, group: Group
) -> None:
    device = group.device("thick")
    guest = await guest_on(api, places, device)
    small = "<diskSnapshot method='lvm'><size unit='MiB'>8</size></diskSnapshot>"
    await api.client.listen()
    created = await api.create(guest, method_xml=small)
    fill(device, 7)
    await until(api, "filling", created)
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "ready"
    fill(device, 8, 8)
    await asyncio.sleep(JUST_NOW_S)  # so old may be what the daemon knows of it
    await refused(api.call(created.snapshot, SNAPSHOT, "GetBackupSource"), "InvalidState")
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "failed"
    await until(api, "overflowed", created)
    assert "has overflowed" in daemon.daemon.log
    await delete(api, created)
    assert not [name for name in group.volumes() if name.startswith("snapd-vm-")]


async def test_one_that_fills_at_once_is_failed_before_anybody_asks(
    daemon: Lab, api: Api, places: Places, group: Group
) -> None:
    device = group.device("thick")
    guest = await guest_on(api, places, device)
    small = "<diskSnapshot method='lvm'><size unit='MiB'>8</size></diskSnapshot>"
    await api.client.listen()
    created = await api.create(guest, method_xml=small)
    fill(device, 16)
    began = asyncio.get_running_loop().time()
    await until(api, "overflowed", created)
    assert asyncio.get_running_loop().time() - began < 28  # looked at it is every 30 s
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "failed"
    await asyncio.sleep(15)
    codes = [one.body[0] for one in api.client.signals if one.member == "Warning"]
    assert codes.count("overflowed") == 1
    await delete(api, created)


async def until(api: Api, code: str, created: Created) -> None:
    """Wait for a Warning."""
    deadline = asyncio.get_running_loop().time() + 60
    while True:
        for signal in api.client.signals:
            heard = signal.member, signal.path, signal.body[:1]
            if heard == ("Warning", created.snapshot, [code]):
                assert "/" not in signal.body[1]
                return
        assert asyncio.get_running_loop().time() < deadline, api.client.signals
        await asyncio.sleep(0.1)


async def test_a_pool_without_room(api: Api, places: Places, group: Group) -> None:
    run("lvcreate", "-q", "-y", "--type", "thin-pool", "-n", "tiny", "-L", "20M", group.name)
    device = group.thin("low", 32, "tiny")
    try:
        guest = await guest_on(api, places, device)
        (warning,) = (await api.plan(guest))["warnings"] or ["none"]
        fill(device, 6)
        error = await refused(api.create(guest), "NoSpace")
        assert "thin pool" in error.text
        assert warning == "none"
    finally:
        run("lvremove", "-q", "-y", "-f", f"{group.name}/tiny")


# -- who uses it, and what was changed behind its back --------------------------------------------


async def test_a_delete_is_refused_while_it_is_read(
    api: Api, places: Places, group: Group, device: Path
) -> None:
    guest = await guest_on(api, places, device)
    created = await api.create(guest)
    with open(created.file, "rb"):
        pass  # by the test itself it would be seen too, if it went on
    held = run_in_background("sleep", "60", created.file)
    try:
        error = await refused(delete(api, created), "Busy")
        assert "sleep" in error.text
    finally:
        held.kill()
        held.wait()
    loop = run("losetup", "--find", "--show", "--read-only", created.file).strip()
    try:
        await refused(delete(api, created), "Busy")
    finally:
        run("losetup", "--detach", loop)
    await delete(api, created)


def run_in_background(program: str, argument: str, stdin: str):  # type: ignore[no-untyped-def]
    import subprocess

    with open(stdin, "rb") as file:
        return subprocess.Popen([program, argument], stdin=file)


async def test_what_others_do_to_it_is_seen(
    api: Api, places: Places, group: Group, device: Path
) -> None:
    guest = await guest_on(api, places, device)
    gone, changed = await api.create(guest), await api.create(guest)
    run("lvremove", "-q", "-y", gone.file)
    await refused(api.call(gone.snapshot, SNAPSHOT, "GetBackupSource"), "StorageFailed")
    assert (await api.properties(gone.snapshot, SNAPSHOT))["State"] == "missing"
    run("lvchange", "-q", "-y", "-prw", changed.file)
    await refused(api.call(changed.snapshot, SNAPSHOT, "GetBackupSource"), "InvalidState")
    assert (await api.properties(changed.snapshot, SNAPSHOT))["State"] == "failed"
    for created in (gone, changed):
        await delete(api, created)
    assert not [name for name in group.volumes() if name.startswith("snapd-vm-")]


async def test_one_that_is_not_active_is_shown_again(
    api: Api, places: Places, group: Group
) -> None:
    device = group.device("thin")
    guest = await guest_on(api, places, device)
    created = await api.create(guest)
    was = read(created.file)
    run("lvchange", "-q", "-an", created.file)
    assert not os.path.exists(created.file)
    assert await api.backup_source(created.snapshot) == created.backup_source
    assert read(created.file) == was
    await delete(api, created)


# -- reverted --------------------------------------------------------------------------------------


async def test_a_revert_leaves_all_snapshots(
    api: Api, places: Places, group: Group, device: Path
) -> None:
    guest = await guest_on(api, places, device)
    run("lvchange", "-q", "--addtag", "somebody", device)
    before = group.contents()
    made, sums = [], []
    for number in range(3):
        fill(device, 2, number)
        sums.append(read(device))
        made.append(await api.create(guest))
    fill(device, 3, 20)
    for number in (1, 0, 2, 1):
        await revert(api, made[number])
        assert read(device) == sums[number]
        assert [read(created.file) for created in made] == sums
        states = await api.snapshots_of(guest)
        assert [row["State"] for row in states.values()] == ["ready"] * 3
        fill(device, 1, 25)
    assert "somebody" in group.volumes()[device.name]["lv_tags"]
    assert "revert" not in group.volumes()[device.name]["lv_tags"]
    now = read(device)
    more = await api.create(guest)
    assert read(more.file) == now
    for created in (*made, more):
        await delete(api, created)
    assert [line.split()[:2] for line in group.contents()] == [line.split()[:2] for line in before]
    assert read(device) == now
    run("lvchange", "-q", "--deltag", "somebody", device)


async def test_a_revert_while_the_volume_is_in_use(
    api: Api, places: Places, group: Group, device: Path
) -> None:
    guest = await guest_on(api, places, device)
    created = await api.create(guest)
    held = run_in_background("sleep", "60", str(device))
    try:
        error = await refused(revert(api, created), "Busy")
        assert "sleep" in error.text
    finally:
        held.kill()
        held.wait()
    await revert(api, created)
    await delete(api, created)


async def test_newer_thick_snapshots_must_have_room(api: Api, places: Places, group: Group) -> None:
    device = group.device("thick")
    guest = await guest_on(api, places, device)
    old = await api.create(guest)
    fill(device, 20)
    small = "<diskSnapshot method='lvm'><size unit='MiB'>8</size></diskSnapshot>"
    new = await api.create(guest, method_xml=small)
    error = await refused(revert(api, old), "NoSpace")
    assert new.file.rpartition("/")[2] in error.text
    await delete(api, new)
    await revert(api, old)
    await delete(api, old)


# -- a file on a volume's file system --------------------------------------------------------------


class Files:
    """A file system on a volume, mounted, with an image in it."""

    def __init__(self, lab: Lab, group: Group, filesystem: str) -> None:
        self.device = group.linear(f"fs-{filesystem}", 320 if filesystem != "ext4" else 64)
        self.point = lab.folder(f"on-{filesystem}")
        run(
            *{"ext4": ("mkfs.ext4", "-q"), "xfs": ("mkfs.xfs", "-q", "-f")}.get(
                filesystem, (f"mkfs.{filesystem}", "-q", "-f")
            ),
            self.device,
        )
        run("mount", "-t", filesystem, self.device, self.point)
        (self.point / "vm").mkdir()
        self.image = self.point / "vm" / "disk.raw"
        self.image.write_bytes(os.urandom(4 * MIB))

    def unmount(self) -> None:
        run("umount", "-R", self.point)


@pytest.fixture(params=["ext4", "xfs"])
def files(lab: Lab, group: Group, request: pytest.FixtureRequest) -> Iterator[Files]:
    """Of each kind."""
    made = Files(lab, group, request.param)
    yield made
    made.unmount()


def mount_of(path: Path | str) -> str:
    """The options of the mount that a path is in."""
    return run("findmnt", "-n", "-o", "OPTIONS,SOURCE,TARGET", "-T", path).strip()


async def test_a_file_is_read_in_the_mounted_snapshot(
    daemon: Lab, api: Api, places: Places, group: Group, files: Files, connect: Connect
) -> None:
    before, was = group.contents(), files.image.read_bytes()
    guest = places.guest(with_image(files.image, "raw"))
    await places.known(api)
    await refused(api.create(guest, method_xml=LVM), "MethodNotSupported")
    created = await api.create(guest, method_xml=on(files.device), name="file")
    assert created.ours("type") == "file"
    assert created.file.endswith("/vm/disk.raw")
    assert read(created.file) == was
    options = mount_of(created.file)
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(options.split()[0].split(","))
    place = Path(created.file).parents[1]
    assert place.is_relative_to(daemon.daemon.state_dir)
    assert (place.parent.stat().st_uid, place.parent.stat().st_mode & 0o777) == (0, 0o700)
    files.image.write_bytes(b"new")
    assert read(created.file) == was
    # as after the host's next start
    daemon.daemon.stop()
    run("umount", place)
    daemon.daemon.start()
    api = await connect()
    assert await api.backup_source(created.snapshot) == created.backup_source
    assert read(created.file) == was
    held = run_in_background("sleep", "60", created.file)
    try:
        await refused(delete(api, created), "Busy")
    finally:
        held.kill()
        held.wait()
    await revert(api, created)
    assert files.image.read_bytes() == was
    assert sorted(os.listdir(files.image.parent)) == ["disk.raw"]
    await revert(api, created)
    await delete(api, created)
    assert group.contents() == before
    assert not place.exists()
    assert files.image.read_bytes() == was


async def test_a_chain_must_be_in_the_file_system(
    api: Api, places: Places, files: Files, lab: Lab
) -> None:
    top, base = files.point / "vm" / "top.qcow2", files.point / "base.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 0 64k", base)
    words = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b")
    run(*words, "../base.qcow2", "top.qcow2", cwd=top.parent)
    guest = places.guest(with_image(top))
    await places.known(api)
    created = await api.create(guest, method_xml=on(files.device))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 4 0 64k", base)
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 3 0 64k", created.file)
    await delete(api, created)
    elsewhere = lab.folder("elsewhere") / "base.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", elsewhere, "1M")
    for name in (str(elsewhere), os.path.relpath(elsewhere, top.parent)):
        top.unlink()
        run(*words, name, "top.qcow2", cwd=top.parent)
        error = await refused(
            api.create(guest, method_xml=on(files.device)), "NotUnderDisk", "MethodNotSupported"
        )
        assert error.text


async def test_btrfs_on_a_volume_is_refused(
    api: Api, places: Places, group: Group, lab: Lab
) -> None:
    files = Files(lab, group, "btrfs")
    try:
        guest = places.guest(with_image(files.image, "raw"))
        await places.known(api)
        error = await refused(api.create(guest, method_xml=on(files.device)), "MethodNotSupported")
        assert "btrfs" in error.text
    finally:
        files.unmount()


# -- tricked ---------------------------------------------------------------------------------------


async def test_no_other_name_for_the_device_is_taken(
    api: Api, places: Places, group: Group, lab: Lab, tmp_path: Path
) -> None:
    device, other = group.device("thick"), group.linear("other", 8)
    guest = await guest_on(api, places, device)
    guest_on_other = await guest_on(api, places, other)
    link = tmp_path / "link"
    link.symlink_to(device)
    numbers = device.stat().st_rdev
    loop = run("losetup", "--find", "--show", "--read-only", device).strip()
    bound = lab.folder("bound") / "device"
    bound.touch()
    run("mount", "--bind", os.path.realpath(device), bound)
    try:
        for name in (
            other,
            link,
            os.path.realpath(device) if "dm-" in os.path.realpath(device) else "/dev/dm-0",
            f"/dev/block/{os.major(numbers)}:{os.minor(numbers)}",
            f"/proc/self/root{device}",
            f"/proc/{os.getpid()}/root{device}",
            loop,
            bound,
            "/dev/mapper/snapd-lab-thick",
        ):
            await refused(api.create(guest, method_xml=on(name)), "NotUnderDisk")
            await refused(api.plan(guest, method_xml=on(name)), "NotUnderDisk")
        for name in (f"/dev/snapd-lab/../snapd-lab/{device.name}", f"{device}/.", "/dev/x/./y"):
            await refused(api.create(guest, method_xml=on(name)), "NotUnderDisk", "InvalidXML")
        await refused(api.create(guest_on_other, method_xml=on(device)), "NotUnderDisk")
        for name in (device, "/dev/mapper/snapd--lab-thick"):
            assert (await api.plan(guest, method_xml=on(name)))["method"] == "lvm"
    finally:
        run("umount", bound)
        run("losetup", "--detach", loop)


async def test_a_bind_mount_over_the_image_is_another_layer(
    api: Api, places: Places, group: Group, files: Files, lab: Lab
) -> None:
    """The path lies in the volume's file system; the file behind it does not."""
    guest = places.guest(with_image(files.image, "raw"))
    await places.known(api)
    outside = lab.folder("outside") / "disk.raw"
    outside.write_bytes(b"x" * MIB)
    run("mount", "--bind", outside, files.image)
    try:
        await refused(
            api.create(guest, method_xml=on(files.device)), "NotUnderDisk", "MethodNotSupported"
        )
    finally:
        run("umount", files.image)
    outside.unlink()


# -- a driver without QEMU -------------------------------------------------------------------------


async def test_a_domain_that_qemu_does_not_run(
    lab: Lab, connect: Connect, group: Group, device: Path
) -> None:
    before, content = group.contents(), read(device)
    async with taken_by("lvm", lab, connect, "block", f"<source dev='{device}'/>") as created:
        fill(device, 4)
        assert read(created.file) == content != read(device)
    assert group.contents() == before


async def test_a_file_on_a_volume_in_a_domain_that_qemu_does_not_run(
    lab: Lab, connect: Connect, files: Files
) -> None:
    content = files.image.read_bytes()
    source = f"<source file='{files.image}'/>"
    method = on(files.device)
    async with taken_by("lvm", lab, connect, "file", source, method) as created:
        files.image.write_bytes(b"something else")
        assert Path(created.file).read_bytes() == content
