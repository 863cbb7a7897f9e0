"""The jobs of Create and CreateSet on real guests, and what SIGTERM waits for."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from snapd_vm.engine.journal import RevertStep, Step
from snapd_vm.errors import PREFIX
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real import images
from tests.real.api import NAME, SNAPSHOT, Api, ApiError, path_of
from tests.real.conftest import Connect
from tests.real.places import Places, refused
from tests.real.test_crash import FAULTY, active_file, faulty
from tests.real.test_delete import chain_of, delete, marks
from tests.real.test_load import journal_is_at_rest
from tests.real.test_long_delete import BANDWIDTH, FILLED, job_of, progress_of
from tests.real.test_revert import contents, places, revert, stack, whole
from tests.real.test_set import DISKS, files, settled, sources

__all__ = ["faulty", "places"]

JOB = f"{NAME}.Job"
BRIEF = (sys.executable, "-m", "tests.real.faulty_daemon", "--stop-limit", "1")


@pytest.fixture(scope="module")
def two(lab: Lab) -> Iterator[Guest]:
    """A guest that writes to two disks, which two methods take."""
    cloning = lab.block.mounted("xfs", 600)
    guest = lab.guest([DiskSpec(size_mib=128), DiskSpec(format="raw", folder=cloning.path)])
    yield guest
    guest.remove()
    cloning.unmount()


@pytest.fixture(params=["one", "set"])
def disks(request: pytest.FixtureRequest) -> Sequence[str]:
    """What is taken."""
    return DISKS[:1] if request.param == "one" else DISKS


class Halted:
    """A Create that waits at a step, and a client that watches."""

    def __init__(self, lab: Lab, connect: Connect, guest: Guest, disks: Sequence[str]) -> None:
        self._lab, self._connect = lab, connect
        self._guest, self._disks = guest, disks

    async def begin(self, step: Step, **config: Any) -> None:
        self.flag = self._lab.folder("flags") / f"job-{step}"
        argv = (*FAULTY, "--at", step, "--do", f"wait:{self.flag}")
        self._lab.daemon.start(config, argv=argv)
        self.api, self.other = await self._connect(), await self._connect()
        await self.other.client.listen()
        self.call = asyncio.create_task(self.create(self.api))
        await asyncio.to_thread(wait_until, "the step", self.flag.exists, 20)

    async def create(self, api: Api) -> Any:
        if len(self._disks) > 1:
            return await api.create_set(self._guest, *self._disks)
        return await api.create(self._guest)

    async def job(self) -> str:
        return await job_of(self.other, path_of(self._guest))

    def completions(self) -> list[Any]:
        signals = self.other.client.signals
        return [signal.body for signal in signals if signal.member == "Completed"]


@pytest.fixture
def halted(faulty: Lab, connect: Connect, two: Guest, disks: Sequence[str]) -> Halted:
    return Halted(faulty, connect, two, disks)


@pytest.mark.parametrize("step", [Step.CHECKED, Step.BEGUN, Step.PREPARED])
async def test_cancelled_in_time_it_leaves_nothing(
    halted: Halted, faulty: Lab, two: Guest, step: Step
) -> None:
    before = sources(two), files(two)
    await halted.begin(step)
    job = await halted.job()
    told = await halted.other.properties(job, JOB)
    assert (told["Operation"], told["Objects"]) == ("create", [path_of(two)])
    assert (told["StartedByUID"], told["Cancelable"]) == (0, True)
    assert (told["ProgressValid"], told["Result"]) == (False, {})
    cancel = asyncio.create_task(halted.other.call(job, JOB, "Cancel"))
    again = asyncio.create_task(halted.api.call(job, JOB, "Cancel"))
    done, _ = await asyncio.wait([cancel], timeout=0.2)
    assert not done  # it is answered when it is true
    halted.flag.unlink()
    await asyncio.gather(cancel, again)
    await refused(halted.call, "Cancelled")
    ended = await halted.other.properties(job, JOB)
    assert ended["Result"] == {"error": f"{PREFIX}Cancelled"}
    assert ended["Cancelable"] is False
    await refused(halted.other.call(job, JOB, "Cancel"), "InvalidState")
    assert halted.completions() == [[False, "The operation was cancelled and undone."]]
    assert (sources(two), files(two)) == before
    assert not await halted.api.snapshots_of(two)
    assert journal_is_at_rest(faulty)
    two.writes_go_on()


async def test_after_the_point_of_no_return_it_goes_to_its_end(
    halted: Halted, faulty: Lab, two: Guest
) -> None:
    before = sources(two), files(two)
    await halted.begin(Step.READ_BACK)
    job = await halted.job()
    assert (await halted.other.properties(job, JOB))["Cancelable"] is False
    await refused(halted.other.call(job, JOB, "Cancel"), "InvalidState")
    halted.flag.unlink()
    await halted.call
    assert (await halted.other.client.heard("Completed", path=job)).body == [True, ""]
    assert not halted.completions()
    ended = await halted.other.properties(job, JOB)
    made = await halted.api.snapshots_of(two)
    assert sorted(ended["Result"]["snapshots"]) == sorted(made)
    assert (ended["Progress"], ended["Cancelable"]) == (1.0, False)
    for path in made:
        await halted.api.call(path, SNAPSHOT, "Delete", "u", 0)
    assert (sources(two), files(two)) == before


async def test_it_survives_the_leaving_of_its_client(halted: Halted, two: Guest) -> None:
    before = sources(two), files(two)
    await halted.begin(Step.PREPARED)
    job = await halted.job()
    halted.api.client.close()
    halted.call.cancel()
    halted.flag.unlink()
    completed = await halted.other.client.heard("Completed", 20)
    assert (completed.path, completed.body) == (job, [True, ""])
    assert not halted.completions()
    for path in await halted.other.snapshots_of(two):
        await halted.other.call(path, SNAPSHOT, "Delete", "u", 0)
    assert (sources(two), files(two)) == before


async def test_one_that_waits_for_its_turn_is_cancelled_at_once(halted: Halted, two: Guest) -> None:
    before = sources(two), files(two)
    await halted.begin(Step.PREPARED)
    await halted.job()
    second = asyncio.create_task(halted.create(halted.other))
    job = await halted.job()
    async with asyncio.timeout(5):
        await halted.other.call(job, JOB, "Cancel")
        await refused(second, "Cancelled")
    assert not halted.call.done()
    halted.flag.unlink()
    await halted.call
    for path in await halted.other.snapshots_of(two):
        await halted.other.call(path, SNAPSHOT, "Delete", "u", 0)
    assert (sources(two), files(two)) == before


# -- SIGTERM -------------------------------------------------------------------------------------


def terminate(lab: Lab) -> asyncio.Task[None]:
    """SIGTERM; done when the daemon has ended."""
    return asyncio.create_task(asyncio.to_thread(lab.daemon.stop, 60))


async def stopping(lab: Lab, api: Api, guest: Guest) -> None:
    """Wait until it takes no more calls."""
    async with asyncio.timeout(10):
        while True:
            try:
                await api.disks(guest)
            except ApiError as error:
                assert error.name == "Cancelled", error
                return


@pytest.mark.parametrize("step", [Step.BEGUN, Step.SWITCHED, Step.READ_BACK])
async def test_a_create_is_waited_for_and_answered(
    halted: Halted, faulty: Lab, connect: Connect, two: Guest, step: Step
) -> None:
    before = sources(two), files(two)
    await halted.begin(step)
    ended = terminate(faulty)
    await stopping(faulty, halted.other, two)
    assert not ended.done()
    halted.flag.unlink()
    await halted.call
    await ended
    assert faulty.daemon.status == 0
    assert journal_is_at_rest(faulty)
    faulty.daemon.start({}, argv=DAEMON)
    api = await connect()
    assert {row["State"] for row in (await api.snapshots_of(two)).values()} == {"ready"}
    for path in await api.snapshots_of(two):
        await api.call(path, SNAPSHOT, "Delete", "u", 0)
    assert (sources(two), files(two)) == before


async def test_what_takes_too_long_is_journalled_and_settled_at_the_next_start(
    halted: Halted, faulty: Lab, connect: Connect, two: Guest, disks: Sequence[str]
) -> None:
    before = sources(two), files(two)
    flag = faulty.folder("flags") / "long"
    faulty.daemon.start({}, argv=(*BRIEF, "--at", Step.READ_BACK, "--do", f"wait:{flag}"))
    api = await connect()
    call = asyncio.create_task(halted.create(api))
    await asyncio.to_thread(wait_until, "the step", flag.exists, 20)
    await asyncio.wait_for(terminate(faulty), 20)
    await refused(call, "Cancelled")
    assert faulty.daemon.status == 0
    assert not journal_is_at_rest(faulty)
    flag.unlink()
    faulty.daemon.start({}, argv=DAEMON)
    api = await connect()
    assert journal_is_at_rest(faulty)
    two.writes_go_on()
    if len(disks) > 1:
        await settled(api, two, before)
    for path in await api.snapshots_of(two):
        await api.call(path, SNAPSHOT, "Delete", "u", 0)
    assert (sources(two), files(two)) == before


@pytest.mark.parametrize("in_time", [True, False])
async def test_a_commit(lab: Lab, faulty: Lab, connect: Connect, two: Guest, in_time: bool) -> None:
    """It goes on in QEMU where it is not waited for, and the next daemon takes it up."""
    argv = DAEMON if in_time else (*BRIEF, "--at", Step.CHECKED, "--do", "sleep:0")
    faulty.daemon.start({"qemu": {"commit_bandwidth": BANDWIDTH}}, argv=argv)
    api = await connect()
    await api.client.listen()
    before = sources(two), files(two)
    (created,) = await chain_of(api, two, 1)
    two.fill("vda", "much", FILLED)
    two.sync()
    deleting = asyncio.create_task(delete(api, created))
    await progress_of(api, await job_of(api, created.snapshot), 0.1)
    await terminate(faulty)
    assert faulty.daemon.status == 0
    if in_time:
        await deleting
        assert (sources(two), files(two)) == before
        assert journal_is_at_rest(faulty)
    else:
        assert (await refused(deleting, "Cancelled")).text
        assert two.domain.blockJobInfo("vda")
        assert not journal_is_at_rest(faulty)
    faulty.daemon.start({}, argv=DAEMON)
    api = await connect()
    async with asyncio.timeout(30):
        while await api.snapshots_of(two):
            await asyncio.sleep(0.05)
    assert (sources(two), files(two)) == before
    assert journal_is_at_rest(faulty)
    assert marks(two, 1) == ["text-0", "text-1"]
    assert len(images.chain(active_file(two))) == 1


@pytest.mark.parametrize("step", [RevertStep.ARMED, RevertStep.SWITCHED])
@pytest.mark.parametrize("in_time", [True, False])
async def test_a_revert(
    faulty: Lab, connect: Connect, places: Places, tmp_path: Any, step: RevertStep, in_time: bool
) -> None:
    guest = places.guest()
    flag = faulty.folder("flags") / "revert-term"
    argv = (*(FAULTY if in_time else BRIEF), "--at", step, "--do", f"wait:{flag}")
    faulty.daemon.start({}, argv=argv)
    api, other = await connect(), await connect()
    await places.known(api)
    stacked = await stack(api, guest, 2)
    sums = await contents(api, tmp_path, stacked)
    reverting = asyncio.create_task(revert(api, stacked[0]))
    await asyncio.to_thread(wait_until, "the step", flag.exists, 20)
    ended = terminate(faulty)
    if in_time:
        await stopping(faulty, other, guest)
        flag.unlink()
        await reverting
        await ended
    else:
        await asyncio.wait_for(ended, 20)
        flag.unlink()
        await refused(reverting, "Cancelled")
        assert not journal_is_at_rest(faulty)
    assert faulty.daemon.status == 0
    faulty.daemon.start({}, argv=DAEMON)
    api = await connect()
    await places.known(api)
    assert journal_is_at_rest(faulty)
    assert await contents(api, tmp_path, stacked) == sums
    assert {row["State"] for row in (await api.snapshots_of(guest)).values()} == {"ready"}
    if in_time or step is RevertStep.SWITCHED:
        assert whole(active_file(guest, 2), tmp_path) == sums[0]
    for created in stacked:
        await delete(api, created)
