"""Delete, Revert, and jobs: who may start and cancel them, what they say, and what is signalled."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.signature import Variant

from snapd_vm.bus.connection import Connection
from snapd_vm.bus.contract import DISK_SNAPSHOT, JOB, OBJECT_MANAGER, PEER, SNAPSHOT
from snapd_vm.bus.remote import CallFailed, Remote
from snapd_vm.bus.served import DiskSnapshotBus
from snapd_vm.errors import NoSuchSnapshot
from snapd_vm.model import ROOT_PATH, Job, domain_path, job_path, snapshot_path
from tests.bus.clients import Client
from tests.bus.fakes import (
    CHALLENGE,
    NO,
    FakeEngine,
    StandInPolkit,
    make_job,
    make_snapshot,
    uuid,
)

STANDARD = "org.freedesktop.DBus.Error."
ERROR = "org.example.DiskSnapshot.Error."
ACTION = "org.example.DiskSnapshot."
VDA = "<disk><target dev='vda'/></disk>"
PATH = snapshot_path(make_snapshot().uuid)
DETAILS = {"domain": "vm1", "uuid": uuid(1), "disk": "vda", "method": "", "name": "label1"}
CREATES: list[tuple[str, str]] = [
    (domain_path(uuid(1)), VDA),
    (ROOT_PATH, f"<domain><name>vm1</name><devices>{VDA}</devices></domain>"),
]


@pytest.fixture
def engine() -> FakeEngine:
    """With a snapshot, and a job of somebody else's that deletes it."""
    engine = FakeEngine()
    engine.snapshots[make_snapshot().uuid] = make_snapshot()
    engine.jobs[1] = make_job(1)
    return engine


@pytest.fixture
def asked(served: DiskSnapshotBus, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the service asks other services, in order."""
    connection = served._connection
    assert connection is not None
    members: list[str] = []
    original = Connection.call

    async def call(self: Connection, method: Remote, *arguments: Any) -> list[Any]:
        members.append(method.member)
        return await original(self, method, *arguments)

    monkeypatch.setattr(Connection, "call", call)
    return members


@pytest.mark.parametrize(
    ("member", "now"), [("Delete", "<disk now='base'/>"), ("Revert", "<disk now='overlay'/>")]
)
async def test_delete_and_revert_ask_polkit_and_answer_the_disk(
    client: Client, engine: FakeEngine, polkit: StandInPolkit, member: str, now: str
) -> None:
    answer = await client.call(SNAPSHOT, member, "u", [0], path=PATH)
    assert (answer.signature, answer.body) == ("s", [now])
    assert engine.calls == [(member.lower(), make_snapshot().uuid)]
    (question,) = polkit.questions
    assert (question.action, question.details) == (ACTION + member.lower(), DETAILS)


@pytest.mark.parametrize("member", ["Delete", "Revert"])
@pytest.mark.parametrize("refusal", [NO, CHALLENGE])
async def test_without_the_right_nothing_is_deleted_or_reverted(
    client: Client, engine: FakeEngine, polkit: StandInPolkit, refusal: Any, member: str
) -> None:
    polkit.by_action = {ACTION + member.lower(): refusal}
    answer = await client.call(SNAPSHOT, member, "u", [0], path=PATH)
    assert answer.error_name.startswith(ERROR + "NotAuthorized")
    assert engine.calls == []


@pytest.mark.parametrize("member", ["Delete", "Revert"])
@pytest.mark.parametrize("flags", [1, 4, 1 << 31])
async def test_delete_and_revert_have_no_flags(
    client: Client, engine: FakeEngine, polkit: StandInPolkit, flags: int, member: str
) -> None:
    answer = await client.call(SNAPSHOT, member, "u", [flags], path=PATH)
    assert answer.error_name == STANDARD + "InvalidArgs"
    assert (polkit.questions, engine.calls) == ([], [])


async def test_delete_of_what_is_gone(client: Client, engine: FakeEngine) -> None:
    gone = snapshot_path(uuid(9))
    answer = await client.call(SNAPSHOT, "Delete", "u", [0], path=gone)
    assert answer.error_name == STANDARD + "UnknownObject"

    async def vanish() -> None:
        raise NoSuchSnapshot("The snapshot is gone; nothing is left to do.")

    engine.work = vanish
    answer = await client.call(SNAPSHOT, "Delete", "u", [0], path=PATH)
    assert answer.error_name == ERROR + "NoSuchSnapshot"


async def test_who_starts_a_job_is_told_to_the_engine(client: Client, engine: FakeEngine) -> None:
    for member in ("Delete", "Revert"):
        await client.call(SNAPSHOT, member, "u", [0], path=PATH)
    for path, xml in CREATES:
        await client.call(DISK_SNAPSHOT, "Create", "sssu", [xml, "", "", 0], path)
    assert [what for what, _ in engine.calls] == ["delete", "revert", "create", "create"]
    assert engine.uids == [os.getuid()] * 4


async def test_the_bus_is_asked_who_starts_a_job_while_polkit_thinks(
    client: Client, polkit: StandInPolkit, asked: list[str]
) -> None:
    polkit.verdict = None
    call = asyncio.create_task(client.call(SNAPSHOT, "Delete", "u", [0], path=PATH))
    async with asyncio.timeout(5):
        while len(asked) < 2:
            await asyncio.sleep(0.002)
    assert set(asked) == {"CheckAuthorization", "GetConnectionUnixUser"}
    call.cancel()


async def test_what_starts_no_job_costs_no_such_question(client: Client, asked: list[str]) -> None:
    await client.call(SNAPSHOT, "GetBackupSource", path=PATH)
    assert asked == ["CheckAuthorization"]


@pytest.mark.parametrize("error", [CallFailed(STANDARD + "NameHasNoOwner", ""), TimeoutError()])
async def test_a_caller_whom_the_bus_does_not_know_starts_and_cancels_nothing(
    client: Client,
    engine: FakeEngine,
    polkit: StandInPolkit,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    original = Connection.call

    async def call(self: Connection, method: Remote, *arguments: Any) -> list[Any]:
        if method.member == "GetConnectionUnixUser":
            raise error
        return await original(self, method, *arguments)

    monkeypatch.setattr(Connection, "call", call)
    for verdict in (polkit.verdict, NO):
        polkit.verdict = verdict
        answer = await client.call(SNAPSHOT, "Delete", "u", [0], path=PATH)
        assert answer.error_name == ERROR + "NotAuthorized"
        answer = await client.call(JOB, "Cancel", path=job_path(1))
        assert answer.error_name == ERROR + "NotAuthorized"
    assert engine.calls == []


async def test_who_has_started_a_job_may_cancel_it(
    client: Client, engine: FakeEngine, polkit: StandInPolkit
) -> None:
    polkit.verdict = NO
    engine.jobs[1] = make_job(1, uid=os.getuid())
    answer = await client.call(JOB, "Cancel", path=job_path(1))
    assert (answer.message_type, answer.body) == (MessageType.METHOD_RETURN, [])
    assert engine.calls == [("cancel", 1)]
    assert polkit.questions == []


@pytest.mark.parametrize("operation", ["create", "delete", "revert"])
async def test_another_needs_the_action_of_what_the_job_does(
    client: Client, engine: FakeEngine, polkit: StandInPolkit, operation: str
) -> None:
    engine.jobs[1] = make_job(1, operation=operation)
    polkit.verdict = NO
    refused = await client.call(JOB, "Cancel", path=job_path(1))
    assert refused.error_name == ERROR + "NotAuthorized"
    assert engine.calls == []
    polkit.by_action = {ACTION + operation: (True, False, {})}
    allowed = await client.call(JOB, "Cancel", path=job_path(1))
    assert allowed.message_type is MessageType.METHOD_RETURN
    assert engine.calls == [("cancel", 1)]
    assert [q.action for q in polkit.questions] == [ACTION + operation] * 2
    assert polkit.questions[0].details == DETAILS


async def test_a_person_can_be_asked_about_a_cancel(client: Client, polkit: StandInPolkit) -> None:
    flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
    await client.call(JOB, "Cancel", path=job_path(1), flags=flags)
    assert [question.flags for question in polkit.questions] == [1]


async def test_a_job_of_an_unknown_operation_is_nobody_elses_to_cancel(
    client: Client, engine: FakeEngine
) -> None:
    engine.jobs[1] = make_job(1, operation="unheard of")
    answer = await client.call(JOB, "Cancel", path=job_path(1))
    assert answer.error_name == ERROR + "Internal"
    assert engine.calls == []


async def test_a_job_that_has_ended_or_never_was_is_not_cancelled(
    client: Client, engine: FakeEngine
) -> None:
    engine.jobs[1] = make_job(1, cancelable=False, done=True)
    answer = await client.call(JOB, "Cancel", path=job_path(1))
    assert answer.error_name == ERROR + "InvalidState"
    for path in (job_path(2), job_path(1) + "/x", ROOT_PATH + "/job/01"):
        answer = await client.call(JOB, "Cancel", path=path)
        assert answer.error_name == STANDARD + "UnknownObject"
    assert engine.calls == [("cancel", 1)]


async def test_the_properties_of_a_job(client: Client, polkit: StandInPolkit) -> None:
    assert await client.properties(job_path(1), JOB) == {
        "Operation": "delete",
        "Progress": 0.0,
        "ProgressValid": False,
        "Bytes": 1 << 33,
        "StartTime": 1_700_000_000_000_000,
        "Objects": [PATH, domain_path(uuid(1))],
        "StartedByUID": 4242,
        "Cancelable": True,
        "Result": {},
    }
    assert polkit.questions == []


async def test_a_result_tells_no_path(client: Client, engine: FakeEngine) -> None:
    secret = "<source file='/pool/secret'/>"
    answers = {"modified_disk": secret, "backup_source": secret, "anything": "/pool/secret"}
    told = {"snapshots": [PATH], "error": "Busy"}
    new = make_job(1, done=True, result=answers | told)
    engine.jobs[1] = new
    assert (await client.properties(job_path(1), JOB))["Result"] == {
        "snapshots": Variant("ao", [PATH]),
        "error": Variant("s", "Busy"),
    }
    await client.listen()
    engine.tell("job_added", new)
    engine.tell("job_changed", make_job(1), new)
    added, changed = await client.heard("InterfacesAdded"), await client.heard("PropertiesChanged")
    assert "secret" not in repr(added.body) + repr(changed.body)


async def life(client: Client, engine: FakeEngine, *jobs: Job) -> list[tuple[str | None, ...]]:
    """What is signalled of a job that is these in turn, and then completes and goes."""
    await client.listen()
    engine.tell("job_added", jobs[0])
    for old, new in pairwise(jobs):
        engine.tell("job_changed", old, new)
    engine.tell("job_completed", jobs[-1], False, "It was cancelled.")
    engine.tell("job_removed", jobs[-1])
    await client.call(PEER, "Ping")
    return [
        (signal.member, signal.path)
        for signal in client.signals
        if signal.path != "/org/freedesktop/DBus"
    ]


async def test_the_life_of_a_job(client: Client, engine: FakeEngine) -> None:
    first = make_job(5)
    half = replace(first, progress=0.5, progress_valid=True)
    done = replace(half, cancelable=False, done=True, result={"error": ERROR + "Cancelled"})
    told = await life(client, engine, first, half, replace(half), done)
    path = job_path(5)
    assert told == [
        ("InterfacesAdded", ROOT_PATH),
        ("PropertiesChanged", path),
        ("PropertiesChanged", path),
        ("Completed", path),
        ("InterfacesRemoved", ROOT_PATH),
    ]
    added, progress, end, completed, removed = (
        signal for signal in client.signals if signal.member != "NameAcquired"
    )
    assert (added.body[0], set(added.body[1]), len(added.body[1][JOB])) == (path, {JOB}, 9)
    changed = {"Progress": Variant("d", 0.5), "ProgressValid": Variant("b", True)}
    assert progress.body == [JOB, changed, []]
    result = Variant("a{sv}", {"error": Variant("s", ERROR + "Cancelled")})
    assert end.body == [JOB, {"Cancelable": Variant("b", False), "Result": result}, []]
    assert (completed.interface, completed.signature) == (JOB, "bs")
    assert completed.body == [False, "It was cancelled."]
    assert removed.body == [path, [JOB]]


async def test_managed_objects_follow_a_job(client: Client, engine: FakeEngine) -> None:
    seen = []
    for progress in (0.25, 0.75):
        engine.jobs[1] = make_job(1, progress=progress)
        answer = await client.call(OBJECT_MANAGER, "GetManagedObjects")
        seen.append(answer.body[0][job_path(1)][JOB]["Progress"].value)
    assert seen == [0.25, 0.75]
    engine.jobs = {}
    answer = await client.call(OBJECT_MANAGER, "GetManagedObjects")
    assert job_path(1) not in answer.body[0]


async def test_a_starter_who_leaves_does_not_end_the_job(
    client: Client, connect: Callable[[], Awaitable[Client]], engine: FakeEngine
) -> None:
    begun, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await go.wait()
        done.set()

    engine.work = work
    leaver = await connect()
    call = leaver.message(SNAPSHOT, "Delete", "u", [0], PATH)
    leaver.bus.send(call).add_done_callback(lambda f: f.exception())
    await asyncio.wait_for(begun.wait(), 5)
    leaver.close()
    await client.call(PEER, "Ping")
    go.set()
    await asyncio.wait_for(done.wait(), 5)
