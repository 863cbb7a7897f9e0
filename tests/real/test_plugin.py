"""The example distribution of docs/example-method, installed by pip, used over the bus."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from snapd_vm.engine.journal import RevertStep, Step
from snapd_vm.model import ROOT_PATH
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
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
    path_of,
)
from tests.real.arrays import COPY, COPY_METHOD, Plugin
from tests.real.conftest import Connect
from tests.real.places import Places, file_of, ready, refused, unchanged, with_image
from tests.real.test_crash import FAULTY, faulty

__all__ = ["faulty"]


@pytest.fixture(scope="module")
def own(lab: Lab) -> Iterator[Guest]:
    """A guest with two raw disks and one that is not."""
    folder = lab.folder("plugin-disks")
    raw = DiskSpec(format="raw", folder=folder)
    running = lab.guest([raw, raw, DiskSpec(folder=folder)])
    yield running
    running.remove()


@pytest.fixture(autouse=True)
def running_again(own: Guest) -> Iterator[None]:
    """A test that fails leaves a guest that runs to the next one."""
    yield
    if own.state == "shutoff":
        own.start()


@pytest.fixture
def plugin(lab: Lab, faulty: Lab) -> Plugin:
    """The distribution, and a daemon that has it."""
    made = Plugin.install(lab)
    faulty.daemon.start(made.config, env=made.env)
    return made


@pytest.fixture
async def api(plugin: Plugin, connect: Connect) -> Api:
    """A client of that daemon."""
    return await connect()


async def test_it_is_made_read_and_deleted(
    api: Api, plugin: Plugin, own: Guest, tmp_path: Path
) -> None:
    xml = own.domain.XMLDesc()
    assert (await api.properties(ROOT_PATH, MANAGER))["Methods"][-1] == COPY
    assert COPY not in {row["method"] for row in await api.disks(own)}
    plan = await api.plan(own, method_xml=COPY_METHOD)
    assert (plan["method"], plan["consistency"]) == (COPY, "quiesced")
    assert plan["warnings"] == ["The guest stands still for as long as the copy takes."]
    assert plan["space_available"] > plan["space_needed"] > 0
    assert plugin.copies == set()
    own.write("vda", "mark", "before")
    created = await api.create(own, method_xml=COPY_METHOD, name="one", flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert (told["Method"], told["Format"], told["Size"]) == (COPY, "raw", 64 << 20)
    assert (told["State"], told["Consistency"]) == ("ready", "quiesced")
    assert {Path(created.file).name} == plugin.copies
    assert images.is_clean(Path(created.file))
    assert run("debugfs", "-R", "cat /mark", created.file).strip() == "before"
    checksum = images.checksum(created.file, "raw", tmp_path)
    own.writes_go_on()
    assert images.checksum(created.file, "raw", tmp_path) == checksum
    assert await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0) == [""]
    assert plugin.copies == set()
    assert own.domain.XMLDesc() == xml
    assert own.read("vda", "mark") == "after"


async def test_a_guest_that_is_not_frozen_stands_still_for_it(
    connect: Connect, faulty: Lab, lab: Lab, own: Guest
) -> None:
    """A copy of an image that is written to meanwhile would be of no instant at all."""
    plugin = Plugin.install(lab)
    argv = (*FAULTY, "--at", Step.STOPPED, "--do", "sleep:4")
    faulty.daemon.start({**plugin.config, "frozen_limit_s": 30}, argv=argv, env=plugin.env)
    api = await connect()
    assert (await api.plan(own, method_xml=COPY_METHOD, flags=NO_QUIESCE))[
        "consistency"
    ] == "paused"
    call = asyncio.create_task(api.create(own, method_xml=COPY_METHOD, flags=NO_QUIESCE))
    await asyncio.to_thread(own.wait_state, "paused", 10)
    created = await call
    assert created.ours("consistency") == "paused"
    own.writes_go_on()
    await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)
    faulty.daemon.stop()
    faulty.daemon.start({**plugin.config, "frozen_limit_s": 1}, argv=argv, env=plugin.env)
    api = await connect()
    await refused(api.create(own, method_xml=COPY_METHOD, flags=NO_QUIESCE), "TimedOut")
    own.writes_go_on()
    assert plugin.copies == set()


async def test_several_disks_and_one_that_is_not_raw(api: Api, plugin: Plugin, own: Guest) -> None:
    made = await api.create_set(own, ("vda", COPY_METHOD), ("vdb", COPY_METHOD), flags=NO_QUIESCE)
    assert [one.ours("consistency") for _, one in made] == ["paused", "paused"]
    await unchanged(api, own, "MethodNotSupported", disk="vdc", method_xml=COPY_METHOD)
    for path, _ in made:
        await api.call(path, SNAPSHOT, "Delete", "u", 0)
    noted = "<diskSnapshot method='copy'><note text='{}'/></diskSnapshot>"
    await unchanged(api, own, "InvalidXML", method_xml=noted.format("x" * 81))
    plan = await api.plan(own, method_xml=noted.format("before the upgrade"))
    assert plan["method"] == COPY
    assert plugin.copies == set()


KILLED = [(Step.BEGUN, False), (Step.FROZEN, False), (Step.THAWED, False), (Step.READ_BACK, True)]


@pytest.mark.parametrize(("step", "stands"), KILLED)
async def test_killed_at(
    connect: Connect, faulty: Lab, lab: Lab, own: Guest, step: Step, stands: bool
) -> None:
    plugin = Plugin.install(lab)
    argv = (*FAULTY, "--at", step, "--do", "kill")
    faulty.daemon.start(plugin.config, argv=argv, env=plugin.env)
    api = await connect()
    with pytest.raises(ApiError):
        await api.create(own, method_xml=COPY_METHOD)
    wait_until("the daemon is dead", lambda: not faulty.daemon.running, 10)
    faulty.daemon.start(plugin.config, env=plugin.env)
    own.writes_go_on()
    assert not own.agent_says_frozen()
    paths = list(await api.snapshots_of(own))
    assert (len(paths), len(plugin.copies)) == (int(stands), int(stands))
    for path in paths:
        await api.call(path, SNAPSHOT, "Delete", "u", 0)
    assert plugin.copies == set()


# -- the disk goes back to it ----------------------------------------------------------------------


def image_of(guest: Guest) -> Path:
    """Of vda."""
    return Path(file_of(guest))


def beside(guest: Guest) -> set[str]:
    """The names of all that is in the folder of the images."""
    return {path.name for path in image_of(guest).parent.iterdir()}


async def test_a_disk_goes_back_to_it(api: Api, plugin: Plugin, own: Guest) -> None:
    image, names = image_of(own), beside(own)
    own.write("vda", "mark", "before")
    created = await api.create(own, method_xml=COPY_METHOD, flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    later = await api.create(own, method_xml=COPY_METHOD, flags=QUIESCE_REQUIRED)
    go_back = (created.snapshot, SNAPSHOT, "Revert", "u", 0)
    await refused(api.call(*go_back), "InvalidState")
    own.poweroff()
    was = image.stat()
    with image.open("rb"):
        await refused(api.call(*go_back), "Busy")
    assert image.stat().st_ino == was.st_ino
    await api.call(*go_back)
    now = image.stat()
    assert now.st_ino != was.st_ino
    assert (now.st_uid, now.st_gid, now.st_mode) == (was.st_uid, was.st_gid, was.st_mode)
    assert beside(own) == names
    own.start()
    assert own.read("vda", "mark") == "before"
    own.poweroff()
    await api.call(later.snapshot, SNAPSHOT, "Revert", "u", 0)
    own.start()
    assert own.read("vda", "mark") == "after"
    for made in (created, later):
        await api.call(made.snapshot, SNAPSHOT, "Delete", "u", 0)
    assert plugin.copies == set()


async def test_it_does_not_go_back_where_another_has_the_image(
    api: Api, plugin: Plugin, own: Guest, lab: Lab
) -> None:
    created = await api.create(own, method_xml=COPY_METHOD, flags=NO_QUIESCE)
    own.poweroff()
    places = Places(lab)
    try:
        other = places.guest(with_image(image_of(own), "raw"))
        await places.known(api)
        error = await refused(api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0), "Busy")
        assert other.name in error.text
    finally:
        places.forget()
    await api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0)
    own.start()
    await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)


@pytest.mark.parametrize("step", list(RevertStep))
async def test_killed_in_a_revert_at(
    connect: Connect, faulty: Lab, lab: Lab, own: Guest, step: RevertStep
) -> None:
    plugin, names = Plugin.install(lab), beside(own)
    argv = (*FAULTY, "--at", step, "--do", "kill")
    faulty.daemon.start(plugin.config, argv=argv, env=plugin.env)
    api = await connect()
    own.write("vda", "mark", "before")
    created = await api.create(own, method_xml=COPY_METHOD, flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    own.poweroff()
    with pytest.raises(ApiError):
        await api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0)
    wait_until("the daemon is dead", lambda: not faulty.daemon.running, 10)
    faulty.daemon.start(plugin.config, argv=DAEMON, env=plugin.env)
    api = await connect()
    await ready(api, created)
    assert beside(own) == names
    own.start()
    steps = list(RevertStep)
    done = steps.index(step) >= steps.index(RevertStep.SWITCHED)
    assert own.read("vda", "mark") == ("before" if done else "after")
    await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)
    assert plugin.copies == set()


# -- others, that are worse ------------------------------------------------------------------------

ODD = """
from snapd_vm.methods import plugin
from snapd_vm_copy import Copy

class Mine(plugin.SnapdError):
    dbus_name = "com.example.Secret"

class Odd(Copy):
    schema = ""
    def {member}(self, *given, **named):
        {does}

class Old(Copy):
    protocol_version = 0

class Broken(Copy):
    def __init__(self, context):
        raise RuntimeError("it is broken\\nin two lines")

class Named(Copy):
    name = property(lambda self: "other", lambda self, value: None)

class Short:
    protocol_version = 1
    name, redirects = "odd", False
    def __init__(self, context):
        pass

class Leaving(Copy):
    def __init__(self, context):
        raise SystemExit(3)

class Formless(Copy):
    schema = "<element/>"
"""
POINTS = ("odd", "old", "broken", "named", "short", "leaving", "formless", "reallymissing")


def odd(lab: Lab, plugin: Plugin, which: str, member: str = "suits", does: str = "") -> Plugin:
    """A distribution whose methods misbehave; the one called `which` is listed."""
    site = lab.folder("odd-site")
    (site / "odd_methods.py").write_text(ODD.format(member=member, does=does or "return 'none'"))
    info = site / "odd_methods-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-methods\nVersion: 1\n")
    lines = [f"{name} = odd_methods:{name.capitalize()}" for name in POINTS]
    (info / "entry_points.txt").write_text("\n".join(["[snapd_vm.methods]", *lines]))
    table = {"folder": str(plugin.folder)}
    config = {"plugins": {"methods": [which, COPY], which: table, COPY: table}}
    return OddPlugin(plugin.site, plugin.folder, config, f"{site}:{plugin.site}")


@dataclass(frozen=True)
class OddPlugin(Plugin):
    """See odd."""

    whole: dict[str, Any]
    path: str

    @property
    def config(self) -> dict[str, Any]:
        return self.whole

    @property
    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": self.path, "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("old", "written for version 0 of the protocol, and this daemon has 1"),
        ("broken", "RuntimeError: it is broken in two lines"),
        ("named", "it calls itself 'other'"),
        ("short", "it has no "),
        ("leaving", "SystemExit"),
        ("reallymissing", "AttributeError"),
        ("formless", "no RELAX NG schema"),
    ],
)
async def test_one_that_can_not_be_loaded_is_left_out_and_told_of(
    connect: Connect, faulty: Lab, lab: Lab, which: str, words: str
) -> None:
    made = odd(lab, Plugin.install(lab), which)
    before = len(faulty.daemon.log)
    faulty.daemon.start(made.config, env=made.env)
    api = await connect()
    methods = (await api.properties(ROOT_PATH, MANAGER))["Methods"]
    assert which not in methods
    assert COPY in methods
    (line,) = [ln for ln in faulty.daemon.log[before:].splitlines() if f"method {which} " in ln]
    assert line.startswith("error: ")
    assert words in line
    assert "Traceback" not in faulty.daemon.log[before:]


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (["nothing-of-that-name"], "lists 'nothing-of-that-name'"),
        (["qemu"], "reserved"),
        (["backup"], "reserved"),
        (["a", "a"], "there twice"),
        ([1], "must be a name"),
    ],
)
async def test_one_that_is_not_there_or_not_allowed_ends_the_start(
    faulty: Lab, listed: list[Any], words: str
) -> None:
    before = len(faulty.daemon.log)
    faulty.daemon.start({"plugins": {"methods": listed}}, wait=0)
    wait_until("it ends", lambda: not faulty.daemon.running, 20)
    assert faulty.daemon.status == 1
    (line,) = faulty.daemon.log[before:].splitlines()
    assert line.startswith("critical: ")
    assert words in line


@pytest.mark.parametrize(
    ("member", "does"),
    [
        ("claim", "return 'a string'"),
        ("claim", "raise Mine('a secret')"),
        ("source", "return given[1], None"),
        ("size", "return -1"),
        ("check", "raise KeyError('a secret')"),
        ("prepare", "return []"),
        ("create", "raise SystemExit(1)"),
        ("create", "raise KeyboardInterrupt"),
        ("create", "import asyncio; raise asyncio.CancelledError"),
        ("create", "raise RecursionError('a secret')"),
        ("taken", "return None"),
        ("standing", "return 7"),
    ],
)
async def test_one_that_misbehaves_harms_nobody(
    connect: Connect, faulty: Lab, lab: Lab, own: Guest, member: str, does: str
) -> None:
    made = odd(lab, Plugin.install(lab), "odd", member, does)
    faulty.daemon.start(made.config, env=made.env)
    api = await connect()
    xml = "<diskSnapshot method='odd'/>"
    if member == "standing":  # whose mistakes show when it is looked at
        created = await api.create(own, method_xml=xml)
        error = await refused(api.backup_source(created.snapshot), "Internal")
    else:
        error = await refused(api.create(own, method_xml=xml), "Internal")
    assert "secret" not in error.text
    assert "Traceback" not in error.text
    assert "Method odd made a mistake" in error.text
    assert f"method odd made a mistake in {member}" in faulty.daemon.log
    assert not own.agent_says_frozen()
    own.writes_go_on()
    created = await api.create(own, method_xml=COPY_METHOD)  # and all others are well
    await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)
    for path in Path(made.folder).iterdir():
        path.unlink()


ODD_METHOD = "<diskSnapshot method='odd'/>"


@pytest.mark.parametrize(
    ("member", "does"),
    [
        ("check_revert", "return 7"),
        ("prepare_revert", "raise KeyError('a secret')"),
        ("revert", "raise SystemExit(1)"),
    ],
)
async def test_a_revert_by_one_that_misbehaves_is_undone(
    connect: Connect, faulty: Lab, lab: Lab, own: Guest, member: str, does: str
) -> None:
    made = odd(lab, Plugin.install(lab), "odd", member, does)
    faulty.daemon.start(made.config, env=made.env)
    api = await connect()
    created = await api.create(own, method_xml=ODD_METHOD, flags=NO_QUIESCE)
    own.poweroff()
    names, inode = beside(own), image_of(own).stat().st_ino
    error = await refused(api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0), "Internal")
    assert "secret" not in error.text
    assert f"method odd made a mistake in {member}" in faulty.daemon.log_of_this_life
    assert (beside(own), image_of(own).stat().st_ino) == (names, inode)
    own.start()
    await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)


async def test_one_is_asked_to_forget_a_revert_until_it_has(
    connect: Connect, faulty: Lab, lab: Lab, own: Guest
) -> None:
    """The disk is reverted meanwhile, and that is not done a second time."""
    notes = lab.folder("odd-notes") / "forgotten"
    notes.unlink(missing_ok=True)
    does = (
        f"import pathlib; notes = pathlib.Path({str(notes)!r}); times = len(notes.read_text()) "
        "if notes.exists() else 0; notes.write_text('x' * (times + 1)); 1 / times"
    )
    made = odd(lab, Plugin.install(lab), "odd", "forget_revert", does)
    faulty.daemon.start(made.config, env=made.env)
    api = await connect()
    created = await api.create(own, method_xml=ODD_METHOD, flags=NO_QUIESCE)
    assert not notes.exists()
    own.poweroff()
    was = image_of(own).stat().st_ino
    await refused(api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0), "Internal")
    now = image_of(own).stat().st_ino
    assert now != was
    await ready(api, created)
    assert notes.read_text() == "xx"
    assert "method odd made a mistake in forget_revert" in faulty.daemon.log_of_this_life
    assert image_of(own).stat().st_ino == now
    own.start()
    await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)


@pytest.mark.parametrize("refuses", [False, True])
async def test_one_may_refuse_the_way_to_an_image(
    connect: Connect, faulty: Lab, lab: Lab, own: Guest, refuses: bool
) -> None:
    does = "raise plugin.MethodNotSupported('The way is not ours.')" if refuses else "return None"
    made = odd(lab, Plugin.install(lab), "odd", "check_way", does)
    faulty.daemon.start(made.config, env=made.env)
    api = await connect()
    call = api.call(path_of(own), DOMAIN, "SetMethod", "ss", VDA, ODD_METHOD)
    if refuses:
        assert (await refused(call, "MethodNotSupported")).text.endswith("The way is not ours.")
    else:
        assert await call == []
        assert next(row for row in await api.disks(own))["method"] == "odd"
        await api.call(path_of(own), DOMAIN, "SetMethod", "ss", VDA, "")
