"""Deletes a snapshot whose overlay holds 1 GiB: ours against `virsh blockcommit`, in turn.

What the guest feels of it is measured as well: the pivot at the end holds its writes. And what
another guest's Create feels of the commit.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from snapd_vm.model import domain_path
from tests.bench.series import Series
from tests.bench.snapshots import COMMIT, SEED
from tests.bench.ways import NAME, TARGET, PlainCaller, Virsh
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run

MIB = 1024
DISK_MIB = 1536
CREATES = 5
"""Alone, in each round."""


@dataclass
class Deleted:
    """What was measured of one way, in seconds."""

    who: str
    call: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)

    @property
    def calls(self) -> Series:
        """From asking for it to its end."""
        return Series.of_seconds(self.call)

    @property
    def stalls(self) -> Series:
        """The longest that a write of the guest took meanwhile."""
        return Series.of_seconds(self.stall)


def measure(lab: Lab, ours: Path, rounds: int) -> tuple[Deleted, Deleted]:
    """Ours and virsh's, each so many times in an order drawn anew; one more round comes first."""
    order = random.Random(SEED)
    guest = lab.guest([DiskSpec(size_mib=DISK_MIB)], name="benchd")
    lab.daemon.start({}, argv=(ours, "daemon"))
    caller = PlainCaller(lab.address)
    mine, virsh = Deleted("snapd-vm"), Deleted("virsh")
    try:
        for turn in range(rounds + 1):
            for one in order.sample((mine, virsh), 2):
                overlay = guest.disk(TARGET).path.with_suffix(".virsh")
                path = _create(caller, guest) if one is mine else ""
                if one is virsh:
                    Virsh(lab.libvirtd.uri).take(guest, overlay)
                guest.fill(TARGET, "big", MIB)
                guest.sync(60)
                guest.writes_go_on()
                guest.reset()
                began = time.perf_counter()
                if one is mine:
                    _delete(caller, path)
                else:
                    run(
                        *("virsh", "-c", lab.libvirtd.uri, "blockcommit", guest.name, TARGET),
                        *COMMIT,
                        timeout=300,
                    )
                took = time.perf_counter() - began
                guest.writes_go_on()
                if turn:
                    one.call.append(took)
                    one.stall.append(max(stall.longest_s for stall in guest.stalls().values()))
                overlay.unlink(missing_ok=True)
    finally:
        caller.close()
        lab.daemon.stop()
        guest.remove()
    return mine, virsh


def measure_beside(lab: Lab, ours: Path, rounds: int) -> tuple[Series, Series]:
    """Create on one guest, alone and while a 1 GiB overlay of another is committed."""
    large = lab.guest([DiskSpec(size_mib=DISK_MIB)], name="benchd")
    other = lab.guest(name="benche")
    lab.daemon.start({}, argv=(ours, "daemon"))
    caller, second = PlainCaller(lab.address), PlainCaller(lab.address)
    alone, beside = list[float](), list[float]()
    try:
        _created(second, other)  # the first finds no connections made
        for _ in range(rounds):
            path = _create(caller, large)
            large.fill(TARGET, "big", MIB)
            large.sync(60)
            alone += [_created(second, other) for _ in range(CREATES)]
            deleting = threading.Thread(target=_delete, args=(caller, path))
            deleting.start()
            while deleting.is_alive():
                took = _created(second, other)
                if deleting.is_alive():
                    beside.append(took)
            deleting.join()
    finally:
        caller.close()
        second.close()
        lab.daemon.stop()
        large.remove()
        other.remove()
    return Series.of_seconds(alone), Series.of_seconds(beside)


def _created(caller: PlainCaller, guest: Guest) -> float:
    """How long a Create takes, in seconds; its snapshot is deleted again."""
    began = time.perf_counter()
    path = _create(caller, guest)
    took = time.perf_counter() - began
    _delete(caller, path)
    return took


def _delete(caller: PlainCaller, path: str) -> None:
    caller.call(NAME, path, f"{NAME}.Snapshot", "Delete", "u", [0])


def _create(caller: PlainCaller, guest: Guest) -> str:
    """A snapshot by us; its object path."""
    body = [[[f"<disk><target dev='{TARGET}'/></disk>", ""]], "", 0]
    _, ([row],) = caller.call(
        NAME, domain_path(guest.uuid), f"{NAME}.Domain", "CreateSet", "a(ss)su", body
    )
    return str(row[0])
