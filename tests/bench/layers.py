"""How long a guest is frozen for a snapshot below QEMU, beside the storage's own command.

In each round the agent's freeze and thaw alone, the command alone, and a quiesced Create, on the
same guest, which writes all the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snapd_vm.model import domain_path
from tests.bench.series import Series
from tests.bench.ways import NAME, TARGET, PlainCaller
from tests.lab.blockdev import FileSystem, Mounted
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run

SETTLE_S = 0.25
COPY = "copy-by-hand"


@dataclass(frozen=True)
class Layer:
    """A method and what does the same by hand: `command` for the disk's image, and `undo` of it."""

    method: str
    filesystem: FileSystem
    command: Callable[[Path], Sequence[str | Path]]
    undo: Callable[[Path], Sequence[str | Path]]


LAYERS = (
    Layer(
        "reflink",
        "xfs",
        lambda image: ("cp", "--reflink=always", image, image.with_name(COPY)),
        lambda image: ("rm", image.with_name(COPY)),
    ),
    Layer(
        "btrfs",
        "btrfs",
        lambda image: (
            *("btrfs", "-q", "subvolume", "snapshot", "-r"),
            *(image.parent, image.with_name(COPY)),
        ),
        lambda image: ("btrfs", "-q", "subvolume", "delete", image.with_name(COPY)),
    ),
)


@dataclass
class Measured:
    """Seconds of each of the three."""

    method: str
    command: str
    agent: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    frozen: list[float] = field(default_factory=list)

    @property
    def beyond(self) -> float:
        """Milliseconds that the guest is frozen beyond what the two others take."""
        agent, alone, frozen = map(Series.of_seconds, (self.agent, self.alone, self.frozen))
        return frozen.median - agent.median - alone.median


def measure(lab: Lab, ours: Path, rounds: int) -> list[Measured]:
    """All layers, one after the other, on a guest and a file system of their own each."""
    found = []
    lab.daemon.start({}, argv=(ours, "daemon"))
    for layer in LAYERS:
        mounted = lab.block.mounted(layer.filesystem, 1200)
        guest = lab.guest([DiskSpec(format="raw", folder=mounted.path)])
        found.append(_measure(lab, layer, mounted, guest, rounds))
        guest.remove()
        mounted.unmount()
    lab.daemon.stop()
    return found


def _measure(lab: Lab, layer: Layer, mounted: Mounted, guest: Guest, rounds: int) -> Measured:
    image = guest.disk().path
    measured = Measured(layer.method, " ".join(map(str, layer.command(Path("IMAGE"))[:-2])))
    caller = PlainCaller(lab.address)
    disk = [f"<disk><target dev='{TARGET}'/></disk>", f"<diskSnapshot method='{layer.method}'/>"]
    for turn in range(rounds + 1):
        _settle(guest)
        began = time.perf_counter()
        guest.domain.fsFreeze()
        guest.domain.fsThaw()
        agent = time.perf_counter() - began
        _settle(guest)
        began = time.perf_counter()
        run(*layer.command(image))
        alone = time.perf_counter() - began
        run(*layer.undo(image))
        _settle(guest)
        _, (_, source) = caller.call(
            NAME, domain_path(guest.uuid), NAME, "Create", "sssu", [*disk, "", 1]
        )
        path = source.partition(':snapshot="')[2].partition('"')[0]
        of = [f"{NAME}.Snapshot", "FrozenTime"]
        properties = "org.freedesktop.DBus.Properties"
        _, (frozen,) = caller.call(NAME, path, properties, "Get", "ss", of)
        caller.call(NAME, path, f"{NAME}.Snapshot", "Delete", "u", [0])
        if turn:  # the first one warms up
            measured.agent.append(agent)
            measured.alone.append(alone)
            measured.frozen.append(getattr(frozen, "value", frozen) / 1e6)
    caller.close()
    return measured


def _settle(guest: Guest) -> None:
    time.sleep(SETTLE_S)
    guest.writes_go_on()
