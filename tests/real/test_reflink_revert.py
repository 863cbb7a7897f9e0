"""Revert with methods reflink (on XFS) and btrfs: the image's path holds the snapshot's contents,
and nothing else has changed.
"""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.lab.blockdev import Mounted
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real.api import NO_QUIESCE, QUIESCE_REQUIRED, SNAPSHOT, Api, Created
from tests.real.places import INACTIVE, Places
from tests.real.test_crash import unnamed
from tests.real.test_delete import delete
from tests.real.test_reflink_files import REFLINK, cloning, guest_on, raw
from tests.real.test_revert import places, revert
from tests.real.test_revert_refused import kept

__all__ = ["cloning", "places"]

MIB = 1 << 20


def seen(path: Path) -> tuple[Any, ...]:
    """What a revert leaves alone where it does not happen: the file itself, and what it holds."""
    found = path.stat()
    rights = (found.st_uid, found.st_gid, found.st_mode, found.st_nlink)
    return (found.st_ino, rights, path.read_bytes(), sorted(os.listdir(path.parent)))


async def stack(
    api: Api, guest: Guest, path: Path, count: int = 2, method_xml: str = ""
) -> list[Created]:
    """So many snapshots of a domain that is off, with contents and size of its own for each."""
    found = []
    for number in range(count):
        path.write_bytes(os.urandom(MIB + 4096 * number))
        found.append(await api.create(guest, method_xml=method_xml, name=f"s{number}"))
    path.write_bytes(os.urandom(3 * MIB))
    return found


def held(stacked: list[Created]) -> list[bytes]:
    return [Path(created.file).read_bytes() for created in stacked]


async def all_ready(api: Api, guest: Guest) -> None:
    deadline = asyncio.get_running_loop().time() + 20
    while {row["State"] for row in (await api.snapshots_of(guest)).values()} != {"ready"}:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)


async def left(api: Api, guest: Guest, created: Created, path: Path, *names: str) -> str:
    """The revert is refused with one of these errors, and nothing has changed; what it says."""
    before = seen(path)
    text = await kept(api, guest, created, *names)
    assert seen(path) == before
    return text


# -- it goes back --------------------------------------------------------------------------------


async def test_a_guest_gets_its_disk_back(api: Api, lab: Lab, cloning: Mounted) -> None:
    spec = DiskSpec(format="raw", folder=cloning.path)
    guest = lab.guest([spec, spec])
    try:
        for target in ("vda", "vdb"):
            guest.write(target, "mark", "before")
        created = await api.create(guest, name="good", flags=QUIESCE_REQUIRED)
        for target in ("vda", "vdb"):
            guest.write(target, "mark", "after")
        crash = await api.create(guest, name="crash", flags=NO_QUIESCE)
        guest.poweroff()
        before, other = Path(created.file).read_bytes(), guest.disk("vdb").path
        untouched = other.stat().st_ino, other.read_bytes()
        xml, files = guest.domain.XMLDesc(INACTIVE), sorted(os.listdir(cloning.path))
        assert await revert(api, created) == ""
        assert guest.domain.XMLDesc(INACTIVE) == xml
        for back, consistency in ((crash, "crash"), (created, "offline")):
            await revert(api, back)  # cleanly shut off, its disk may be what a crash leaves
            taken = await api.create(guest)
            assert taken.ours("consistency") == consistency
            await delete(api, taken)
        assert sorted(os.listdir(cloning.path)) == files
        assert guest.disk().path.read_bytes() == before
        assert (other.stat().st_ino, other.read_bytes()) == untouched
        guest.start()
        assert (guest.read("vda", "mark"), guest.read("vdb", "mark")) == ("before", "after")
        guest.writes_go_on()
        assert Path(created.file).read_bytes() == before
        later = await api.create(guest, name="later", flags=QUIESCE_REQUIRED)
        assert (await api.properties(later.snapshot, SNAPSHOT))["Consistency"] == "quiesced"
        for one in (created, crash, later):
            await delete(api, one)
        assert guest.read("vda", "mark") == "before"
    finally:
        guest.remove()


async def test_to_and_fro_and_again(
    daemon: Lab, api: Api, places: Places, cloning: Mounted
) -> None:
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    stacked = await stack(api, guest, path, 3)
    sums, files = held(stacked), sorted(os.listdir(path.parent))
    for to in (0, 2, 1, 1, 0):
        assert await revert(api, stacked[to]) == ""
        assert path.read_bytes() == sums[to]
        assert held(stacked) == sums
        assert sorted(os.listdir(path.parent)) == files
        await all_ready(api, guest)
        path.write_bytes(os.urandom(2 * MIB))
    stacked.append(await api.create(guest, name="s3"))
    sums = held(stacked)
    assert sums[3] == path.read_bytes()
    await revert(api, stacked[1])
    for created in stacked:
        await delete(api, created)
    assert path.read_bytes() == sums[1]
    assert os.listdir(path.parent) == [path.name]
    assert not unnamed(daemon.daemon)


async def test_owner_mode_and_list_of_rights(api: Api, places: Places, cloning: Mounted) -> None:
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1, REFLINK)
    os.chown(path, 12345, 23456)
    path.chmod(0o664)
    entries = [(1, 6, 2**32 - 1), (2, 6, 1000), (4, 0, 2**32 - 1), (16, 6, 2**32 - 1)]
    value = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry) for entry in [*entries, (32, 4, 2**32 - 1)]
    )
    os.setxattr(path, "system.posix_acl_access", value)
    like = path.stat()
    await revert(api, created)
    found = path.stat()
    assert (found.st_uid, found.st_gid, found.st_mode) == (like.st_uid, like.st_gid, like.st_mode)
    assert os.getxattr(path, "system.posix_acl_access") == value
    assert "trusted.snapd-vm" not in os.listxattr(path), "it is no snapshot"
    with path.open("r+b"):
        pass  # nor immutable
    clone = Path(created.file)
    assert clone.stat().st_mode & 0o222 == 0
    assert "trusted.snapd-vm" in os.listxattr(clone)


async def test_an_image_behind_a_symlink(api: Api, places: Places, cloning: Mounted) -> None:
    path, elsewhere = raw(cloning.path), places.folder()
    link = elsewhere / "link.raw"
    link.symlink_to(path)
    guest = await guest_on(api, places, link)
    (created,) = await stack(api, guest, path, 1)
    await revert(api, created)
    assert link.is_symlink()
    assert os.readlink(link) == str(path)
    assert not path.is_symlink()
    assert path.read_bytes() == Path(created.file).read_bytes()
    elsewhere.chmod(0o777)
    path.write_bytes(b"x" * MIB)
    assert str(elsewhere) in await left(api, guest, created, path, "MethodNotSupported")


@pytest.mark.parametrize("cloning", ["btrfs"], indirect=True)
async def test_btrfs_without_checksums(api: Api, places: Places, cloning: Mounted) -> None:
    """The new image takes after the snapshot in that, as a clone must, whatever the present is."""
    path = raw(cloning.path)
    path.unlink()
    path.touch()
    run("chattr", "+C", path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1)
    path.unlink()
    path.write_bytes(b"with checksums")
    await revert(api, created)
    assert path.read_bytes() == Path(created.file).read_bytes()


async def test_rounds_leave_nothing(
    daemon: Lab, api: Api, places: Places, cloning: Mounted
) -> None:
    path = raw(cloning.path)
    guest = await guest_on(api, places, path)
    (created,) = await stack(api, guest, path, 1)
    await revert(api, created)
    files, descriptors = os.listdir(path.parent), len(os.listdir(f"/proc/{daemon.daemon.pid}/fd"))
    for _ in range(30):
        await revert(api, created)
    assert os.listdir(path.parent) == files
    assert len(os.listdir(f"/proc/{daemon.daemon.pid}/fd")) <= descriptors + 2
