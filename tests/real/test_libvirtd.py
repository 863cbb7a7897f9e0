"""libvirtd restarted, killed and hung in the middle of a Create, and away for a while."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path

import libvirt
import pytest

from snapd_vm.engine.journal import Step
from snapd_vm.model import ROOT_PATH
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real import images
from tests.real.api import MANAGER, QUIESCE_REQUIRED, SNAPSHOT, VDA, Api, ApiError
from tests.real.conftest import Connect
from tests.real.test_crash import FAULTY, active_file, agrees, faulty, files_of

__all__ = ["faulty"]

KILLS = 30


async def is_connected(api: Api) -> bool:
    return bool((await api.properties(ROOT_PATH, MANAGER))["Connected"])


async def until_connected(api: Api, wanted: bool, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while await is_connected(api) != wanted:
        assert time.monotonic() < deadline, f"Connected is not {wanted} after {timeout} s"
        await asyncio.sleep(0.05)


async def test_it_reconnects_by_itself_and_says_so(daemon: Lab, api: Api, guest: Guest) -> None:
    await api.client.listen()
    await asyncio.to_thread(daemon.libvirtd.stop)
    await until_connected(api, False)
    with pytest.raises(ApiError) as error:
        await api.create(guest)
    assert error.value.name == "HypervisorUnavailable"
    with pytest.raises(ApiError) as error:  # who can tell that there is none?
        await api.call(ROOT_PATH, MANAGER, "FindDomain", "s", "nobody")
    assert error.value.name == "HypervisorUnavailable"
    await asyncio.to_thread(daemon.libvirtd.start)
    await until_connected(api, True)
    await asyncio.to_thread(guest.wait_agent)  # libvirt opens its channel after it has our call
    await api.create(guest, flags=QUIESCE_REQUIRED)
    told = [
        signal.body[1]["Connected"].value
        for signal in api.client.signals
        if signal.member == "PropertiesChanged" and signal.path == ROOT_PATH
    ]
    assert told == [False, True]


async def test_what_somebody_writes_into_a_domains_metadata(
    daemon: Lab, connect: Connect, lab: Lab, guest: Guest
) -> None:
    """libvirt keeps comments and CDATA there, with whatever they hold."""
    odd = lab.guest(start=False)
    note = "<note><!-- <!DOCTYPE x [<!ENTITY y 'z'>]> --><![CDATA[<!DOCTYPE x>]]></note>"
    kind, config = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_CONFIG
    odd.domain.setMetadata(kind, note, "test", "urn:test", config)
    assert "<!DOCTYPE x>" in odd.domain.XMLDesc()
    daemon.daemon.stop()
    daemon.daemon.start({}, argv=None)
    api = await connect()
    assert await is_connected(api)
    for one in (guest, odd):
        created = await api.create(one)
        await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)
    assert "<!DOCTYPE x>" in odd.domain.XMLDesc(), "it was redefined as it was"
    odd.remove()


@pytest.mark.parametrize("step", [Step.PREPARED, Step.ARMED, Step.FROZEN, Step.SWITCHED])
async def test_libvirtd_restarted_in_mid_create(
    connect: Connect, faulty: Lab, guest: Guest, step: Step
) -> None:
    before, file_before = files_of(guest), active_file(guest)
    flag = faulty.folder("flags") / f"restart-{step}"
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", f"wait:{flag}"))
    api = await connect()
    call = asyncio.create_task(api.create(guest, flags=QUIESCE_REQUIRED))
    await asyncio.to_thread(wait_until, "the step", flag.exists, 20)
    await asyncio.to_thread(faulty.libvirtd.restart)
    flag.unlink()
    answer = (await asyncio.gather(call, return_exceptions=True))[0]
    await until_connected(api, True)
    outcome = await agrees(api, guest, before, file_before)
    if isinstance(answer, ApiError):
        # The agent's channel is not open again at once when libvirtd is back.
        assert answer.name in ("HypervisorUnavailable", "QuiesceFailed"), answer
        assert outcome == "nothing"
    else:
        assert not isinstance(answer, BaseException), answer
        assert outcome == "snapshot"
    await asyncio.to_thread(guest.wait_agent)
    await api.create(guest, flags=QUIESCE_REQUIRED)


async def test_libvirtd_killed_at_moments_spread_over_the_switch(
    connect: Connect, faulty: Lab, guest: Guest, scratch: Path
) -> None:
    """30 kills at 0 to 20 ms after the freeze; each ends with all of a snapshot or nothing of it.

    The marks that the guest wrote before and after each are there at the end, after a boot, too.
    """
    outcomes = []
    flag = faulty.folder("flags") / "kill"
    # On a chain, so that what is mended into its bottom, and not into the image above, shows.
    faulty.daemon.start({}, argv=DAEMON)
    await (await connect()).create(guest, flags=QUIESCE_REQUIRED)
    faulty.daemon.stop()
    bottom = Path(images.chain(active_file(guest))[-1])
    untouched = hashlib.sha256(bottom.read_bytes()).hexdigest()
    for number in range(KILLS):
        before, file_before = files_of(guest), active_file(guest)
        faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.FROZEN, "--do", f"wait:{flag}"))
        api = await connect()
        known = set(await api.snapshots_of(guest))
        call = asyncio.create_task(api.create(guest, flags=QUIESCE_REQUIRED))
        await asyncio.to_thread(wait_until, "the freeze", flag.exists, 20)
        flag.unlink()
        await asyncio.sleep(number * 20e-3 / KILLS)
        faulty.libvirtd.kill()
        await asyncio.to_thread(faulty.libvirtd.start)
        answer = (await asyncio.gather(call, return_exceptions=True))[0]
        await until_connected(api, True)
        wait_until("the guest is thawed", lambda: not guest.agent_says_frozen(), 30)
        guest.writes_go_on()
        await settled(api, guest)
        new = {p: t for p, t in (await api.snapshots_of(guest)).items() if p not in known}
        live, persistent = active_file(guest), active_file(guest, 2)
        assert live == persistent
        assert images.is_open(live)
        if isinstance(answer, ApiError):
            outcomes.append(answer.name)
        else:
            assert not isinstance(answer, BaseException), answer
            outcomes.append(answer.ours("consistency"))
        if new:
            assert live != file_before
            assert [told["State"] for told in new.values()] == ["ready"]
            assert len(files_of(guest)) == len(before) + 1
        else:
            assert isinstance(answer, ApiError)
            assert live == file_before
            assert files_of(guest) == before
        guest.write("vda", f"mark{number}", f"after-{number}")
        api.client.close()
        await asyncio.to_thread(faulty.daemon.stop)
    print("outcomes:", {name: outcomes.count(name) for name in set(outcomes)})
    assert hashlib.sha256(bottom.read_bytes()).hexdigest() == untouched
    guest.poweroff()
    guest.start()
    for number in range(KILLS):
        assert guest.read("vda", f"mark{number}") == f"after-{number}"


async def settled(api: Api, guest: Guest) -> None:
    """Wait until the daemon has nothing open on the domain: a Create that is wrong is not Busy."""
    deadline = time.monotonic() + 60
    wrong = "<diskSnapshot method='qemu'><overlay file='/nowhere/x'/></diskSnapshot>"
    while True:
        with pytest.raises(ApiError) as error:
            await api.create(guest, VDA, wrong)
        if error.value.name == "MethodNotSupported":
            return
        assert error.value.name in ("Busy", "HypervisorUnavailable"), error.value
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


@pytest.mark.measures
async def test_a_hung_libvirtd_does_not_hang_us(daemon: Lab, api: Api, guest: Guest) -> None:
    daemon.libvirtd.suspend()
    try:
        started = time.monotonic()
        objects = await api.snapshots()  # from memory
        assert time.monotonic() - started < 1
        assert isinstance(objects, dict)
        with pytest.raises(ApiError) as error:
            await api.create(guest)
        assert error.value.name == "HypervisorUnavailable"
        assert time.monotonic() - started < 45
    finally:
        daemon.libvirtd.resume()
    await until_connected(api, True, 30)
    guest.writes_go_on()
    await api.create(guest, flags=QUIESCE_REQUIRED)
