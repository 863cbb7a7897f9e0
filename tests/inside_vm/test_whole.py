"""A qcow2 image on a logical volume and on ZFS, snapshotted from below a QEMU that writes to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.volumegroup import Group
from tests.lab.zpool import make_pool
from tests.real.conftest import Connect, connect, lab, scratch
from tests.real.storages import IN_A_VM
from tests.real.whole import all_are_whole

__all__ = ["connect", "lab", "scratch"]


@pytest.fixture
def on_lvm(lab: Lab) -> Iterator[Guest]:
    loop = lab.block.loop(600)
    group = Group(loop.device)
    group.pool()
    guest = lab.guest([DiskSpec(device=group.thin("image", 100))])
    yield guest
    guest.remove()
    group.remove()
    loop.detach()


@pytest.fixture
def on_zfs(lab: Lab) -> Iterator[Guest]:
    pool = make_pool(lab)
    guest = lab.guest([DiskSpec(folder=pool.dataset("image"))])
    yield guest
    guest.remove()
    pool.destroy()


@pytest.mark.timeout(2900)
@pytest.mark.parametrize("method", ["lvm", "zfs"])
async def test_a_hundred_of_a_hundred_are_whole(
    lab: Lab, connect: Connect, scratch: Path, request: pytest.FixtureRequest, method: str
) -> None:
    writing: Guest = request.getfixturevalue(f"on_{method}")
    lab.daemon.start(IN_A_VM)
    try:
        await all_are_whole(await connect(), writing, f"<diskSnapshot method='{method}'/>", scratch)
    finally:
        lab.daemon.stop()
