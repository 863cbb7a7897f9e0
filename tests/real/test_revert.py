"""Revert on real domains: the disk is what the snapshot is, and nothing else has changed."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from snapd_vm.model import NAMESPACE
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real import images
from tests.real.api import QUIESCE_REQUIRED, SNAPSHOT, Api, ApiError, Created
from tests.real.places import INACTIVE, Places, file_of, refused
from tests.real.test_crash import faulty
from tests.real.test_delete import chain_of, delete, own

__all__ = ["faulty", "own"]

MIB = 1 << 20


@pytest.fixture
def places(lab: Lab) -> Iterator[Places]:
    made = Places(lab)
    yield made
    made.forget()


async def revert(api: Api, created: Created | str) -> str:
    path = created if isinstance(created, str) else created.snapshot
    return str((await api.call(path, SNAPSHOT, "Revert", "u", 0))[0])


def put(path: str, pattern: int, mib: int = 0, count: int = 1) -> None:
    """Write a byte all over some MiB of an image that nobody uses."""
    words = f"write -q -P {pattern} {mib * MIB} {count * MIB}"
    run("qemu-io", "-f", "qcow2", "-c", words, path)


def whole(path: str, scratch: Path) -> str:
    return images.checksum(path, "qcow2", scratch)


async def stack(api: Api, guest: Guest, count: int, method: str = "qemu") -> list[Created]:
    """So many snapshots of a domain that is off, each with a pattern of its own before it."""
    found = []
    for number in range(count):
        put(file_of(guest), number + 1, mib=number, count=2)
        method_xml = f"<diskSnapshot method='{method}'/>"
        found.append(await api.create(guest, method_xml=method_xml, name=f"s{number}"))
    put(file_of(guest), 0xEE, count=6)
    return found


async def until(api: Api, guest: Guest, created: Created, state: str) -> None:
    """Wait until the snapshot's State is this."""
    deadline = asyncio.get_running_loop().time() + 20
    while (await api.snapshots_of(guest))[created.snapshot]["State"] != state:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)


async def contents(api: Api, scratch: Path, stacked: list[Created]) -> list[str]:
    """The checksums of what the snapshots' sources say now."""
    found = []
    for created in stacked:
        source = etree.fromstring(await api.backup_source(created.snapshot))
        kind = source.get(f"{{{NAMESPACE}}}format") or ""
        found.append(images.checksum(source.get("file") or "", kind, scratch))
    return found


async def test_a_guest_gets_its_disk_back(api: Api, lab: Lab, tmp_path: Path) -> None:
    guest = lab.guest([DiskSpec(), DiskSpec()])
    guest.write("vda", "mark", "before")
    guest.write("vdb", "mark", "before")
    created = await api.create(guest, name="good", flags=QUIESCE_REQUIRED)
    guest.write("vda", "mark", "after")
    guest.write("vdb", "mark", "after")
    guest.poweroff()
    before, other = whole(created.file, tmp_path), file_of(guest, target="vdb")
    other_before = whole(other, tmp_path)
    modified = await revert(api, created)
    source = etree.fromstring(modified).find("source")
    assert source is not None
    now = source.get("file") or ""
    assert now == file_of(guest) == file_of(guest, INACTIVE)
    assert now not in (created.file, created.overlay)
    assert not os.path.exists(created.overlay)
    assert whole(now, tmp_path) == whole(created.file, tmp_path) == before
    assert (file_of(guest, target="vdb"), whole(other, tmp_path)) == (other, other_before)
    (told,) = (await api.snapshots_of(guest)).values()
    assert told["State"] == "ready"
    assert (await api.call(created.snapshot, SNAPSHOT, "GetModifiedDisk"))[0] == modified
    guest.start()
    assert (guest.read("vda", "mark"), guest.read("vdb", "mark")) == ("before", "after")
    guest.writes_go_on()
    assert whole(created.file, tmp_path) == before
    await delete(api, created)
    assert file_of(guest) == file_of(guest, INACTIVE) == created.file
    assert not os.path.exists(now)
    assert guest.read("vda", "mark") == "before"
    guest.writes_go_on()
    guest.remove()


async def test_again_and_again(api: Api, places: Places, tmp_path: Path) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    before = whole(created.file, tmp_path)
    folder = Path(created.file).parent
    for _ in range(5):
        put(file_of(guest), 0x77, count=8)
        await revert(api, created)
        assert whole(file_of(guest), tmp_path) == before
        assert len(list(folder.iterdir())) == 2
    put(file_of(guest), 0x78, count=8)
    present = whole(file_of(guest), tmp_path)
    await delete(api, created)
    assert whole(file_of(guest), tmp_path) == present
    assert [str(path) for path in folder.iterdir()] == [created.file]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("to", [0, 1])
async def test_to_an_older_one_and_all_go_in_any_order(
    api: Api, places: Places, tmp_path: Path, to: int, order: tuple[int, ...]
) -> None:
    guest = places.guest()
    await places.known(api)
    first = file_of(guest)
    stacked = await stack(api, guest, 3)
    sums = await contents(api, tmp_path, stacked)
    await revert(api, stacked[to])
    assert whole(file_of(guest), tmp_path) == sums[to]
    assert await contents(api, tmp_path, stacked) == sums
    assert not os.path.exists(stacked[2].overlay)
    assert {row["State"] for row in (await api.snapshots_of(guest)).values()} == {"ready"}
    put(file_of(guest), 0x55, mib=1, count=5)
    present = whole(file_of(guest), tmp_path)
    left = dict(zip(stacked, sums, strict=True))
    for number in order:
        await delete(api, stacked[number])
        del left[stacked[number]]
        assert whole(file_of(guest), tmp_path) == present
        assert await contents(api, tmp_path, list(left)) == list(left.values())
        assert {row["State"] for row in (await api.snapshots_of(guest)).values()} <= {"ready"}
    assert os.listdir(Path(first).parent) == [Path(first).name]
    assert file_of(guest) == first


async def test_to_and_fro(api: Api, places: Places, tmp_path: Path) -> None:
    """What a revert has left beside the chain can be gone back to, and what comes then too."""
    guest = places.guest()
    await places.known(api)
    first = file_of(guest)
    stacked = await stack(api, guest, 3)
    sums = await contents(api, tmp_path, stacked)
    for to in (0, 2, 1, 0, 1, 2, 2, 0):
        await revert(api, stacked[to])
        assert whole(file_of(guest), tmp_path) == sums[to]
        assert await contents(api, tmp_path, stacked) == sums
        put(file_of(guest), 0x40 + to, count=3)
    stacked.append(await api.create(guest, name="s3"))
    sums = await contents(api, tmp_path, stacked)
    put(file_of(guest), 0x51, count=3)
    await revert(api, stacked[1])
    assert await contents(api, tmp_path, stacked) == sums
    put(file_of(guest), 0x52, count=4)
    present = whole(file_of(guest), tmp_path)
    for number in (0, 3, 1, 2):
        await delete(api, stacked[number])
        sums[number] = ""
        assert whole(file_of(guest), tmp_path) == present
        left = [one for one, checksum in zip(stacked, sums, strict=True) if checksum]
        assert await contents(api, tmp_path, left) == [one for one in sums if one]
    assert os.listdir(Path(first).parent) == [Path(first).name]


async def test_what_was_an_overlay_of_a_snapshot_that_is_gone_is_removed_with_the_last_on_it(
    api: Api, places: Places
) -> None:
    """It is beside the chain, in it, and beside it again, and no record has it for an overlay."""
    guest = places.guest()
    await places.known(api)
    first = file_of(guest)
    first_made, beside = await stack(api, guest, 2)
    await revert(api, first_made)
    newest = await api.create(guest, name="newest")
    await delete(api, first_made)
    await revert(api, beside)
    await revert(api, newest)
    for one in (beside, newest):
        await delete(api, one)
    assert os.listdir(Path(first).parent) == [Path(first).name]


@pytest.mark.parametrize("base_format", ["qcow2", "raw"])
async def test_older_ones_go_while_the_guest_runs_on_what_it_went_back_to(
    api: Api, lab: Lab, tmp_path: Path, base_format: str
) -> None:
    guest = lab.guest([DiskSpec(format=base_format)])  # type: ignore[arg-type]
    stacked = await chain_of(api, guest, 3)
    guest.poweroff()
    sums = await contents(api, tmp_path, stacked)
    await revert(api, stacked[1])
    guest.start()
    assert (guest.read("vda", "mark0"), guest.read("vda", "mark1")) == ("text-0", "text-1")
    guest.write("vda", "mark9", "later")
    for number in (0, 1):  # the newest, of which nothing is below the disk, is the last
        await delete(api, stacked[number])
        guest.writes_go_on()
        assert await contents(api, tmp_path, stacked[number + 1 :]) == sums[number + 1 :]
        assert file_of(guest) == file_of(guest, INACTIVE)
    await delete(api, stacked[2])
    assert len(images.chain(file_of(guest))) == 1
    assert (guest.read("vda", "mark1"), guest.read("vda", "mark9")) == ("text-1", "later")
    guest.poweroff()
    guest.start()
    assert guest.read("vda", "mark9") == "later"
    assert f"{guest.name} is detached" not in lab.daemon.log
    guest.remove()


@pytest.mark.parametrize("seed", range(4))
async def test_creates_reverts_and_deletes_at_random(
    api: Api, places: Places, tmp_path: Path, seed: int
) -> None:
    """The disk and every snapshot against what was written, after each of them."""
    chance = random.Random(seed)
    guest = places.guest(DiskSpec(folder=places.folder(), size_mib=4, filesystem=None))
    await places.known(api)
    first = file_of(guest)
    put(first, 1)
    present = whole(first, tmp_path)
    taken: dict[Created, str] = {}
    for number in range(40):
        what = chance.choice(["create", "write", "revert", "revert", "delete"])
        one = chance.choice(list(taken)) if taken else None
        if what == "create" and len(taken) < 6:
            taken[await api.create(guest, name=f"r{number}")] = present
        elif what == "revert" and one is not None and file_of(guest) != first:
            try:
                await revert(api, one)
                present = taken[one]
            except ApiError as error:  # the disk is an image that was there before us
                assert "make a snapshot of the disk first" in error.text
                taken[await api.create(guest, name=f"f{number}")] = present
        elif what == "delete" and one is not None:
            await delete(api, one)
            del taken[one]
        else:
            put(file_of(guest), number + 2, chance.randrange(4))
            present = whole(file_of(guest), tmp_path)
        assert whole(file_of(guest), tmp_path) == present
        assert await contents(api, tmp_path, list(taken)) == list(taken.values())
        states = {row["State"] for row in (await api.snapshots_of(guest)).values()}
        assert states <= {"ready"}
        used = {file_of(guest)}
        for one in taken:
            source = etree.fromstring(await api.backup_source(one.snapshot))
            used.add(source.get("file") or "")
        there = {str(path) for path in Path(first).parent.iterdir()}
        assert there - {first} == used - {first}
    for one in chance.sample(list(taken), len(taken)):
        await delete(api, one)
        assert whole(file_of(guest), tmp_path) == present
    there = {str(path) for path in Path(first).parent.iterdir()}
    assert there - {first} == {file_of(guest)} - {first}


async def test_the_image_that_was_there_first_is_never_removed(
    api: Api, places: Places, tmp_path: Path
) -> None:
    guest = places.guest()
    await places.known(api)
    first = file_of(guest)
    one, two = await stack(api, guest, 2)
    await revert(api, one)
    await delete(api, one)
    assert file_of(guest) == first
    put(first, 0x31, count=4)
    text = (await refused(revert(api, two), "InvalidState")).text
    assert "make a snapshot of the disk first" in text
    three = await api.create(guest, name="three")
    sums = await contents(api, tmp_path, [two, three])
    for turn in (two, three, two):
        await revert(api, turn)
        assert await contents(api, tmp_path, [two, three]) == sums
        assert {row["State"] for row in (await api.snapshots_of(guest)).values()} == {"ready"}
    await delete(api, three)
    assert images.checksum(first, "qcow2", tmp_path) == sums[1]
    await delete(api, two)
    assert whole(file_of(guest), tmp_path) == sums[0]
    assert {str(path) for path in Path(first).parent.iterdir()} == {first, file_of(guest)}
