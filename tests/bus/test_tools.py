"""busctl and gdbus show and call what is served."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from snapd_vm.bus.contract import BUS_NAME, DISK_SNAPSHOT, MANAGER
from snapd_vm.bus.served import DiskSnapshotBus
from snapd_vm.model import ROOT_PATH, domain_path, snapshot_path
from tests.bus.fakes import FakeEngine, StandInPolkit, make_snapshot, uuid

VDA = "<disk><target dev='vda'/></disk>"
PATH = domain_path(uuid(1))

needs_busctl = pytest.mark.skipif(not shutil.which("busctl"), reason="needs busctl (systemd)")
needs_gdbus = pytest.mark.skipif(not shutil.which("gdbus"), reason="needs gdbus (libglib2.0-bin)")


async def run(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(20):
        output, _ = await process.communicate()
    return f"{process.returncode}: {output.decode()}"


@needs_busctl
async def test_busctl_tree(served: DiskSnapshotBus, engine: FakeEngine) -> None:
    snapshot = make_snapshot()
    engine.snapshots[snapshot.uuid] = snapshot
    output = await run("busctl", "--system", "tree", "--list", BUS_NAME)
    for path in (ROOT_PATH, PATH, domain_path(uuid(2)), snapshot_path(snapshot.uuid)):
        assert path in output.splitlines()


@needs_busctl
async def test_busctl_introspect(served: DiskSnapshotBus) -> None:
    output = await run("busctl", "--system", "introspect", BUS_NAME, PATH)
    assert ".Create" in output
    assert "sssu" in output
    assert ".GuestAgent" in output
    assert 's "running"'.partition(" ")[2] in output
    output = await run("busctl", "--system", "introspect", BUS_NAME, ROOT_PATH)
    assert ".GetManagedObjects" in output


@needs_busctl
async def test_busctl_call(served: DiskSnapshotBus, polkit: StandInPolkit) -> None:
    call = ("busctl", "--system", "call", BUS_NAME)
    output = await run(*call, PATH, DISK_SNAPSHOT, "Create", "sssu", VDA, "", "", "0")
    assert output.replace("\\", "") == """0: ss "<disk now='overlay'/>" "<source/>"\n"""
    assert polkit.questions[0].flags == 1, "busctl lets polkit ask"
    output = await run(*call, ROOT_PATH, MANAGER, "FindDomain", "s", "vm9")
    assert output.startswith("1: Call failed: There is no domain of that name")
    output = await run("busctl", "--system", "get-property", BUS_NAME, ROOT_PATH, MANAGER, "URI")
    assert output == '0: s "test:///default"\n'


@needs_gdbus
async def test_gdbus(served: DiskSnapshotBus) -> None:
    to = ("--system", "--dest", BUS_NAME, "--object-path")
    member = f"{DISK_SNAPSHOT}.Create"
    output = await run("gdbus", "call", *to, PATH, "--method", member, VDA, "", "", "0")
    assert output == """0: ("<disk now='overlay'/>", '<source/>')\n"""
    output = await run("gdbus", "call", *to, PATH, "--method", member, VDA, "", "", "3")
    assert "GDBus.Error:org.freedesktop.DBus.Error.InvalidArgs" in output
    output = await run("gdbus", "introspect", *to, PATH)
    assert "in  s disk_xml" in output
    assert "out s backup_source" in output
    output = await run("gdbus", "introspect", "--recurse", *to, "/")
    assert PATH in output
