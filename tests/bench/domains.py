"""How long GetManagedObjects takes with 200 domains of libvirt's test driver."""

from __future__ import annotations

import time
from pathlib import Path

from snapd_vm.bus.contract import OBJECT_MANAGER
from tests.bench.series import Series
from tests.bus.clients import Client, RawPeer, marshalled
from tests.lab.lab import Lab

COUNT = 200
CALLS = 21
DOMAIN = """<domain type='test'><name>d{n}</name><memory>8192</memory>
<os><type>hvm</type></os><devices><disk type='file' device='disk'><driver type='qcow2'/>
<source file='/images/d{n}.qcow2'/><target dev='vda' bus='virtio'/></disk></devices></domain>"""


def measure(lab: Lab, ours: Path) -> Series:
    """Times from sending the call to having the whole answer; the first call is one of them."""
    node = lab.run.folder / "node.xml"
    node.write_text(f"<node>{''.join(DOMAIN.format(n=n) for n in range(COUNT))}</node>")
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
    peer.close()
    lab.daemon.stop()
    return Series.of_seconds(times)
