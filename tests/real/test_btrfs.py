"""Create and Delete with method btrfs on a real guest that writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.blockdev import Mounted
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real import images
from tests.real.api import QUIESCE_REQUIRED, SNAPSHOT, Api, Created

MIB = 1 << 20
BTRFS = "<diskSnapshot method='btrfs'/>"


@pytest.fixture(scope="module")
def mounted(lab: Lab) -> Iterator[Mounted]:
    """A btrfs."""
    made = lab.block.mounted("btrfs", 1000)
    yield made
    made.unmount()


@pytest.fixture(scope="module")
def own(lab: Lab, mounted: Mounted) -> Iterator[Guest]:
    """A guest with a disk in a subvolume."""
    path = mounted.path / "vm"
    run("btrfs", "-q", "subvolume", "create", path)
    running = lab.guest([DiskSpec(format="raw", folder=path)])
    yield running
    running.remove()


async def delete(api: Api, created: Created) -> str:
    return str((await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0))[0])


async def test_the_view_is_what_the_guest_had_and_stays_so(
    api: Api, own: Guest, tmp_path: Path
) -> None:
    image = own.disk().path
    before, xml = set(os.listdir(image.parent)), own.domain.XMLDesc()
    own.write("vda", "mark", "before")
    created = await api.create(own, name="nightly", flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert (told["Method"], told["Format"], told["Size"]) == ("btrfs", "raw", 64 * MIB)
    path = Path(created.file)
    assert images.is_clean(path)
    assert not images.needs_recovery(path)
    checksum = images.checksum(path, "raw", tmp_path)
    own.fill("vda", "filling", 4)
    assert images.checksum(path, "raw", tmp_path) == checksum
    assert await delete(api, created) == ""
    assert set(os.listdir(image.parent)) == before
    assert own.domain.XMLDesc() == xml
