"""A method that is a program, on a real guest: what it does, and what it must not be able to do."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from snapd_vm.engine.journal import RevertStep
from snapd_vm.methods.outside import jsonform
from snapd_vm.model import ROOT_PATH
from tests.lab import allow
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import CHECKOUT, run
from tests.real import images
from tests.real.api import (
    DOMAIN,
    MANAGER,
    NO_QUIESCE,
    QUIESCE_REQUIRED,
    SNAPSHOT,
    VDA,
    Api,
    ApiError,
    Created,
    path_of,
)
from tests.real.api import NAME as BUS_NAME
from tests.real.arrays import METHOD, NAME, Array
from tests.real.conftest import Connect
from tests.real.places import Places, ready, refused, unchanged
from tests.real.test_crash import FAULTY, faulty
from tests.real.test_revert import places

__all__ = ["faulty", "places"]

SCHEMA = CHECKOUT / "data/executable-method.schema.json"
LIMIT_S = 10
"""Of the frozen time: the program is started in it, and many other tests run beside these."""
TIMEOUT_S = LIMIT_S + 5
"""Of the program."""


@pytest.fixture(scope="module")
def own(lab: Lab) -> Iterator[Guest]:
    """A guest with two raw disks."""
    folder = lab.folder("array-disks")
    running = lab.guest([DiskSpec(format="raw", folder=folder)] * 2)
    yield running
    running.remove()


def installed(lab: Lab, **more: Any) -> Array:
    """The program, with its copies where no other file of tests leaves any."""
    return Array.install(lab, lab.folder("executable-copies"), **more)


@pytest.fixture
def array(lab: Lab, faulty: Lab) -> Iterator[Array]:
    """The program, and a daemon that has it."""
    made = installed(lab, reverts=True, timeout_s=TIMEOUT_S)
    faulty.daemon.start({**made.config, "frozen_limit_s": LIMIT_S})
    yield made
    made.faults()
    for path in made.folder.iterdir():
        path.unlink()


@pytest.fixture
async def api(array: Array, connect: Connect) -> Api:
    """A client of that daemon."""
    return await connect()


async def delete(api: Api, created: Created) -> str:
    return str((await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0))[0])


async def test_it_is_made_read_and_deleted(
    api: Api, array: Array, own: Guest, tmp_path: Path
) -> None:
    xml = own.domain.XMLDesc()
    manager = await api.properties(ROOT_PATH, MANAGER)
    assert manager["Methods"][-1] == NAME
    assert {row["method"] for row in await api.disks(own)} <= {"qemu", "reflink"}
    plan = await api.plan(own, method_xml=METHOD, name="planned")
    assert (plan["method"], plan["consistency"], plan["warnings"]) == (
        NAME,
        "quiesced",
        ["1 copied."],
    )
    assert plan["space_available"] > plan["space_needed"] > 0
    assert array.copies == set()
    own.write("vda", "mark", "before")
    created = await api.create(own, method_xml=METHOD, name="one", flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert (told["Method"], told["Format"], told["Size"]) == (NAME, "raw", 64 << 20)
    assert (told["State"], told["Consistency"]) == ("ready", "quiesced")
    uuid = created.snapshot.rpartition("/_")[2].replace("_", "-")
    assert created.file == str(array.folder / f"snapd-vm-{uuid}.img")
    assert (created.ours("type"), created.modified_disk) == ("file", "")
    assert images.is_clean(Path(created.file))
    assert run("debugfs", "-R", "cat /mark", created.file).strip() == "before"
    checksum = images.checksum(created.file, "raw", tmp_path)
    own.writes_go_on()
    assert images.checksum(created.file, "raw", tmp_path) == checksum
    assert await delete(api, created) == ""
    assert array.copies == set()
    assert own.domain.XMLDesc() == xml
    assert own.read("vda", "mark") == "after"


async def state_of(api: Api, path: str) -> str:
    return str((await api.properties(path, SNAPSHOT))["State"])


async def test_two_disks_are_one_run_and_one_instant(api: Api, array: Array, own: Guest) -> None:
    made = await api.create_set(own, ("vda", METHOD), ("vdb", METHOD), flags=NO_QUIESCE)
    assert [one.ours("consistency") for _, one in made] == ["crash", "crash"]  # not stopped
    assert len(array.copies) == 2
    array.faults(create="fail:the second is too many")
    await refused(api.create_set(own, ("vda", METHOD), ("vdb", METHOD)), "StorageFailed")
    assert len(array.copies) == 2
    array.faults()
    for _, one in made:
        await delete(api, one)
    assert array.copies == set()


HOSTILE_CLAIMS = {
    "refuse:NoSpace": ("NoSpace", "The array says no."),
    "refuse:Internal": ("StorageFailed", "status 1"),
    "refuse:NotAuthorized": ("StorageFailed", "status 1"),
    "fail:the door is shut": ("StorageFailed", "the door is shut"),
    "die": ("StorageFailed", "status -9"),
    "flood": ("StorageFailed", "more than"),
    "say:": ("StorageFailed", "not JSON"),
    "say:NaN": ("StorageFailed", "not JSON"),
    "say:[]": ("StorageFailed", "not of type object"),
    'say:{"mine": 1}': ("StorageFailed", "not of type boolean"),
    'say:{"mine": true, "mine": true}': ("StorageFailed", "twice"),
    'say:{"mine": true}': ("StorageFailed", "does not say where"),
    'say:{"mine": true, "paths": []}': ("StorageFailed", "'paths' is not known"),
    'say:{"mine": false}': ("MethodNotSupported", "does not say why"),
    'say:{"mine": false, "reason": "a\\u001b[31m\\nb"}': ("MethodNotSupported", "a [31m b."),
    'say:{"mine": true, "source": {}}': ("StorageFailed", "fewer than 1"),
    'say:{"mine": true, "source": {"file": "/a", "device": "/b"}}': (
        "StorageFailed",
        "more than 1",
    ),
    'say:{"mine": true, "source": {"file": "/etc/shadow"}}': ("StorageFailed", "source_dirs"),
    'say:{"mine": true, "source": {"file": "COPIES/../../a"}}': ("StorageFailed", "normal"),
    'say:{"mine": true, "source": {"file": "COPIES-not/a"}}': ("StorageFailed", "source_dirs"),
    'say:{"mine": true, "source": {"file": "DISK"}}': ("StorageFailed", "own image"),
    'say:{"mine": true, "source": {"snapshot": "a"}}': ("StorageFailed", "no RBD image"),
    'say:{"mine": true, "source": {"snapshot": "a\'/>"}}': ("StorageFailed", "form"),
}


async def test_what_it_answers_to_claim_is_judged(
    connect: Connect, faulty: Lab, lab: Lab, own: Guest
) -> None:
    array = installed(lab)
    array.more["source_dirs"] = [str(array.folder), str(own.disk().path.parent)]
    faulty.daemon.start(array.config)
    api = await connect()
    for fault, (name, words) in HOSTILE_CLAIMS.items():
        said = fault.replace("COPIES", str(array.folder)).replace("DISK", str(own.disk().path))
        array.faults(claim=said)
        error = await unchanged(api, own, name, method_xml=METHOD)
        assert words in error.text, (fault, error.text)
        assert error.text.isprintable()
        assert "Traceback" not in error.text
    array.faults(check='say:{"space_needed": -1}')
    await unchanged(api, own, "StorageFailed", method_xml=METHOD)
    array.faults(check="refuse:Busy")
    await unchanged(api, own, "Busy", method_xml=METHOD)
    array.faults()
    await delete(api, await api.create(own, method_xml=METHOD))


async def test_a_create_that_fails_in_any_way_leaves_nothing_and_nobody_frozen(
    api: Api, array: Array, own: Guest
) -> None:
    for faults, name in (
        ({"create": "fail:no"}, "StorageFailed"),
        ({"create": "refuse:NoSpace"}, "NoSpace"),
        ({"halfway": "die"}, "StorageFailed"),
        ({"after-create": "fail:it is there all the same"}, "StorageFailed"),
        ({"after-create": "say:{}{}"}, "StorageFailed"),
        ({"create": "flood"}, "StorageFailed"),
        ({"create": "hang"}, "QuiesceTimedOut"),
        ({"halfway": "hang-child"}, "QuiesceTimedOut"),
        ({"create": "say:{}"}, "StorageFailed"),  # said, and not done
    ):
        own.reset()
        array.faults(**faults)
        began = time.monotonic()
        await refused(api.create(own, method_xml=METHOD, flags=QUIESCE_REQUIRED), name)
        assert not own.agent_says_frozen()
        own.writes_go_on()
        assert own.stalls()["vda"].longest_s < LIMIT_S + 3
        assert time.monotonic() - began < TIMEOUT_S + 10
        assert array.copies == set(), faults
        assert not await api.snapshots_of(own)
    array.faults()
    await delete(api, await api.create(own, method_xml=METHOD, flags=QUIESCE_REQUIRED))


async def test_an_image_that_would_lead_its_reader_elsewhere(
    api: Api, array: Array, places: Places
) -> None:
    """Whoever reads the snapshot may read more than the program that made it."""
    guest = places.guest()
    await places.known(api)
    created = await api.create(guest, method_xml=METHOD)
    assert created.ours("format") == "qcow2"
    array.faults(halfway="lie-on:/etc/shadow")
    error = await refused(api.create(guest, method_xml=METHOD), "StorageFailed")
    assert "shadow" not in error.text
    assert array.copies == {Path(created.file).name}
    array.faults()
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", created.file)
    await refused(api.backup_source(created.snapshot), "InvalidState")
    assert await state_of(api, created.snapshot) == "failed"
    await delete(api, created)
    assert array.copies == set()


async def test_another_domains_image_is_no_snapshot(
    connect: Connect, faulty: Lab, lab: Lab, own: Guest, places: Places
) -> None:
    other = places.guest(places.disk(format="raw"))
    array = installed(lab)
    array.more["source_dirs"] = [str(other.disk().path.parent)]
    faulty.daemon.start(array.config)
    api = await connect()
    await places.known(api)
    array.faults(
        claim=f'say:{{"mine": true, "source": {{"file": "{other.disk().path}"}}, "data": '
        f'{{"image": "{own.disk().path}"}}}}'
    )
    error = await refused(api.create(own, method_xml=METHOD), "StorageFailed")
    assert other.name in error.text
    assert array.copies == set()
    assert other.disk().path.exists()


async def test_a_device_that_udev_has_linked(
    connect: Connect, faulty: Lab, lab: Lab, own: Guest
) -> None:
    """As those of device mapper are; a link that others than root could change is not followed."""
    array, folder, loop = installed(lab), lab.folder("links"), lab.block.loop(64)
    array.more["source_dirs"] = [str(folder)]
    faulty.daemon.start(array.config)
    api = await connect()
    (folder / "disk").symlink_to(loop.device)
    try:
        array.faults(
            claim=f'say:{{"mine": true, "source": {{"device": "{folder}/disk"}}}}',
            check="say:{}",
            create="say:{}",
            state='say:{"state": "ready"}',
        )
        created = await api.create(own, method_xml=METHOD)
        source = etree.fromstring(created.backup_source)
        assert (source.get("dev"), created.ours("type")) == (f"{folder}/disk", "block")
        folder.chmod(0o777)
        await refused(api.backup_source(created.snapshot), "StorageFailed")
        folder.chmod(0o755)
        assert await api.backup_source(created.snapshot) == created.backup_source
        array.faults(delete='say:{"deleted": true}', state='say:{"state": "missing"}')
        await delete(api, created)
    finally:
        (folder / "disk").unlink()
        loop.detach()


async def test_what_it_says_is_told_of_two_at_once(
    api: Api, array: Array, own: Guest, places: Places, faulty: Lab
) -> None:
    """Each in its own time: after the guest goes on."""
    other = places.guest(places.disk(format="raw"))
    await places.known(api)
    array.faults(halfway="wait:3", **{"after-create": "shout"})
    first = asyncio.create_task(api.create(own, method_xml=METHOD))
    await asyncio.to_thread(wait_until, "the first is at work", lambda: array.copies, 20)
    second = await api.create(other, method_xml=METHOD)
    for created in (await first, second):
        await delete(api, created)
    assert faulty.daemon.log_of_this_life.count("lines more)") == 2


@pytest.mark.measures
async def test_one_that_takes_too_long_to_stand_still_for_goes_on_and_the_guest_too(
    connect: Connect, faulty: Lab, array: Array, own: Guest
) -> None:
    faulty.daemon.stop()
    faulty.daemon.start({**array.config, "frozen_limit_s": 2})
    api = await connect()
    array.faults(halfway="wait:6")
    own.reset()
    created = await api.create(own, method_xml=METHOD)
    assert created.ours("consistency") == "crash"
    assert not own.agent_says_frozen()
    own.writes_go_on()
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert told["State"] == "ready"
    # In time, and that is what is told.
    assert 2 <= told["FrozenTime"] / 1e6 < 5
    assert own.stalls()["vda"].longest_s < 5
    await delete(api, created)
    error = await refused(
        api.create(own, method_xml=METHOD, flags=QUIESCE_REQUIRED), "QuiesceTimedOut"
    )
    assert "thawed meanwhile" in error.text
    assert array.copies == set()
    # Who does not want to stand still has all the time that the program is given.
    created = await api.create(own, method_xml=METHOD, flags=NO_QUIESCE)
    assert created.ours("consistency") == "crash"
    await delete(api, created)
    array.faults()
    assert array.copies == set()


async def test_a_delete_that_fails_leaves_it_as_it_was(api: Api, array: Array, own: Guest) -> None:
    created = await api.create(own, method_xml=METHOD)
    for fault in ("fail:no", "refuse:Busy", 'say:{"deleted": true}', "die"):
        array.faults(delete=fault)
        await refused(
            api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "StorageFailed", "Busy"
        )
        assert await state_of(api, created.snapshot) == "ready"
        assert len(array.copies) == 1
    array.faults(**{"after-delete": "die"})
    await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "StorageFailed")
    assert array.copies == set()
    array.faults()  # it is gone on with, and that nothing is there any more is no failure
    deadline = time.monotonic() + 60
    while await api.snapshots_of(own):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


async def test_it_has_no_rights_that_it_was_not_given(
    connect: Connect, faulty: Lab, lab: Lab, own: Guest
) -> None:
    shown = lab.folder("shown")
    shown.chmod(0o777)
    ways: tuple[tuple[dict[str, Any], int], ...] = (
        ({"capabilities": ["dac_override"]}, 2),
        ({"capabilities": []}, 0),
        ({"user": "backup"}, 0),
    )
    for how, bounds in ways:
        array = installed(lab, **how)
        user = how.get("user", "")
        faulty.daemon.start(array.config)
        api = await connect()
        array.faults(claim=f"show:{shown}/{user or 'root'}{bounds}")
        try:
            await api.plan(own, method_xml=METHOD)
        except ApiError as error:  # the other user can't read the image
            assert error.name == "StorageFailed"
        told: dict[str, Any] = json.loads((shown / f"{user or 'root'}{bounds}").read_text())
        status = dict(line.split(":\t", 1) for line in told["status"].splitlines() if ":\t" in line)
        uid = 34 if user else 0
        assert (told["uid"], status["Uid"].split()) == (uid, [str(uid)] * 4)
        assert told["groups"] == ([34] if user else [])
        assert status["NoNewPrivs"] == "1"
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            wanted = bounds if kind in ("CapPrm", "CapEff", "CapBnd") else 0
            assert int(status[kind], 16) == wanted, kind
        assert set(told["environment"]) <= {"PATH", "LC_ALL", "HOME", "SNAPD_VM_RUN", "LC_CTYPE"}
        assert told["descriptors"] == ["0", "1", "2", "3"]  # the last is that of the listing
        assert told["cwd"] == "/"
        array.faults()
        faulty.daemon.stop()


async def test_what_it_writes_to_stderr_is_in_the_log_and_bounded(
    api: Api, array: Array, own: Guest, lab: Lab
) -> None:
    before = len(lab.daemon.log)
    array.faults(create="shout")
    created = await api.create(own, method_xml=METHOD)
    lines = [ln for ln in lab.daemon.log[before:].splitlines() if f"method {NAME} says" in ln]
    assert len(lines) == 101
    assert "lines more" in lines[-1]
    assert all(len(line) < 500 and line.isprintable() for line in lines)
    await delete(api, created)


async def test_a_program_that_others_could_change_is_not_run(
    api: Api, array: Array, own: Guest, tmp_path: Path
) -> None:
    program = array.program

    async def is_refused(words: str) -> None:
        error = await unchanged(api, own, "StorageFailed", method_xml=METHOD)
        assert words in error.text

    program.chmod(0o775)
    await is_refused("writable by root alone")
    program.chmod(0o644)
    await is_refused("not executable")
    program.chmod(0o755)
    os.chown(program, 34, 0)
    await is_refused("must be root's")
    os.chown(program, 0, 0)
    program.parent.chmod(0o777)
    await is_refused("others than root")
    program.parent.chmod(0o755)
    os.chown(program.parent, 34, -1)
    await is_refused("others than root")
    os.chown(program.parent, 0, -1)
    real = program.rename(program.with_name("real"))
    await is_refused("No such file")
    program.symlink_to(real)
    await is_refused("not a regular file")
    program.unlink()
    real.rename(program)
    await delete(api, await api.create(own, method_xml=METHOD))


async def test_what_a_dead_daemon_left_running_is_ended_before_it_is_undone(
    api: Api, array: Array, own: Guest, lab: Lab
) -> None:
    """The program itself dies with the daemon; what it has started does not."""
    array.faults(halfway="hang-child")
    before = set(sleepers(lab))
    task = asyncio.ensure_future(api.create(own, method_xml=METHOD, flags=NO_QUIESCE))
    deadline = time.monotonic() + 20
    while not set(sleepers(lab)) - before:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    lab.daemon.kill()
    with pytest.raises(ApiError):
        await task
    assert set(sleepers(lab)) - before
    array.faults()
    lab.daemon.start()
    assert not set(sleepers(lab)) - before
    assert array.copies == set()
    assert not await api.snapshots_of(own)
    assert "of an earlier daemon ended" in lab.daemon.log


def sleepers(lab: Lab) -> Iterator[int]:
    """The processes that the program has started, by the mark in their environment."""
    mark = f"SNAPD_VM_RUN={NAME}@{lab.daemon.state_dir}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0")
            if argv[0] == b"sleep" and mark in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)
        except OSError:
            continue


async def test_the_database_is_lost_and_foreign_snapshots_are_left_alone(
    connect: Connect, array: Array, own: Guest, lab: Lab
) -> None:
    api = await connect()
    created = await api.create(own, method_xml=METHOD)
    (array.folder / "mine.img").write_text("somebody else's")
    lab.daemon.stop()
    shutil.rmtree(lab.daemon.state_dir)
    before = len(lab.daemon.log)
    lab.daemon.start()
    wait_until("it is told of", lambda: "no record knows: 1" in lab.daemon.log[before:], 20)
    line = next(ln for ln in lab.daemon.log[before:].splitlines() if "that no record" in ln)
    assert Path(created.file).stem in line
    assert f"the storage of method {NAME} has it" in line
    assert array.copies == {Path(created.file).name, "mine.img"}


async def test_gone_replaced_and_read(api: Api, array: Array, own: Guest) -> None:
    created = await api.create(own, method_xml=METHOD)
    copy = Path(created.file)
    with copy.open("rb") as file, subprocess.Popen(["sleep", "60"], stdin=file) as reader:
        try:
            error = await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "Busy")
        finally:
            reader.kill()
    assert "being read by" in error.text
    kept = copy.rename(copy.with_suffix(".kept"))
    array.faults(state='say:{"state": "ready"}')  # hostile: it must lie in the folder all the same
    for lure in ("/etc/passwd", own.disk().path, array.folder, "/dev/null", "/nowhere"):
        copy.symlink_to(lure)
        await refused(api.backup_source(created.snapshot), "StorageFailed")
        copy.unlink()
    await refused(api.backup_source(created.snapshot), "StorageFailed")
    array.faults()
    await refused(api.backup_source(created.snapshot), "StorageFailed")
    assert await state_of(api, created.snapshot) == "missing"
    kept.rename(copy)
    assert await api.backup_source(created.snapshot) == created.backup_source
    await delete(api, created)
    assert array.copies == set()


async def test_it_is_configured_no_more_and_again(
    connect: Connect, array: Array, own: Guest, lab: Lab
) -> None:
    api = await connect()
    created = await api.create(own, method_xml=METHOD)
    lab.daemon.stop()
    lab.daemon.start({})
    error = await refused(api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0), "MethodUnknown")
    assert "back into the configuration" in error.text
    await refused(api.create(own, method_xml=METHOD), "MethodUnknown")
    lab.daemon.stop()
    lab.daemon.start(array.config)
    assert await api.backup_source(created.snapshot) == created.backup_source
    await delete(api, created)


async def test_a_disk_goes_back_to_it(api: Api, array: Array, own: Guest) -> None:
    own.write("vda", "mark", "before")
    created = await api.create(own, method_xml=METHOD, flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    revert = (created.snapshot, SNAPSHOT, "Revert", "u", 0)
    await refused(api.call(*revert), "InvalidState")
    own.poweroff()
    array.faults(revert="refuse:StorageFailed")
    await refused(api.call(*revert), "StorageFailed")
    assert await state_of(api, created.snapshot) == "ready"
    array.faults(revert="die")  # cut off: asked for again, and the same again
    await refused(api.call(*revert), "StorageFailed")
    array.faults()
    await ready(api, created)
    own.start()
    assert own.read("vda", "mark") == "before"
    await delete(api, created)


def shown_to(array: Array) -> dict[str, Any]:
    """The request that the program was to show, which is of the form that the schema has."""
    path = array.folder / "request.json"
    shown: dict[str, Any] = json.loads(path.read_text())
    jsonform.Form(json.loads(SCHEMA.read_text())).check(shown, "#/$defs/request")
    path.unlink()
    return shown


@pytest.mark.parametrize("step", [RevertStep.PREPARED])
async def test_killed_in_a_revert_at(
    connect: Connect, faulty: Lab, own: Guest, step: RevertStep
) -> None:
    array = installed(faulty, reverts=True)
    faulty.daemon.start(array.config, argv=(*FAULTY, "--at", step, "--do", "kill"))
    api = await connect()
    own.write("vda", "mark", "before")
    created = await api.create(own, method_xml=METHOD, flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    own.poweroff()
    with pytest.raises(ApiError):
        await api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0)
    wait_until("the daemon is dead", lambda: not faulty.daemon.running, 10)
    faulty.daemon.start(array.config)
    assert await state_of(api, created.snapshot) == "ready"
    own.start()
    assert own.read("vda", "mark") == "before"
    await delete(api, created)
    assert array.copies == set()


async def test_a_revert_whose_answer_was_lost_is_not_done_twice(
    connect: Connect, faulty: Lab, own: Guest
) -> None:
    """The daemon is killed with it, the guest runs, and the next daemon asks for it again."""
    array = installed(faulty, reverts=True)
    faulty.daemon.start(array.config)
    api = await connect()
    own.write("vda", "mark", "before")
    created = await api.create(own, method_xml=METHOD, flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    own.poweroff()
    array.faults(**{"after-revert": "kill-daemon"})
    with pytest.raises(ApiError):
        await api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0)
    wait_until("the daemon is dead", lambda: not faulty.daemon.running, 10)
    own.start()
    assert own.read("vda", "mark") == "before"
    own.write("vda", "mark", "since")
    own.poweroff()
    array.faults()
    faulty.daemon.start(array.config)
    api = await connect()
    await ready(api, created)
    own.start()
    assert own.read("vda", "mark") == "since"
    own.poweroff()
    array.faults(revert="show-request")
    await api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0)  # another one is done
    shown = shown_to(array)
    assert shown["revert_id"]
    own.start()
    assert own.read("vda", "mark") == "before"
    await delete(api, created)
    assert array.copies == set()


RNG = """<element name="diskSnapshot" xmlns="http://relaxng.org/ns/structure/1.0">
  <attribute name="method"><value>array</value></attribute>
  <optional><element name="volume"><attribute name="lun"/><text/></element></optional>
</element>"""


async def test_its_own_schema_says_what_its_element_may_hold(
    connect: Connect, faulty: Lab, lab: Lab, own: Guest
) -> None:
    array = installed(lab)
    schema = array.program.with_name("array.rng")
    schema.write_text(RNG)
    array.more["schema"] = str(schema)
    faulty.daemon.start(array.config)
    api = await connect()
    asked = "<diskSnapshot method='array'>{}</diskSnapshot>"
    array.faults(claim="show-request")
    for inside in ("<volume/>", "<volume lun='1'><x/></volume>", "<other/>", "text"):
        await refused(api.plan(own, method_xml=asked.format(inside)), "InvalidXML")
    await api.plan(own, method_xml=asked.format("<volume lun='3'>gold</volume>"))
    shown = shown_to(array)
    assert shown["snapshots"][0]["options"] == {"volume/@lun": "3", "volume": "gold"}
    assert "revert_id" not in shown
    lab.polkit.rules(allow("nobody", f"{BUS_NAME}.create"))
    try:
        for inside, may in (("", True), ("<volume lun='3'/>", False)):
            words = ("Plan", "sssu", VDA, asked.format(inside), "", "0")
            done = lab.busctl("call", BUS_NAME, path_of(own), DOMAIN, *words, user="nobody")
            assert (done.returncode == 0) is may, done.stderr
            assert (array.folder / "request.json").exists() is may
            (array.folder / "request.json").unlink(missing_ok=True)
        assert f"{BUS_NAME}.configure needs authentication" in done.stderr
    finally:
        lab.polkit.rules("")
