"""Every call is answered exactly once, whatever becomes of it; and nobody can have too many."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message

from snapd_vm.bus import wire
from snapd_vm.bus.contract import DISK_SNAPSHOT, DOMAIN, MANAGER, PEER
from snapd_vm.bus.served import DiskSnapshotBus
from snapd_vm.errors import Busy, NoSpace
from snapd_vm.model import ROOT_PATH, Plan, domain_path
from tests.bus.clients import Client, RawPeer, marshalled
from tests.bus.fakes import FakeEngine, StandInPolkit, uuid

ERROR = "org.example.DiskSnapshot.Error."
PATH = domain_path(uuid(1))
VDA = "<disk><target dev='vda'/></disk>"
CREATE = (DISK_SNAPSHOT, "Create", "sssu", [VDA, "", "", 0], PATH)


async def once(client: Client, answer: Message) -> bool:
    """Whether a later round trip brings no second answer."""
    await client.call(PEER, "Ping")
    return client.answers[answer.reply_serial] == 1


async def raising(error: BaseException) -> None:
    raise error


async def test_success_is_answered_once(client: Client) -> None:
    answer = await client.call(*CREATE)
    assert answer.message_type is MessageType.METHOD_RETURN
    assert await once(client, answer)


async def test_an_error_of_ours_has_its_name_and_sentence(
    client: Client, engine: FakeEngine
) -> None:
    engine.work = lambda: raising(NoSpace("The pool is full; make room."))
    answer = await client.call(*CREATE)
    assert answer.error_name == ERROR + "NoSpace"
    assert answer.body == ["The pool is full; make room."]
    assert await once(client, answer)


@pytest.mark.parametrize("error", [ZeroDivisionError("secret /pool/x"), KeyError("x"), OSError(5)])
async def test_a_stray_exception_goes_to_the_log_and_not_to_the_caller(
    client: Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    engine.work = lambda: raising(error)
    answer = await client.call(*CREATE)
    assert answer.error_name == ERROR + "Internal"
    assert answer.body == ["Something went wrong in the service; see its log."]
    assert any(record.exc_info for record in caplog.records)
    assert await once(client, answer)


async def test_an_operation_that_is_cancelled_is_answered(
    client: Client, engine: FakeEngine
) -> None:
    engine.work = lambda: raising(asyncio.CancelledError())
    answer = await client.call(*CREATE)
    assert answer.error_name == ERROR + "Cancelled"
    assert await once(client, answer)


async def test_an_answer_that_can_not_be_sent_is_our_mistake(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def plan(*_: object) -> Plan:
        return Plan("qemu", "", None, -1, 0, ())  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "plan", plan)
    answer = await client.call(DOMAIN, "Plan", "sssu", CREATE[3], PATH)
    assert answer.error_name == ERROR + "Internal"
    assert await once(client, answer)


async def test_a_property_that_can_not_be_read_is_our_mistake(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "connected", "perhaps")
    answer = await client.call("org.freedesktop.DBus.Properties", "GetAll", "s", [MANAGER])
    assert answer.error_name == ERROR + "Internal"
    assert await once(client, answer)


@pytest.mark.parametrize("member", ["Create", "Nonsense", "Ping"])
async def test_who_wants_no_reply_gets_none(
    client: Client, served: DiskSnapshotBus, member: str
) -> None:
    """Nothing is even sent: the bus would hold back an answer that nobody asked for."""
    assert served._connection is not None
    answered: list[str] = []
    served._connection._send = lambda kind, *_, **fields: answered.append(fields["destination"])  # type: ignore[method-assign]
    message = client.message(None, member, path=PATH, flags=MessageFlag.NO_REPLY_EXPECTED)
    if member == "Create":
        message = client.message(*CREATE, flags=MessageFlag.NO_REPLY_EXPECTED)
    await client.bus.send(message)
    await client.bus.send(client.message(PEER, "Ping"))
    await until(lambda: client.name in answered)
    await asyncio.sleep(0.05)
    assert answered.count(client.name) == 1


async def test_a_caller_who_leaves_during_the_check_takes_the_question_back(
    client: Client,
    connect: Callable[[], Awaitable[Client]],
    engine: FakeEngine,
    polkit: StandInPolkit,
) -> None:
    polkit.verdict = None
    leaver = await connect()
    leaver.bus.send(leaver.message(*CREATE)).add_done_callback(lambda f: f.exception())
    await until(lambda: bool(polkit.questions))
    leaver.close()
    await until(lambda: bool(polkit.cancelled))
    assert polkit.cancelled == [polkit.questions[0].cancellation_id]
    assert engine.calls == []


async def test_a_caller_who_leaves_later_does_not_end_the_operation(
    client: Client,
    connect: Callable[[], Awaitable[Client]],
    engine: FakeEngine,
) -> None:
    begun, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await go.wait()
        done.set()

    engine.work = work
    leaver = await connect()
    leaver.bus.send(leaver.message(*CREATE)).add_done_callback(lambda f: f.exception())
    await asyncio.wait_for(begun.wait(), 5)
    leaver.close()
    await client.call(PEER, "Ping")
    go.set()
    await asyncio.wait_for(done.wait(), 5)
    engine.work = None
    assert (await client.call(*CREATE)).message_type is MessageType.METHOD_RETURN


async def test_the_bus_is_asked_who_leaves_only_while_polkit_is_asked(
    client: Client, served: DiskSnapshotBus, polkit: StandInPolkit
) -> None:
    guard = served._guard
    assert guard is not None
    asked: list[bool] = []
    connection = guard._connection
    original = connection.watch_leaving
    connection.watch_leaving = lambda wanted: (asked.append(wanted), original(wanted))[1]  # type: ignore[method-assign,func-returns-value]
    polkit.delay = 0.05
    await asyncio.gather(*(client.call(*CREATE) for _ in range(5)))
    assert asked == [True, False]
    assert guard.in_progress == 0


async def test_a_sender_has_a_limited_number_of_calls(
    client: Client, connect: Callable[[], Awaitable[Client]], engine: FakeEngine
) -> None:
    go = asyncio.Event()
    engine.work = go.wait
    calls = [asyncio.create_task(client.call(*CREATE)) for _ in range(126)]
    await until(lambda: len(engine.calls) == 120)
    other = await connect()
    others = asyncio.create_task(other.call(*CREATE))
    await until(lambda: len(engine.calls) == 121)
    assert (await client.call(MANAGER, "FindDomain", "s", ["vm1"])).body, "what is open stays open"
    go.set()
    answers = await asyncio.gather(*calls)
    refused = [a.error_name for a in answers if a.message_type is MessageType.ERROR]
    assert refused == ["org.freedesktop.DBus.Error.LimitsExceeded"] * 6
    assert (await others).message_type is MessageType.METHOD_RETURN
    assert (await client.call(*CREATE)).message_type is MessageType.METHOD_RETURN


async def test_two_thousand_calls_at_once_are_all_answered_once(
    client: Client, engine: FakeEngine, served: DiskSnapshotBus, address: str
) -> None:
    engine.work = lambda: asyncio.sleep(0.01)
    answers = await asyncio.to_thread(flood, address, 2000)
    assert len(answers) == 2000
    assert {len(kinds) for kinds in answers.values()} == {1}
    names = {name for (name,) in answers.values()}
    assert names == {"", "org.freedesktop.DBus.Error.LimitsExceeded"}
    assert len(engine.calls) >= 120
    assert (await client.call(*CREATE)).message_type is MessageType.METHOD_RETURN
    assert served._guard is not None
    assert (served._guard.in_progress, len(served._guard._senders)) == (0, 0)


def flood(address: str, number: int) -> dict[int, list[str]]:
    """Sends that many Creates without waiting; the answers to each, by error name."""
    peer = RawPeer(address)
    messages = []
    for serial in range(2, number + 3):
        last = serial == number + 2
        message = Client.message(PEER, "Ping") if last else Client.message(*CREATE)
        messages.append(marshalled(message, serial))
    peer.send(b"".join(messages))
    answers: dict[int, list[str]] = {}
    ping = False
    while not ping or len(answers) < number:
        answer = peer.read()
        assert answer is not None
        if answer.reply_serial == number + 2:
            ping = True
        elif answer.kind != wire.SIGNAL:
            answers.setdefault(answer.reply_serial, []).append(answer.error_name)
    peer.close()
    return answers


async def test_closing_waits_for_what_runs_and_takes_back_what_is_asked(
    engine: FakeEngine,
    polkit: StandInPolkit,
    client: Client,
    served: DiskSnapshotBus,
) -> None:
    go = asyncio.Event()
    engine.work = go.wait
    running = asyncio.create_task(client.call(*CREATE))
    await until(lambda: bool(engine.calls))
    polkit.verdict = None
    asking = asyncio.create_task(client.call(*CREATE))
    await until(lambda: len(polkit.questions) == 2)
    closing = asyncio.create_task(served.close(5))
    assert (await asking).error_name == ERROR + "Cancelled"
    late = await client.call(*CREATE)
    assert late.error_name == ERROR + "Cancelled"
    go.set()
    assert (await running).message_type is MessageType.METHOD_RETURN
    await closing


async def test_closing_does_not_wait_longer_than_it_is_told(
    engine: FakeEngine, client: Client, served: DiskSnapshotBus
) -> None:
    engine.work = asyncio.Event().wait
    running = asyncio.create_task(client.call(*CREATE))
    await until(lambda: bool(engine.calls))
    await asyncio.wait_for(served.close(0.1), 2)
    assert (await running).error_name == ERROR + "Cancelled"


async def test_calls_are_not_answered_in_line(client: Client, engine: FakeEngine) -> None:
    engine.work = asyncio.Event().wait
    running = asyncio.create_task(client.call(*CREATE))
    await until(lambda: bool(engine.calls))
    engine.work = lambda: raising(Busy("The domain is busy; call again."))
    assert (await client.call(*CREATE)).error_name == ERROR + "Busy"
    assert not running.done()
    running.cancel()


async def test_nothing_is_logged_as_an_error_when_all_is_well(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    await client.call(*CREATE)
    await client.call(None, "Nonsense", path=ROOT_PATH)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


async def until(condition: Callable[[], bool], limit: float = 5) -> None:
    async with asyncio.timeout(limit):
        while not condition():
            await asyncio.sleep(0.002)
