"""The file system that an overlay grows in gets full: it is said in time, once, and by no path."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.blockdev import FileSystem, Mounted
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real.api import SNAPSHOT, Api
from tests.real.places import Places
from tests.real.test_refusals import places

__all__ = ["places"]

MIB = 1 << 20


@pytest.fixture
def small(lab: Lab) -> Iterator[Mounted]:
    """A file system of 64 MiB."""
    mounted = lab.block.mounted("ext4", 64)
    yield mounted
    mounted.unmount()


async def looked_at(guest: Guest, said: Callable[[], Any]) -> None:
    """Give the daemon reason to look at the domain until it has said something."""
    async with asyncio.timeout(20):
        while not said():
            guest.domain.suspend()
            guest.domain.resume()
            await asyncio.sleep(0.1)


async def test_a_file_system_that_gets_full_is_warned_of_once(
    api: Api, small: Mounted, places: Places, lab: Lab
) -> None:
    guest = places.guest(places.disk(small.path), start=True)
    await places.known(api)
    await api.client.listen()
    lower = await api.create(guest, name="lower")
    upper = await api.create(guest, name="upper")

    def warnings() -> list[list[str]]:
        signals = [s for s in api.client.signals if s.member == "Warning"]
        assert {s.path for s in signals} <= {upper.snapshot}  # the other's overlay grows no more
        return [s.body for s in signals]

    small.fill(leave=4 * MIB)
    await looked_at(guest, warnings)
    ((code, message),) = warnings()
    assert code == "low-space"
    assert "bytes left" in message
    assert "/" not in message
    small.drain()
    await looked_at(guest, lambda: "no more low-space" in lab.daemon.log_of_this_life)
    assert len(warnings()) == 1  # although it was looked at again and again
    small.fill(leave=4 * MIB)
    await looked_at(guest, lambda: len(warnings()) == 2)
    assert lab.daemon.log_of_this_life.count("CODE=low-space") == 3
    small.drain()
    await looked_at(guest, lambda: lab.daemon.log_of_this_life.count("no more low-space") == 2)
    for created in (upper, lower):
        await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)
    assert len(warnings()) == 2


@pytest.mark.parametrize("filesystem", ["xfs", "btrfs"])
async def test_what_a_guest_shares_with_a_clone_or_snapshot_needs_room_too(
    api: Api, places: Places, lab: Lab, filesystem: FileSystem
) -> None:
    made = lab.block.mounted(filesystem, 400)
    try:
        guest = places.guest(DiskSpec(format="raw", folder=made.path), start=True)
        await places.known(api)
        await api.client.listen()
        created = await api.create(guest)
        assert created.modified_disk == ""

        def warnings() -> list[list[str]]:
            return [s.body for s in api.client.signals if s.member == "Warning"]

        made.fill(leave=8 * MIB)
        await looked_at(guest, warnings)
        ((code, message),) = warnings()
        assert code == "low-space"
        assert "/" not in message
        made.drain()
        await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)
        places.forget()
    finally:
        made.unmount()
