"""With the database lost, the log tells of what bears our mark, with a command that is right."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.blockdev import Mounted
from tests.lab.deadline import wait_until
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real import images
from tests.real.api import SNAPSHOT, Api
from tests.real.places import CONFIG, INACTIVE, Places, file_of, image, with_image
from tests.real.test_reflink_files import raw

COMMAND = re.compile(r"this would remove it: (.*?) MESSAGE_ID=")


@pytest.fixture
def places(lab: Lab) -> Iterator[Places]:
    """Domains of the test's own."""
    made = Places(lab)
    yield made
    made.forget()


@pytest.fixture(scope="module")
def xfs(lab: Lab) -> Iterator[Mounted]:
    """A file system that can clone."""
    made = lab.block.mounted("xfs", 600)
    yield made
    made.unmount()


async def strays(lab: Lab, *, lost: bool = True) -> dict[str, str]:
    """Start the daemon again, its database lost; the files that its log tells of, and why."""
    lab.daemon.stop()
    if lost:
        shutil.rmtree(lab.daemon.state_dir)
    before = len(lab.daemon.log)
    lab.daemon.start({}, argv=None)
    end = "looked for our files that no record knows: "
    await asyncio.to_thread(wait_until, "it has looked", lambda: end in lab.daemon.log[before:], 30)
    lines = [line for line in lab.daemon.log[before:].splitlines() if "left alone; " in line]
    assert f"{end}{len(lines)}" in lab.daemon.log[before:]
    return {line.partition(": ")[2].partition(" is a file of")[0]: line for line in lines}


def command(line: str) -> str:
    """The command in the line; '' : none."""
    found = COMMAND.search(line)
    return found[1] if found else ""


async def chain(api: Api, places: Places, *, start: bool) -> tuple[Guest, list[str]]:
    """A guest with two snapshots, and the files of its chain, its own first."""
    guest = places.guest(start=start)
    await places.known(api)
    one = await api.create(guest, name="one")
    two = await api.create(guest, name="two")
    return guest, [two.overlay, one.overlay, one.file]


@pytest.mark.parametrize("start", [True, False])
async def test_overlays_in_a_chain(api: Api, lab: Lab, places: Places, start: bool) -> None:
    guest, (top, middle, base) = await chain(api, places, start=start)
    found = await strays(lab)
    assert {top, middle} <= found.keys()
    assert base not in found
    assert images.chain(top) == [top, middle, base]  # left alone
    assert "virsh" in command(found[middle])
    assert "blockcommit" in command(found[middle])
    run("bash", "-c", command(found[middle]), timeout=60)
    assert images.chain(top) == [top, base]
    assert not os.path.exists(middle)
    again = await strays(lab)
    assert middle not in again
    run("bash", "-c", command(again[top]), timeout=60)
    assert file_of(guest) == file_of(guest, INACTIVE) == base
    assert not os.path.exists(top)
    assert guest.domain.isActive() == start
    assert not {top, middle} & (await strays(lab)).keys()
    guest.domain.destroy() if start else guest.domain.create()


async def test_an_overlay_that_nobody_uses(api: Api, lab: Lab, places: Places) -> None:
    guest, (top, middle, base) = await chain(api, places, start=False)
    other = image(places.folder() / "other.qcow2")
    xml = guest.domain.XMLDesc().replace(top, str(other))
    places.lab.hypervisor.define(xml)
    aside = places.guest(with_image(image(Path(base).parent / "beside.qcow2")))
    await places.known(api)
    assert file_of(aside)  # it keeps the folder one that is looked in
    found = await strays(lab)
    assert top in found[middle]
    assert not command(found[middle])  # the other one lies on it
    assert command(found[top]) == f"rm -- {top}"
    run("bash", "-c", command(found[top]))
    again = await strays(lab)
    assert command(again[middle]) == f"rm -- {middle}"


async def test_a_base_that_others_use_too_is_not_to_be_written_to(
    api: Api, lab: Lab, places: Places
) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    created = await api.create(guest)
    other = places.guest(with_image(image(places.folder() / "clone.qcow2", created.file)))
    line = (await strays(lab))[created.overlay]
    assert other.name in line
    assert not command(line)


async def test_a_domain_with_a_managed_save_image_is_to_be_started_first(
    api: Api, lab: Lab, places: Places
) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    created = await api.create(guest)
    guest.domain.managedSave(0)
    try:
        line = (await strays(lab))[created.overlay]
        assert "managed save image" in line
        assert not command(line)
    finally:
        guest.domain.managedSaveRemove(0)


async def test_an_overlay_of_the_next_start_only(api: Api, lab: Lab, places: Places) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    created = await api.create(guest)
    definition = guest.domain.XMLDesc(INACTIVE)
    run(
        *("virsh", "-c", lab.hypervisor.uri, "blockcommit", guest.name, "vda"),
        *("--active", "--pivot", "--wait"),
        timeout=60,
    )
    lab.hypervisor.define(definition)
    line = (await strays(lab))[created.overlay]
    assert "next start" in line
    assert not command(line)


async def test_a_clone(api: Api, lab: Lab, places: Places, xfs: Mounted) -> None:
    guest = places.guest(with_image(raw(xfs.path), "raw"))
    await places.known(api)
    created = await api.create(guest)
    line = (await strays(lab))[created.file]
    assert command(line) == f"chattr -i -- {created.file} && rm -- {created.file}"
    guest.domain.attachDeviceFlags(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{created.file}'/><target dev='vdb' bus='virtio'/></disk>",
        CONFIG,
    )
    line = (await strays(lab))[created.file]
    assert not command(line)
    assert guest.name in line
    run("chattr", "-i", created.file)


async def test_what_is_on_record_or_not_ours_is_not_told_of(
    api: Api, lab: Lab, places: Places
) -> None:
    guest, (top, middle, base) = await chain(api, places, start=False)
    folder = Path(top).parent
    run("cp", "-a", "--preserve=all", top, folder / "copy.qcow2")
    assert os.getxattr(folder / "copy.qcow2", "trusted.snapd-vm")
    named = image(folder / "snapd-vm-00000000-0000-0000-0000-000000000000")
    (older,) = (
        path for path, row in (await api.snapshots_of(guest)).items() if row["Name"] == "one"
    )
    await api.call(older, SNAPSHOT, "Revert", "u", 0)
    ours = {str(path) for path in folder.iterdir()}
    assert not ours & (await strays(lab, lost=False)).keys()
    found = ours & (await strays(lab)).keys()
    assert found == ours - {base, str(folder / "copy.qcow2"), str(named)}
    assert middle in found


async def test_a_draft_that_no_journal_knows(api: Api, lab: Lab, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    folder = Path(guest.disk().path).parent
    draft = image(folder / ".snapd-vm-0b9a2f10-1111-4222-8333-444455556666.vda.new")
    image(folder / ".snapd-vm-notes.new")
    found = {
        path: line for path, line in (await strays(lab)).items() if path.startswith(str(folder))
    }
    assert list(found) == [str(draft)]
    assert command(found[str(draft)]) == f"rm -- {draft}"
    assert draft.exists()
