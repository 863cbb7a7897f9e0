"""Which of the domain's disks a file system is on, from what the agent says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapd_vm.model import Disk
from snapd_vm.virt.agent import FileSystem
from snapd_vm.virt.agentsocket import SocketAgent
from tests.agent.fake import FakeAgent


def disk(target: str, address: str = "", serial: str = "") -> Disk:
    return Disk(target, "disk", "file", "raw", "/x", "", "", address=address, serial=serial)


DISKS = (
    disk("vda", "0000:01:00.0"),
    disk("vdb", "0000:04:0a.1", "a-serial-of-more-than-twenty-bytes"),
    disk("sda", "", "twin"),
    disk("sdb", "", "twin"),
    disk("sdc", "", "only"),
)


def at(bus: int, slot: int = 0, function: int = 0, domain: int = 0, **more: Any) -> dict[str, Any]:
    pci = {"domain": domain, "bus": bus, "slot": slot, "function": function}
    return {"pci-controller": pci, "bus-type": "virtio", "bus": 0, "target": 0, "unit": 0, **more}


NOWHERE = at(-1, -1, -1, -1)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeAgent]:
    with FakeAgent(tmp_path / "agent") as agent:
        yield agent


@pytest.mark.parametrize(
    ("said", "targets"),
    [
        ([at(1)], ("vda",)),
        ([at(1, dev="/dev/vda", serial="whatever")], ("vda",)),
        ([at(4, 10, 1)], ("vdb",)),
        ([at(4, 10, 1), at(1)], ("vda", "vdb")),
        ([at(1), at(1)], ("vda",)),
        ([{**NOWHERE, "serial": "only"}], ("sdc",)),
        ([{"serial": "a-serial-of-more-than-twenty-bytes"[:20]}], ("vdb",)),
        ([at(4, 10, 1, serial="a-serial-of-more-than-twenty-bytes"[:20])], ("vdb",)),
        ([at(4, 10, 1, serial="another")], None),
        ([{**NOWHERE, "serial": "twin"}], None),
        ([{**NOWHERE, "serial": ""}], None),
        ([NOWHERE], None),
        ([at(1), NOWHERE], None),
        ([at(9)], None),
        ([at(1, domain=1)], None),
        ([at(True)], None),  # True == 1
        ([at(257)], None),
        ([], None),
        (None, None),
        ("x", None),
        ([1], None),
    ],
)
def test_disks_are_told_by_address_and_serial(
    fake: FakeAgent, said: Any, targets: tuple[str, ...] | None
) -> None:
    entry = {"name": "dm-0", "mountpoint": "/srv/ü", "type": "xfs", "disk": said}
    fake.answers["guest-get-fsinfo"] = json.dumps({"return": [entry]}).encode() + b"\n"
    assert SocketAgent(fake.path, DISKS).fsinfo(5) == [FileSystem("/srv/ü", "xfs", targets)]


def test_an_entry_without_disks_is_on_none_that_is_known(fake: FakeAgent) -> None:
    assert SocketAgent(fake.path, DISKS).fsinfo(5) == [FileSystem("/", "ext4", None)]
