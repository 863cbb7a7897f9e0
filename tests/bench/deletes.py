"""Deletes a snapshot whose overlay holds 1 GiB: ours against `virsh blockcommit`, in turn.

What the guest feels of it is measured as well: the pivot at the end holds its writes.
"""

from __future__ import annotations

import random
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
                    caller.call(NAME, path, f"{NAME}.Snapshot", "Delete", "u", [0])
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


def _create(caller: PlainCaller, guest: Guest) -> str:
    """A snapshot by us; its object path."""
    body = [[[f"<disk><target dev='{TARGET}'/></disk>", ""]], "", 0]
    _, ([row],) = caller.call(
        NAME, domain_path(guest.uuid), f"{NAME}.Domain", "CreateSet", "a(ss)su", body
    )
    return str(row[0])
