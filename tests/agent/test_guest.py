"""The agent in a real guest, on a channel that libvirt does not own: what freezes, freezes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from snapd_vm.model import Domain
from snapd_vm.virt.agent import AgentGone, AgentRefused, AgentTimeout
from snapd_vm.virt.agentsocket import SocketAgent
from snapd_vm.virt.agentwire import Wire
from snapd_vm.virt.domainxml import parse_domain
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab

pytestmark = [pytest.mark.timeout(300), pytest.mark.measures]


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    if os.geteuid() != 0:
        pytest.skip("the lab needs root")
    with Lab(polkit=False) as lab:
        guest = lab.guest((DiskSpec(), DiskSpec()), agent="socket")
        yield guest
        guest.remove()


@pytest.fixture
def agent(guest: Guest) -> Iterator[SocketAgent]:
    """The agent that a Domain read from libvirt's XML leads to; the guest is thawed afterwards."""
    domain = read(guest)
    assert domain.agent is not None
    client = SocketAgent(domain.agent.socket, domain.disks)
    client.ping(10)
    yield client
    guest.cont_agent()
    client.thaw(30)
    guest.writes_go_on()


def read(guest: Guest) -> Domain:
    return parse_domain(
        guest.domain.XMLDesc(),
        None,
        id=guest.domain.ID(),
        state="running",
        persistent=False,
        resolve_volume=lambda _pool, _volume: None,
    )


def test_file_systems_are_placed_on_the_disks_that_libvirt_knows(agent: SocketAgent) -> None:
    placed = {f.mountpoint: f.targets for f in agent.fsinfo(10)}
    assert placed == {"/mnt/vda": ("vda",), "/mnt/vdb": ("vdb",)}


def test_a_freeze_stops_the_writers_and_a_thaw_lets_them_go_on(
    agent: SocketAgent, guest: Guest
) -> None:
    assert agent.freeze(None, 10) == 2
    guest.stands_still()
    assert agent.status(10) == "frozen"
    for refused in (lambda: agent.fsinfo(10), lambda: agent.freeze(None, 10)):
        with pytest.raises(AgentRefused) as caught:
            refused()
        assert caught.value.frozen_already
    assert agent.thaw(10) == 2
    guest.writes_go_on()
    assert agent.status(10) == "thawed"
    assert agent.thaw(10) == 0


def test_a_freeze_of_one_file_system_leaves_the_other_alone(
    agent: SocketAgent, guest: Guest
) -> None:
    assert agent.freeze(["/mnt/vdb"], 10) == 1
    guest.stands_still()
    stalls = guest.stalls()
    assert stalls["vdb"].current_s >= 0.3 > stalls["vda"].current_s
    assert agent.thaw(10) == 1


def test_a_mount_point_that_is_not_there_freezes_nothing(agent: SocketAgent) -> None:
    assert agent.freeze(["/nowhere"], 10) == 0


def test_a_file_system_that_can_not_be_frozen_is_named(agent: SocketAgent, guest: Guest) -> None:
    guest.bad_mount("vdb")
    try:
        with pytest.raises(AgentRefused, match="/mnt/bad/vdb") as caught:
            agent.freeze(None, 10)
        assert not caught.value.frozen_already
        agent.thaw(10)
        guest.writes_go_on()
    finally:
        guest.good_mount("vdb")


def test_a_stopped_agent_is_gone_within_the_limit(agent: SocketAgent, guest: Guest) -> None:
    guest.stop_agent()
    begin = time.monotonic()
    with pytest.raises(AgentGone):
        agent.freeze(None, 0.5)
    assert 0.4 < time.monotonic() - begin < 0.8
    guest.cont_agent()
    agent.ping(10)
    assert agent.status(10) == "thawed", "the handshake alone was sent"


def test_a_late_freeze_is_undone_by_the_thaw_that_succeeds(
    agent: SocketAgent, guest: Guest
) -> None:
    wire = Wire(str(guest.ports.agent), time.monotonic() + 10)
    wire.sync()
    guest.stop_agent()
    wire.deadline = time.monotonic() + 0.3
    with pytest.raises(AgentTimeout):
        wire.call("guest-fsfreeze-freeze")
    wire.close()
    with pytest.raises(AgentGone):
        agent.thaw(0.3)
    guest.cont_agent()
    assert agent.thaw(20) == 2, "QEMU passes on what a client left behind"
    guest.writes_go_on()
    assert agent.status(10) == "thawed"
