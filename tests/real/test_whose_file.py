"""Whose file is it? Create is refused, naming the user, where somebody else has the image."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real import images
from tests.real.api import Api
from tests.real.places import (
    CONFIG,
    INACTIVE,
    Places,
    file_of,
    image,
    refused,
    unchanged,
    with_image,
)

QEMU = "<diskSnapshot method='qemu'/>"


@pytest.fixture
def places(lab: Lab) -> Iterator[Places]:
    """Domains of the test's own."""
    made = Places(lab)
    yield made
    made.forget()


@pytest.fixture
async def golden(api: Api, places: Places) -> Guest:
    """A domain, off, whose image others come to use."""
    made = places.guest()
    await places.known(api)
    return made


def forge(path: Path, names: str | Path, size: int = 16 << 20) -> Path:
    """A raw image whose first sector its guest made a qcow2 header that names a base."""
    name = os.fsencode(names)
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 104, len(name), 16, size, *[0] * 7)
    with path.open("wb") as file:
        file.truncate(size)
        file.write(header.ljust(104, b"\0") + name)
    path.chmod(0o644)
    return path


# -- another domain ------------------------------------------------------------------------------


async def test_a_second_definition_of_the_same_disk(
    api: Api, places: Places, golden: Guest
) -> None:
    other = places.guest(with_image(golden.disk().path))
    error = await unchanged(api, golden, "Busy")
    assert f"disk vda of domain {other.name}" in error.text
    other.remove()  # at once: nothing is remembered of it
    assert (await api.create(golden)).file == str(golden.disk().path)


@pytest.mark.parametrize("running", [False, True])
async def test_a_linked_clone_of_another_domain(
    api: Api, places: Places, golden: Guest, running: bool
) -> None:
    clone = image(places.folder() / "clone.qcow2", golden.disk().path)
    other = places.guest(with_image(clone), start=running)
    assert other.name in (await unchanged(api, golden, "Busy")).text


async def test_at_the_bottom_of_anothers_chain(api: Api, places: Places, golden: Guest) -> None:
    chain = image(places.folder() / "1.qcow2", golden.disk().path)
    for number in (2, 3):
        chain = image(places.folder() / f"{number}.qcow2", chain)
    other = places.guest(with_image(chain))
    assert other.name in (await unchanged(api, golden, "Busy")).text


async def test_only_in_anothers_persistent_definition(
    api: Api, places: Places, golden: Guest
) -> None:
    other = places.guest(start=True)
    xml = other.domain.XMLDesc(INACTIVE)
    changed = xml.replace(str(other.disk().path), str(golden.disk().path))
    places.lab.hypervisor.define(changed)
    assert file_of(other) != file_of(other, INACTIVE) == str(golden.disk().path)
    assert other.name in (await unchanged(api, golden, "Busy")).text


async def test_only_in_anothers_live_definition(api: Api, places: Places, golden: Guest) -> None:
    clone = image(places.folder() / "clone.qcow2", golden.disk().path)
    elsewhere = image(places.folder() / "elsewhere.qcow2")
    other = places.guest(with_image(clone), start=True)
    places.lab.hypervisor.define(other.domain.XMLDesc(INACTIVE).replace(str(clone), str(elsewhere)))
    assert file_of(other, INACTIVE) == str(elsewhere)
    assert other.name in (await unchanged(api, golden, "Busy")).text


async def test_a_disk_that_was_added_to_a_definition_a_moment_ago(
    api: Api, places: Places, golden: Guest
) -> None:
    """libvirt sends no event for it."""
    other = places.guest()
    other.domain.attachDeviceFlags(
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
        f"<source file='{golden.disk().path}'/><target dev='vdb' bus='virtio'/></disk>",
        CONFIG,
    )
    assert f"disk vdb of domain {other.name}" in (await unchanged(api, golden, "Busy")).text


async def test_another_disk_of_the_same_domain(api: Api, places: Places) -> None:
    base = image(places.folder() / "base.qcow2")
    clone = image(places.folder() / "clone.qcow2", base)
    guest = places.guest(with_image(base), with_image(clone))
    await places.known(api)
    assert "disk vdb" in (await unchanged(api, guest, "Busy")).text
    assert (await api.create(guest, "<disk><target dev='vdb'/></disk>")).file == str(clone)


def symlink(path: Path, folder: Path) -> Path:
    (folder / "link.qcow2").symlink_to(path)
    return folder / "link.qcow2"


def hard_link(path: Path, folder: Path) -> Path:
    (folder / "hard.qcow2").hardlink_to(path)
    return folder / "hard.qcow2"


def bind(path: Path, folder: Path) -> Path:
    run("mount", "--bind", path.parent, folder)
    return folder / path.name


@pytest.mark.parametrize("way", [symlink, hard_link, bind])
@pytest.mark.parametrize("below", [False, True])
async def test_by_another_path(
    api: Api, places: Places, golden: Guest, way: Callable[[Path, Path], Path], below: bool
) -> None:
    folder = places.folder()
    named = way(golden.disk().path, folder)
    if below:
        named = image(places.folder() / "clone.qcow2", named)
    other = places.guest(with_image(named))
    assert other.name in (await unchanged(api, golden, "Busy")).text
    if way is bind:
        other.remove()
        run("umount", folder)


async def test_linked_clones_of_a_golden_image(api: Api, places: Places, golden: Guest) -> None:
    folder = places.folder()
    clones = [image(folder / f"{number}.qcow2", golden.disk().path) for number in (1, 2)]
    first, second = (places.guest(with_image(clone)) for clone in clones)
    await places.known(api)
    before = images.info(golden.disk().path), os.stat(golden.disk().path).st_mtime_ns
    for guest, clone in ((first, clones[0]), (second, clones[1])):
        created = await api.create(guest)
        assert created.file == str(clone)
        assert images.info(created.overlay)["backing-filename"] == str(clone)
    await unchanged(api, golden, "Busy")
    assert (images.info(golden.disk().path), os.stat(golden.disk().path).st_mtime_ns) == before


# -- an image ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whole", "relative", "json"])
async def test_an_image_in_the_same_folder(
    api: Api, places: Places, golden: Guest, name: str
) -> None:
    path = golden.disk().path
    base = {
        "whole": str(path),
        "relative": path.name,
        "json": f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{path}"}}}}',
    }[name]
    clone = image(path.parent / "clone.img", base)
    assert str(clone) in (await unchanged(api, golden, "Busy")).text
    clone.unlink()
    await api.create(golden)


async def test_an_image_beside_the_file_behind_a_symlink(api: Api, places: Places) -> None:
    path = image(places.folder() / "real.qcow2")
    guest = places.guest(with_image(symlink(path, places.folder())))
    clone = image(path.parent / "clone.qcow2", path)
    await places.known(api)
    assert str(clone) in (await unchanged(api, guest, "Busy")).text
    clone.unlink()
    await api.create(guest)


async def test_an_image_in_an_active_pool(api: Api, places: Places, golden: Guest) -> None:
    folder = places.folder()
    clone = image(folder / "clone.qcow2", golden.disk().path)
    connection = places.lab.hypervisor.connection()
    pool = connection.storagePoolDefineXML(
        f"<pool type='dir'><name>{folder.name}</name><target><path>{folder}</path></target></pool>"
    )
    try:
        pool.create()
        assert str(clone) in (await unchanged(api, golden, "Busy")).text
        pool.destroy()  # made inactive: nobody's any more
        await api.create(golden)
    finally:
        if pool.isActive():
            pool.destroy()
        pool.undefine()


async def test_a_domains_volume_in_a_pool_that_is_not_active(
    api: Api, places: Places, golden: Guest
) -> None:
    """libvirt looks up no volume there, and the domain has it all the same."""
    folder = places.folder()
    image(folder / "clone.qcow2", golden.disk().path)
    connection = places.lab.hypervisor.connection()
    pool = connection.storagePoolDefineXML(
        f"<pool type='dir'><name>{folder.name}</name><target><path>{folder}</path></target></pool>"
    )
    try:
        pool.create()
        source = f"<source pool='{folder.name}' volume='clone.qcow2'/>"
        other = places.guest(DiskSpec("qcow2", source=source, type="volume"))
        pool.destroy()
        assert other.name in (await unchanged(api, golden, "Busy")).text
        other.remove()
        await api.create(golden)
    finally:
        if pool.isActive():
            pool.destroy()
        pool.undefine()


async def test_an_image_on_a_block_device(api: Api, places: Places, lab: Lab) -> None:
    device, folder = lab.block.loop().device, lab.folder("overlays")
    guest = places.guest(DiskSpec(device=device, size_mib=16, filesystem=None))
    method = f"<diskSnapshot method='qemu'><overlay file='{folder}/mine'/></diskSnapshot>"
    lab.daemon.stop()
    lab.daemon.start({"qemu": {"overlay_dirs": [str(folder)]}})
    second = Path(f"{places.folder()}/second-node")
    os.mknod(second, 0o60600, os.stat(device).st_rdev)
    other = places.guest(DiskSpec(source=f"<source dev='{second}'/>", type="block"))
    assert other.name in (await unchanged(api, guest, "Busy", method_xml=method)).text
    other.remove()
    assert (await api.create(guest, method_xml=method)).file == str(device)


# -- what a guest wrote is no proof --------------------------------------------------------------


@pytest.mark.parametrize("same_folder", [False, True])
async def test_what_a_guest_wrote_into_its_raw_disk_makes_nobody_busy(
    api: Api, places: Places, golden: Guest, same_folder: bool
) -> None:
    folder = golden.disk().path.parent if same_folder else places.folder()
    forged = forge(folder / "raw.img", golden.disk().path)
    attacker = places.guest(with_image(forged, "raw"))
    await api.create(golden)
    attacker.remove()
    places.guest(with_image(forge(forged, file_of(golden)), "qcow2"))
    await unchanged(api, golden, "Busy")  # so that the test can tell


@pytest.mark.parametrize("same_folder", [False, True])
async def test_nor_once_that_disk_is_a_snapshots_base(
    api: Api, places: Places, golden: Guest, same_folder: bool
) -> None:
    """It is no domain's active image then; that it is raw is told by the overlay's header."""
    folder = golden.disk().path.parent if same_folder else places.folder()
    forged = forge(folder / "raw.img", golden.disk().path)
    attacker = places.guest(with_image(forged, "raw"))
    await places.known(api)
    created = await api.create(attacker, method_xml=QEMU)
    assert (created.file, created.ours("format")) == (str(forged), "raw")
    await api.create(golden)
    await api.create(attacker, method_xml=QEMU)


async def test_a_snapshot_of_a_forged_disk_is_the_raw_disk(
    api: Api, places: Places, golden: Guest
) -> None:
    forged = forge(places.folder() / "raw.img", "/etc/passwd")
    attacker = places.guest(with_image(forged, "raw"))
    await places.known(api)
    created = await api.create(attacker, method_xml=QEMU)
    assert images.info(created.overlay)["backing-filename-format"] == "raw"
    assert "/etc/passwd" not in created.backup_source + created.modified_disk


# -- our own -------------------------------------------------------------------------------------


async def test_a_chain_of_ones_own_snapshots_is_nobody_elses(
    api: Api, places: Places, golden: Guest
) -> None:
    files = [str(golden.disk().path)]
    for number in range(3):
        created = await api.create(golden, name=f"s{number}")
        assert created.file == files[-1]
        files.append(created.overlay)
    assert {row["State"] for row in (await api.snapshots_of(golden)).values()} == {"ready"}


async def test_open_for_writing_in_another_process(api: Api, places: Places) -> None:
    """A QEMU of somebody's own, that libvirt knows nothing of."""
    guest = places.guest(places.disk())
    await places.known(api)
    path = guest.disk().path
    argv = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-qmp", "null"]
    holder = subprocess.Popen([*argv, "-drive", f"if=none,id=d,format=qcow2,file={path}"])
    try:
        wait_until("it is open", lambda: images.is_open(path), 60)
        await unchanged(api, guest, "Busy")
    finally:
        holder.kill()
        holder.wait()
    await api.create(guest)


async def test_the_source_of_two_domains_is_ambiguous_without_the_domain(
    api: Api, places: Places, golden: Guest
) -> None:
    path = golden.disk().path
    other = places.guest(with_image(path))
    await places.known(api)
    bare = f"<disk><source file='{path}'/></disk>"
    error = await refused(api.create_on_root(bare), "AmbiguousDisk")
    assert str(path) not in error.text
    await places.unknown(api, other)
    assert (await api.create_on_root(bare)).file == str(path)
