"""The limits of the configuration: how many snapshots a disk has, and how long its chain gets."""

from __future__ import annotations

import shutil

import pytest

from tests.lab.lab import Lab
from tests.real import images
from tests.real.api import SNAPSHOT, Api
from tests.real.conftest import Connect
from tests.real.places import Places, file_of, refused, unchanged, world
from tests.real.test_refusals import places

__all__ = ["places"]


async def limited(lab: Lab, connect: Connect, **config: object) -> Api:
    """A client of the daemon, started anew with this configuration."""
    lab.daemon.stop()
    lab.daemon.start(config)
    return await connect()


@pytest.mark.parametrize("running", [True, False])
async def test_one_snapshot_more_than_the_limit_is_refused_with_what_to_delete(
    daemon: Lab, connect: Connect, places: Places, running: bool
) -> None:
    api = await limited(daemon, connect, snapshot_limit=2)
    guest = places.guest(places.disk(), places.disk(), start=running)
    await places.known(api)
    oldest = await api.create(guest, name="oldest")
    await api.create(guest, name="newer")
    error = await unchanged(api, guest, "NoSpace", name="newest")
    assert "'oldest'" in error.text
    assert "snapshot_limit is 2" in error.text
    await api.create(
        guest, "<disk><target dev='vdb'/></disk>", name="other"
    )  # each disk for itself
    await api.call(oldest.snapshot, SNAPSHOT, "Delete", "u", 0)
    await api.create(guest, name="newest")
    assert "'newer'" in (await unchanged(api, guest, "NoSpace", name="more")).text


async def test_a_set_is_refused_for_the_one_disk_that_is_at_its_limit(
    daemon: Lab, connect: Connect, places: Places
) -> None:
    api = await limited(daemon, connect, chain_limit=3)
    guest = places.guest(places.disk(), places.disk(overlays=1), start=True)
    await places.known(api)
    await api.create_set(guest, "vda", "vdb", name="first")
    before = world(guest), await api.snapshots_of(guest)
    error = await refused(api.create_set(guest, "vda", "vdb", name="second"), "NoSpace")
    assert "disk vdb" in error.text
    assert "'first'" in error.text
    assert (world(guest), await api.snapshots_of(guest)) == before
    await api.create(guest, name="second")


@pytest.mark.parametrize("running", [True, False])
async def test_a_chain_of_others_counts_too(
    daemon: Lab, connect: Connect, places: Places, running: bool
) -> None:
    api = await limited(daemon, connect, chain_limit=4)
    guest = places.guest(places.disk(overlays=1), start=running)
    assert len(images.chain(file_of(guest))) == 2
    await places.known(api)
    oldest = await api.create(guest, name="oldest")
    await api.create(guest, name="newer")
    assert len(images.chain(file_of(guest))) == 4
    error = await unchanged(api, guest, "NoSpace", name="newest")
    assert "'oldest'" in error.text
    assert "chain_limit is 4" in error.text
    await api.call(oldest.snapshot, SNAPSHOT, "Delete", "u", 0)
    await api.create(guest, name="newest")
    assert len(images.chain(file_of(guest))) == 4


async def test_a_chain_that_nobody_here_made_is_not_ours_to_delete(
    daemon: Lab, connect: Connect, places: Places
) -> None:
    api = await limited(daemon, connect, chain_limit=2)
    guest = places.guest(places.disk(overlays=1), start=True)
    await places.known(api)
    assert "virsh blockcommit" in (await unchanged(api, guest, "NoSpace")).text


async def test_a_guests_own_data_is_not_taken_for_a_chain(
    daemon: Lab, connect: Connect, places: Places
) -> None:
    """A raw image may hold what looks like a qcow2 with a base of its own."""
    api = await limited(daemon, connect, chain_limit=2)
    inner = places.guest(places.disk(overlays=1))
    guest = places.guest(places.disk(format="raw"))
    shutil.copy(file_of(inner), file_of(guest))
    await places.known(api)
    await api.create(guest)
