"""A running domain of libvirt's test driver, which has no QEMU, and a snapshot of its disk."""

from __future__ import annotations

import shutil
import uuid as uuids
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from snapd_vm.model import domain_path
from tests.lab.daemon import DAEMON
from tests.lab.lab import Lab
from tests.real.api import DOMAIN, NAME, SNAPSHOT, VDA, Api, Created
from tests.real.conftest import Connect


@contextmanager
def other_domain(lab: Lab, kind: str, source: str) -> Iterator[str]:
    """A daemon that has that one domain, whose vda is of this type and on this `<source>`.

    Nothing says that it is raw, as of this driver's own domain `test`. Gives the domain's object
    path. Whatever daemon ran before is stopped, and this one at the end.
    """
    if lab.daemon.running:
        lab.daemon.stop()
    shutil.rmtree(lab.daemon.state_dir, ignore_errors=True)
    uuid = str(uuids.uuid4())
    node = lab.folder("node") / "node.xml"
    node.write_text(
        f"<node><domain type='test'><name>other</name><uuid>{uuid}</uuid>"
        "<memory>1024</memory><os><type>hvm</type></os><devices>"
        f"<disk type='{kind}' device='disk'>{source}"
        "<target dev='vda'/></disk></devices></domain></node>"
    )
    try:
        lab.daemon.start({"uri": f"test://{node}"}, argv=DAEMON, wait=90)
        yield domain_path(uuid)
    finally:
        if lab.daemon.running:
            lab.daemon.stop()


async def create(api: Api, path: str, method_xml: str = "") -> Created:
    """Create on its disk."""
    return Created(*await api.call(path, NAME, "Create", "sssu", VDA, method_xml, "nightly", 0))


@asynccontextmanager
async def taken_by(
    method: str, lab: Lab, connect: Connect, kind: str, source: str, method_xml: str = ""
) -> AsyncIterator[Created]:
    """A snapshot of its disk by this method, asked for or the default; deleted at the end."""
    with other_domain(lab, kind, source) as path:
        api = await connect()
        assert (await api.properties(path, DOMAIN))["State"] == "running"
        (row,) = (await api.call(path, DOMAIN, "Disks"))[0]
        assert method_xml or row["method"] == method
        assert row["format"] == "raw"
        created = await create(api, path, method_xml)
        assert (created.modified_disk, created.ours("consistency")) == ("", "crash")
        told = (await api.snapshots())[created.snapshot]
        assert (told["Method"], told["State"], told["Consistency"]) == (method, "ready", "crash")
        yield created
        assert await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0) == [""]
        assert not await api.snapshots()
