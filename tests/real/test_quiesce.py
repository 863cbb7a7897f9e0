"""Freezing on real guests: what is frozen, what is reported, and the ways to go wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import libvirt
import libvirt_qemu
import pytest
from lxml import etree

from snapd_vm.engine.journal import Journal, Step
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real import images
from tests.real.api import NO_QUIESCE, QUIESCE_REQUIRED, SNAPSHOT, VDA, Api, ApiError, Created
from tests.real.conftest import Connect
from tests.real.test_crash import FAULTY, active_file, faulty, files_of

__all__ = ["faulty"]

SHORT = {"agent_timeout_s": 1, "freeze_timeout_s": 2, "frozen_limit_s": 2}


@pytest.fixture
def two(lab: Lab) -> Iterator[Guest]:
    """A guest with a file system on each of two disks."""
    guest = lab.guest([DiskSpec(), DiskSpec()])
    guest.writer(True, pause_us=2000)  # so that a stall of 20 ms is seen
    yield guest
    guest.remove()


@pytest.fixture
def own(lab: Lab) -> Iterator[Guest]:
    """A guest of the test's own, to be damaged."""
    guest = lab.guest()
    yield guest
    guest.remove()


class Unchanged:
    """What must be as it was after a Create that failed."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._before = self._now()

    def _now(self) -> Any:
        guest = self._guest
        return guest.state, active_file(guest), active_file(guest, 2), files_of(guest)

    def check(self) -> None:
        assert self._now() == self._before


async def told(api: Api, path: str) -> dict[str, Any]:
    return await api.properties(path, SNAPSHOT)


@pytest.mark.measures
async def test_only_the_file_systems_of_the_disk_are_frozen(api: Api, two: Guest) -> None:
    two.reset()
    created = await api.create(two, flags=QUIESCE_REQUIRED)
    row = await told(api, created.snapshot)
    assert (row["Consistency"], row["FrozenFilesystems"]) == ("quiesced", 1)
    two.writes_go_on()
    stalls = two.stalls()
    assert stalls["vda"].longest_s > 0.02
    assert stalls["vdb"].longest_s < stalls["vda"].longest_s


async def test_a_disk_without_a_file_system_is_not_quiesced(api: Api, two: Guest) -> None:
    two.umount("vdb")
    vdb = "<disk><target dev='vdb'/></disk>"
    unchanged = Unchanged(two)
    with pytest.raises(ApiError) as error:
        await api.create(two, vdb, flags=QUIESCE_REQUIRED)
    assert error.value.name == "QuiesceFailed"
    unchanged.check()
    created = await api.create(two, vdb)
    assert created.ours("consistency") == "crash"
    assert (await told(api, created.snapshot))["FrozenFilesystems"] == 0


@pytest.mark.measures
@pytest.mark.parametrize("agent", ["none", "killed", "stopped"])
async def test_no_dead_or_hung_agent(connect: Connect, daemon: Lab, lab: Lab, agent: str) -> None:
    guest = lab.guest(agent="none" if agent == "none" else "libvirt")
    if agent == "killed":
        guest.kill_agent()
    elif agent == "stopped":
        guest.stop_agent()
    daemon.daemon.stop()
    daemon.daemon.start({"agent_timeout_s": 2})
    api = await connect()
    unchanged = Unchanged(guest)
    for member in (api.plan, api.create):
        started = time.monotonic()
        with pytest.raises(ApiError) as error:
            await member(guest, VDA, "", "", QUIESCE_REQUIRED)
        assert error.value.name == "AgentUnavailable"
        assert time.monotonic() - started < 2 + 3
    unchanged.check()
    guest.writes_go_on()
    created = await api.create(guest)
    assert created.ours("consistency") == "crash"
    guest.remove()


async def test_the_agent_hangs_at_the_freeze_and_freezes_late(
    connect: Connect, faulty: Lab, own: Guest
) -> None:
    """Stopped after the ping: the freeze times out, comes into effect later, and is undone then."""
    flag = faulty.folder("flags") / "hang"
    faulty.daemon.start(SHORT, argv=(*FAULTY, "--at", Step.ARMED, "--do", f"wait:{flag}"))
    api = await connect()
    unchanged = Unchanged(own)
    call = asyncio.create_task(api.create(own, flags=QUIESCE_REQUIRED))
    await asyncio.to_thread(wait_until, "the ping is over", flag.exists, 20)
    own.stop_agent()
    flag.unlink()
    started = time.monotonic()
    with pytest.raises(ApiError) as error:
        await call
    assert error.value.name == "QuiesceTimedOut"
    assert time.monotonic() - started < SHORT["freeze_timeout_s"] + SHORT["agent_timeout_s"] + 3
    unchanged.check()
    own.writes_go_on()
    assert held_in(faulty) == [own.uuid]
    own.cont_agent()  # now the freeze may come
    await asyncio.to_thread(wait_until, "it is released", lambda: not held_in(faulty), 30)
    own.writes_go_on()
    assert not own.agent_says_frozen()
    assert (await api.create(own, flags=QUIESCE_REQUIRED)).ours("consistency") == "quiesced"


async def taken_by_a_hung_agent(
    connect: Connect, faulty: Lab, own: Guest, settings: dict[str, Any]
) -> tuple[Api, Created]:
    """A snapshot of a guest whose agent stops after the ping, and may freeze it when it goes on."""
    flag = faulty.folder("flags") / "hang-0"
    faulty.daemon.start(settings, argv=(*FAULTY, "--at", Step.ARMED, "--do", f"wait:{flag}"))
    api = await connect()
    call = asyncio.create_task(api.create(own))
    await asyncio.to_thread(wait_until, "the ping is over", flag.exists, 20)
    own.stop_agent()
    flag.unlink()
    return api, await call


async def test_without_the_flag_a_freeze_that_times_out_is_gone_on_without(
    connect: Connect, faulty: Lab, own: Guest
) -> None:
    _, created = await taken_by_a_hung_agent(connect, faulty, own, SHORT)
    assert created.ours("consistency") == "crash"
    own.cont_agent()
    await asyncio.to_thread(wait_until, "it is released", lambda: not held_in(faulty), 30)
    own.writes_go_on()


async def test_a_late_freeze_does_not_last_as_long_as_a_delete(
    connect: Connect, faulty: Lab, own: Guest
) -> None:
    """A commit may take hours, and does not thaw."""
    limited = {**SHORT, "qemu": {"commit_bandwidth": 1}}
    api, created = await taken_by_a_hung_agent(connect, faulty, own, limited)
    own.fill("vda", "filling", 24)
    delete = asyncio.create_task(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0))
    await asyncio.to_thread(
        wait_until, "it is committed", lambda: own.domain.blockJobInfo("vda"), 20
    )
    own.cont_agent()
    await asyncio.to_thread(wait_until, "it is released", lambda: not held_in(faulty), 10)
    assert not delete.done()
    own.writes_go_on()
    await delete
    assert not own.agent_says_frozen()


@pytest.mark.parametrize("required", [True, False])
async def test_the_agent_hangs_at_the_thaw(
    connect: Connect, faulty: Lab, own: Guest, required: bool
) -> None:
    """The record is not lost: the guest stays on the journal, and is thawed when that can be."""
    flag = faulty.folder("flags") / f"hang-thaw-{required}"
    limits = {**SHORT, "frozen_limit_s": 30}
    faulty.daemon.start(limits, argv=(*FAULTY, "--at", Step.SWITCHED, "--do", f"wait:{flag}"))
    api = await connect()
    unchanged = Unchanged(own)
    flags = QUIESCE_REQUIRED if required else 0
    call = asyncio.create_task(api.create(own, flags=flags, name="thaw"))
    await asyncio.to_thread(wait_until, "the switch", flag.exists, 20)
    own.stop_agent()
    flag.unlink()
    answer = (await asyncio.gather(call, return_exceptions=True))[0]
    assert held_in(faulty) == [own.uuid]
    own.cont_agent()
    await asyncio.to_thread(wait_until, "it is released", lambda: not held_in(faulty), 30)
    own.writes_go_on()
    assert not own.agent_says_frozen()
    if required:
        assert isinstance(answer, ApiError)
        assert answer.name == "QuiesceFailed"
        unchanged.check()
    else:
        assert not isinstance(answer, BaseException)
        assert answer.ours("consistency") == "crash"


@pytest.mark.measures
@pytest.mark.parametrize("required", [True, False])
async def test_the_frozen_limit(connect: Connect, faulty: Lab, own: Guest, required: bool) -> None:
    """A switch that takes too long: the guest is thawed in the middle of it, in time."""
    faulty.daemon.start(
        {**SHORT, "frozen_limit_s": 1}, argv=(*FAULTY, "--at", Step.SWITCHED, "--do", "sleep:4")
    )
    api = await connect()
    own.reset()
    unchanged = Unchanged(own)
    flags = QUIESCE_REQUIRED if required else 0
    answer = (await asyncio.gather(api.create(own, flags=flags), return_exceptions=True))[0]
    own.writes_go_on()
    assert 1 < own.longest_stall() < 2.5
    if required:
        assert isinstance(answer, ApiError)
        assert answer.name == "QuiesceTimedOut"
        unchanged.check()
        assert images.is_open(active_file(own))
    else:
        assert not isinstance(answer, BaseException)
        assert answer.ours("consistency") == "crash"
        told = await api.properties(answer.snapshot, SNAPSHOT)
        assert 1 <= told["FrozenTime"] / 1e6 < 2.5


async def test_frozen_by_somebody_else_is_busy_and_not_thawed(api: Api, own: Guest) -> None:
    own.domain.fsFreeze()
    unchanged = Unchanged(own)
    for flags in (0, QUIESCE_REQUIRED):
        with pytest.raises(ApiError) as error:
            await api.create(own, flags=flags)
        assert error.value.name == "Busy"
    unchanged.check()
    assert own.agent_says_frozen()
    assert own.domain.fsThaw() == 1


async def test_a_mount_that_fails_is_named(api: Api, own: Guest) -> None:
    own.bad_mount("vda")
    unchanged = Unchanged(own)
    with pytest.raises(ApiError) as error:
        await api.create(own, flags=QUIESCE_REQUIRED)
    assert error.value.name == "QuiesceFailed"
    assert "/mnt" in error.value.text
    unchanged.check()
    own.writes_go_on()
    assert not own.agent_says_frozen()
    created = await api.create(own)
    assert created.ours("consistency") == "crash"
    own.writes_go_on()


async def test_thawed_in_the_middle_by_somebody_else_is_not_quiesced(
    connect: Connect, faulty: Lab, own: Guest
) -> None:
    flag = faulty.folder("flags") / "thawed"
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.FROZEN, "--do", f"wait:{flag}"))
    api = await connect()
    call = asyncio.create_task(api.create(own))
    await asyncio.to_thread(wait_until, "the freeze", flag.exists, 20)
    assert own.domain.fsThaw() == 1
    flag.unlink()
    created = await call
    assert created.ours("consistency") == "crash"


async def test_resumed_in_the_middle_is_not_paused(
    connect: Connect, faulty: Lab, own: Guest
) -> None:
    own.domain.suspend()
    flag = faulty.folder("flags") / "resumed"
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.ARMED, "--do", f"wait:{flag}"))
    api = await connect()
    call = asyncio.create_task(api.create(own))
    await asyncio.to_thread(wait_until, "it is prepared", flag.exists, 20)
    own.domain.resume()
    await asyncio.sleep(0.2)
    own.domain.suspend()
    await asyncio.sleep(0.2)
    flag.unlink()
    created = await call
    assert created.ours("consistency") == "crash"


@pytest.mark.measures
async def test_the_agents_timeout_is_put_back(api: Api, own: Guest, lab: Lab) -> None:
    await api.create(own, flags=QUIESCE_REQUIRED)
    own.stop_agent()
    own.domain.agentSetResponseTimeout(3)
    with pytest.raises(ApiError):
        await api.create(own, flags=QUIESCE_REQUIRED)
    started = time.monotonic()
    with pytest.raises(libvirt.libvirtError):
        own.domain.fsInfo()
    assert 2.5 < time.monotonic() - started < 4.5
    own.cont_agent()


@pytest.mark.measures
async def test_no_quiesce_does_not_speak_to_the_agent(api: Api, own: Guest) -> None:
    own.stop_agent()
    started = time.monotonic()
    created = await api.create(own, flags=NO_QUIESCE)
    assert time.monotonic() - started < 2
    assert created.ours("consistency") == "crash"


async def test_an_agent_on_a_socket_of_its_own(api: Api, lab: Lab) -> None:
    guest = lab.guest([DiskSpec(), DiskSpec()], agent="socket")
    assert (await api.plan(guest, flags=QUIESCE_REQUIRED))["consistency"] == "quiesced"
    created = await api.create(guest, flags=QUIESCE_REQUIRED)
    row = await told(api, created.snapshot)
    assert (row["Consistency"], row["FrozenFilesystems"]) == ("quiesced", 1)
    guest.writes_go_on()
    assert not guest.agent_says_frozen()
    guest.stop_agent()
    with pytest.raises(ApiError) as error:
        await api.create(guest, flags=QUIESCE_REQUIRED)
    assert error.value.name == "AgentUnavailable"
    guest.cont_agent()
    guest.remove()


@pytest.mark.measures
async def test_the_frozen_time_is_what_the_guest_saw(api: Api, own: Guest) -> None:
    await api.create(own)  # what is loaded at the first time is loaded
    own.reset()
    created = await api.create(own, flags=QUIESCE_REQUIRED)
    own.writes_go_on()
    frozen_s = (await told(api, created.snapshot))["FrozenTime"] / 1e6
    assert 0.3 * frozen_s < own.longest_stall() < frozen_s + 0.1


def held_in(lab: Lab) -> list[str]:
    """The domains that the daemon's journal says may be frozen."""
    journal = Journal(lab.daemon.state_dir)
    try:
        return [held.domain_uuid for held in journal.held()]
    finally:
        journal.close()


def test_the_tests_can_see_a_frozen_guest(own: Guest) -> None:
    """So that `not agent_says_frozen` and `writes_go_on` above can fail."""
    own.domain.fsFreeze()
    assert own.agent_says_frozen()
    own.stands_still()
    status = libvirt_qemu.qemuAgentCommand(own.domain, '{"execute":"guest-fsfreeze-status"}', 5, 0)
    assert "frozen" in status
    own.domain.fsThaw()
    own.writes_go_on()
    assert etree.fromstring(own.domain.XMLDesc()).findtext("name") == own.name
