"""Method btrfs: the subvolume found from the disk's file, the place of snapshots, and who lies.

Domains that are only defined; a snapshot of their disks takes milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import uuid as uuids
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_vm.engine.journal import Step
from tests.lab.blockdev import Mounted
from tests.lab.deadline import wait_until
from tests.lab.lab import Lab
from tests.lab.mounts import unmount
from tests.lab.program import run
from tests.real.api import Api
from tests.real.conftest import Connect
from tests.real.places import Places, image, refused, unchanged, with_image
from tests.real.test_crash import FAULTY, PLACE, faulty
from tests.real.test_delete import delete
from tests.real.test_reflink_files import guest_on, raw
from tests.real.test_revert import places

__all__ = ["faulty", "places"]

BTRFS = "<diskSnapshot method='btrfs'/>"
MIB = 1 << 20


@pytest.fixture(scope="module")
def btrfs(lab: Lab) -> Iterator[Mounted]:
    """The top of a file system."""
    made = lab.block.mounted("btrfs", 600)
    yield made
    made.unmount()


@pytest.fixture
def vm(btrfs: Mounted) -> Path:
    """A subvolume of the test's own."""
    path = btrfs.path / uuids.uuid4().hex
    run("btrfs", "-q", "subvolume", "create", path)
    return path


@pytest.fixture
def point(lab: Lab) -> Iterator[Path]:
    """A folder to mount something on."""
    path = lab.folder(f"point{uuids.uuid4().hex}")
    yield path
    while os.path.ismount(path):
        unmount(path)


def subvolumes(btrfs: Mounted) -> list[str]:
    """All of the file system."""
    listed = run("btrfs", "subvolume", "list", btrfs.path).splitlines()
    return sorted(line.partition(" path ")[2] for line in listed)


def named(path: Path | str) -> str:
    """The XML that names a subvolume."""
    return f"<diskSnapshot method='btrfs'><subvolume path='{path}'/></diskSnapshot>"


# -- which subvolume -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    ["top", "nested", "subvol=", "symlink", "bind of a folder", "bind of the file", "bind within"],
)
async def test_the_subvolume_is_found_from_the_file(
    api: Api, places: Places, btrfs: Mounted, vm: Path, point: Path, how: str
) -> None:
    before, root = subvolumes(btrfs), vm
    if how == "top":
        path = raw(btrfs.path)
        root = btrfs.path
    elif how == "nested":
        root = vm / "inner"
        run("btrfs", "-q", "subvolume", "create", root)
        before = subvolumes(btrfs)
        path = raw(root)
    elif how == "subvol=":
        run("mount", "-o", f"subvol={vm.name}", btrfs.loop.device, point)
        root, path = point, raw(point)
    elif how == "symlink":
        path = places.folder() / "link.raw"
        path.symlink_to(raw(vm))
    elif how == "bind of a folder":
        inner = raw(vm)
        run("mount", "--bind", inner.parent, point)
        path = point / inner.name
    elif how == "bind of the file":
        path = places.folder() / "file.raw"
        path.touch()
        run("mount", "--bind", raw(vm), path)
    else:  # what lies around the mount looks as if it were around the file
        inner = raw(vm)
        around = vm / "around"
        (around / "on").mkdir(parents=True)
        run("mount", "--bind", inner.parent, around / "on")
        path = around / "on" / inner.name
    (root / "beside").write_text("is held too")
    guest = await guest_on(api, places, path)
    (row,) = await api.disks(guest)
    assert (row["method"], row["reason"]) == ("btrfs", "the default for a raw file on btrfs")
    content = path.read_bytes()
    created = await api.create(guest)
    path.write_bytes(b"something else")
    with open(created.file, "rb") as file:
        assert file.read() == content
    assert created.file.startswith(f"{root}/{PLACE}/")
    assert len(subvolumes(btrfs)) == len(before) + 1
    snapshot = next(p for p in Path(created.file).parents if p.name.startswith("snapd-vm-"))
    assert (snapshot / "beside").read_text() == "is held too"
    assert (os.stat(root / PLACE).st_mode & 0o777, os.stat(root / PLACE).st_uid) == (0o700, 0)
    await delete(api, created)
    assert subvolumes(btrfs) == before
    assert not (root / PLACE).exists()
    if how.startswith("bind of the file"):
        unmount(path)
    elif how == "bind within":
        unmount(path.parent)


async def test_a_subvolume_whose_root_no_mount_shows(
    api: Api, lab: Lab, places: Places, point: Path
) -> None:
    made = lab.block.mounted("btrfs", 200)
    try:
        vm = made.path / "vm"
        run("btrfs", "-q", "subvolume", "create", vm)
        path = raw(vm)
        run("mount", "--bind", path.parent, point)
        unmount(made.path)
        guest = await guest_on(api, places, point / path.name)
        assert [row["method"] for row in await api.disks(guest)] == ["reflink"]
        error = await unchanged(api, guest, "MethodNotSupported", method_xml=BTRFS)
        assert "mount it" in error.text
        run("mount", "-t", "btrfs", made.loop.device, made.path)
        created = await api.create(guest, method_xml=BTRFS)  # by way of the other mount
        assert created.file.startswith(f"{vm}/")
        await delete(api, created)
        unmount(point)
    finally:
        made.unmount()


async def test_other_file_systems_are_not_for_it(api: Api, lab: Lab, places: Places) -> None:
    made = lab.block.mounted("xfs", 300)
    try:
        guest = await guest_on(api, places, raw(made.path))
        assert [row["method"] for row in await api.disks(guest)] == ["reflink"]
        await unchanged(api, guest, "MethodNotSupported", method_xml=BTRFS)
        await unchanged(api, guest, "NotUnderDisk", method_xml=named(made.path))
    finally:
        made.unmount()


# -- where snapshots are kept --------------------------------------------------------------------


async def test_the_place_of_snapshots_is_configured(
    lab: Lab, connect: Connect, faulty: Lab, places: Places, btrfs: Mounted, vm: Path
) -> None:
    place, elsewhere = btrfs.path / "kept", lab.folder("elsewhere")
    place.mkdir(exist_ok=True)
    faulty.daemon.start({"btrfs": {"snapshot_dir": str(place)}}, argv=None)
    api = await connect()
    guest = await guest_on(api, places, raw(vm))
    other = await guest_on(api, places, raw(btrfs.path))
    one, two = await api.create(guest), await api.create(other)
    for created in (one, two):
        assert created.file.startswith(f"{place}/")
    for created in (one, two):
        await delete(api, created)
    assert not list(place.iterdir())
    place.chmod(0o777)
    error = await unchanged(api, guest, "MethodNotSupported", method_xml=BTRFS)
    assert "btrfs.snapshot_dir" in error.text
    assert [row["method"] for row in await api.disks(guest)] == ["reflink"]
    place.chmod(0o755)
    faulty.daemon.stop()
    faulty.daemon.start({"btrfs": {"snapshot_dir": str(elsewhere)}}, argv=None)
    api = await connect()
    created = await api.create(guest)  # of another file system
    assert created.file.startswith(f"{vm}/{PLACE}/")
    await delete(api, created)
    faulty.daemon.stop()
    faulty.daemon.start({"btrfs": {"snapshot_dir": f"{elsewhere}/nowhere"}}, argv=None)
    api = await connect()
    error = await unchanged(api, guest, "StorageFailed", method_xml=BTRFS)
    assert "btrfs.snapshot_dir" in error.text


@pytest.mark.parametrize("whose", ["QEMU's", "everybody's"])
async def test_a_subvolume_whose_root_others_can_write_to(
    api: Api, places: Places, vm: Path, whose: str
) -> None:
    path = raw(vm)
    if whose == "QEMU's":
        os.chown(vm, 12345, 0)
    else:
        vm.chmod(0o777)
    guest = await guest_on(api, places, path)
    error = await unchanged(api, guest, "MethodNotSupported", method_xml=BTRFS)
    assert "btrfs.snapshot_dir" in error.text
    assert not (vm / PLACE).exists()


async def test_snapshots_of_snapshots_are_not_taken(
    api: Api, places: Places, btrfs: Mounted, vm: Path
) -> None:
    """What is in the place of the first is no part of the second, and no stray of ours."""
    guest = await guest_on(api, places, raw(vm))
    one = await api.create(guest)
    two = await api.create(guest)
    snapshot = next(p for p in Path(two.file).parents if p.name.startswith("snapd-vm-"))
    (stub,) = (p for p in (snapshot / PLACE).glob("*/*") if one.file.split("/")[-3] in str(p))
    assert not list(stub.iterdir())
    for created in (two, one):
        await delete(api, created)
    assert not (vm / PLACE).exists()


# -- tricks --------------------------------------------------------------------------------------


async def test_a_subvolume_that_is_named(
    api: Api, lab: Lab, places: Places, btrfs: Mounted, vm: Path, point: Path
) -> None:
    path = raw(vm)
    other, secret = btrfs.path / f"{vm.name}-other", raw(btrfs.path)
    run("btrfs", "-q", "subvolume", "create", other)
    link = lab.folder("links") / vm.name
    link.symlink_to(vm)
    guest = await guest_on(api, places, path)
    before = subvolumes(btrfs)
    (vm / "folder").mkdir()
    run("mount", "--bind", other, point)
    for wrong in (
        *(link, other, btrfs.path, secret.parent, path, path.parent, vm / "folder", point),
        *(f"/proc/self/root{vm}", f"/proc/1/root{vm}", "/", "/nowhere", "/dev/null", "/proc/self"),
        *(f"/proc/self/cwd{vm}", f"{link}/folder", "/etc/shadow"),
    ):
        error = await unchanged(api, guest, "NotUnderDisk", method_xml=named(wrong))
        assert str(vm) in error.text
    for odd in (f"{other}/../{vm.name}", f"{vm}/", f"{vm}/.", f"/{vm}", "vm", ""):
        await unchanged(api, guest, "InvalidXML", method_xml=named(odd))
    unmount(point)
    run("mount", "--bind", vm, point)
    assert subvolumes(btrfs) == before
    for right in (vm, point):  # it is the same one, and is read where we know it
        created = await api.create(guest, method_xml=named(right))
        assert created.file.startswith(f"{vm}/{PLACE}/")
        assert Path(created.file).read_bytes() == path.read_bytes()
        await delete(api, created)
    assert subvolumes(btrfs) == before


@pytest.mark.parametrize("step", [Step.BEGUN, Step.ARMED])
@pytest.mark.parametrize(
    "by", ["another file", "a symlink", "a folder's symlink", "a fifo", "move"]
)
async def test_a_path_that_changes_between_check_and_use(
    connect: Connect,
    faulty: Lab,
    places: Places,
    btrfs: Mounted,
    vm: Path,
    by: str,
    step: Step,
    tmp_path: Path,
) -> None:
    flag = tmp_path / "flag"
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", f"wait:{flag}"))
    api = await connect()
    path, secret = raw(vm), raw(vm)
    guest = await guest_on(api, places, path)
    before = subvolumes(btrfs)
    call = asyncio.create_task(api.create(guest, method_xml=BTRFS))
    await asyncio.to_thread(wait_until, "it has come so far", flag.exists, 20)
    if by == "a folder's symlink":
        path.parent.rename(path.parent.with_suffix(".old"))
        path.parent.symlink_to(secret.parent)
    else:
        path.rename(path.with_suffix(".old"))
        if by == "another file":
            path.write_bytes(secret.read_bytes())
        elif by == "a symlink":
            path.symlink_to(secret)
        elif by == "a fifo":
            os.mkfifo(path)
    flag.unlink()
    await refused(call, "StorageFailed", "MethodNotSupported")
    assert not await api.snapshots_of(guest)
    assert subvolumes(btrfs) == before
    assert not (vm / PLACE).exists()


@pytest.mark.parametrize("what", ["subvolume", "place"])
async def test_a_place_that_changes_between_check_and_use(
    connect: Connect,
    faulty: Lab,
    places: Places,
    btrfs: Mounted,
    vm: Path,
    what: str,
    tmp_path: Path,
) -> None:
    flag = tmp_path / "flag"
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.PREPARED, "--do", f"wait:{flag}"))
    api = await connect()
    path = raw(vm)
    guest = await guest_on(api, places, path)
    before = subvolumes(btrfs)
    secret = tmp_path / "secret"
    secret.mkdir()
    call = asyncio.create_task(api.create(guest, method_xml=BTRFS))
    await asyncio.to_thread(wait_until, "it has come so far", flag.exists, 20)
    if what == "subvolume":  # with a copy of all that is in it
        vm.rename(vm.with_suffix(".old"))
        run("btrfs", "-q", "subvolume", "snapshot", vm.with_suffix(".old"), vm)
        before = subvolumes(btrfs)
    else:
        (vm / PLACE).symlink_to(secret)
    flag.unlink()
    await refused(call, "StorageFailed", "NameInUse", "MethodNotSupported")
    assert not await api.snapshots_of(guest)
    assert subvolumes(btrfs) == before
    assert not list(secret.iterdir())


# -- what it says in time ------------------------------------------------------------------------


async def test_plan_warns_of_what_is_held_and_of_files_written_in_place(
    api: Api, places: Places, vm: Path
) -> None:
    guest = await guest_on(api, places, raw(vm))
    (held,) = (await api.plan(guest))["warnings"]
    assert "all else that is in the subvolume" in held
    folder = vm / "nocow"
    folder.mkdir()
    run("chattr", "+C", folder)
    (folder / "disk.raw").write_bytes(os.urandom(MIB))
    guest = await guest_on(api, places, folder / "disk.raw")
    (place, _) = (await api.plan(guest))["warnings"]
    assert "chattr +C" in place
    created = await api.create(guest)
    content = Path(created.file).read_bytes()
    with (folder / "disk.raw").open("r+b") as file:
        file.write(b"written in place")
        os.fsync(file.fileno())
    assert Path(created.file).read_bytes() == content
    await delete(api, created)


async def test_a_swap_file_in_the_subvolume(
    api: Api, places: Places, btrfs: Mounted, vm: Path
) -> None:
    swap = vm / "swap"
    run("btrfs", "filesystem", "mkswapfile", "-s", "8m", swap)
    run("swapon", swap)
    try:
        guest = await guest_on(api, places, raw(vm))
        before = subvolumes(btrfs)
        error = await refused(api.create(guest, method_xml=BTRFS), "MethodNotSupported")
        assert "swap file" in error.text
        assert subvolumes(btrfs) == before
        assert not (vm / PLACE).exists()
    finally:
        run("swapoff", swap)


async def test_a_format_that_is_not_raw_is_left_to_qemu(api: Api, places: Places, vm: Path) -> None:
    guest = places.guest(with_image(image(raw(vm).with_suffix(".qcow2"))))
    await places.known(api)
    assert [row["method"] for row in await api.disks(guest)] == ["qemu"]
