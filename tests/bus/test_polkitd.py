"""The same verdicts from the real polkitd, for real other users, with our policy file."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_vm.bus.contract import (
    BUS_NAME,
    DISK_SNAPSHOT,
    DOMAIN,
    JOB,
    MANAGER,
    OBJECT_MANAGER,
    SNAPSHOT,
)
from snapd_vm.bus.polkit import INTERFACE, NAME, PATH
from snapd_vm.bus.served import DiskSnapshotBus
from snapd_vm.model import ROOT_PATH, domain_path, job_path, snapshot_path
from tests.bus.clients import Client
from tests.bus.fakes import FakeEngine, make_job, make_snapshot, uuid
from tests.lab import Lab
from tests.lab.program import account_of

ERROR = "org.example.DiskSnapshot.Error."
ACTION = "org.example.DiskSnapshot."
VDA = "<disk><target dev='vda'/></disk>"
POLKITD = "/usr/lib/polkit-1/polkitd"

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root, for polkitd and other users"),
    pytest.mark.skipif(not os.path.exists(POLKITD), reason="needs polkitd (package polkitd)"),
    pytest.mark.skipif(shutil.which("busctl") is None, reason="needs busctl (package systemd)"),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(libvirt=False) as lab:
        yield lab


@pytest.fixture
def system_bus(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lab's bus in the place of that of the other tests."""
    lab.polkit.rules("")
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", lab.address)


@pytest.fixture(autouse=True)
async def service(system_bus: None, engine: FakeEngine) -> AsyncIterator[DiskSnapshotBus]:
    bus = DiskSnapshotBus()
    await bus.connect()
    bus.serve(engine, "0")
    await bus.take_name()
    yield bus
    await bus.close(1)


def words(number: int, disk: str = VDA, method: str = "") -> list[str]:
    call = ["call", BUS_NAME, domain_path(uuid(number)), DISK_SNAPSHOT, "Create", "sssu"]
    return [*call, disk, method, "", "0"]


async def busctl(lab: Lab, user: str | None, *arguments: str, ask: bool = False) -> str:
    """The answer, or the error's name and sentence."""
    argument = f"--allow-interactive-authorization={'yes' if ask else 'no'}"
    done = await asyncio.to_thread(lab.busctl, argument, *arguments, user=user, timeout=20)
    return done.stdout if done.returncode == 0 else "error: " + done.stderr


async def test_root_may(lab: Lab) -> None:
    assert (await busctl(lab, None, *words(1))).startswith("ss ")


@pytest.mark.parametrize("user", ["nobody", "backup"])
async def test_others_need_a_rule(lab: Lab, engine: FakeEngine, user: str) -> None:
    answer = await busctl(lab, user, *words(1))
    assert answer.startswith("error:")
    assert "needs authentication" in answer
    assert engine.calls == []
    lab.polkit.rules(rule(user, "create"))
    assert (await busctl(lab, user, *words(1))).startswith("ss ")
    lab.polkit.rules(rule(user, "create", "NO"))
    assert "does not allow" in await busctl(lab, user, *words(1))
    assert len(engine.calls) == 1


async def test_a_rule_can_go_by_the_domain(lab: Lab, engine: FakeEngine) -> None:
    lab.polkit.rules(rule("backup", "create", condition='action.lookup("domain") == "vm1"'))
    assert (await busctl(lab, "backup", *words(1))).startswith("ss ")
    assert (await busctl(lab, "backup", *words(2))).startswith("error:")
    assert (await busctl(lab, "nobody", *words(1))).startswith("error:")
    by_root = [f"<domain><name>vm2</name><devices>{VDA}</devices></domain>", "", "", "0"]
    answer = await busctl(
        lab, "backup", "call", BUS_NAME, ROOT_PATH, DISK_SNAPSHOT, "Create", "sssu", *by_root
    )
    assert answer.startswith("error:")
    assert len(engine.calls) == 1


async def test_all_details_reach_the_rules(lab: Lab) -> None:
    condition = " && ".join(
        f'action.lookup("{key}") == "{value}"'
        for key, value in {
            "domain": "vm1",
            "uuid": uuid(1),
            "disk": "vda",
            "method": "qemu",
        }.items()
    )
    lab.polkit.rules(rule("backup", "create", condition=condition))
    method = "<diskSnapshot method='qemu'/>"
    assert (await busctl(lab, "backup", *words(1, method=method))).startswith("ss ")
    assert (await busctl(lab, "backup", *words(1))).startswith("error:")


async def test_naming_a_place_needs_configure_too(lab: Lab, engine: FakeEngine) -> None:
    place = "<diskSnapshot method='qemu'><overlay file='/pool/x.qcow2'/></diskSnapshot>"
    lab.polkit.rules(rule("backup", "create"))
    assert (await busctl(lab, "backup", *words(1, method=place))).startswith("error:")
    assert engine.calls == []
    lab.polkit.rules(rule("backup", "create") + rule("backup", "configure"))
    assert (await busctl(lab, "backup", *words(1, method=place))).startswith("ss ")


async def test_who_may_create_may_not_read(lab: Lab) -> None:
    lab.polkit.rules(rule("backup", "create"))
    disks = ["call", BUS_NAME, domain_path(uuid(1)), DOMAIN, "Disks"]
    assert (await busctl(lab, "backup", *disks)).startswith("error:")
    lab.polkit.rules(rule("backup", "read"))
    assert (await busctl(lab, "backup", *disks)).startswith("aa{sv} 1 7 ")


async def test_who_may_create_may_not_delete(lab: Lab, engine: FakeEngine) -> None:
    engine.snapshots[make_snapshot().uuid] = make_snapshot()
    path = snapshot_path(make_snapshot().uuid)
    delete = ["call", BUS_NAME, path, SNAPSHOT, "Delete", "u", "0"]
    lab.polkit.rules(rule("backup", "create"))
    assert (await busctl(lab, "backup", *delete)).startswith("error:")
    assert engine.calls == []
    condition = 'action.lookup("domain") == "vm1" && action.lookup("name") == "label1"'
    lab.polkit.rules(rule("backup", "delete", condition=condition))
    assert (await busctl(lab, "backup", *delete)).startswith("s ")
    assert engine.uids == [account_of("backup").pw_uid]


async def test_a_job_is_its_starters_to_cancel_and_others_need_its_action(
    lab: Lab, engine: FakeEngine
) -> None:
    engine.jobs[1] = make_job(1, uid=account_of("nobody").pw_uid)
    cancel = ["call", BUS_NAME, job_path(1), JOB, "Cancel"]
    assert await busctl(lab, "nobody", *cancel) == ""
    assert (await busctl(lab, "backup", *cancel)).startswith("error:")
    lab.polkit.rules(rule("backup", "create"))
    assert (await busctl(lab, "backup", *cancel)).startswith("error:")
    assert engine.calls == [("cancel", 1)]
    lab.polkit.rules(rule("backup", "delete"))
    assert await busctl(lab, "backup", *cancel) == ""
    assert await busctl(lab, None, *cancel) == "", "root may all"


async def test_what_is_open_is_open_to_nobody(lab: Lab) -> None:
    find = ["call", BUS_NAME, ROOT_PATH, MANAGER, "FindDomain", "s", "vm1"]
    assert (await busctl(lab, "nobody", *find)).startswith("o ")
    objects = ["call", BUS_NAME, ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects"]
    answer = await busctl(lab, "nobody", *objects)
    assert answer.startswith("a{oa{sa{sv}}} 2 ")
    assert "/pool" not in answer


async def test_a_dismissed_question(lab: Lab, engine: FakeEngine) -> None:
    """An agent is registered for the caller's process, and dismisses what it is asked."""
    command = ["sh", "-c", 'read go; exec busctl --timeout=20 "$@"', "sh", *words(1)]
    caller = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        user="nobody",
        group="nogroup",
        extra_groups=[],
    )
    agent = await MessageBus(bus_address=lab.address).connect()
    asked: list[str] = []

    def dismiss(message: Message) -> Message | None:
        if message.member != "BeginAuthentication":
            return None
        asked.append(message.body[0])
        return Message.new_error(message, NAME + ".Error.Cancelled", "no")

    agent.add_message_handler(dismiss)
    with open(f"/proc/{caller.pid}/stat") as stat:
        start = int(stat.read().rpartition(")")[2].split()[19])
    subject = ["unix-process", {"pid": Variant("u", caller.pid), "start-time": Variant("t", start)}]
    subject[1]["uid"] = Variant("i", 65534)  # type: ignore[index]
    registered = await agent.call(
        Message(
            destination=NAME,
            path=PATH,
            interface=INTERFACE,
            member="RegisterAuthenticationAgent",
            signature="(sa{sv})ss",
            body=[subject, "C", "/agent"],
        )
    )
    assert registered is not None
    assert registered.message_type is MessageType.METHOD_RETURN, registered.body
    _, error = await caller.communicate(b"go\n")
    assert asked == [ACTION + "create"], error
    assert b"dismissed" in error
    assert caller.returncode == 1
    assert engine.calls == []
    Client(agent).close()


async def test_without_polkitd_root_alone_may(lab: Lab, engine: FakeEngine) -> None:
    lab.polkit.stop()
    try:
        assert (await busctl(lab, None, *words(1))).startswith("ss ")
        answer = await busctl(lab, "nobody", *words(1))
        assert answer.startswith("error:")
        assert "only root" in answer
        assert len(engine.calls) == 1
    finally:
        lab.polkit.start()
    assert "needs authentication" in await busctl(lab, "nobody", *words(1))


def rule(user: str, action: str, result: str = "YES", condition: str = "true") -> Any:
    return (
        "polkit.addRule(function(action, subject) {\n"
        f"  if (subject.user == '{user}' && action.id == '{ACTION}{action}' && {condition})\n"
        f"    return polkit.Result.{result};\n"
        "});\n"
    )
