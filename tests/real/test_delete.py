"""Delete with method qemu on real guests: the snapshot goes, and nothing else changes."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from snapd_vm.engine.journal import DeleteStep
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real import images
from tests.real.api import QUIESCE_REQUIRED, SNAPSHOT, Api, ApiError, Created
from tests.real.conftest import Connect
from tests.real.test_crash import FAULTY, active_file, faulty, files_of

__all__ = ["faulty"]


@pytest.fixture
def own(lab: Lab) -> Iterator[Guest]:
    guest = lab.guest()
    yield guest
    guest.remove()


async def delete(api: Api, created: Created) -> str:
    return str((await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0))[0])


async def chain_of(api: Api, guest: Guest, count: int) -> list[Created]:
    """So many snapshots on top of one another, with a mark of the guest's before each."""
    qemu = "<diskSnapshot method='qemu'/>"
    found = []
    for number in range(count):
        guest.write("vda", f"mark{number}", f"text-{number}")
        found.append(
            await api.create(guest, method_xml=qemu, name=f"s{number}", flags=QUIESCE_REQUIRED)
        )
    guest.write("vda", f"mark{count}", f"text-{count}")
    return found


def marks(guest: Guest, count: int) -> list[str]:
    return [guest.read("vda", f"mark{number}") for number in range(count + 1)]


async def test_the_newest_goes_while_the_guest_writes(api: Api, own: Guest) -> None:
    first, files = active_file(own), files_of(own)
    (created,) = await chain_of(api, own, 1)
    modified = await delete(api, created)
    source = etree.fromstring(modified).find("source")
    assert source is not None
    assert source.get("file") == first == active_file(own) == active_file(own, 2)
    assert files_of(own) == files
    assert not await api.snapshots_of(own)
    own.writes_go_on()
    assert marks(own, 1) == ["text-0", "text-1"]
    own.poweroff()
    own.start()
    assert marks(own, 1) == ["text-0", "text-1"]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("state", ["running", "paused", "shutoff"])
async def test_any_of_three_goes_and_the_others_stay_as_they_are(
    api: Api, own: Guest, tmp_path: Path, which: int, state: str
) -> None:
    chain = await chain_of(api, own, 3)
    if state == "paused":
        own.domain.suspend()
    elif state == "shutoff":
        own.poweroff()
    others = [created for created in chain if created is not chain[which]]
    before = {c.snapshot: images.checksum(c.file, c.ours("format"), tmp_path) for c in others}
    await api.client.listen()
    await delete(api, chain[which])
    assert own.state == state
    assert set(await api.snapshots_of(own)) == set(before)
    for path, checksum in before.items():
        source = etree.fromstring(await api.backup_source(path))
        assert images.checksum(source.get("file") or "", "qcow2", tmp_path) == checksum
    assert not os.path.exists(chain[which].overlay)
    live = active_file(own)
    assert live == active_file(own, 2)
    assert len(images.chain(live)) == 3
    moved = [s for s in api.client.signals if s.member == "Warning"]
    if which < 2:  # the next one's source was the overlay that has gone into its base
        assert [s.path for s in moved] == [chain[which + 1].snapshot]
        assert moved[0].body[0] == "source-moved"
        assert "/" not in moved[0].body[1]
        again = etree.fromstring(await api.backup_source(chain[which + 1].snapshot))
        assert again.get("file") == chain[which].file
    else:
        assert not moved
    if state == "paused":
        own.domain.resume()
    elif state == "shutoff":
        own.start()
    own.writes_go_on()
    assert marks(own, 3) == [f"text-{n}" for n in range(4)]


async def test_raw_bases_too(api: Api, lab: Lab) -> None:
    guest = lab.guest([DiskSpec(format="raw")])
    first = active_file(guest)
    chain = await chain_of(api, guest, 2)
    await api.client.listen()
    for created in chain:
        await delete(api, created)
    # The second one's source was an overlay, and is then the image.
    formats = [
        (signal.path, signal.body[1]["Format"].value)
        for signal in api.client.signals
        if signal.member == "PropertiesChanged" and "Format" in signal.body[1]
    ]
    assert formats == [(chain[1].snapshot, "raw")]
    assert active_file(guest) == first
    driver = etree.fromstring(guest.domain.XMLDesc(2)).find("devices/disk/driver")
    assert driver is not None
    assert driver.get("type") == "raw"
    assert marks(guest, 2) == ["text-0", "text-1", "text-2"]
    guest.remove()


async def test_a_source_that_is_being_read_is_refused(api: Api, own: Guest) -> None:
    (created,) = await chain_of(api, own, 1)
    with open(created.file, "rb") as file, subprocess.Popen(["sleep", "60"], stdin=file) as p:
        with pytest.raises(ApiError) as error:
            await delete(api, created)
        assert error.value.name == "Busy"
        assert "process" in error.value.text
        p.kill()
    await delete(api, created)


@pytest.mark.parametrize("step", list(DeleteStep))
@pytest.mark.parametrize("which", [0, 1])
async def test_killed_at(
    connect: Connect, faulty: Lab, own: Guest, which: int, step: DeleteStep
) -> None:
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "kill"))
    api = await connect()
    chain = await chain_of(api, own, 2)
    with pytest.raises(ApiError) as error:
        await delete(api, chain[which])
    assert error.value.name == "org.freedesktop.DBus.Error.NoReply"
    await asyncio.to_thread(wait_until, "it is dead", lambda: not faulty.daemon.running, 10)
    faulty.daemon.start({}, argv=DAEMON)
    own.writes_go_on()
    assert marks(own, 2) == ["text-0", "text-1", "text-2"]
    there = await api.snapshots_of(own)
    gone = step is not DeleteStep.CHECKED
    assert (chain[which].snapshot in there) is not gone
    assert os.path.exists(chain[which].overlay) is not gone
    assert {row["State"] for row in there.values()} == {"ready"}
    for path in there:
        source = etree.fromstring(await api.backup_source(path))
        assert os.path.exists(source.get("file") or "")
        await api.call(path, SNAPSHOT, "Delete", "u", 0)
    assert len(images.chain(active_file(own))) == 1
    assert active_file(own) == active_file(own, 2)
