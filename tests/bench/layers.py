"""How long a guest is frozen for a snapshot below QEMU, beside the storage's own command.

In each round the agent's freeze and thaw alone, the command alone, and a quiesced Create, on the
same guest, which writes all the time. lvm and zfs are measured where the kernel has them:

    python -m tests.lab vm -- python3 -m tests.bench --only layers --methods lvm zfs
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from snapd_vm.model import domain_path
from tests.bench.series import Series
from tests.bench.ways import NAME, TARGET, PlainCaller
from tests.lab.blockdev import FileSystem
from tests.lab.ceph import POOL
from tests.lab.deadline import LabError
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import attempt, run
from tests.lab.volumegroup import Group
from tests.lab.zpool import make_pool

SETTLE_S = 0.25
COPY = "copy-by-hand"


Place = AbstractContextManager[tuple[Guest, Path]]


@dataclass(frozen=True)
class Layer:
    """A method and what does the same by hand: `command` for the disk's image, and `undo` of it.

    `place` makes a guest whose disk is there, and tells where, as those two take it. `needs` is a
    module of the kernel without which the method can't be; '' if it can be everywhere.
    """

    method: str
    place: Callable[[Lab], Place]
    command: Callable[[Path], Sequence[str | Path]]
    undo: Callable[[Path], Sequence[str | Path]]
    needs: str = ""


def _on(filesystem: FileSystem) -> Callable[[Lab], Place]:
    @contextmanager
    def place(lab: Lab) -> Iterator[tuple[Guest, Path]]:
        mounted = lab.block.mounted(filesystem, 1200)
        guest = lab.guest([DiskSpec(format="raw", folder=mounted.path)])
        yield guest, guest.disk().path
        guest.remove()
        mounted.unmount()

    return place


@contextmanager
def _in_ceph(lab: Lab) -> Iterator[tuple[Guest, Path]]:
    ceph = lab.ceph.start()
    os.environ["CEPH_CONF"] = str(ceph.conf)
    guest = lab.guest([ceph.disk("bench")])
    yield guest, Path(POOL, "bench")
    guest.remove()
    del os.environ["CEPH_CONF"]


@contextmanager
def _on_volume(lab: Lab) -> Iterator[tuple[Guest, Path]]:
    loop = lab.block.loop(640)
    group = Group(loop.device, "bench")
    device = group.linear("image", 64)
    guest = lab.guest([DiskSpec(format="raw", device=device)])
    yield guest, device
    guest.remove()
    group.remove()
    loop.detach()


@contextmanager
def _in_pool(lab: Lab) -> Iterator[tuple[Guest, Path]]:
    pool = make_pool(lab)
    guest = lab.guest([DiskSpec(format="raw", folder=pool.dataset("image"))])
    yield guest, Path(pool.name, "image")
    guest.remove()
    pool.destroy()


LAYERS = (
    Layer(
        "lvm",
        _on_volume,
        lambda image: ("lvcreate", "-q", "-y", "-s", "-pr", "-L", "68M", "-n", COPY, image),
        lambda image: ("lvremove", "-q", "-y", image.with_name(COPY)),
        needs="dm_snapshot",
    ),
    Layer(
        "zfs",
        _in_pool,
        lambda image: ("zfs", "snapshot", f"{image}@{COPY}"),
        lambda image: ("zfs", "destroy", f"{image}@{COPY}"),
        needs="zfs",
    ),
    Layer(
        "reflink",
        _on("xfs"),
        lambda image: ("cp", "--reflink=always", image, image.with_name(COPY)),
        lambda image: ("rm", image.with_name(COPY)),
    ),
    Layer(
        "btrfs",
        _on("btrfs"),
        lambda image: (
            *("btrfs", "-q", "subvolume", "snapshot", "-r"),
            *(image.parent, image.with_name(COPY)),
        ),
        lambda image: ("btrfs", "-q", "subvolume", "delete", image.with_name(COPY)),
    ),
    Layer(
        "rbd",
        _in_ceph,
        lambda image: ("rbd", "--no-progress", "snap", "create", f"{image}@{COPY}"),
        lambda image: ("rbd", "--no-progress", "snap", "rm", f"{image}@{COPY}"),
    ),
)

METHODS = tuple(layer.method for layer in LAYERS)


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


def measure(lab: Lab, ours: Path, rounds: int, methods: Sequence[str]) -> list[Measured]:
    """These layers, as far as they can be here, one after the other, on a guest and a storage of
    their own each.

    The times that the daemon has are long enough for a host that is slow.
    """
    found = []
    lab.daemon.start(
        {"agent_timeout_s": 30, "freeze_timeout_s": 60, "frozen_limit_s": 60},
        argv=(ours, "daemon"),
    )
    for layer in LAYERS:
        if layer.method not in methods:
            continue
        if layer.needs and not kernel_has(layer.needs):
            print(f"\n{layer.method} is not measured: this kernel has no {layer.needs}")
            continue
        with layer.place(lab) as (guest, image):
            found.append(_measure(lab, layer, guest, image, rounds))
    lab.daemon.stop()
    return found


def _measure(lab: Lab, layer: Layer, guest: Guest, image: Path, rounds: int) -> Measured:
    words = [str(word) for word in layer.command(Path("IMAGE/IMAGE"))]
    measured = Measured(layer.method, " ".join(word for word in words if "IMAGE" not in word))
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


def kernel_has(module: str) -> bool:
    """Whether the kernel has a module, or can load it."""
    try:
        return attempt(["modprobe", "-q", module]).returncode == 0
    except LabError:  # a machine without modules has no modprobe
        return False


def _settle(guest: Guest) -> None:
    time.sleep(SETTLE_S)
    guest.writes_go_on()
