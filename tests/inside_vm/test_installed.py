"""The installed service with its unit, the system's bus, polkitd and libvirtd, and a guest that
runs: in the host VM, where `make install` was done and the service is up (tests/hostvm).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from tests import readme
from tests.lab.cleanup import clean
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest, make_guest
from tests.lab.hypervisor import Hypervisor
from tests.lab.image import guest_image
from tests.lab.program import run
from tests.lab.run import Run
from tests.lab.volumegroup import Group
from tests.real import images
from tests.real.conftest import PAUSE_US

SYSTEM = "qemu:///system"
GROUP = Path("/dev/disk/by-id/virtio-data1")


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    """A guest of the system's libvirtd: vda is a file, vdb a logical volume."""
    group = Group(GROUP, "installed")
    lab = Run.begin()
    try:
        volume = group.linear("disk", 64)
        disks = [DiskSpec(), DiskSpec(format="raw", device=volume)]
        made = make_guest(lab, Hypervisor(SYSTEM), guest_image(), "web", disks, pause_us=PAUSE_US)
        yield made
        made.remove()
    finally:
        clean(lab)
    group.remove()


def words() -> set[str]:
    """All snapshots, as DOMAIN/DISK/NAME."""
    rows = json.loads(run("snapd-vm", "list", "--json"))
    return {f"{row['domain']}/{row['target']}/{row['name']}" for row in rows}


def test_the_examples_of_the_readme(guest: Guest) -> None:
    """They make two, and delete one, whichever it is."""
    made = words() | {f"{guest.name}/vda/{name}" for name in ("nightly", "weekly")}
    run("bash", "-euc", readme.examples().replace("web", guest.name), timeout=600)
    assert words() < made
    assert len(words()) == len(made) - 1
    guest.writes_go_on(60)


def test_a_logical_volume_quiesced(guest: Guest, tmp_path: Path) -> None:
    asked = ("snapd-vm", "create", guest.name, "vdb", "--name", "q", "--quiesce-required", "--json")
    row = json.loads(run(*asked, timeout=300))
    assert (row["method"], row["consistency"]) == ("lvm", "quiesced")
    guest.writes_go_on(60)
    device = etree.fromstring(row["backup_source"]).get("dev") or ""
    raw = images.raw_copy(device, "raw", tmp_path / "raw")
    assert images.is_clean(raw)
    run("snapd-vm", "delete", f"{guest.name}/vdb/q", timeout=300)
    assert not Path(device).exists()
    assert not guest.agent_says_frozen()
