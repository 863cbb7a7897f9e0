"""CreateSet on real guests: several disks, one name, one freeze, all or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from snapd_vm.engine.journal import Step
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import attempt
from tests.real import images
from tests.real.api import DOMAIN, NO_QUIESCE, QUIESCE_REQUIRED, SNAPSHOT, Api, ApiError, path_of
from tests.real.conftest import Connect
from tests.real.test_crash import FAULTY, faulty

__all__ = ["faulty"]

DISKS = ("vda", "vdb")


METHODS = {"alike": ("qemu", "qemu"), "mixed": ("qemu", "reflink")}
MIXED = pytest.mark.parametrize("methods", ["mixed"], indirect=True)


@pytest.fixture(scope="module", params=list(METHODS))
def methods(request: pytest.FixtureRequest) -> Sequence[str]:
    """The methods of the disks that are taken."""
    return METHODS[request.param]


@pytest.fixture(scope="module")
def three(lab: Lab, methods: Sequence[str]) -> Iterator[Guest]:
    """A guest with three disks under write load, of which the first two are taken."""
    cloning = lab.block.mounted("xfs", 600)
    clones = DiskSpec(format="raw", folder=cloning.path)
    guest = lab.guest([DiskSpec(), clones if "reflink" in methods else DiskSpec(), DiskSpec()])
    yield guest
    guest.remove()
    cloning.unmount()


def sources(guest: Guest, flags: int = 0) -> dict[str, str]:
    """The file of each disk, by target."""
    found = {}
    for disk in etree.fromstring(guest.domain.XMLDesc(flags)).findall("devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        assert target is not None and source is not None
        found[target.get("dev") or ""] = source.get("file") or ""
    return found


def files(guest: Guest) -> set[str]:
    """All in the folders of the guest's disks, drafts too."""
    return {str(f) for disk in guest.disks for f in disk.path.parent.iterdir()}


async def refused(api: Api, guest: Guest, *disks: Any, **more: Any) -> str:
    """The name of the error; asserts that it changed nothing."""
    before = sources(guest), files(guest), await api.snapshots_of(guest)
    with pytest.raises(ApiError) as error:
        await api.create_set(guest, *disks, **more)
    assert (sources(guest), files(guest), await api.snapshots_of(guest)) == before
    return error.value.name


async def test_one_name_one_freeze(
    api: Api, three: Guest, methods: Sequence[str], scratch: Path
) -> None:
    before = sources(three)
    three.reset()
    made = await api.create_set(three, *DISKS, name="both", flags=QUIESCE_REQUIRED)
    three.writes_go_on()
    rows = [await api.properties(path, SNAPSHOT) for path, _ in made]
    assert [row["Target"] for row in rows] == list(DISKS)
    assert [row["Method"] for row in rows] == list(methods)
    for key, value in {"Name": "both", "Consistency": "quiesced", "FrozenFilesystems": 2}.items():
        assert [row[key] for row in rows] == [value, value]
    assert rows[0]["FrozenTime"] == rows[1]["FrozenTime"] > 0
    assert rows[0]["Created"] == rows[1]["Created"]
    for number, (path, created) in enumerate(made):
        assert created.snapshot == path
        raw = images.raw_copy(created.file, created.ours("format"), scratch / f"{number}")
        assert images.is_clean(raw)
        live = sources(three)[DISKS[number]]
        assert live == sources(three, 2)[DISKS[number]]
        if methods[number] == "qemu":
            assert (created.file, created.overlay) == (before[DISKS[number]], live)
        else:
            assert (created.modified_disk, live) == ("", before[DISKS[number]])
    assert sources(three)["vdc"] == before["vdc"]


async def test_each_can_be_deleted_alone(api: Api, three: Guest) -> None:
    before = sources(three)
    made = await api.create_set(three, *DISKS)
    await api.call(made[0][0], SNAPSHOT, "Delete", "u", 0)
    assert sources(three)["vda"] == before["vda"]
    (row,) = (await api.snapshots_of(three)).values()
    assert (row["Target"], row["State"]) == ("vdb", "ready")
    await api.call(made[1][0], SNAPSHOT, "Delete", "u", 0)
    assert sources(three) == sources(three, 2) == before
    three.writes_go_on()


async def test_a_name_is_made_for_all(api: Api, three: Guest, methods: Sequence[str]) -> None:
    made = await api.create_set(three, *DISKS, flags=NO_QUIESCE)
    names = {(await api.properties(path, SNAPSHOT))["Name"] for path, _ in made}
    assert len(names) == 1
    # Several methods take several moments, so the vCPUs stand still meanwhile.
    expected = "crash" if methods[0] == methods[1] else "paused"
    assert [created.ours("consistency") for _, created in made] == [expected, expected]
    assert three.state == "running"
    three.writes_go_on()


async def test_bad_input_changes_nothing(api: Api, three: Guest) -> None:
    assert (await refused(api, three)).endswith("InvalidArgs")
    assert (await refused(api, three, "vda", "vda")).endswith("InvalidArgs")
    assert await refused(api, three, "vda", "vdx") == "NoSuchDisk"
    assert (await refused(api, three, *DISKS, flags=3)).endswith("InvalidArgs")
    assert await refused(api, three, *DISKS, name="/etc") == "InvalidName"
    assert await refused(api, three, "vda", ("vdb", "<nonsense/>")) == "InvalidXML"
    many = [["<disk><target dev='vda'/></disk>" + " " * 60_000, ""]] * 8
    with pytest.raises(ApiError) as error:
        await api.call(path_of(three), DOMAIN, "CreateSet", "a(ss)su", many, "", 0)
    assert error.value.name.endswith("LimitsExceeded")


async def test_what_one_disk_can_not_none_does(
    api: Api, three: Guest, methods: Sequence[str]
) -> None:
    folder = three.disk("vda").path.parent
    same = f"<diskSnapshot method='qemu'><overlay file='{folder}/same'/></diskSnapshot>"
    expected = "NameInUse" if methods[0] == methods[1] else "MethodNotSupported"
    assert await refused(api, three, ("vda", same), ("vdb", same)) == expected
    own = three.disk("vdb").path.parent
    (own / "there").touch()
    there = f"<diskSnapshot method='qemu'><overlay file='{own}/there'/></diskSnapshot>"
    assert await refused(api, three, "vda", ("vdb", there)) == "NameInUse"
    (own / "there").unlink()
    other = f"<diskSnapshot method='qemu'><overlay file='{own}/other'/></diskSnapshot>"
    created = await api.create(three, "<disk><target dev='vdb'/></disk>", other, name="used")
    assert await refused(api, three, *DISKS, name="used") == "NameInUse"
    await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)


async def settled(api: Api, guest: Guest, before: tuple[Any, Any]) -> str:
    """Asserts that both snapshots are there, whole, or nothing of either; which of the two."""
    wait_until("the guest is thawed", lambda: not guest.agent_says_frozen(), 20)
    guest.writes_go_on()
    assert guest.state == "running"
    live = sources(guest)
    assert live == sources(guest, 2)
    rows = await api.snapshots_of(guest)
    if not rows:
        assert (live, files(guest)) == before
        return "nothing"
    assert sorted((row["Target"], row["State"]) for row in rows.values()) == [
        (target, "ready") for target in DISKS
    ]
    assert len(files(guest)) == len(before[1]) + 2
    for row in rows.values():
        target, now = row["Target"], live[row["Target"]]
        if row["Method"] == "qemu":
            assert images.info(now)["backing-filename"] == before[0][target]
        else:
            assert now == before[0][target]
    return "snapshots"


@pytest.mark.parametrize("step", list(Step))
async def test_killed_at(
    connect: Connect, faulty: Lab, three: Guest, methods: Sequence[str], step: Step
) -> None:
    alike = methods[0] == methods[1]
    if alike and step is Step.STOPPED:
        return  # never reached
    before = sources(three), files(three)
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "kill"))
    api = await connect()
    with pytest.raises(ApiError):
        await api.create_set(three, *DISKS, name=f"killed-{step}")
    wait_until("the daemon is dead", lambda: not faulty.daemon.running, 10)
    faulty.daemon.start({}, argv=DAEMON)
    steps = list(Step)
    # A clone has no name before it is read back.
    first = Step.SWITCHED if alike else Step.READ_BACK
    stands = steps.index(step) >= steps.index(first)
    assert await settled(api, three, before) == ("snapshots" if stands else "nothing")
    for path in await api.snapshots_of(three):
        await api.call(path, SNAPSHOT, "Delete", "u", 0)
    assert (sources(three), files(three)) == before


@pytest.mark.parametrize("step", [Step.PREPARED, Step.ARMED, Step.SWITCHED, Step.READ_BACK])
async def test_an_error_undoes_both(
    connect: Connect, faulty: Lab, three: Guest, step: Step
) -> None:
    before = sources(three), files(three)
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "raise"))
    api = await connect()
    with pytest.raises(ApiError) as error:
        await api.create_set(three, *DISKS)
    assert error.value.name == "StorageFailed"
    assert await settled(api, three, before) == "nothing"
    await api.create_set(three, *DISKS)


async def test_undoing_both_asks_no_monitor(connect: Connect, faulty: Lab) -> None:
    own = faulty.guest([DiskSpec(), DiskSpec()])
    try:
        before = own.domain.messages()
        faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.ARMED, "--do", "raise"))
        api = await connect()
        with pytest.raises(ApiError):
            await api.create_set(own, *DISKS)
        assert not await api.snapshots_of(own)
        assert own.domain.messages() == before  # the monitor's use would be told there
    finally:
        own.remove()


@MIXED
async def test_the_vcpus_stand_still_between_two_methods(
    connect: Connect, faulty: Lab, three: Guest
) -> None:
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.STOPPED, "--do", "sleep:1"))
    api = await connect()
    call = asyncio.create_task(api.create_set(three, *DISKS, flags=NO_QUIESCE))
    await asyncio.to_thread(three.wait_state, "paused", 10)
    await call
    assert three.state == "running"
    three.writes_go_on()


@pytest.mark.measures
@MIXED
@pytest.mark.parametrize("flags", [NO_QUIESCE, QUIESCE_REQUIRED])
async def test_they_do_not_stand_still_for_longer_than_the_limit(
    connect: Connect, faulty: Lab, three: Guest, flags: int
) -> None:
    before = sources(three), files(three)
    limit = {"frozen_limit_s": 1}
    faulty.daemon.start(limit, argv=(*FAULTY, "--at", Step.STOPPED, "--do", "sleep:4"))
    api = await connect()
    call = asyncio.create_task(api.create_set(three, *DISKS, flags=flags))
    await asyncio.to_thread(three.wait_state, "paused", 10)
    await asyncio.to_thread(three.wait_state, "running", 2.5)
    with pytest.raises(ApiError) as error:
        await call
    assert error.value.name == ("TimedOut" if flags == NO_QUIESCE else "QuiesceTimedOut")
    assert await settled(api, three, before) == "nothing"


@MIXED
async def test_exec_stop_post_lets_them_run(connect: Connect, faulty: Lab, three: Guest) -> None:
    before = sources(three), files(three)
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.STOPPED, "--do", "kill"))
    api = await connect()
    with pytest.raises(ApiError):
        await api.create_set(three, *DISKS, flags=NO_QUIESCE)
    wait_until("the daemon is dead", lambda: not faulty.daemon.running, 10)
    assert three.state == "paused"
    argv = [*DAEMON, "--thaw-held"]
    done = attempt([*argv, "--config", faulty.daemon.config_file], env=faulty.bus.env, timeout=60)
    assert (done.returncode, three.state) == (0, "running")
    faulty.daemon.start({}, argv=DAEMON)
    assert await settled(api, three, before) == "nothing"
