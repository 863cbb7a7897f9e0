"""200 domains of libvirt's test driver: GetManagedObjects, and Disks of all of them.

Each has two raw disks in files: of one half on XFS, of the other on btrfs.
"""

from __future__ import annotations

import time
from pathlib import Path

from snapd_vm.bus.contract import DOMAIN, OBJECT_MANAGER
from snapd_vm.model import domain_path
from tests.bench.series import Series
from tests.bus.clients import Client, RawPeer, marshalled
from tests.lab.lab import Lab

COUNT = 200
CALLS = 21
ROUNDS = 5
XML = """<domain type='test'><name>d{n}</name><uuid>{uuid}</uuid><memory>8192</memory>
<os><type>hvm</type></os><devices>{disks}</devices></domain>"""
DISK = """<disk type='file' device='disk'><driver type='raw'/><source file='{path}'/>
<target dev='{target}' bus='virtio'/></disk>"""


def measure(lab: Lab, ours: Path) -> tuple[Series, Series]:
    """Times from sending a call to having the whole answer, and of 200 calls of Disks in a row.

    The first call is one of them.
    """
    places = [lab.block.mounted("xfs"), lab.block.mounted("btrfs")]
    node = lab.run.folder / "node.xml"
    node.write_text(f"<node>{''.join(_domain(n, places[n % 2].path) for n in range(COUNT))}</node>")
    lab.daemon.start({"uri": f"test://{node}"}, argv=(ours, "daemon"))
    peer = RawPeer(lab.address)
    times = []
    for serial in range(2, CALLS + 2):
        data = marshalled(Client.message(OBJECT_MANAGER, "GetManagedObjects"), serial)
        began = time.perf_counter()
        peer.send(data)
        answer = peer.reply_to(serial)
        times.append(time.perf_counter() - began)
        assert len(answer.body) > COUNT * 100, "not all of them"
    rounds = [_disks(peer, 1000 * (number + 1)) for number in range(ROUNDS)]
    peer.close()
    lab.daemon.stop()
    for place in places:
        place.unmount()
    return Series.of_seconds(times), Series.of_seconds(rounds)


def _domain(number: int, folder: Path) -> str:
    disks = ""
    for target in ("vda", "vdb"):
        path = folder / f"d{number}-{target}.img"
        path.write_bytes(bytes(4096))
        disks += DISK.format(path=path, target=target)
    return XML.format(n=number, uuid=_uuid(number), disks=disks)


def _uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def _disks(peer: RawPeer, first: int) -> float:
    """Seconds that Disks takes of all domains, one after the other."""
    messages = [
        marshalled(Client.message(DOMAIN, "Disks", path=domain_path(_uuid(number))), first + number)
        for number in range(COUNT)
    ]
    began = time.perf_counter()
    for number, message in enumerate(messages):
        peer.send(message)
        answer = peer.reply_to(first + number)
        assert b"the default for" in answer.body, "no method was chosen"
    return time.perf_counter() - began
