"""Method reflink on qcow2 images, which it takes where it is asked for."""

from __future__ import annotations

import os
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
from tests.real.api import NO_QUIESCE, QUIESCE_REQUIRED, SNAPSHOT, VDA, Api
from tests.real.places import Places, image, unchanged, with_image
from tests.real.test_delete import delete
from tests.real.test_revert import places
from tests.real.whole import all_are_whole

__all__ = ["places"]

REFLINK = "<diskSnapshot method='reflink'/>"


@pytest.fixture(scope="module")
def xfs(lab: Lab) -> Iterator[Mounted]:
    made = lab.block.mounted("xfs", 600)
    yield made
    made.unmount()


@pytest.fixture(scope="module")
def writing(lab: Lab, xfs: Mounted) -> Iterator[Guest]:
    """A guest that writes to a qcow2 image there."""
    guest = lab.guest([DiskSpec(folder=xfs.path)])
    yield guest
    guest.remove()


def folder(xfs: Mounted) -> Path:
    """A new one there."""
    made = xfs.path / uuids.uuid4().hex
    made.mkdir(mode=0o755)
    return made


@pytest.mark.timeout(300)
async def test_a_hundred_of_a_hundred_are_whole(api: Api, writing: Guest, scratch: Path) -> None:
    await all_are_whole(api, writing, REFLINK, scratch)


@pytest.mark.parametrize(
    ("flags", "consistency"), [(NO_QUIESCE, "paused"), (QUIESCE_REQUIRED, "quiesced")]
)
async def test_the_plan_says_what_will_be_made(
    api: Api, writing: Guest, flags: int, consistency: str
) -> None:
    plan = await api.plan(writing, method_xml=REFLINK, flags=flags)
    assert (plan["method"], plan["consistency"]) == ("reflink", consistency)
    assert f'consistency="{consistency}"' in plan["backup_source"]
    created = await api.create(writing, method_xml=REFLINK, flags=flags)
    assert (created.ours("format"), created.ours("consistency")) == ("qcow2", consistency)
    told = await api.properties(created.snapshot, SNAPSHOT)
    virtual = images.info(created.file)["virtual-size"]
    assert (told["Format"], told["Size"], told["Consistency"]) == ("qcow2", virtual, consistency)
    await delete(api, created)


async def test_the_default_is_qemu(api: Api, writing: Guest) -> None:
    (row,) = await api.disks(writing)
    assert row["method"] == "qemu"


async def test_it_goes_back(api: Api, writing: Guest) -> None:
    writing.write("vda", "mark", "before")
    created = await api.create(writing, VDA, REFLINK, flags=QUIESCE_REQUIRED)
    writing.write("vda", "mark", "after")
    writing.poweroff()
    assert await api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0) == [""]
    writing.start()
    assert writing.read("vda", "mark") == "before"
    await delete(api, created)


@pytest.mark.parametrize("how", ["backing file", "data in another file"])
async def test_one_that_lies_on_others_is_refused(
    api: Api, places: Places, xfs: Mounted, how: str
) -> None:
    place = folder(xfs)
    path = place / "disk.qcow2"
    if how == "backing file":
        image(path, image(place / "base.qcow2"))
    else:
        data = ("-o", f"data_file={place}/data.raw,data_file_raw=on")
        run("qemu-img", "create", "-q", "-f", "qcow2", *data, path, "16M")
    guest = places.guest(with_image(path))
    await places.known(api)
    error = await unchanged(api, guest, "MethodNotSupported", method_xml=REFLINK)
    assert "backing file" in error.text
    assert not [name for name in os.listdir(place) if name.startswith("snapd-vm-")]
