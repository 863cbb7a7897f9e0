"""The agent is asked early, once for one state of its domain, and let go of before it is reused."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from snapd_vm.config import Config
from snapd_vm.engine.survey import Quiesce, Survey
from snapd_vm.engine.world import World
from snapd_vm.errors import AgentUnavailable, Busy, QuiesceFailed
from snapd_vm.model import AgentChannel, Consistency, Domain, Flags
from snapd_vm.virt.agent import AgentGone, AgentRefused, FileSystem

REQUIRED, NO_QUIESCE, TRY = Flags.QUIESCE_REQUIRED, Flags.NO_QUIESCE, Flags(0)
CRASH, OFFLINE = Consistency.CRASH, Consistency.OFFLINE
RUNNING = Domain(
    uuid="1b4e28ba-2fa1-11d2-883f-0016d3cca427",
    name="web",
    id=1,
    state="running",
    driver="kvm",
    persistent=True,
    disks=(),
    agent=AgentChannel("org.qemu.guest_agent.0", "", True),
)


class SlowAgent:
    """Answers when it is let; `closed` counts, and an answer after it has begun is an error."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.let = threading.Event()
        self.asked = threading.Event()
        self.closed = 0
        self._fails = fails

    def fsinfo(self, timeout: float) -> Sequence[FileSystem]:
        self.asked.set()
        assert self.let.wait(10)
        assert not self.closed
        if self._fails:
            raise self._fails
        return [FileSystem("/a", "ext4", ("vda",)), FileSystem("/b", "ext4", ("vdb",))]

    def arm(self, timeout: float) -> int:
        assert not self.closed
        return 7

    def close(self) -> None:
        self.closed += 1


class Hypervisor:
    """Has the agents given, one after the other."""

    def __init__(self, *agents: SlowAgent) -> None:
        self.left = list(agents)

    def agent(self, domain: Domain, former_timeout: int | None = None) -> SlowAgent:
        return self.left.pop(0)


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def survey(beside: ThreadPoolExecutor, flags: Flags, *agents: SlowAgent) -> Survey:
    nothing = cast(Any, None)
    config = Config(state_dir=Path("/nonexistent"))
    world = World(
        config, cast(Any, Hypervisor(*agents)), {}, nothing, nothing, beside, lambda step: None
    )
    return Survey(world, flags)


def test_it_is_asked_at_once_and_waited_for_last(beside: ThreadPoolExecutor) -> None:
    agent = SlowAgent()
    asked = survey(beside, REQUIRED, agent)
    asked.ask(RUNNING, ["vda"])
    assert agent.asked.wait(10)
    asked.ask(replace(RUNNING), ["vda"])  # libvirt says what was remembered: once is enough
    asked.refuse(CRASH)  # nothing is known against it
    agent.let.set()
    assert asked.result(CRASH) == Quiesce(["/a"], 7)
    asked.close()
    assert agent.closed == 1


@pytest.mark.parametrize(
    ("domain", "target"),
    [(replace(RUNNING, id=2), "vda"), (RUNNING, "vdb"), (replace(RUNNING, agent=None), "vda")],
)
def test_what_was_remembered_wrongly_is_asked_anew(
    beside: ThreadPoolExecutor, domain: Domain, target: str
) -> None:
    first, second = SlowAgent(), SlowAgent()
    first.let.set()
    second.let.set()
    asked = survey(beside, TRY, first, second)
    asked.ask(RUNNING, ["vda"])
    asked.ask(domain, [target])
    assert first.closed == 1
    expected = Quiesce(["/b" if target == "vdb" else "/a"], 7) if domain.agent else None
    assert asked.result(CRASH) == expected
    assert second.asked.is_set() == (domain.agent is not None)


def test_it_is_not_closed_before_it_has_answered(beside: ThreadPoolExecutor) -> None:
    agent = SlowAgent()
    asked = survey(beside, TRY, agent)
    asked.ask(RUNNING, ["vda"])
    assert agent.asked.wait(10)
    threading.Timer(0.05, agent.let.set).start()
    asked.close()
    assert agent.closed == 1
    assert asked.result(CRASH) == Quiesce(["/a"], 7)  # the agent's own assertions held


@pytest.mark.parametrize(
    ("domain", "floor", "error"),
    [
        (replace(RUNNING, state="paused"), CRASH, AgentUnavailable),
        (replace(RUNNING, agent=None), CRASH, AgentUnavailable),
        (replace(RUNNING, id=-1, state="shutoff"), CRASH, QuiesceFailed),
    ],
)
def test_what_is_known_without_the_agent_is_said_before_anything_is_made(
    beside: ThreadPoolExecutor, domain: Domain, floor: Consistency, error: type[Exception]
) -> None:
    agent = SlowAgent()
    asked = survey(beside, REQUIRED, agent)
    asked.ask(domain, ["vda"])
    with pytest.raises(error):
        asked.refuse(floor)
    assert not agent.asked.is_set()
    lenient = survey(beside, TRY, SlowAgent())
    lenient.ask(domain, ["vda"])
    lenient.refuse(floor)
    assert lenient.result(floor) is None


def test_a_domain_that_is_off_and_one_not_to_be_quiesced_are_not_asked(
    beside: ThreadPoolExecutor,
) -> None:
    off, running = SlowAgent(), SlowAgent()
    asked = survey(beside, REQUIRED, off)
    asked.ask(replace(RUNNING, id=-1, state="shutoff"), "vda")
    assert asked.result(OFFLINE) is None
    asked = survey(beside, NO_QUIESCE, running)
    asked.ask(RUNNING, ["vda"])
    assert asked.result(CRASH) is None
    assert not off.asked.is_set()
    assert not running.asked.is_set()


def test_an_agent_that_does_not_answer(beside: ThreadPoolExecutor) -> None:
    gone = SlowAgent(AgentGone("no answer"))
    gone.let.set()
    asked = survey(beside, REQUIRED, gone)
    asked.ask(RUNNING, ["vda"])
    with pytest.raises(AgentUnavailable):
        asked.result(CRASH)
    gone = SlowAgent(AgentGone("no answer"))
    gone.let.set()
    asked = survey(beside, TRY, gone)
    asked.ask(RUNNING, ["vda"])
    assert asked.result(CRASH) is None


def test_a_guest_that_is_frozen_already_is_busy_with_any_flags(beside: ThreadPoolExecutor) -> None:
    frozen = SlowAgent(AgentRefused("frozen", frozen_already=True))
    frozen.let.set()
    asked = survey(beside, TRY, frozen)
    asked.ask(RUNNING, ["vda"])
    with pytest.raises(Busy):
        asked.result(CRASH)
