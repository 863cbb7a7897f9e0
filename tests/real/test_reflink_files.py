"""Method reflink and the files around it: which can be cloned, whose they are, what is in the way.

Domains that are only defined; a clone of their disks takes milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import struct
import subprocess
import sys
import uuid as uuids
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from snapd_vm import storage
from snapd_vm.engine.journal import Step
from tests.lab.blockdev import Mounted
from tests.lab.deadline import wait_until
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real.api import DOMAIN, SNAPSHOT, VDA, Api, Created, path_of
from tests.real.conftest import Connect
from tests.real.other_driver import taken_by
from tests.real.places import CONFIG, Places, image, refused, unchanged, with_image
from tests.real.test_crash import FAULTY, faulty, unnamed
from tests.real.test_whose_file import forge

__all__ = ["faulty"]

REFLINK = "<diskSnapshot method='reflink'/>"
QEMU = "<diskSnapshot method='qemu'/>"
MIB = 1 << 20


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def cloning(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """A file system that can clone."""
    made = lab.block.mounted(request.param, 600)
    yield made
    made.unmount()


@pytest.fixture(scope="module")
def ext4(lab: Lab) -> Iterator[Mounted]:
    """One that can't."""
    made = lab.block.mounted("ext4", 64)
    yield made
    made.unmount()


@pytest.fixture
def places(lab: Lab) -> Iterator[Places]:
    """Domains of the test's own."""
    made = Places(lab)
    yield made
    made.forget()


def raw(folder: Path, name: str = "disk.raw", size: int = 16 * MIB) -> Path:
    """A raw image of random bytes in a folder of its own there."""
    own = folder / uuids.uuid4().hex
    own.mkdir(mode=0o755)
    path = own / name
    path.write_bytes(os.urandom(MIB))
    os.truncate(path, size)
    path.chmod(0o640)
    return path


async def guest_on(api: Api, places: Places, path: Path) -> Guest:
    """A domain, off, whose vda is this raw file."""
    made = places.guest(with_image(path, "raw"))
    await places.known(api)
    return made


def default(cloning: Mounted) -> str:
    """The method that takes a raw file there."""
    return {".xfs": "reflink", ".btrfs": "btrfs"}[cloning.path.suffix]


async def delete(api: Api, created: Created) -> str:
    return str((await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0))[0])


def operation(lab: Lab) -> str:
    """The UUID of the snapshot that is being made."""
    with sqlite3.connect(lab.daemon.state_dir / "journal.sqlite3") as db:
        ((found,),) = db.execute("SELECT uuid FROM operation").fetchall()
    return str(found)


# -- file systems and formats --------------------------------------------------------------------


async def test_where_it_can_not_be_cloned_qemu_is_the_default(
    api: Api, places: Places, ext4: Mounted
) -> None:
    guest = await guest_on(api, places, raw(ext4.path))
    (row,) = await api.disks(guest)
    assert (row["method"], row["reason"]) == (
        "qemu",
        "the default for a raw image on a file source",
    )
    error = await unchanged(api, guest, "MethodNotSupported", method_xml=REFLINK)
    assert "can't clone" in error.text
    created = await api.create(guest)
    assert created.overlay


async def test_an_xfs_made_without_reflink(api: Api, lab: Lab, places: Places) -> None:
    loop = lab.block.loop(300)
    run("mkfs.xfs", "-q", "-f", "-m", "reflink=0", loop.device)
    path = loop.file.with_suffix(".xfs")
    path.mkdir()
    run("mount", "-t", "xfs", loop.device, path)
    made = Mounted(path, loop)
    try:
        guest = await guest_on(api, places, raw(path))
        assert [row["method"] for row in await api.disks(guest)] == ["qemu"]
        await unchanged(api, guest, "MethodNotSupported", method_xml=REFLINK)
    finally:
        made.unmount()


async def test_other_formats_are_left_to_qemu(api: Api, places: Places, cloning: Mounted) -> None:
    path = raw(cloning.path).with_suffix(".vmdk")
    run("qemu-img", "create", "-q", "-f", "vmdk", path, "16M")
    guest = places.guest(with_image(path, "vmdk"))
    await places.known(api)
    error = await unchanged(api, guest, "MethodNotSupported", method_xml=REFLINK)
    assert "vmdk" in error.text


@pytest.mark.parametrize("cloning", ["btrfs"], indirect=True)
@pytest.mark.parametrize("on", ["image", "folder"])
async def test_btrfs_without_checksums(
    api: Api, places: Places, cloning: Mounted, tmp_path: Path, on: str
) -> None:
    """libvirt itself makes the folders of its pools so (chattr +C)."""
    folder = cloning.path / uuids.uuid4().hex
    folder.mkdir()
    path = folder / "disk.raw"
    if on == "folder":  # the image is older than the flag
        path.touch()
        run("chattr", "+C", folder)
    else:
        path.touch()
        run("chattr", "+C", path)
    path.write_bytes(os.urandom(MIB))
    guest = await guest_on(api, places, path)
    created = await api.create(guest, method_xml=REFLINK)
    assert created.source.get("file") != str(path)
    assert Path(created.file).read_bytes() == path.read_bytes()
    await delete(api, created)


@pytest.mark.parametrize("size", [0, 512, 1000, 4096, 4097])
async def test_small_and_odd_sizes(api: Api, places: Places, cloning: Mounted, size: int) -> None:
    path = raw(cloning.path)
    os.truncate(path, size)
    guest = await guest_on(api, places, path)
    created = await api.create(guest, method_xml=REFLINK)
    assert Path(created.file).read_bytes() == path.read_bytes()
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert told["Size"] == -(-size // 512) * 512
    await delete(api, created)


# -- rights --------------------------------------------------------------------------------------


async def test_owner_mode_and_list_of_rights(api: Api, places: Places, cloning: Mounted) -> None:
    path = raw(cloning.path)
    os.chown(path, 12345, 23456)
    path.chmod(0o664)
    # acl(5): user 1000 may read, the owning group nothing, which the mode does not show
    entries = [(1, 6, 2**32 - 1), (2, 6, 1000), (4, 0, 2**32 - 1), (16, 6, 2**32 - 1)]
    rights = [*entries, (32, 4, 2**32 - 1)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in rights)
    os.setxattr(path, "system.posix_acl_access", value)
    guest = await guest_on(api, places, path)
    created = await api.create(guest, method_xml=REFLINK)
    found = os.stat(created.file)
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (12345, 23456, 0o444)
    copied = os.getxattr(created.file, "system.posix_acl_access")
    granted = {(tag, who): rights for tag, rights, who in struct.iter_unpack("<HHI", copied[4:])}
    assert granted[4, 2**32 - 1] == 0  # the owning group
    assert granted[16, 2**32 - 1] == 4  # the most that anyone in the list has
    await delete(api, created)


# -- whose file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "symlink", "folder"])
async def test_a_foreign_file_of_its_name_is_left_alone(
    connect: Connect, faulty: Lab, places: Places, cloning: Mounted, kind: str, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.ARMED, "--do", f"wait:{flag}"))
    api = await connect()
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    call = asyncio.create_task(api.create(guest, method_xml=REFLINK))
    await asyncio.to_thread(wait_until, "it is armed", flag.exists, 20)
    foreign = path.parent / f"snapd-vm-{operation(faulty)}"
    elsewhere = tmp_path / "elsewhere"
    if kind == "file":
        foreign.write_text("somebody else's")
    elif kind == "symlink":
        foreign.symlink_to(elsewhere)
    else:
        foreign.mkdir()
    flag.unlink()
    error = await refused(call, "NameInUse")
    assert foreign.name in error.text
    assert sorted(os.listdir(path.parent)) == sorted([path.name, foreign.name])
    assert foreign.is_symlink() == (kind == "symlink")
    assert kind != "file" or foreign.read_text() == "somebody else's"
    assert not elsewhere.exists()
    assert not await api.snapshots_of(guest)
    await api.create(guest, method_xml=REFLINK)


@pytest.mark.parametrize("by", ["a file", "a symlink", "a fifo"])
async def test_an_image_that_is_replaced_after_the_check(
    connect: Connect, faulty: Lab, places: Places, cloning: Mounted, by: str, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.BEGUN, "--do", f"wait:{flag}"))
    api = await connect()
    path, secret = raw(cloning.path), raw(cloning.path)
    guest = await guest_on(api, places, path)
    call = asyncio.create_task(api.create(guest, method_xml=REFLINK))
    await asyncio.to_thread(wait_until, "it has begun", flag.exists, 20)
    path.rename(path.with_suffix(".old"))
    if by == "a file":
        path.write_bytes(secret.read_bytes())
    elif by == "a symlink":
        path.symlink_to(secret)
    else:
        os.mkfifo(path)
    flag.unlink()
    await refused(call, "StorageFailed")
    assert not [name for name in os.listdir(path.parent) if "snapd-vm" in name]
    path.unlink()
    path.with_suffix(".old").rename(path)


@pytest.mark.parametrize("step", [Step.ARMED, Step.SWITCHED])
async def test_a_disk_that_is_given_another_image_meanwhile(
    connect: Connect, faulty: Lab, places: Places, cloning: Mounted, step: Step, tmp_path: Path
) -> None:
    """What was cloned is then not what the domain wrote to at that moment."""
    flag = tmp_path / "flag"
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", f"wait:{flag}"))
    api = await connect()
    path, other = raw(cloning.path), raw(cloning.path)
    guest = await guest_on(api, places, path)
    call = asyncio.create_task(api.create(guest, method_xml=REFLINK))
    await asyncio.to_thread(wait_until, "it has come so far", flag.exists, 20)
    disk = etree.fromstring(guest.disk().xml)
    source = disk.find("source")
    assert source is not None
    source.set("file", str(other))
    guest.domain.updateDeviceFlags(etree.tostring(disk, encoding="unicode"), CONFIG)
    flag.unlink()
    error = await refused(call, "Busy")
    assert "another image" in error.text
    for folder, name in ((path.parent, path.name), (other.parent, other.name)):
        assert os.listdir(folder) == [name]
    assert not await api.snapshots_of(guest)


async def test_an_image_whose_path_is_no_text(api: Api, places: Places, cloning: Mounted) -> None:
    path = raw(cloning.path)
    odd = Path(os.fsdecode(os.fsencode(path.parent) + b"\xff\x01"))
    path.parent.rename(odd)
    link = places.folder() / "link.raw"
    link.symlink_to(odd / path.name)
    guest = await guest_on(api, places, link)
    error = await unchanged(api, guest, "StorageFailed", method_xml=REFLINK)
    assert "symlink" in error.text


async def test_an_image_behind_a_symlink(api: Api, places: Places, cloning: Mounted) -> None:
    path = raw(cloning.path)
    link = places.folder() / "link.raw"
    link.symlink_to(path)
    guest = await guest_on(api, places, link)
    assert [row["method"] for row in await api.disks(guest)] == [default(cloning)]
    created = await api.create(guest, method_xml=REFLINK)
    assert os.path.dirname(created.file) == str(path.parent)
    assert Path(created.file).read_bytes() == path.read_bytes()
    assert os.listdir(link.parent) == [link.name]
    await delete(api, created)


@pytest.mark.parametrize("whose", ["the link's", "the image's"])
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
async def test_a_folder_that_others_can_write(
    api: Api, places: Places, cloning: Mounted, whose: str, mode: int
) -> None:
    path = raw(cloning.path)
    link = places.folder() / "link.raw"
    link.symlink_to(path)
    opened = link.parent if whose == "the link's" else path.parent
    opened.chmod(mode)
    if mode == 0o775:
        os.chown(opened, 0, 23456)
    guest = await guest_on(api, places, link)
    error = await unchanged(api, guest, "MethodNotSupported", method_xml=REFLINK)
    assert str(opened) in error.text
    assert sorted(os.listdir(path.parent)) == [path.name]
    # Who asks beforehand is told the same, and a method that never could is not stored.
    (row,) = await api.disks(guest)
    assert row["method"] == ""
    assert str(opened) in row["reason"]
    call = api.call(path_of(guest), DOMAIN, "SetMethod", "ss", VDA, REFLINK)
    assert str(opened) in (await refused(call, "MethodNotSupported")).text


async def test_an_image_that_somebody_else_writes_to(
    api: Api, places: Places, cloning: Mounted
) -> None:
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    argv = ["qemu-io", "-f", "raw", str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as writer:
        await asyncio.to_thread(
            wait_until, "it is open", lambda: storage.write_locked(str(path)), 20
        )
        await unchanged(api, guest, "Busy", method_xml=REFLINK)
        writer.kill()
    await delete(api, await api.create(guest, method_xml=REFLINK))


# -- what stands in the way ----------------------------------------------------------------------


async def test_a_full_file_system(api: Api, lab: Lab, places: Places) -> None:
    made = lab.block.mounted("xfs", 300)
    try:
        guest = await guest_on(api, places, raw(made.path))
        made.fill(leave=300 << 10)
        error = await unchanged(api, guest, "NoSpace", method_xml=REFLINK)
        assert "bytes left" in error.text
        made.drain()
        await delete(api, await api.create(guest, method_xml=REFLINK))
    finally:
        made.unmount()


async def test_the_room_ends_in_the_middle_of_the_clone(
    daemon: Lab, api: Api, lab: Lab, places: Places
) -> None:
    """The map of an image in very many pieces is larger than what is left."""
    made = lab.block.mounted("xfs", 800)
    try:
        path = raw(made.path, size=800 * MIB)
        block = bytes(4096)
        with path.open("r+b") as file:
            for number in range(100_000):
                os.pwrite(file.fileno(), block, number * 8192)
            os.fsync(file.fileno())
        guest = await guest_on(api, places, path)
        made.fill(leave=1200 << 10)
        before = os.listdir(path.parent)
        error = await refused(api.create(guest, method_xml=REFLINK), "NoSpace")
        assert "clone" in error.text
        assert os.listdir(path.parent) == before
        assert not unnamed(daemon.daemon)
        assert not await api.snapshots_of(guest)
        made.drain()
        await delete(api, await api.create(guest, method_xml=REFLINK))
    finally:
        made.unmount()


async def test_plan_warns_where_the_guest_could_run_out_of_room(
    api: Api, lab: Lab, places: Places
) -> None:
    made = lab.block.mounted("xfs", 300)
    try:
        path = raw(made.path)
        path.write_bytes(os.urandom(16 * MIB))
        guest = await guest_on(api, places, path)
        assert (await api.plan(guest))["warnings"] == []
        made.fill(leave=8 * MIB)
        (warning,) = (await api.plan(guest))["warnings"]
        assert "the guest stops" in warning
    finally:
        made.unmount()


async def test_a_file_system_that_is_read_only(api: Api, lab: Lab, places: Places) -> None:
    made = lab.block.mounted("xfs", 300)
    try:
        guest = await guest_on(api, places, raw(made.path))
        made.set_read_only(True)
        await unchanged(api, guest, "StorageFailed", method_xml=REFLINK)
        made.set_read_only(False)
        await delete(api, await api.create(guest, method_xml=REFLINK))
    finally:
        made.unmount()


async def test_an_image_that_is_not_there(api: Api, places: Places, cloning: Mounted) -> None:
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    path.unlink()
    await refused(api.create(guest, method_xml=REFLINK), "MethodNotSupported")


# -- afterwards ----------------------------------------------------------------------------------


async def test_what_a_guest_wrote_into_its_disk_holds_up_nobody(
    api: Api, places: Places, cloning: Mounted
) -> None:
    """A clone's first bytes are the guest's, and could look like a qcow2 on another's image."""
    base = raw(cloning.path)
    other = await guest_on(api, places, base)
    forged = forge(base.with_name("forged.raw"), base)
    guest = await guest_on(api, places, forged)
    created = await api.create(guest, method_xml=REFLINK)
    await api.create(other, method_xml=QEMU)
    await delete(api, created)


async def test_every_reader_counts(places: Places) -> None:
    """Of a file that no domain is to have open, the domain's own QEMU is a reader too."""
    path = raw(places.folder())
    reads = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", reads, str(path), "-uuid", "1234"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe) as reader:
        assert reader.stdout is not None
        assert reader.stdin is not None
        reader.stdout.readline()
        assert str(reader.pid) in storage.reader_of(str(path), "")
        assert str(reader.pid) in storage.reader_of(str(path), "5678")
        assert storage.reader_of(str(path), "1234") == ""
        reader.stdin.close()


async def test_a_clone_that_others_build_on_is_not_deleted(
    api: Api, places: Places, cloning: Mounted
) -> None:
    guest = await guest_on(api, places, raw(cloning.path))
    created = await api.create(guest, method_xml=REFLINK)
    clone = Path(created.file)
    overlay = image(clone.with_name("overlay.qcow2"), clone, "raw")
    error = await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "Busy")
    assert str(overlay) in error.text
    overlay.unlink()
    await delete(api, created)
    assert not clone.exists()


async def test_a_definition_that_writes_to_a_clone(
    api: Api, places: Places, cloning: Mounted
) -> None:
    guest = await guest_on(api, places, raw(cloning.path))
    created = await api.create(guest, method_xml=REFLINK)
    disk = (
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{created.file}'/><target dev='vdb' bus='virtio'/></disk>"
    )
    guest.domain.attachDeviceFlags(disk, CONFIG)
    error = await refused(api.backup_source(created.snapshot), "InvalidState")
    assert "definition" in error.text
    await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "InvalidState")
    guest.domain.detachDeviceFlags(disk, CONFIG)
    await api.disks(guest)
    assert await api.backup_source(created.snapshot) == created.backup_source
    await delete(api, created)


async def test_a_domain_that_is_gone_leaves_its_snapshots(
    api: Api, places: Places, cloning: Mounted
) -> None:
    path = raw(cloning.path)
    content = path.read_bytes()
    guest = await guest_on(api, places, path)
    created = await api.create(guest, method_xml=REFLINK)
    await places.unknown(api, guest)
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "ready"
    assert await api.backup_source(created.snapshot) == created.backup_source
    assert Path(created.file).read_bytes() == content
    assert await delete(api, created) == ""
    assert not os.path.exists(created.file)


@pytest.mark.parametrize("how", ["another file", "no mark", "another's mark", "a symlink"])
async def test_what_is_not_provably_ours_is_left_alone(
    api: Api, places: Places, cloning: Mounted, how: str
) -> None:
    guest = await guest_on(api, places, raw(cloning.path))
    created = await api.create(guest, method_xml=REFLINK)
    clone = Path(created.file)
    run("chattr", "-i", clone)
    if how == "another file":  # the mark copied with it
        run("cp", "-a", "--preserve=xattr", clone, clone.with_name("copy"))
        clone.with_name("copy").rename(clone)
        assert os.getxattr(clone, "trusted.snapd-vm")
    elif how == "no mark":
        os.removexattr(clone, "trusted.snapd-vm")
    elif how == "another's mark":
        os.setxattr(clone, "trusted.snapd-vm", b'{"snapshot": "other"}')
    else:
        clone.rename(clone.with_name("moved"))
        clone.symlink_to(clone.with_name("moved"))
    await refused(api.backup_source(created.snapshot), "StorageFailed")
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "missing"
    await delete(api, created)
    assert os.path.lexists(clone)
    assert clone.stat().st_size == 16 * MIB


# -- a driver without QEMU -----------------------------------------------------------------------


async def test_a_domain_that_qemu_does_not_run(
    lab: Lab, connect: Connect, cloning: Mounted
) -> None:
    path = raw(cloning.path)
    content = path.read_bytes()
    source = f"<source file='{path}'/>"
    async with taken_by(default(cloning), lab, connect, "file", source) as created:
        path.write_bytes(b"something else")
        assert Path(created.file).read_bytes() == content
    assert os.listdir(path.parent) == [path.name]
