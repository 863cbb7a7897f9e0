"""200 domains of libvirt's test driver: GetManagedObjects, and Disks of all of them.

Each has two raw disks: of the first on XFS, of the next on btrfs, and so on in turn; also on ZFS,
and on logical volumes, where the kernel has them:

    python -m tests.lab vm -- python3 -m tests.bench --only domains
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from snapd_vm.bus.contract import DOMAIN, OBJECT_MANAGER
from snapd_vm.model import domain_path
from tests.bench.layers import kernel_has
from tests.bench.series import Series
from tests.bus.clients import Client, RawPeer, marshalled
from tests.lab.blockdev import FileSystem
from tests.lab.lab import Lab
from tests.lab.volumegroup import Group
from tests.lab.zpool import make_pool

COUNT = 200
CALLS = 21
ROUNDS = 5
XML = """<domain type='test'><name>d{n}</name><uuid>{uuid}</uuid><memory>8192</memory>
<os><type>hvm</type></os><devices>{disks}</devices></domain>"""
FILE = """<disk type='file' device='disk'><driver type='raw'/><source file='{path}'/>
<target dev='{target}' bus='virtio'/></disk>"""
DEVICE = FILE.replace("file=", "dev=").replace("'file'", "'block'")
VOLUMES = 8
"""Logical ones, which domains share: to make one takes seconds in the host VM."""

Place = Callable[[int, str], str]
"""The `<disk>` of a domain's number and a target."""


@dataclass(frozen=True)
class Measured:
    """From sending a call to having the whole answer; the first call is one of them.

    `disks` is of 200 calls of Disks in a row, `by_place` of one of them, by what the disks are on.
    """

    objects: Series
    disks: Series
    by_place: Mapping[str, Series]


def measure(lab: Lab, ours: Path) -> Measured:
    """Let a daemon have these domains, and ask it."""
    with ExitStack() as stack:
        places = _places(lab, stack)
        turns = list(itertools.islice(itertools.cycle(places), COUNT))
        domains = "".join(_domain(n, places[name]) for n, name in enumerate(turns))
        node = lab.run.folder / "node.xml"
        node.write_text(f"<node>{domains}</node>")
        lab.daemon.start({"uri": f"test://{node}"}, argv=(ours, "daemon"))
        stack.callback(lab.daemon.stop)
        peer = RawPeer(lab.address)
        stack.callback(peer.close)
        objects = Series.of_seconds(_objects(peer))
        rounds = [_disks(peer, 1000 * (number + 1)) for number in range(ROUNDS)]
        by_place: dict[str, list[float]] = {name: [] for name in places}
        for name, seconds in zip(turns * ROUNDS, itertools.chain(*rounds), strict=True):
            by_place[name].append(seconds)
        return Measured(
            objects,
            Series.of_seconds([sum(one) for one in rounds]),
            {name: Series.of_seconds(times) for name, times in by_place.items()},
        )


def _objects(peer: RawPeer) -> list[float]:
    times = []
    for serial in range(2, CALLS + 2):
        data = marshalled(Client.message(OBJECT_MANAGER, "GetManagedObjects"), serial)
        began = time.perf_counter()
        peer.send(data)
        answer = peer.reply_to(serial)
        times.append(time.perf_counter() - began)
        assert len(answer.body) > COUNT * 100, "not all of them"
    return times


def _places(lab: Lab, stack: ExitStack) -> Mapping[str, Place]:
    """All that can be here, by name; they go with the stack."""
    places: dict[str, Place] = {}
    filesystems: tuple[FileSystem, ...] = ("xfs", "btrfs")
    for filesystem in filesystems:
        mounted = lab.block.mounted(filesystem)
        stack.callback(mounted.unmount)
        places[filesystem] = _in(mounted.path)
    if kernel_has("zfs"):
        pool = make_pool(lab)
        stack.callback(pool.destroy)
        places["zfs"] = _in(pool.dataset("images"))
    if kernel_has("dm_snapshot"):
        loop = lab.block.loop(64)
        stack.callback(loop.detach)
        group = Group(loop.device, "bench")
        stack.callback(group.remove)
        devices = [group.linear(f"v{number}", 4) for number in range(VOLUMES)]
        turn = itertools.cycle(devices)
        places["lvm"] = lambda _, target: DEVICE.format(path=next(turn), target=target)
    return places


def _in(folder: Path) -> Place:
    def disk(number: int, target: str) -> str:
        path = folder / f"d{number}-{target}.img"
        path.write_bytes(bytes(4096))
        return FILE.format(path=path, target=target)

    return disk


def _domain(number: int, place: Place) -> str:
    disks = "".join(place(number, target) for target in ("vda", "vdb"))
    return XML.format(n=number, uuid=_uuid(number), disks=disks)


def _uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def _disks(peer: RawPeer, first: int) -> list[float]:
    """Seconds that Disks takes of each domain, one after the other."""
    messages = [
        marshalled(Client.message(DOMAIN, "Disks", path=domain_path(_uuid(number))), first + number)
        for number in range(COUNT)
    ]
    times = []
    for number, message in enumerate(messages):
        began = time.perf_counter()
        peer.send(message)
        answer = peer.reply_to(first + number)
        times.append(time.perf_counter() - began)
        assert b"the default for" in answer.body, "no method was chosen"
    return times
