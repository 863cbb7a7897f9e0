"""Images that are not raw, and those that lie on others, snapshotted by btrfs from below QEMU."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid as uuids
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.blockdev import Mounted
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real import images
from tests.real.api import QUIESCE_REQUIRED, SNAPSHOT, VDA, Api
from tests.real.places import Places, file_of, refused, unchanged, with_image
from tests.real.test_btrfs_places import BTRFS, btrfs, named, vm
from tests.real.test_delete import delete
from tests.real.test_revert import places, revert
from tests.real.whole import all_are_whole

__all__ = ["btrfs", "places", "vm"]


@pytest.fixture
def writing(lab: Lab, vm: Path) -> Iterator[Guest]:
    """A guest that writes to a qcow2 image in a subvolume."""
    running = lab.guest([DiskSpec(folder=vm)])
    running.writer(True, pause_us=2000)
    yield running
    running.remove()


def chain(folder: Path, *names: str) -> Path:
    """Images in a folder, each on the one before by its relative name; the last one."""
    below, formats = "", ""
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        kind = "raw" if name.endswith(".raw") else "qcow2"
        backing = ["-b", below, "-F", formats] if below else []
        words = ("qemu-img", "create", "-q", "-f", kind, *backing, "-u")
        run(*words, path, "16M", cwd=path.parent)
        if not below:
            run("qemu-io", "-f", kind, "-c", "write -q -P 7 0 1M", path)
        below, formats = os.path.relpath(path, folder), kind
    return folder / names[-1]


def contents(path: str | Path) -> bytes:
    """The first MiB and a bit of a qcow2 image's view."""
    with tempfile.TemporaryDirectory() as folder:
        return images.raw_copy(path, "qcow2", Path(folder) / "raw").read_bytes()[: 2 << 20]


@pytest.mark.timeout(300)
async def test_a_hundred_of_a_hundred_are_whole(api: Api, writing: Guest, scratch: Path) -> None:
    await all_are_whole(api, writing, BTRFS, scratch)


async def test_the_default_for_it_is_qemu(api: Api, writing: Guest) -> None:
    (row,) = await api.disks(writing)
    assert row["method"] == "qemu"
    plan = await api.plan(writing, method_xml=BTRFS)
    assert (plan["method"], plan["consistency"]) == ("btrfs", "quiesced")


async def test_it_goes_back(api: Api, writing: Guest) -> None:
    writing.write("vda", "mark", "before")
    created = await api.create(writing, VDA, BTRFS, flags=QUIESCE_REQUIRED)
    writing.write("vda", "mark", "after")
    writing.poweroff()
    assert await revert(api, created) == ""
    writing.start()
    assert writing.read("vda", "mark") == "before"
    writing.writes_go_on()
    await delete(api, created)


async def test_a_chain_in_the_subvolume_is_a_view_of_its_own(
    api: Api, lab: Lab, places: Places, vm: Path
) -> None:
    """Proved by a commit into the live base afterwards."""
    path = chain(vm / "chain", "base.raw", "middle.qcow2", "top.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 64k 64k", path)
    guest = places.guest(with_image(path), start=True)
    await places.known(api)
    base = path.parent / "base.raw"
    before = contents(path)
    live = base.read_bytes()
    for how in (BTRFS, named(vm)):
        created = await api.create(guest, method_xml=how)
        assert created.ours("consistency") == "paused"
        assert images.chain(created.file) == [
            str(Path(created.file).with_name(name))
            for name in ("top.qcow2", "middle.qcow2", "base.raw")
        ]
        assert contents(created.file) == before
        if how == BTRFS:
            await delete(api, created)
    guest.domain.destroy()
    run("qemu-img", "commit", "-q", "-f", "qcow2", "-b", base, path)
    run("qemu-io", "-f", "raw", "-c", "write -q -P 1 0 1M", base)
    assert base.read_bytes() != live
    assert contents(created.file) == before
    # What lies on others does not go back alone: what it lies on may be another by now.
    error = await refused(
        api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0), "MethodNotSupported"
    )
    assert "backing file" in error.text
    await delete(api, created)


@pytest.mark.parametrize(
    ("how", "error", "by_name"),
    [
        ("absolute", "MethodNotSupported", "MethodNotSupported"),
        ("absolute, outside", "MethodNotSupported", "NotUnderDisk"),
        ("json", "MethodNotSupported", "MethodNotSupported"),
        ("outside", "MethodNotSupported", "NotUnderDisk"),
        ("nested", "MethodNotSupported", "NotUnderDisk"),
        ("symlink", "MethodNotSupported", "NotUnderDisk"),
        ("folder's symlink", "MethodNotSupported", "NotUnderDisk"),
        ("no format", "MethodNotSupported", "MethodNotSupported"),
        ("data file", "MethodNotSupported", "MethodNotSupported"),
        ("gone", "MethodNotSupported", "NotUnderDisk"),
    ],
)
async def test_a_chain_that_leads_out_of_the_snapshot_is_refused(
    api: Api, places: Places, btrfs: Mounted, vm: Path, how: str, error: str, by_name: str
) -> None:
    folder = vm / "chain"
    folder.mkdir()
    top, base = folder / "top.qcow2", folder / "base.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "16M")
    name = "base.qcow2"
    if how == "absolute":
        name = str(base)
    elif how == "absolute, outside":
        name = str(shutil.move(base, places.folder() / "base.qcow2"))
    elif how == "json":
        name = f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{base}"}}}}'
    elif how in ("outside", "nested"):
        other = btrfs.path / uuids.uuid4().hex if how == "outside" else folder / "inner"
        run("btrfs", "-q", "subvolume", "create", other)
        shutil.move(base, other / "base.qcow2")
        name = os.path.relpath(other / "base.qcow2", folder)
    elif how == "symlink":
        shutil.move(base, btrfs.path / f"{vm.name}.qcow2")
        base.symlink_to(btrfs.path / f"{vm.name}.qcow2")
    elif how == "folder's symlink":
        (folder / "link").symlink_to(folder)
        name = "link/base.qcow2"
    if how == "data file":
        options = f"data_file={folder}/data.raw"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, top, "16M")
    else:
        words = ["-b", name, "-F", "qcow2", "-u"]
        run("qemu-img", "create", "-q", "-f", "qcow2", *words, top, "16M", cwd=folder)
    if how == "no format":
        header = bytearray(top.read_bytes())
        place = header.index(b"\xe2\x79\x2a\xca")
        header[place : place + 4] = b"\x12\x34\x56\x78"  # an extension that nobody knows
        top.write_bytes(header)
    elif how == "gone":
        base.unlink()
    guest = places.guest(with_image(top))
    await places.known(api)
    await unchanged(api, guest, error, method_xml=BTRFS)
    await unchanged(api, guest, by_name, method_xml=named(vm))
    assert file_of(guest) == str(top)


async def test_a_definition_that_says_another_chain(api: Api, places: Places, vm: Path) -> None:
    """libvirt and QEMU go by the definition, and a reader of the snapshot by the header."""
    path = chain(vm / "chain", "base.qcow2", "top.qcow2")
    other = chain(vm / "other", "other.qcow2")
    source = (
        f"<source file='{path}'/><backingStore type='file'><format type='qcow2'/>"
        f"<source file='{other}'/><backingStore/></backingStore>"
    )
    guest = places.guest(DiskSpec(format="qcow2", source=source))
    await places.known(api)
    error = await unchanged(api, guest, "MethodNotSupported", method_xml=BTRFS)
    assert "another backing chain" in error.text
