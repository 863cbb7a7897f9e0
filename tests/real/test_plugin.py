"""The example distribution of docs/example-method, installed by pip, used over the bus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real import images
from tests.real.api import MANAGER, QUIESCE_REQUIRED, SNAPSHOT, Api
from tests.real.arrays import COPY, COPY_METHOD, Plugin
from tests.real.conftest import Connect
from tests.real.test_crash import faulty

__all__ = ["faulty"]


@pytest.fixture(scope="module")
def own(lab: Lab) -> Iterator[Guest]:
    """A guest with two raw disks and one that is not."""
    folder = lab.folder("plugin-disks")
    raw = DiskSpec(format="raw", folder=folder)
    running = lab.guest([raw, raw, DiskSpec(folder=folder)])
    yield running
    running.remove()


@pytest.fixture
def plugin(lab: Lab, faulty: Lab) -> Plugin:
    """The distribution, and a daemon that has it."""
    made = Plugin.install(lab)
    faulty.daemon.start(made.config, env=made.env)
    return made


@pytest.fixture
async def api(plugin: Plugin, connect: Connect) -> Api:
    """A client of that daemon."""
    return await connect()


async def test_it_is_made_read_and_deleted(
    api: Api, plugin: Plugin, own: Guest, tmp_path: Path
) -> None:
    xml = own.domain.XMLDesc()
    assert (await api.properties("/org/example/DiskSnapshot", MANAGER))["Methods"][-1] == COPY
    assert COPY not in {row["method"] for row in await api.disks(own)}
    plan = await api.plan(own, method_xml=COPY_METHOD)
    assert (plan["method"], plan["consistency"]) == (COPY, "quiesced")
    assert plan["warnings"] == ["The guest stands still for as long as the copy takes."]
    assert plan["space_available"] > plan["space_needed"] > 0
    assert plugin.copies == set()
    own.write("vda", "mark", "before")
    created = await api.create(own, method_xml=COPY_METHOD, name="one", flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert (told["Method"], told["Format"], told["Size"]) == (COPY, "raw", 64 << 20)
    assert (told["State"], told["Consistency"]) == ("ready", "quiesced")
    assert {Path(created.file).name} == plugin.copies
    assert images.is_clean(Path(created.file))
    assert run("debugfs", "-R", "cat /mark", created.file).strip() == "before"
    checksum = images.checksum(created.file, "raw", tmp_path)
    own.writes_go_on()
    assert images.checksum(created.file, "raw", tmp_path) == checksum
    assert await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0) == [""]
    assert plugin.copies == set()
    assert own.domain.XMLDesc() == xml
    assert own.read("vda", "mark") == "after"
