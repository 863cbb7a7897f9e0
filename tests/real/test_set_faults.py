"""CreateSet attacked: odd disks, hostile input, agents that fail, many at once, libvirtd killed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from snapd_vm.engine.journal import DeleteStep, Step
from tests.bus.clients import Client, RawPeer, marshalled
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real.api import (
    DOMAIN,
    NAME,
    NO_QUIESCE,
    QUIESCE_REQUIRED,
    SNAPSHOT,
    Api,
    ApiError,
    path_of,
)
from tests.real.conftest import Connect
from tests.real.places import refused
from tests.real.test_crash import FAULTY, faulty
from tests.real.test_libvirtd import until_connected
from tests.real.test_load import journal_is_at_rest, response_timeout
from tests.real.test_set import DISKS, files, settled, sources

__all__ = ["faulty"]

METHODS = {"qemu": ("qemu", "qemu"), "mixed": ("qemu", "reflink"), "clones": ("reflink", "reflink")}
SHORT = {"agent_timeout_s": 1, "freeze_timeout_s": 2}


@pytest.fixture(scope="module", params=list(METHODS))
def methods(request: pytest.FixtureRequest) -> Sequence[str]:
    """The methods of the disks that are taken."""
    return METHODS[request.param]


@pytest.fixture(scope="module")
def three(lab: Lab, methods: Sequence[str]) -> Iterator[Guest]:
    """A guest that writes to two disks, and has a third without a file system."""
    cloning = lab.block.mounted("xfs", 600)
    clones = DiskSpec(format="raw", folder=cloning.path)
    disks = [clones if method == "reflink" else DiskSpec() for method in methods]
    guest = lab.guest([*disks, DiskSpec(filesystem=None)])
    yield guest
    guest.remove()
    cloning.unmount()


async def call(api: Api, guest: Guest, pairs: Any, name: str = "", flags: int = 0) -> Any:
    """CreateSet with whatever is given."""
    args = (pairs, name, flags)
    return (await api.call(path_of(guest), DOMAIN, "CreateSet", "a(ss)su", *args))[0]


async def delete_all(api: Api, guest: Guest) -> None:
    for path in await api.snapshots_of(guest):
        await api.call(path, SNAPSHOT, "Delete", "u", 0)


def target(disk: str) -> str:
    return f"<disk><target dev='{disk}'/></disk>"


def by_source(guest: Guest, disk: str) -> str:
    return f"<disk><source file='{sources(guest)[disk]}'/></disk>"


async def test_a_disk_without_a_file_system_is_part_of_it(api: Api, three: Guest) -> None:
    before = sources(three), files(three)
    rows = await call(api, three, [[target("vda"), ""], [target("vdc"), ""]], "", QUIESCE_REQUIRED)
    told = [await api.properties(path, SNAPSHOT) for path, _, _ in rows]
    assert [row["Consistency"] for row in told] == ["quiesced"] * 2
    assert [row["FrozenFilesystems"] for row in told] == [1, 1]
    await delete_all(api, three)
    alone = call(api, three, [[target("vdc"), ""]], "", QUIESCE_REQUIRED)
    assert (await refused(alone, "QuiesceFailed")).text
    assert (sources(three), files(three)) == before
    await call(api, three, [[target("vdc"), ""]])
    await delete_all(api, three)
    assert (sources(three), files(three)) == before


async def test_disks_are_found_by_their_source_and_none_is_taken_twice(
    api: Api, three: Guest
) -> None:
    before = sources(three), files(three)
    twice = [[target("vda"), ""], [by_source(three, "vda"), ""]]
    await refused(call(api, three, twice), "org.freedesktop.DBus.Error.InvalidArgs")
    other = f"<disk><source file='{before[0]['vda']}'/><target dev='vdb'/></disk>"
    await refused(call(api, three, [[target("vda"), ""], [other, ""]]), "DiskMismatch")
    assert (sources(three), files(three)) == before
    pairs = [[by_source(three, "vdb"), ""], [by_source(three, "vda"), ""]]
    rows = await call(api, three, pairs, "", QUIESCE_REQUIRED)
    told = [(await api.properties(path, SNAPSHOT))["Target"] for path, _, _ in rows]
    assert told == ["vdb", "vda"]
    await delete_all(api, three)
    assert (sources(three), files(three)) == before


async def test_hostile_input(api: Api, three: Guest, lab: Lab) -> None:
    before = sources(three), files(three)
    invalid = "org.freedesktop.DBus.Error.InvalidArgs"
    many = [[target(f"vd{number}"), ""] for number in range(1000)]
    await refused(call(api, three, many), invalid)
    for flags in (3, 4, 8, 1 << 31):
        await refused(call(api, three, [[target("vda"), ""]], "", flags), invalid)
    for signature, body in (
        ("a(s)su", [[[target("vda")]], "", 0]),
        ("assu", [[target("vda")], "", 0]),
        ("a(ss)s", [[[target("vda"), ""]], ""]),
        ("", []),
    ):
        wrong = api.call(path_of(three), DOMAIN, "CreateSet", signature, *body)
        await refused(wrong, invalid)
    peer = RawPeer(lab.address)  # the bus itself cuts off who sends NUL
    message = Client.message(
        DOMAIN, "CreateSet", "a(ss)su", [[["<disk/>", "X"]], "", 0], path_of(three)
    )
    peer.send(marshalled(message, 2).replace(b"<disk/>", b"<dis\0/>"))
    assert peer.cut_off()
    peer.close()
    assert (sources(three), files(three)) == before
    assert not await api.snapshots_of(three)


@pytest.mark.parametrize("agent", ["killed", "stopped", "frozen by others"])
async def test_an_agent_that_fails(
    connect: Connect, daemon: Lab, lab: Lab, three: Guest, methods: Sequence[str], agent: str
) -> None:
    daemon.daemon.stop()
    daemon.daemon.start(SHORT)
    api = await connect()
    before, limit = (sources(three), files(three)), response_timeout(lab, three)
    if agent == "killed":
        three.kill_agent()
    elif agent == "stopped":
        three.stop_agent()
    else:
        three.domain.fsFreeze()
    expected = "Busy" if agent.startswith("frozen") else "AgentUnavailable"
    try:
        await refused(api.create_set(three, *DISKS, flags=QUIESCE_REQUIRED), expected)
        assert (sources(three), files(three), three.state) == (*before, "running")
        assert not await api.snapshots_of(three)
        assert journal_is_at_rest(lab)
        if agent.startswith("frozen"):
            await refused(api.create_set(three, *DISKS), "Busy")
            assert (sources(three), files(three), three.state) == (*before, "running")
            assert three.agent_says_frozen()
            three.stands_still()  # it is theirs to thaw
        else:
            made = await api.create_set(three, *DISKS)
            found = {created.ours("consistency") for _, created in made}
            assert found == {"crash" if methods == METHODS["qemu"] else "paused"}
        assert response_timeout(lab, three) == limit
    finally:
        if agent == "killed":
            three.start_agent()
        elif agent == "stopped":
            three.cont_agent()
        else:
            three.domain.fsThaw()
        three.wait_agent()
    three.writes_go_on()
    await delete_all(api, three)
    assert (sources(three), files(three)) == before
    assert journal_is_at_rest(lab)


@pytest.mark.parametrize("step", [Step.PREPARED, Step.READ_BACK])
async def test_a_client_that_leaves_does_not_end_it(
    connect: Connect, faulty: Lab, three: Guest, step: Step
) -> None:
    before = sources(three), files(three)
    flag = faulty.folder("flags") / f"leaves-{step}"
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", f"wait:{flag}"))
    leaves, api = await connect(), await connect()
    asked = asyncio.create_task(leaves.create_set(three, *DISKS))
    await asyncio.to_thread(wait_until, "the step", flag.exists, 20)
    leaves.client.close()
    asked.cancel()
    flag.unlink()
    async with asyncio.timeout(20):
        while not await api.snapshots_of(three):
            await asyncio.sleep(0.02)
    assert await settled(api, three, before) == "snapshots"
    await delete_all(api, three)
    assert (sources(three), files(three)) == before


async def test_all_at_once_on_one_domain(connect: Connect, daemon: Lab, three: Guest) -> None:
    """Whatever is refused is refused with Busy, and what stands in the end is all told of."""
    before = sources(three), files(three)
    apis = [await connect() for _ in range(3)]
    api = apis[0]
    made = await api.create_set(three, *DISKS)
    calls: list[Any] = [one.create_set(three, *DISKS, flags=NO_QUIESCE) for one in apis]
    calls += [one.create(three, target("vdb")) for one in apis]
    calls += [one.call(made[0][0], SNAPSHOT, "Delete", "u", 0) for one in apis[:2]]
    calls += [apis[2].call(made[1][0], SNAPSHOT, "Revert", "u", 0)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    failed = [one for one in answers if isinstance(one, BaseException)]
    assert all(isinstance(one, ApiError) for one in failed), failed
    names = {one.name for one in failed if isinstance(one, ApiError)}
    assert names <= {"Busy", "InvalidState", "NoSuchSnapshot"}, failed
    assert journal_is_at_rest(daemon)
    live = sources(three)
    assert live == sources(three, 2)
    rows = await api.snapshots_of(three)
    assert {row["State"] for row in rows.values()} == {"ready"}
    assert len(files(three)) == len(before[1]) + len(rows)
    three.writes_go_on()
    await delete_all(api, three)
    assert (sources(three), files(three)) == before


async def test_who_waits_is_told_when_a_delete_begins(
    connect: Connect, faulty: Lab, three: Guest
) -> None:
    flag = faulty.folder("flags") / "delete"
    argv = (*FAULTY, "--at", DeleteStep.CHECKED, "--do", f"wait:{flag}")
    faulty.daemon.start({}, argv=argv)
    api, other = await connect(), await connect()
    before = sources(three), files(three)
    made = await api.create_set(three, *DISKS)
    three.fill("vda", "much", 8)
    deleting = asyncio.create_task(api.call(made[0][0], SNAPSHOT, "Delete", "u", 0))
    await asyncio.to_thread(wait_until, "the step", flag.exists, 20)
    waits = asyncio.create_task(other.create_set(three, *DISKS))
    done, _ = await asyncio.wait([waits], timeout=0.3)
    assert not done
    three.domain.suspend()  # a commit of what is paused goes on
    flag.unlink()
    error = await refused(waits, "Busy")
    assert "deleted" in error.text
    await deleting
    three.domain.resume()
    await delete_all(api, three)
    assert (sources(three), files(three)) == before


@pytest.mark.parametrize("step", [Step.ARMED, Step.SWITCHED])
async def test_libvirtd_killed_in_mid_set(
    connect: Connect, faulty: Lab, three: Guest, step: Step
) -> None:
    before = sources(three), files(three)
    flag = faulty.folder("flags") / f"libvirtd-{step}"
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", f"wait:{flag}"))
    api = await connect()
    asked = asyncio.create_task(api.create_set(three, *DISKS, flags=QUIESCE_REQUIRED))
    await asyncio.to_thread(wait_until, "the step", flag.exists, 20)
    await asyncio.to_thread(faulty.libvirtd.kill)
    await asyncio.to_thread(faulty.libvirtd.start)
    flag.unlink()
    answer = (await asyncio.gather(asked, return_exceptions=True))[0]
    await until_connected(api, True)
    outcome = await settled(api, three, before)
    if isinstance(answer, ApiError):
        names = ("HypervisorUnavailable", "QuiesceFailed", "AgentUnavailable")
        assert answer.name in names, answer
        assert outcome == "nothing"
    else:
        assert not isinstance(answer, BaseException), answer
        assert outcome == "snapshots"
    three.wait_agent()
    await delete_all(api, three)
    assert (sources(three), files(three)) == before
    await asyncio.to_thread(wait_until, "it is at rest", lambda: journal_is_at_rest(faulty), 30)


async def test_a_rule_for_one_disk_does_not_let_a_set_through(
    daemon: Lab, api: Api, lab: Lab, three: Guest
) -> None:
    before = sources(three), files(three)
    lab.polkit.rules(
        "polkit.addRule(function(action, subject) {\n"
        f'  if (subject.user == "backup" && action.id == "{NAME}.create" &&\n'
        '      action.lookup("disk") == "vda") return polkit.Result.YES;\n'
        "});\n"
    )
    try:
        for disks, allowed in ((("vda",), True), (DISKS, False), (("vda", "vda"), False)):
            pairs = [word for disk in disks for word in (target(disk), "")]
            args = ("CreateSet", "a(ss)su", str(len(disks)), *pairs, "", str(NO_QUIESCE))
            done = lab.busctl("call", NAME, path_of(three), DOMAIN, *args, user="backup")
            assert (done.returncode == 0) is allowed, done.stdout + done.stderr
            if not allowed:
                assert "needs authentication" in done.stderr
    finally:
        lab.polkit.rules("")
    assert len(await api.snapshots_of(three)) == 1
    await delete_all(api, three)
    assert (sources(three), files(three)) == before


async def test_what_is_resumed_by_others_is_not_taken(
    connect: Connect, faulty: Lab, three: Guest, methods: Sequence[str]
) -> None:
    """Disks that are taken one after the other would be of several moments."""
    together = methods == METHODS["qemu"]
    before = sources(three), files(three)
    flag = faulty.folder("flags") / "resumed"
    for paused in (False, True):
        step = Step.ARMED if paused else Step.STOPPED
        if together and not paused:
            continue  # its vCPUs are not stopped
        faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", f"wait:{flag}"))
        api = await connect()
        if paused:
            three.domain.suspend()
        asked = asyncio.create_task(api.create_set(three, *DISKS, flags=NO_QUIESCE))
        await asyncio.to_thread(wait_until, "the step", flag.exists, 20)
        three.domain.resume()
        three.writes_go_on()  # and the daemon has heard of it
        flag.unlink()
        if together:
            assert {made.ours("consistency") for _, made in await asked} == {"crash"}
            await delete_all(api, three)
        else:
            await refused(asked, "Busy")
        assert three.state == "running"
        assert not await api.snapshots_of(three)
        assert (sources(three), files(three)) == before
        faulty.daemon.stop()
