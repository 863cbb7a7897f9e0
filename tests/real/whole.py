"""Takes a running guest's qcow2 again and again from below QEMU, and looks whether it is whole.

QEMU keeps parts of a qcow2 in memory: the vCPUs are stopped for the snapshot, and it writes them.
"""

from __future__ import annotations

import time
from pathlib import Path

from tests.lab.guest import Guest
from tests.lab.program import attempt
from tests.lab.ring import read_ring
from tests.real import images
from tests.real.api import NO_QUIESCE, QUIESCE_REQUIRED, VDA, Api
from tests.real.test_delete import delete

ROUNDS = 100


async def all_are_whole(api: Api, writing: Guest, method_xml: str, scratch: Path) -> None:
    """A hundred of a hundred, quiesced and not, under load; some are looked into as well."""
    began = time.monotonic()
    for number in range(ROUNDS):
        quiesced = number % 2
        if number % 10 == 0:  # so that it has tables to write
            writing.fill("vda", f"filling{number % 3}", 2)
        created = await api.create(
            writing, VDA, method_xml, flags=QUIESCE_REQUIRED if quiesced else NO_QUIESCE
        )
        assert created.ours("format") == "qcow2"
        assert created.ours("consistency") == ("quiesced" if quiesced else "paused")
        checked = attempt(["qemu-img", "check", "-f", "qcow2", created.file])
        assert checked.returncode == 0, checked.stdout + checked.stderr
        if number % 20 == 1:
            raw = images.raw_copy(created.file, "qcow2", scratch / "raw")
            assert images.is_clean(raw)
            assert read_ring(raw).whole
        await delete(api, created)
    print(f"{ROUNDS} snapshots of a qcow2 in {time.monotonic() - began:.1f} s")
    writing.writes_go_on()
