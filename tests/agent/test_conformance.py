"""What the client promises of every agent, on the real qemu-ga and on the fake one alike."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from snapd_vm.virt.agent import AgentGone, AgentRefused
from snapd_vm.virt.agentsocket import SocketAgent
from tests.agent.fake import FakeAgent
from tests.agent.real import RealAgent

pytestmark = pytest.mark.measures

Start = Callable[[bool], FakeAgent | RealAgent]


@pytest.fixture(params=["real", "fake"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Starts an agent that can't freeze; with True, one that is in the frozen state."""
    with ExitStack() as stack:

        def real(frozen: bool) -> RealAgent:
            if not shutil.which("qemu-ga") or os.geteuid() != 0:
                pytest.skip("the real agent wants qemu-ga (package qemu-guest-agent) and root")
            return stack.enter_context(RealAgent(frozen=frozen))

        def fake(frozen: bool) -> FakeAgent:
            agent = FakeAgent(tmp_path / "agent")
            agent.can_freeze = False
            agent.frozen = frozen
            return stack.enter_context(agent)

        yield real if request.param == "real" else fake


def hold(agent: FakeAgent | RealAgent, on: bool) -> None:
    """Makes the agent hang, or go on."""
    match agent:
        case RealAgent():
            agent.stop() if on else agent.go_on()
        case FakeAgent():
            agent.hold.clear() if on else agent.hold.set()


def test_it_answers_ping_status_and_thaw(start: Start) -> None:
    client = SocketAgent(start(False).path)
    client.ping(5)
    assert client.status(5) == "thawed"
    assert client.thaw(5) == 0
    assert "/" in {f.mountpoint for f in client.fsinfo(5)}


def test_a_command_that_the_agent_blocks_is_refused_and_it_is_not_frozen(start: Start) -> None:
    client = SocketAgent(start(False).path)
    for mountpoints in (None, ["/nowhere"]):
        with pytest.raises(AgentRefused, match="disabled") as caught:
            client.freeze(mountpoints, 5)
        assert not caught.value.frozen_already
    client.ping(5)


def test_a_frozen_agent_says_so_and_a_thaw_makes_it_answer_again(start: Start) -> None:
    client = SocketAgent(start(True).path)
    client.ping(5)
    assert client.status(5) == "frozen"
    for refused in (lambda: client.fsinfo(5), lambda: client.freeze(None, 5)):
        with pytest.raises(AgentRefused) as caught:
            refused()
        assert caught.value.frozen_already
    client.thaw(5)
    assert client.status(5) == "thawed"
    assert client.fsinfo(5)


def test_a_hung_agent_is_gone_within_the_limit_and_back_when_it_goes_on(start: Start) -> None:
    agent = start(False)
    client = SocketAgent(agent.path)
    hold(agent, True)
    for call in (client.ping, client.thaw, client.fsinfo):
        begin = time.monotonic()
        with pytest.raises(AgentGone):
            call(0.2)
        assert 0.15 < time.monotonic() - begin < 0.5
    hold(agent, False)
    client.ping(5)


def test_another_client_on_the_channel_is_waited_for_within_the_limit(start: Start) -> None:
    agent = start(False)
    client = SocketAgent(agent.path)
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(agent.path)
        other.sendall(b'\xff{"execute":"guest-ping"}\n')
        other.recv(100)
        begin = time.monotonic()
        with pytest.raises(AgentGone):
            client.ping(0.2)
        assert 0.15 < time.monotonic() - begin < 0.5
    client.ping(5)


def test_half_a_command_and_unread_answers_of_another_client_do_no_harm(start: Start) -> None:
    agent = start(False)
    for left in (
        b'{"execute":"guest-pi',
        b'{"execute":"guest-sync-delimited","arguments":{"id":1}}\n' * 3,
        b'{"execute":"guest-ping"}\n{"execute": {{{{"',
    ):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(agent.path)
            other.sendall(left)
            if b"\n" in left:
                other.recv(1)
        assert SocketAgent(agent.path).status(5) == "thawed"


def test_no_socket_is_no_agent_at_once(tmp_path: Path) -> None:
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead))
    for path in (str(tmp_path / "none"), str(dead), str(tmp_path), "x" * 200, "\ud800"):
        begin = time.monotonic()
        with pytest.raises(AgentGone, match="can't be opened"):
            SocketAgent(path).ping(5)
        assert time.monotonic() - begin < 0.5
