"""Reverts, and deletes after them, that are refused: nothing has changed then."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapd_vm import storage
from snapd_vm.errors import Busy
from tests.lab import allow
from tests.lab.blockdev import Mounted
from tests.lab.deadline import wait_until
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import attempt, run
from tests.real.api import NAME, SNAPSHOT, Api, Created
from tests.real.places import (
    INACTIVE,
    Places,
    file_of,
    image,
    refused,
    with_image,
    world,
)
from tests.real.test_delete import delete
from tests.real.test_faults import small
from tests.real.test_revert import contents, places, put, revert, stack, until

__all__ = ["places", "small"]


async def kept(api: Api, guest: Guest, created: Created, *names: str) -> str:
    """The revert is refused with one of these errors, and nothing has changed; what it says."""
    before = world(guest), await api.snapshots_of(guest)
    error = await refused(revert(api, created), *names)
    assert (world(guest), await api.snapshots_of(guest)) == before
    return error.text


@contextmanager
def reader(path: str) -> Iterator[str]:
    """A process that has the file open, and nobody else has; its id."""
    with open(path, "rb") as file:
        process = subprocess.Popen(["sleep", "60"], stdin=file)
    try:
        yield str(process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("state", ["running", "paused", "saved"])
async def test_a_domain_that_is_not_off(api: Api, places: Places, state: str) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    created = await api.create(guest)
    if state == "paused":
        guest.domain.suspend()
    elif state == "saved":
        guest.domain.managedSave()
        await api.client.listen()
    text = await kept(api, guest, created, "InvalidState")
    assert {"running": "shut it down", "paused": "shut it down", "saved": "managedsave-remove"}[
        state
    ] in text
    if state == "saved":
        guest.domain.managedSaveRemove()
    else:
        guest.domain.destroy()
    await revert(api, created)


async def test_a_domain_with_checkpoints(api: Api, places: Places) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    created = await api.create(guest)
    guest.domain.checkpointCreateXML("<domaincheckpoint><name>one</name></domaincheckpoint>")
    guest.destroy()
    assert "checkpoints" in await kept(api, guest, created, "InvalidState")


async def test_flags(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    call = api.call(created.snapshot, SNAPSHOT, "Revert", "u", 1)
    await refused(call, "org.freedesktop.DBus.Error.InvalidArgs")


async def test_without_the_right(api: Api, lab: Lab, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    before = world(guest)
    argv = ("call", NAME, created.snapshot, SNAPSHOT, "Revert", "u", "0")
    for rules in ("", allow("nobody", f"{NAME}.delete"), allow("backup", f"{NAME}.revert")):
        lab.polkit.rules(rules)
        done = lab.busctl(*argv, user="nobody")
        assert done.returncode != 0
        assert world(guest) == before
    lab.polkit.rules(allow("nobody", f"{NAME}.revert"))
    done = lab.busctl(*argv, user="nobody")
    assert done.returncode == 0, done.stderr
    lab.polkit.rules("")
    assert world(guest) != before


async def test_another_domain_uses_what_would_be_discarded(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    clone = image(places.folder() / "clone.qcow2", created.overlay)
    other = places.guest(with_image(clone))
    await places.known(api)
    assert other.name in await kept(api, guest, created, "Busy")
    await places.unknown(api, other)
    beside = image(Path(created.overlay).with_name("linked.qcow2"), created.overlay)
    assert "linked.qcow2" in await kept(api, guest, created, "Busy")
    beside.unlink()
    await revert(api, created)


async def test_what_would_be_discarded_is_being_read(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    with reader(created.overlay) as pid:
        assert pid in await kept(api, guest, created, "Busy")
    with open(created.file, "rb"):  # to read the snapshot is nothing that a revert disturbs
        await revert(api, created)


async def test_an_image_that_is_not_ours(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    foreign = image(Path(created.overlay).with_name("foreign.qcow2"), created.overlay)
    xml = guest.domain.XMLDesc(INACTIVE)
    connection: Any = guest.domain.connect()
    connection.defineXML(xml.replace(created.overlay, str(foreign)))
    text = await kept(api, guest, created, "InvalidState")
    assert "make a snapshot" in text
    xml = guest.domain.XMLDesc(INACTIVE)
    connection.defineXML(xml.replace(str(foreign), created.file))  # as from an old definition
    await until(api, guest, created, "failed")
    await refused(revert(api, created), "InvalidState")
    assert file_of(guest) == created.file
    assert os.path.exists(created.overlay)


async def test_no_room_for_the_overlay(api: Api, places: Places, small: Mounted) -> None:
    guest = places.guest(with_image(image(small.path / "disk.qcow2")))
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    small.fill(1 << 20)
    assert "make room" in await kept(api, guest, created, "NoSpace")
    small.drain()
    await revert(api, created)
    guest.remove()


async def test_no_room_for_what_a_delete_copies(
    api: Api, places: Places, small: Mounted, tmp_path: Path
) -> None:
    """The oldest goes, and a snapshot beside the chain needs what it had of it."""
    guest = places.guest(with_image(image(small.path / "disk.qcow2")))
    await places.known(api)
    put(file_of(guest), 9, count=6)
    stacked = await stack(api, guest, 2)
    sums = await contents(api, tmp_path, stacked)
    await revert(api, stacked[0])
    small.fill(3 << 20)
    error = await refused(delete(api, stacked[0]), "NoSpace")
    assert "make room" in error.text
    assert await contents(api, tmp_path, stacked) == sums
    small.drain()
    await delete(api, stacked[0])
    assert await contents(api, tmp_path, stacked[1:]) == sums[1:]
    await delete(api, stacked[1])
    guest.remove()


async def test_one_beside_the_chain_that_is_read_holds_up_the_delete_of_what_it_lies_on(
    api: Api, places: Places, tmp_path: Path
) -> None:
    guest = places.guest()
    await places.known(api)
    stacked = await stack(api, guest, 2)
    sums = await contents(api, tmp_path, stacked)
    await revert(api, stacked[0])
    with reader(stacked[1].file) as pid:
        for created in stacked:
            assert pid in (await refused(delete(api, created), "Busy")).text
    linked = image(Path(stacked[1].file).with_name("linked.qcow2"), stacked[1].file)
    assert "linked" in (await refused(delete(api, stacked[1]), "Busy")).text
    linked.unlink()
    assert await contents(api, tmp_path, stacked) == sums
    await delete(api, stacked[1])
    assert not os.path.exists(stacked[1].file)


async def test_one_beside_the_chain_that_can_not_be_looked_at_is_not_spoilt(
    api: Api, places: Places, tmp_path: Path
) -> None:
    """As when what it is on is not mounted."""
    guest = places.guest()
    await places.known(api)
    stacked = await stack(api, guest, 2)
    sums = await contents(api, tmp_path, stacked)
    await revert(api, stacked[0])
    away = places.folder() / "away"
    os.rename(stacked[1].file, away)
    assert "is not there" in (await refused(delete(api, stacked[0]), "InvalidState")).text
    os.rename(away, stacked[1].file)
    assert await contents(api, tmp_path, stacked) == sums
    await delete(api, stacked[0])
    assert await contents(api, tmp_path, stacked[1:]) == sums[1:]
    await delete(api, stacked[1])


async def test_an_image_with_snapshots_in_itself(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    (created,) = await stack(api, guest, 1)
    run("qemu-img", "snapshot", "-c", "inner", created.overlay)
    assert "internal" in await kept(api, guest, created, "InvalidState")
    run("qemu-img", "snapshot", "-d", "inner", created.overlay)
    await revert(api, created)


def test_what_is_kept_from_writers_is_not_opened_by_qemu(places: Places) -> None:
    path = str(image(places.folder() / "held.qcow2"))
    with storage.kept_from_writers(path):
        assert attempt(["qemu-io", "-c", "write 0 512", path]).returncode != 0
        assert attempt(["qemu-io", "-r", "-c", "read 0 512", path]).returncode == 0
    assert attempt(["qemu-io", "-c", "write 0 512", path]).returncode == 0
    argv = ["qemu-io", "-c", "read 0 512", "-c", "sleep 60000", path]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as writer:
        wait_until("it has it open", lambda: storage.write_locked(path), 10)
        with pytest.raises(Busy), storage.kept_from_writers(path):
            pass
        writer.kill()
