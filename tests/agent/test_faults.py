"""Agents that are slow, out of step, hostile or gone: one error of ours, within the limit."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapd_vm.virt.agent import AgentError, AgentGone, AgentRefused, AgentTimeout
from snapd_vm.virt.agentsocket import SocketAgent
from tests.agent.fake import FakeAgent, result

pytestmark = pytest.mark.measures

CALLS: dict[str, tuple[str, Callable[[SocketAgent, float], object]]] = {
    "ping": ("guest-ping", lambda agent, limit: agent.ping(limit)),
    "status": ("guest-fsfreeze-status", lambda agent, limit: agent.status(limit)),
    "fsinfo": ("guest-get-fsinfo", lambda agent, limit: agent.fsinfo(limit)),
    "freeze": ("guest-fsfreeze-freeze", lambda agent, limit: agent.freeze(None, limit)),
    "freeze some": (
        "guest-fsfreeze-freeze-list",
        lambda agent, limit: agent.freeze(["/a"], limit),
    ),
    "thaw": ("guest-fsfreeze-thaw", lambda agent, limit: agent.thaw(limit)),
}


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeAgent]:
    with FakeAgent(tmp_path / "agent") as agent:
        yield agent


@pytest.fixture
def client(fake: FakeAgent) -> Iterator[SocketAgent]:
    agent = SocketAgent(fake.path)
    yield agent
    agent.close()


def took(call: Callable[[], object], error: type[AgentError], match: str | None = None) -> float:
    """How long it takes, in seconds, to fail with this error."""
    begin = time.monotonic()
    with pytest.raises(error, match=match) as caught:
        call()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 200
    return time.monotonic() - begin


def test_answers_byte_by_byte_are_put_together(fake: FakeAgent, client: SocketAgent) -> None:
    fake.slowly = True
    assert [f.mountpoint for f in client.fsinfo(5)] == ["/"]


@pytest.mark.parametrize("call", CALLS)
def test_a_trickle_does_not_stretch_the_limit(
    fake: FakeAgent, client: SocketAgent, call: str
) -> None:
    fake.slowly, fake.pause = True, 0.05
    assert took(lambda: CALLS[call][1](client, 0.3), AgentGone) < 0.5


@pytest.mark.parametrize(
    "stale",
    [
        result({}) + result(7),
        b"\xff" + result(12345) + b"\xff" + result(True) + b"\xff" + result(1.0),
        b"\xff" + result("1")[:8] + b"\xff",
        b'{"return": [{"name": ',
        b"\xff\xff\xff{}\n\xff\n\xffnull\n",
        b"\x00\xfe\x80 garbage \n\n" * 1000,
        b"[" * 100_000 + b"\n",
        b'\xff{"return": ' + b"9" * 10_000 + b"}\n",
    ],
)
@pytest.mark.parametrize("where", ["greeting", "before_sync"])
def test_what_is_old_is_thrown_away(
    fake: FakeAgent, client: SocketAgent, stale: bytes, where: str
) -> None:
    setattr(fake, where, stale)
    assert client.status(5) == "thawed"


def test_a_flood_before_the_handshake_ends_at_the_limit(
    fake: FakeAgent, client: SocketAgent
) -> None:
    fake.flood = True
    assert took(lambda: client.ping(0.3), AgentGone) < 0.6


def test_another_agents_number_is_no_handshake(fake: FakeAgent, client: SocketAgent) -> None:
    fake.answers["guest-sync-delimited"] = b"\xff" + result(1)
    assert took(lambda: client.freeze(None, 0.2), AgentGone) < 0.4
    assert fake.received == ["guest-sync-delimited"]


@pytest.mark.parametrize("call", CALLS)
def test_no_answer_is_a_timeout_within_the_limit(
    fake: FakeAgent, client: SocketAgent, call: str
) -> None:
    command, make = CALLS[call]
    fake.answers[command] = None
    assert 0.2 <= took(lambda: make(client, 0.2), AgentTimeout, command) < 0.4


@pytest.mark.parametrize("call", CALLS)
def test_a_hang_up_is_told_apart_by_whether_the_command_was_sent(
    fake: FakeAgent, client: SocketAgent, call: str
) -> None:
    command, make = CALLS[call]
    fake.answers[command] = b"HANG UP"
    assert took(lambda: make(client, 5), AgentTimeout, "closed") < 0.5
    fake.answers["guest-sync-delimited"] = b"HANG UP"
    assert took(lambda: make(client, 5), AgentGone, "closed") < 0.5


HOSTILE = [
    *(b"null", b"[]", b"1", b'"x"', b"{}", b"true", b"{", b"x", b"\x80", b"\xff", b"\0"),
    *(b'{"return": NaN}', b'{"return": Infinity}', b'{"return": -1}', b'{"return": 1.5}'),
    *(b'{"return": null}', b'{"return": "frozen?"}', b'{"return": true}', b'{"return": 1e999}'),
    *(b'{"return": 1, "return": 2}', b'{"return": 1, "error": {"desc": "both"}}'),
    *(b'{"error": null}', b'{"error": 1}', b'{"error": {}}', b'{"error": {"desc": 5}}'),
    b'{"error": {"desc": "a\\u001b[31m\\n\\ud800' + b"x" * 5000 + b'"}}',
    b'{"return": ' + b"9" * 10_000 + b"}",
    b'{"return": ' + b"9" * 30 + b"}",
    b'{"return": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    b'{"return": ' + b'{"a":' * 150_000 + b"1" + b"}" * 150_000 + b"}",
    b'{"return": [1]}',
    b'{"return": [{"mountpoint": 1, "type": "ext4"}]}',
    b'{"return": [{"mountpoint": "\\ud800", "type": "ext4"}]}',
    b'{"return": [{"mountpoint": "/a\\u0000", "type": "ext4"}]}',
    b"x" * (1 << 20) + b"xx",
]


@pytest.mark.parametrize("call", ["status", "fsinfo", "freeze", "freeze some", "thaw"])
@pytest.mark.parametrize("answer", HOSTILE, ids=lambda a: repr(a[:30]))
def test_a_hostile_answer_is_a_refusal(
    fake: FakeAgent, client: SocketAgent, call: str, answer: bytes
) -> None:
    command, make = CALLS[call]
    fake.answers[command] = answer + b"\n"
    assert took(lambda: make(client, 5), AgentRefused) < 1


def test_an_answer_without_end_is_not_waited_for(fake: FakeAgent, client: SocketAgent) -> None:
    fake.answers["guest-get-fsinfo"] = b"x" * (3 << 20)
    assert took(lambda: client.fsinfo(5), AgentRefused, "too long") < 1


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        *("return", "error", "desc", "mountpoint", "type", "disk", "serial"),
                        *("pci-controller", "domain", "bus", "slot", "function"),
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ),
    st.sampled_from(sorted(CALLS)),
)
def test_any_json_is_an_answer_or_an_agent_error(
    fake: FakeAgent, client: SocketAgent, value: object, call: str
) -> None:
    command, make = CALLS[call]
    for answer in (json.dumps(value), json.dumps({"return": value}), json.dumps({"error": value})):
        fake.answers = {command: answer.encode() + b"\n"}
        try:
            make(client, 5)
        except AgentError:
            continue
        finally:
            client.close()


def test_a_refused_freeze_is_put_down_to_a_frozen_guest_only_if_it_is_one(
    fake: FakeAgent, client: SocketAgent
) -> None:
    said = b'{"error": {"desc": "The command has been disabled for this instance"}}\n'
    fake.answers["guest-fsfreeze-freeze"] = said
    for frozen in (True, False):
        fake.frozen = frozen
        with pytest.raises(AgentRefused) as caught:
            client.freeze(None, 5)
        assert caught.value.frozen_already is frozen
    fake.frozen = True  # by this very freeze, of which another file system failed
    fake.answers["guest-fsfreeze-freeze"] = b'{"error": {"desc": "failed to freeze /frozen"}}\n'
    with pytest.raises(AgentRefused, match="failed to freeze /frozen") as caught:
        client.freeze(None, 5)
    assert not caught.value.frozen_already


def test_after_a_freeze_that_timed_out_a_thaw_is_the_last_word(
    fake: FakeAgent, client: SocketAgent
) -> None:
    def stop(agent: FakeAgent) -> bytes:
        agent.hold.clear()
        agent.hold.wait()
        agent.frozen = True
        return result(2)

    fake.answers["guest-fsfreeze-freeze"] = stop
    assert took(lambda: client.freeze(None, 0.2), AgentTimeout) < 0.4
    for _ in range(3):
        assert took(lambda: client.thaw(0.1), AgentGone) < 0.3
    assert not fake.frozen
    fake.hold.set()
    assert client.thaw(5) == 2
    assert not fake.frozen
    assert fake.received[-1] == "guest-fsfreeze-thaw"
    assert fake.clients == 1, "it kept its place in the queue"


class TestKeptConnection:
    def test_nobody_comes_between_freeze_and_thaw(
        self, fake: FakeAgent, client: SocketAgent
    ) -> None:
        with socket.socket(socket.AF_UNIX) as other:
            assert client.freeze(["/a", "/ü"], 5) == 2
            assert fake.mountpoints == [["/a", "/ü"]]
            other.connect(fake.path)  # QEMU's backlog takes it in
            other.settimeout(0.1)
            other.sendall(b'{"execute":"guest-ping"}\n')
            with pytest.raises(TimeoutError):
                other.recv(1)
            assert client.status(5) == "frozen"
            assert client.thaw(5) == 2
            assert other.recv(100), "the channel is free again"

    def test_does_without_a_handshake_only_while_all_is_answered(
        self, fake: FakeAgent, client: SocketAgent
    ) -> None:
        client.freeze(None, 5)
        fake.received.clear()
        client.thaw(5)
        assert fake.received == ["guest-fsfreeze-thaw"]
        fake.answers["guest-fsfreeze-freeze"] = result(2) + result(3)
        client.freeze(None, 5)
        fake.received.clear()
        assert client.thaw(5) == 0
        assert fake.received == ["guest-sync-delimited", "guest-fsfreeze-thaw"]

    def test_is_shared_so_that_another_can_thaw(self, fake: FakeAgent, client: SocketAgent) -> None:
        client.freeze(None, 5)
        assert SocketAgent(fake.path).thaw(5) == 2
        client.ping(5)
        assert fake.clients == 2

    def test_ends_with_the_last_agent_that_has_it(self, fake: FakeAgent) -> None:
        SocketAgent(fake.path).freeze(None, 5)
        assert SocketAgent(fake.path).thaw(5) == 2
        assert fake.clients == 2

    def test_that_was_hung_up_is_made_anew(self, fake: FakeAgent, client: SocketAgent) -> None:
        client.freeze(None, 5)
        fake.answers["guest-ping"] = b"HANG UP"
        with pytest.raises(AgentTimeout):
            client.ping(5)
        assert client.thaw(5) == 2

    def test_of_a_refused_freeze_is_let_go(self, fake: FakeAgent, client: SocketAgent) -> None:
        fake.can_freeze = False
        with pytest.raises(AgentRefused):
            client.freeze(None, 5)
        client.ping(5)
        assert fake.clients == 2

    def test_stays_while_the_thaw_fails(self, fake: FakeAgent, client: SocketAgent) -> None:
        client.freeze(None, 5)
        fake.answers["guest-fsfreeze-thaw"] = b'{"error": {"desc": "no"}}\n'
        with pytest.raises(AgentRefused):
            client.thaw(5)
        fake.answers["guest-fsfreeze-thaw"] = None
        with pytest.raises(AgentTimeout):
            client.thaw(0.1)
        fake.answers.clear()
        assert client.thaw(5) == 2
        assert fake.clients == 1


def test_two_threads_take_turns_within_their_own_limits(
    fake: FakeAgent, client: SocketAgent
) -> None:
    fake.answers["guest-get-fsinfo"] = None
    slow = threading.Thread(target=lambda: took(lambda: client.fsinfo(0.6), AgentTimeout))
    slow.start()
    while "guest-get-fsinfo" not in fake.received:
        time.sleep(0.001)
    assert took(lambda: client.thaw(0.1), AgentGone, "busy") < 0.3
    assert client.thaw(5) == 0
    slow.join()


def test_a_full_backlog_is_waited_for_within_the_limit(tmp_path: Path) -> None:
    path = str(tmp_path / "agent")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(path)
            limit = 0.3
            gone = took(lambda: SocketAgent(path).ping(limit), AgentGone, "in use by another")
            assert limit <= gone < 0.5
