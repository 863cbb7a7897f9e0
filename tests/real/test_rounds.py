"""Two hundred rounds of create, read and delete on one guest that writes: nothing is left over."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lxml import etree

from snapd_vm.engine.journal import Journal
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.mounts import loops_below
from tests.real.api import QUIESCE_REQUIRED, SNAPSHOT, Api

pytestmark = pytest.mark.timeout(300)

ROUNDS = 200
WARM_UP = 20
HEAD = 1 << 20


@pytest.fixture(params=["qemu", "reflink", "btrfs"])
def own(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest whose disk the method takes by default."""
    mounted = lab.block.mounted("btrfs" if request.param == "btrfs" else "xfs", 600)
    spec = DiskSpec(format="qcow2" if request.param == "qemu" else "raw", folder=mounted.path)
    guest = lab.guest([spec])
    yield guest
    guest.remove()
    mounted.unmount()


@dataclass(frozen=True)
class Traces:
    """All that a snapshot may leave behind; descriptors by process."""

    files: frozenset[str]
    mounts: tuple[int, ...]
    loops: int
    records: int
    descriptors: tuple[int, ...]

    @classmethod
    def of(cls, lab: Lab, guest: Guest) -> Traces:
        journal = Journal(lab.daemon.state_dir)
        try:
            records = [*journal.snapshots(), *journal.operations(), *journal.held()]
        finally:
            journal.close()
        qemu = (lab.run.folder / "libvirt/run/qemu" / f"{guest.name}.pid").read_text()
        return cls(
            files=frozenset(os.listdir(guest.disk().path.parent)),
            mounts=tuple(
                Path(f"/proc/{pid}/mountinfo").read_text().count(str(lab.run.folder))
                for pid in (os.getpid(), lab.daemon.pid)
            ),
            loops=len(list(loops_below(lab.run.folder))),
            records=len(records),
            descriptors=tuple(
                len(os.listdir(f"/proc/{pid}/fd"))
                for pid in (lab.daemon.pid, lab.libvirtd.pid, int(qemu))
            ),
        )


def used_by(guest: Guest, flags: int = 0) -> list[str]:
    """The images of its disk's whole chain, as its XML has them."""
    sources = etree.fromstring(guest.domain.XMLDesc(flags)).findall("devices/disk//source")
    return [source.get("file") or "" for source in sources]


async def test_rounds_of_create_read_and_delete_leave_nothing(
    daemon: Lab, api: Api, own: Guest
) -> None:
    (first,) = used_by(own)
    warm: Traces | None = None
    began = time.monotonic()
    for number in range(ROUNDS):
        if number == WARM_UP:  # by now it has the connections and threads that it keeps
            warm = Traces.of(daemon, own)
        created = await api.create(own, flags=QUIESCE_REQUIRED)
        source = etree.fromstring(await api.backup_source(created.snapshot)).get("file") or ""
        with open(source, "rb") as image:
            assert any(image.read(HEAD))
        await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)
        assert (used_by(own), used_by(own, 2)) == ([first], [first])
    print(f"{ROUNDS} rounds in {time.monotonic() - began:.1f} s")
    assert not await api.snapshots_of(own)
    left = Traces.of(daemon, own)
    assert warm is not None
    more = [now - then for now, then in zip(left.descriptors, warm.descriptors, strict=True)]
    assert max(more) <= 3, (warm, left)
    assert (left.files, left.records) == (warm.files, 0)
    assert left.files == {own.disk().path.name}
    assert (left.mounts, left.loops) == (warm.mounts, warm.loops)
    own.writes_go_on()
