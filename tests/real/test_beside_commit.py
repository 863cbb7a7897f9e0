"""A commit at full speed holds up no other domain: the exact figure is measured by `make bench`."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

import pytest

from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real.api import QUIESCE_REQUIRED, Api
from tests.real.conftest import Connect
from tests.real.test_delete import delete

pytestmark = pytest.mark.timeout(180)

FILLED = 500
ALONE = 5
FACTOR = 10  # the commit, guests and other tests share two cores and a disk


@pytest.fixture
def large(lab: Lab) -> Iterator[Guest]:
    """A guest with room to fill."""
    guest = lab.guest([DiskSpec(size_mib=600)])
    yield guest
    guest.remove()


async def timed(api: Api, guest: Guest) -> float:
    """How long a Create takes; its snapshot goes again."""
    began = time.monotonic()
    created = await api.create(guest, flags=QUIESCE_REQUIRED)
    took = time.monotonic() - began
    await delete(api, created)
    return took


async def test_create_on_another_domain_answers_as_fast_as_before(
    daemon: Lab, connect: Connect, large: Guest, guest: Guest
) -> None:
    api, other = await connect(), await connect()
    alone = [await timed(other, guest) for _ in range(ALONE)]
    created = await api.create(large, flags=QUIESCE_REQUIRED)
    await asyncio.to_thread(large.fill, "vda", "much", FILLED)
    await asyncio.to_thread(large.sync, 60)
    beside: list[float] = []
    deleting = asyncio.create_task(delete(api, created))
    while not deleting.done():
        beside.append(await timed(other, guest))
    await deleting
    beside.pop()  # the commit may have ended in the middle of it
    print(f"alone {statistics.median(alone):.3f} s, beside {[f'{one:.3f}' for one in beside]}")
    assert beside, "none was answered before the commit's end"
    assert min(beside) < FACTOR * statistics.median(alone)
