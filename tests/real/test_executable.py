"""A method that is a program, on a real guest: what it does, and what it must not be able to do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real import images
from tests.real.api import (
    MANAGER,
    NO_QUIESCE,
    QUIESCE_REQUIRED,
    SNAPSHOT,
    Api,
    Created,
)
from tests.real.arrays import METHOD, NAME, Array
from tests.real.conftest import Connect
from tests.real.places import refused, unchanged
from tests.real.test_crash import FAULTY, faulty

__all__ = ["faulty"]


@pytest.fixture(scope="module")
def own(lab: Lab) -> Iterator[Guest]:
    """A guest with two raw disks."""
    folder = lab.folder("array-disks")
    running = lab.guest([DiskSpec(format="raw", folder=folder)] * 2)
    yield running
    running.remove()


@pytest.fixture
def array(lab: Lab, faulty: Lab) -> Array:
    """The program, and a daemon that has it."""
    made = Array.install(lab)
    faulty.daemon.start(made.config)
    yield made
    made.faults()


@pytest.fixture
async def api(array: Array, connect: Connect) -> Api:
    """A client of that daemon."""
    return await connect()


async def delete(api: Api, created: Created) -> str:
    return str((await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0))[0])


async def test_it_is_made_read_and_deleted(
    api: Api, array: Array, own: Guest, tmp_path: Path
) -> None:
    xml = own.domain.XMLDesc()
    manager = await api.properties("/org/example/DiskSnapshot", MANAGER)
    assert manager["Methods"][-1] == NAME
    assert {row["method"] for row in await api.disks(own)} <= {"qemu", "reflink"}
    plan = await api.plan(own, method_xml=METHOD, name="planned")
    assert (plan["method"], plan["consistency"], plan["warnings"]) == (
        NAME,
        "quiesced",
        ["1 copied."],
    )
    assert plan["space_available"] > plan["space_needed"] > 0
    assert array.copies == set()
    own.write("vda", "mark", "before")
    created = await api.create(own, method_xml=METHOD, name="one", flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert (told["Method"], told["Format"], told["Size"]) == (NAME, "raw", 64 << 20)
    assert (told["State"], told["Consistency"]) == ("ready", "quiesced")
    uuid = created.snapshot.rpartition("/_")[2].replace("_", "-")
    assert created.file == str(array.folder / f"snapd-vm-{uuid}.img")
    assert (created.ours("type"), created.modified_disk) == ("file", "")
    assert images.is_clean(Path(created.file))
    assert run("debugfs", "-R", "cat /mark", created.file).strip() == "before"
    checksum = images.checksum(created.file, "raw", tmp_path)
    own.writes_go_on()
    assert images.checksum(created.file, "raw", tmp_path) == checksum
    assert await delete(api, created) == ""
    assert array.copies == set()
    assert own.domain.XMLDesc() == xml
    assert own.read("vda", "mark") == "after"
