"""What is asked of polkit, and what becomes of each of its answers, with a stand-in on the bus."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from dbus_next.constants import MessageFlag, MessageType

from snapd_vm.bus.connection import Connection, open_connection
from snapd_vm.bus.contract import DISK_SNAPSHOT, DOMAIN, SNAPSHOT
from snapd_vm.bus.polkit import ABSENT, AT_ONCE, Polkit
from snapd_vm.bus.served import DiskSnapshotBus
from snapd_vm.model import ROOT_PATH, domain_path, snapshot_path
from tests.bus.clients import Client
from tests.bus.fakes import (
    CHALLENGE,
    DISMISSED,
    NO,
    YES,
    FakeEngine,
    StandInPolkit,
    make_snapshot,
    uuid,
)

ERROR = "org.example.DiskSnapshot.Error."
ACTION = "org.example.DiskSnapshot."
PATH = domain_path(uuid(1))
VDA = "<disk><target dev='vda'/></disk>"
PLACE = "<diskSnapshot method='qemu'><overlay file='/pool/x.qcow2'/></diskSnapshot>"
EMBEDDED = f"<disk><target dev='vda'/>{PLACE}</disk>"
CREATE = (DISK_SNAPSHOT, "Create", "sssu", [VDA, "", "nightly", 0], PATH)
INTERACTIVE = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION


@pytest.mark.parametrize(
    ("verdict", "error"),
    [
        (NO, "NotAuthorized"),
        (CHALLENGE, "NotAuthorizedCanObtain"),
        (DISMISSED, "NotAuthorizedDismissed"),
        ("org.freedesktop.PolicyKit1.Error.Failed", "NotAuthorized"),
        ("org.freedesktop.DBus.Error.NoReply", "NotAuthorized"),
        ("org.freedesktop.DBus.Error.AccessDenied", "NotAuthorized"),
    ],
)
async def test_anything_but_yes_is_refused_and_nothing_done(
    client: Client, engine: FakeEngine, polkit: StandInPolkit, verdict: Any, error: str
) -> None:
    polkit.verdict = verdict
    for call in (
        CREATE,
        (DOMAIN, "Plan", "sssu", [VDA, "", "", 0], PATH),
        (DOMAIN, "Disks", "", [], PATH),
        (DOMAIN, "SetMethod", "ss", [VDA, ""], PATH),
        (DOMAIN, "GetMethod", "s", [VDA], PATH),
    ):
        answer = await client.call(*call)
        assert answer.error_name == ERROR + error
        assert "\n" not in answer.body[0]
    assert engine.calls == []


async def test_what_polkit_is_told(client: Client, polkit: StandInPolkit) -> None:
    await client.call(*CREATE)
    (asked,) = polkit.questions
    assert asked.sender == client.name
    assert asked.action == ACTION + "create"
    assert asked.details == {
        "domain": "vm1",
        "uuid": uuid(1),
        "disk": "vda",
        "method": "",
        "name": "nightly",
    }


async def test_a_disk_that_is_not_there_looks_like_one_that_is(
    client: Client, engine: FakeEngine, polkit: StandInPolkit
) -> None:
    polkit.verdict = NO
    missing = "<disk><target dev='vdz'/></disk>"
    there = await client.call(*CREATE)
    absent = await client.call(DISK_SNAPSHOT, "Create", "sssu", [missing, "", "", 0], PATH)
    assert (absent.error_name, absent.body) == (there.error_name, there.body)
    assert polkit.questions[1].details["disk"] == "vdz"
    polkit.verdict = YES
    allowed = await client.call(DISK_SNAPSHOT, "Create", "sssu", [missing, "", "", 0], PATH)
    assert allowed.error_name == ERROR + "NoSuchDisk"
    assert engine.calls == []


async def test_a_domain_that_is_not_there_looks_like_one_that_is(
    client: Client, polkit: StandInPolkit
) -> None:
    polkit.verdict = NO
    answers = []
    for name in ("vm1", "vm99"):
        xml = f"<domain><name>{name}</name><devices>{VDA}</devices></domain>"
        answers.append(await client.call(DISK_SNAPSHOT, "Create", "sssu", [xml, "", "", 0]))
    assert [(a.error_name, a.body) for a in answers] == [
        (answers[0].error_name, answers[0].body)
    ] * 2
    assert [q.details["domain"] for q in polkit.questions] == ["vm1", "vm99"]
    assert [q.details["uuid"] for q in polkit.questions] == [uuid(1), ""]


@pytest.mark.parametrize(
    ("disk", "method", "actions", "asked"),
    [
        (VDA, "", ["create"], ""),
        (VDA, "<diskSnapshot method='qemu'/>", ["create"], "qemu"),
        (VDA, PLACE, ["create", "configure"], "qemu"),
        (EMBEDDED, "", ["create", "configure"], "qemu"),
        (EMBEDDED, "<diskSnapshot method='qemu'/>", ["create"], "qemu"),
    ],
)
@pytest.mark.parametrize("member", ["Create", "Plan"])
async def test_naming_a_place_needs_configure_too(
    client: Client,
    engine: FakeEngine,
    polkit: StandInPolkit,
    member: str,
    disk: str,
    method: str,
    actions: list[str],
    asked: str,
) -> None:
    interface = DISK_SNAPSHOT if member == "Create" else DOMAIN
    call = (interface, member, "sssu", [disk, method, "", 0], PATH)
    assert (await client.call(*call)).message_type is MessageType.METHOD_RETURN
    assert [q.action.removeprefix(ACTION) for q in polkit.questions] == actions
    assert {q.details["method"] for q in polkit.questions} == {asked}
    engine.calls.clear()
    for refused in actions:
        polkit.by_action = {ACTION + refused: NO}
        assert (await client.call(*call)).error_name == ERROR + "NotAuthorized"
    assert engine.calls == []


async def test_on_the_root_a_place_needs_configure_too(
    client: Client, polkit: StandInPolkit, engine: FakeEngine
) -> None:
    polkit.by_action = {ACTION + "configure": NO}
    xml = f"<domain><name>vm1</name><devices>{EMBEDDED}</devices></domain>"
    answer = await client.call(DISK_SNAPSHOT, "Create", "sssu", [xml, "", "", 0], ROOT_PATH)
    assert answer.error_name == ERROR + "NotAuthorized"
    assert engine.calls == []


@pytest.mark.parametrize("member", ["GetBackupSource", "GetModifiedDisk"])
async def test_reading_a_snapshot(
    client: Client, engine: FakeEngine, polkit: StandInPolkit, member: str
) -> None:
    snapshot = make_snapshot()
    engine.snapshots[snapshot.uuid] = snapshot
    await client.call(SNAPSHOT, member, path=snapshot_path(snapshot.uuid))
    await client.call(DOMAIN, "Disks", path=PATH)
    assert [q.action for q in polkit.questions] == [ACTION + "read"] * 2
    assert polkit.questions[0].details == {
        "domain": "vm1",
        "uuid": uuid(1),
        "disk": "vda",
        "method": "",
        "name": "label1",
    }
    polkit.verdict = NO
    answer = await client.call(SNAPSHOT, member, path=snapshot_path(snapshot.uuid))
    assert answer.error_name == ERROR + "NotAuthorized"


async def test_a_person_is_asked_only_if_the_message_says_so(
    client: Client, polkit: StandInPolkit
) -> None:
    await client.call(*CREATE)
    await client.call(*CREATE, flags=INTERACTIVE)
    assert [q.flags for q in polkit.questions] == [0, 1]
    assert len({q.cancellation_id for q in polkit.questions}) == 2


async def test_a_check_that_takes_its_time_holds_up_nobody(
    client: Client, polkit: StandInPolkit
) -> None:
    polkit.delay = 0.3
    slow = asyncio.create_task(client.call(*CREATE))
    while not polkit.questions:
        await asyncio.sleep(0.002)
    polkit.delay = 0
    assert (await client.call(*CREATE)).message_type is MessageType.METHOD_RETURN
    assert not slow.done()
    assert (await slow).message_type is MessageType.METHOD_RETURN


@pytest.fixture
async def impatient(
    engine: FakeEngine, polkit: StandInPolkit, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[DiskSnapshotBus]:
    """The surface with short limits for polkit."""

    def short(connection: Connection) -> Polkit:
        return Polkit(connection, limit=0.1, interactive_limit=0.3)

    monkeypatch.setattr("snapd_vm.bus.served.Polkit", short)
    bus = DiskSnapshotBus()
    await bus.connect()
    bus.serve(engine, "0")
    await bus.take_name()
    yield bus
    await bus.close(1)


async def test_a_polkit_that_never_answers_is_a_no(
    impatient: DiskSnapshotBus,
    address: str,
    engine: FakeEngine,
    polkit: StandInPolkit,
) -> None:
    polkit.verdict = None
    client = await Client.connect(address)
    for flags, shortest, longest in ((MessageFlag.NONE, 0.1, 0.25), (INTERACTIVE, 0.3, 1.0)):
        begun = asyncio.get_running_loop().time()
        answer = await client.call(*CREATE, flags=flags)
        assert answer.error_name == ERROR + "NotAuthorized"
        assert shortest <= asyncio.get_running_loop().time() - begun < longest
    await asyncio.sleep(0.05)
    assert polkit.cancelled == [q.cancellation_id for q in polkit.questions]
    assert engine.calls == []
    client.close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, as root alone may without polkit")
async def test_without_polkit_root_may(
    client: Client, engine: FakeEngine, polkit: StandInPolkit
) -> None:
    await polkit.end()
    assert (await client.call(*CREATE)).message_type is MessageType.METHOD_RETURN
    assert len(engine.calls) == 1


@pytest.mark.parametrize("error", [*sorted(ABSENT), "org.freedesktop.DBus.Error.Spawn.Failed"])
async def test_without_polkit_nobody_else_may(
    client: Client,
    engine: FakeEngine,
    polkit: StandInPolkit,
    served: DiskSnapshotBus,
    monkeypatch: pytest.MonkeyPatch,
    error: str,
) -> None:
    connection = served._connection
    assert connection is not None
    original = connection.call

    async def call(method: Any, *arguments: Any) -> list[Any]:
        if method.member == "GetConnectionUnixUser":
            assert arguments[0] == [client.name]
            return [65534]
        return await original(method, *arguments)

    monkeypatch.setattr(connection, "call", call)
    polkit.verdict = error
    answer = await client.call(*CREATE)
    assert answer.error_name == ERROR + "NotAuthorized"
    assert "root" in answer.body[0]
    assert engine.calls == []


async def test_an_answer_of_the_wrong_form_is_a_no(
    address: str, polkit: StandInPolkit, client: Client, engine: FakeEngine
) -> None:
    polkit.verdict = ("not", "a", "verdict")  # type: ignore[assignment]
    handler = polkit.bus._user_message_handlers

    def odd(message: Any) -> Any:
        from dbus_next.message import Message

        if message.member == "CheckAuthorization":
            return Message.new_method_return(message, "b", [True])
        return None

    handler.insert(0, odd)
    assert (await client.call(*CREATE)).error_name == ERROR + "NotAuthorized"
    assert engine.calls == []


async def test_losing_the_bus_during_a_check_is_a_no(polkit: StandInPolkit) -> None:
    connection = await open_connection()
    polkit.verdict = None
    from snapd_vm.bus.calls import Action, Details
    from snapd_vm.errors import NotAuthorized

    check = asyncio.create_task(Polkit(connection).check(":1.999", [Action.READ], Details(), False))
    while not polkit.questions:
        await asyncio.sleep(0.002)
    connection._bus._sock.shutdown(2)
    with pytest.raises(NotAuthorized):
        await asyncio.wait_for(check, 5)
    await connection.close()


async def test_the_callers_agent_is_not_told_whose_disk_a_source_is(
    client: Client, engine: FakeEngine, polkit: StandInPolkit
) -> None:
    polkit.verdict = CHALLENGE
    owner = engine.domains[uuid(1)]
    bare = f"<disk><source file='{owner.disks[0].path}'/></disk>"
    for path in (ROOT_PATH, PATH):
        polkit.questions.clear()
        await client.call(
            DISK_SNAPSHOT, "Create", "sssu", [bare, "", "", 0], path, flags=INTERACTIVE
        )
        for_rules, for_agent = polkit.questions
        assert not for_rules.flags
        assert (for_rules.details["domain"], for_rules.details["disk"]) == (owner.name, "vda")
        assert for_agent.flags
        known = owner.name if path == PATH else ""
        assert (for_agent.details["domain"], for_agent.details["disk"]) == (known, "")


@pytest.mark.parametrize("interactive", [False, True])
async def test_more_questions_than_the_bus_lets_wait_are_all_answered(
    served: DiskSnapshotBus,
    connect: Callable[[], Awaitable[Client]],
    polkit: StandInPolkit,
    interactive: bool,
) -> None:
    """Of one connection 128 calls may wait for their answers (dbus-daemon(1))."""
    assert sum(AT_ONCE.values()) < 128
    polkit.delay = 1.0
    clients = [await connect() for _ in range(3)]
    flags = INTERACTIVE if interactive else MessageFlag.NONE
    calls = [client.call(*CREATE, flags=flags) for client in clients for _ in range(100)]
    answered = asyncio.gather(*calls)
    while len(polkit.questions) < AT_ONCE[interactive]:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert len(polkit.questions) == AT_ONCE[interactive]
    answers = await answered
    assert [a.error_name for a in answers if a.message_type is MessageType.ERROR] == []
