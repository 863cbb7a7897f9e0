"""The Ceph cluster goes away for a minute, in the middle of what is asked of it.

The guest is let go, the caller is told, all others are served; afterwards there is a snapshot that
is listed and can be read, or nothing of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snapd_vm.engine.journal import DeleteStep, Step
from tests.lab.ceph import Ceph
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real import images
from tests.real.api import QUIESCE_REQUIRED, SNAPSHOT, VDA, Api, ApiError
from tests.real.conftest import Connect
from tests.real.places import Places, refused
from tests.real.test_crash import FAULTY, faulty
from tests.real.test_rbd import ceph, checksum, delete, metadata, name_of, snaps
from tests.real.test_revert import places

__all__ = ["ceph", "faulty", "places"]

pytestmark = pytest.mark.timeout(300)

AWAY_S = 60
FROZEN_LIMIT_S = 10


@pytest.fixture
def cluster(ceph: Ceph) -> Iterator[Ceph]:
    """The cluster, which is back at the test's end."""
    yield ceph
    ceph.resume()


@pytest.fixture(scope="module")
def writing(lab: Lab, ceph: Ceph) -> Iterator[Guest]:
    running = lab.guest([ceph.disk("away"), DiskSpec()])
    yield running
    running.remove()


async def _until(path: Path, there: bool = True) -> None:
    deadline = time.monotonic() + 30
    while path.exists() is not there:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def _timed(call: Awaitable[Any]) -> tuple[float, ApiError | None]:
    began = time.monotonic()
    try:
        await call
    except ApiError as error:
        return time.monotonic() - began, error
    return time.monotonic() - began, None


async def _create_and_delete(api: Api, guest: Guest) -> None:
    await delete(api, await api.create(guest))


async def _until_free(api: Api, guest: Guest) -> None:
    """Wait until what was left open is settled."""
    deadline = time.monotonic() + 60
    while True:
        try:
            await api.plan(guest)
        except ApiError as error:
            assert error.name in ("Busy", "TimedOut"), error
            assert time.monotonic() < deadline
            await asyncio.sleep(0.5)
        else:
            return


async def test_away_for_a_minute_in_the_freeze(
    connect: Connect, faulty: Lab, cluster: Ceph, writing: Guest, places: Places, tmp_path: Path
) -> None:
    other, third = places.guest(cluster.disk("other")), places.guest(cluster.disk("third"))
    file = places.guest()
    flag = tmp_path / "frozen"
    argv = (*FAULTY, "--at", Step.FROZEN, "--do", f"wait:{flag}")
    faulty.daemon.start({"frozen_limit_s": FROZEN_LIMIT_S}, argv=argv)
    api = await connect()
    await places.known(api)
    stands = await api.create(other, name="stands")
    first = checksum(cluster, f"other@{name_of(stands)}", tmp_path)
    writing.reset()
    create = asyncio.create_task(
        _timed(api.create(writing, VDA, name="lost", flags=QUIESCE_REQUIRED))
    )
    await _until(flag)
    cluster.suspend()
    away = time.monotonic()
    flag.unlink()
    asked = [
        asyncio.create_task(_timed(api.create(third))),
        asyncio.create_task(_timed(api.call(stands.snapshot, SNAPSHOT, "Delete", "u", 0))),
        asyncio.create_task(_timed(api.backup_source(stands.snapshot))),
    ]
    slowest = 0.0
    while time.monotonic() < away + AWAY_S:  # all others are served
        took, error = await _timed(_create_and_delete(api, file))
        assert error is None
        slowest = max(slowest, took)
        await asyncio.sleep(0.5)
    assert slowest < 5
    took, error = await create
    assert error is not None and error.name == "QuiesceTimedOut", error
    assert "'ceph -s'" in error.text and cluster.host not in error.text
    for task in asked:
        took, error = await task
        assert error is not None and error.name == "TimedOut", error
        assert took < 45
    # To thaw, the guest has to write to the disk that is away: it was told to in time, and does so
    # as soon as it can. Its other disk was not frozen at all.
    assert f"a guest has stood still for {FROZEN_LIMIT_S} s" in faulty.daemon.log
    assert writing.stalls()["vdb"].longest_s < 5
    cluster.resume()
    wait_until("the guest is thawed", lambda: not writing.agent_says_frozen(), 60)
    writing.writes_go_on(30)
    assert not cluster.ceph("osd", "blocklist", "ls").strip(), "somebody was shut out"
    for guest in (writing, other, third):
        await _until_free(api, guest)
    assert not await api.snapshots_of(writing)
    assert not snaps(cluster, "away") and not metadata(cluster, "away")
    assert not snaps(cluster, "third")
    told = await api.snapshots_of(other)
    assert set(snaps(cluster, "other")) == ({name_of(stands)} if told else set())
    if told:
        assert checksum(cluster, f"other@{name_of(stands)}", tmp_path) == first
        await delete(api, stands)
    made = await api.create(writing, VDA, name="lost", flags=QUIESCE_REQUIRED)
    assert images.is_clean(cluster.read(f"away@{name_of(made)}", tmp_path / "raw"))
    await delete(api, made)


async def test_away_for_longer_than_the_guest_may_be_frozen(
    connect: Connect, faulty: Lab, cluster: Ceph, writing: Guest, tmp_path: Path
) -> None:
    """It is taken all the same, and is told to be what it is."""
    flag = tmp_path / "frozen"
    argv = (*FAULTY, "--at", Step.FROZEN, "--do", f"wait:{flag}")
    faulty.daemon.start({"frozen_limit_s": 2}, argv=argv)
    api = await connect()
    create = asyncio.create_task(api.create(writing, VDA))
    await _until(flag)
    cluster.suspend()
    flag.unlink()
    await asyncio.sleep(6)
    cluster.resume()
    made = await create
    assert "a guest has stood still for 2 s" in faulty.daemon.log
    assert made.ours("consistency") == "crash"
    told = await api.properties(made.snapshot, SNAPSHOT)
    assert (told["State"], told["Consistency"]) == ("ready", "crash")
    assert told["FrozenTime"] >= 2_000_000
    writing.writes_go_on(30)
    assert not writing.agent_says_frozen()
    cluster.read(f"away@{name_of(made)}", tmp_path / "raw")
    assert images.recovers(tmp_path / "raw")
    await delete(api, made)
    assert not snaps(cluster, "away") and not metadata(cluster, "away")


async def test_away_in_a_delete(
    connect: Connect, faulty: Lab, cluster: Ceph, writing: Guest, tmp_path: Path
) -> None:
    flag = tmp_path / "begun"
    argv = (*FAULTY, "--at", DeleteStep.BEGUN, "--do", f"wait:{flag}")
    faulty.daemon.start({}, argv=argv)
    api = await connect()
    made = await api.create(writing)
    call = asyncio.create_task(_timed(api.call(made.snapshot, SNAPSHOT, "Delete", "u", 0)))
    await _until(flag)
    cluster.suspend()
    flag.unlink()
    took, error = await call
    assert error is not None and error.name == "TimedOut" and took < 60
    await refused(api.create(writing), "Busy")
    cluster.resume()
    writing.writes_go_on(30)
    assert not cluster.ceph("osd", "blocklist", "ls").strip(), "somebody was shut out"
    await _until_free(api, writing)
    told = await api.snapshots_of(writing)
    assert set(snaps(cluster, "away")) == ({name_of(made)} if told else set())
    for path, row in told.items():
        assert row["State"] == "ready"
        await api.call(path, SNAPSHOT, "Delete", "u", 0)
    assert not snaps(cluster, "away") and not metadata(cluster, "away")
