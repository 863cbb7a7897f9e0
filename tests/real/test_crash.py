"""The daemon killed at every step of a Create or Delete, with each method.

The snapshot is there then, or nothing of it. A further method is one more Subject.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from snapd_vm.engine.journal import DeleteStep, Step
from tests.lab.daemon import DAEMON, Daemon
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.process import open_files
from tests.lab.program import attempt, run
from tests.real import images
from tests.real.api import QUIESCE_REQUIRED, SNAPSHOT, Api, ApiError, Created
from tests.real.arrays import METHOD, NAME, Array, Plugin
from tests.real.conftest import Connect

PLACE = ".snapd-vm"
"""The folder of a subvolume's snapshots, which goes with the last of them."""
FAULTY = (sys.executable, "-m", "tests.real.faulty_daemon")


@pytest.fixture
def faulty(lab: Lab) -> Iterator[Lab]:
    """A lab whose daemon the test starts, with a fault, and starts again without."""
    import shutil

    shutil.rmtree(lab.daemon.state_dir, ignore_errors=True)
    yield lab
    if lab.daemon.running:
        lab.daemon.stop()
    lab.daemon.argv = DAEMON


def active_file(guest: Guest, flags: int = 0) -> str:
    """What the XML says that vda is."""
    source = etree.fromstring(guest.domain.XMLDesc(flags)).find("devices/disk/source")
    assert source is not None
    return source.get("file") or ""


def files_of(guest: Guest) -> set[str]:
    """Everything in the folder of the guest's disk that belongs to its disk, drafts too."""
    folder = guest.disk().path.parent
    stem = guest.disk().path.stem
    ours = (stem, ".snapd-vm", "snapd-vm")
    found = {name for name in os.listdir(folder) if name.startswith(ours) and name != PLACE}
    return found | {str(path.relative_to(folder)) for path in folder.glob(f"{PLACE}/*")}


async def agrees(api: Api, guest: Guest, files_before: set[str], file_before: str) -> str:
    """Assert that the snapshot is there, whole, or nothing of it; which of the two."""
    wait_until("the guest is thawed", lambda: not guest.agent_says_frozen(), 20)
    guest.writes_go_on()
    assert guest.state == "running"
    snapshots = await api.snapshots_of(guest)
    live, persistent = active_file(guest), active_file(guest, 2)
    assert live == persistent
    assert images.is_open(live)
    if not snapshots:
        assert live == file_before
        assert files_of(guest) == files_before
        return "nothing"
    assert len(snapshots) == 1
    path, told = next(iter(snapshots.items()))
    assert told["State"] == "ready"
    source = etree.fromstring(await api.backup_source(path))
    assert source.get("file") == file_before != live
    assert images.info(live)["backing-filename"] == file_before
    assert len(files_of(guest)) == len(files_before) + 1
    return "snapshot"


async def agrees_reflink(
    daemon: Daemon, api: Api, guest: Guest, files_before: set[str], file_before: str
) -> str:
    """The same where the domain stays on its file, and a clone stands beside it."""
    wait_until("the guest is thawed", lambda: not guest.agent_says_frozen(), 20)
    guest.writes_go_on()
    assert guest.state == "running"
    assert active_file(guest) == active_file(guest, 2) == file_before
    snapshots = await api.snapshots_of(guest)
    new = files_of(guest) - files_before
    assert not unnamed(daemon)
    if not snapshots:
        assert not new
        return "nothing"
    ((path, told),) = snapshots.items()
    assert told["State"] == "ready"
    assert await api.call(path, SNAPSHOT, "GetModifiedDisk") == [""]
    source = etree.fromstring(await api.backup_source(path))
    assert {os.path.basename(source.get("file") or "")} == new
    assert "i" in run("lsattr", source.get("file") or "").split()[0]
    assert os.path.getsize(source.get("file") or "") == os.path.getsize(file_before)
    return "snapshot"


async def agrees_btrfs(api: Api, guest: Guest, files_before: set[str], file_before: str) -> str:
    """The same where a read-only snapshot of the subvolume that the file is in stands."""
    wait_until("the guest is thawed", lambda: not guest.agent_says_frozen(), 20)
    guest.writes_go_on()
    assert guest.state == "running"
    assert active_file(guest) == active_file(guest, 2) == file_before
    snapshots = await api.snapshots_of(guest)
    new = files_of(guest) - files_before
    if not snapshots:
        assert not new
        return "nothing"
    ((path, told),) = snapshots.items()
    assert told["State"] == "ready"
    assert await api.call(path, SNAPSHOT, "GetModifiedDisk") == [""]
    source = Path(etree.fromstring(await api.backup_source(path)).get("file") or "")
    assert source.name == os.path.basename(file_before)
    (folder,) = new
    assert source.parent.parent == guest.disk().path.parent / folder
    shown = run("btrfs", "property", "get", "-ts", source.parent, "ro")
    assert shown.strip() == "ro=true"
    return "snapshot"


def unnamed(daemon: Daemon) -> list[str]:
    """Files without a name in folders of images that the daemon still has open."""
    return [link for link in open_files(daemon.pid) if link.endswith(" (deleted)") and "/#" in link]


def raw_of(created: Created, to: Path) -> Path:
    """What a backup program copies out of a file."""
    return images.raw_copy(created.file, created.ours("format"), to)


@dataclass(frozen=True)
class Subject:
    """A guest whose disks one method takes by default, or if `xml` names it.

    `agrees` asserts that the snapshot is there, whole, or nothing of it, and says which; `stands`
    is the first step at which a kill leaves a snapshot. `files` is all on the storage that could be
    one, and `raw` copies one out; `config` and `env` are the daemon's.
    """

    method: str
    guest: Guest
    agrees: Callable[[Api, Guest, set[str], str], Awaitable[str]]
    stands: Step
    xml: str = ""
    files: Callable[[Guest], set[str]] = files_of
    raw: Callable[[Created, Path], Path] = raw_of
    config: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    def start(self, lab: Lab, *fault: str) -> None:
        """Start the daemon, with a fault or as it is."""
        argv = (*FAULTY, *fault) if fault else DAEMON
        lab.daemon.start(self.config, argv=argv, env=self.env)


def _in_ceph(lab: Lab) -> Subject:
    """An image in a Ceph cluster."""
    ceph = lab.ceph.start()
    running = lab.guest([ceph.disk("crash")])

    def files(_guest: Guest) -> set[str]:
        found = json.loads(ceph.rbd("snap", "ls", "vm/crash", "--format=json"))
        said = json.loads(ceph.rbd("image-meta", "list", "vm/crash", "--format=json") or "{}")
        snaps = {f"{one['name']} protected={one['protected']}".lower() for one in found}
        return snaps | {f"said of {key}" for key in said}

    async def agrees_rbd(api: Api, guest: Guest, files_before: set[str], _file: str) -> str:
        wait_until("the guest is thawed", lambda: not guest.agent_says_frozen(), 20)
        guest.writes_go_on()
        assert guest.state == "running"
        snapshots = await api.snapshots_of(guest)
        new = files(guest) - files_before
        if not snapshots:
            assert not new
            return "nothing"
        ((path, told),) = snapshots.items()
        assert told["State"] == "ready"
        source = Created("", await api.backup_source(path)).source.find("snapshot")
        assert source is not None
        assert new == {f"{source.get('name')} protected=true", f"said of {source.get('name')}"}
        return "snapshot"

    def raw(created: Created, to: Path) -> Path:
        source = created.source.find("snapshot")
        assert source is not None
        return ceph.read(f"crash@{source.get('name')}", to)

    return Subject("rbd", running, agrees_rbd, Step.SWITCHED, files=files, raw=raw)


@pytest.fixture(scope="module", params=["qemu", "reflink", "btrfs", "rbd", "array"])
def subject(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Subject]:
    """Each method in turn."""
    if request.param == "qemu":
        running = lab.guest()
        yield Subject("qemu", running, agrees, Step.SWITCHED)
        running.remove()
        return
    if request.param == "array":
        running = lab.guest([DiskSpec(format="raw", folder=lab.folder("copied"))])
        yield copied(NAME, METHOD, running, Step.SWITCHED, Array.install(lab))
        running.remove()
        return
    if request.param == "rbd":
        yield (subject := _in_ceph(lab))
        subject.guest.remove()
        return
    mounted = lab.block.mounted("xfs" if request.param == "reflink" else "btrfs", 4096)
    running = lab.guest([DiskSpec(format="raw", folder=mounted.path)])
    if request.param == "btrfs":
        yield Subject("btrfs", running, agrees_btrfs, Step.SWITCHED)
    else:  # before its name is given, when it is read back, the clone goes with the daemon
        yield Subject("reflink", running, partial(agrees_reflink, lab.daemon), Step.READ_BACK)
    running.remove()
    mounted.unmount()


def copied(name: str, xml: str, guest: Guest, stands: Step, made: Array | Plugin) -> Subject:
    """A method from outside that makes copies."""

    def files(_: Guest) -> set[str]:
        return made.copies

    agrees = partial(agrees_copies, files)
    return Subject(name, guest, agrees, stands, xml, files, config=made.config, env=made.env)


async def agrees_copies(
    files: Callable[[Guest], set[str]],
    api: Api,
    guest: Guest,
    files_before: set[str],
    file_before: str,
) -> str:
    """The same where the domain stays on its file, and copies are in a folder of their own."""
    wait_until("the guest is thawed", lambda: not guest.agent_says_frozen(), 20)
    guest.writes_go_on()
    assert guest.state == "running"
    assert active_file(guest) == active_file(guest, 2) == file_before
    snapshots = await api.snapshots_of(guest)
    new = files(guest) - files_before
    if not snapshots:
        assert not new
        return "nothing"
    ((path, told),) = snapshots.items()
    assert told["State"] == "ready"
    source = etree.fromstring(await api.backup_source(path))
    assert {os.path.basename(source.get("file") or "")} == new
    assert os.path.getsize(source.get("file") or "") == os.path.getsize(file_before)
    return "snapshot"


@pytest.mark.parametrize(
    ("step", "flags"),
    # Both try to quiesce, and there is an agent that answers.
    [*zip((s for s in Step if s is not Step.STOPPED), cycle([QUIESCE_REQUIRED, 0]), strict=False)],
)
async def test_killed_at(
    connect: Connect, faulty: Lab, subject: Subject, scratch: Path, step: Step, flags: int
) -> None:
    guest = subject.guest
    before, file_before = subject.files(guest), active_file(guest)
    guest.write("vda", "mark", f"{step}-{flags}")
    subject.start(faulty, "--at", step, "--do", "kill")
    api = await connect()
    with pytest.raises(ApiError) as error:
        await api.create(guest, method_xml=subject.xml, name=f"killed-{step}-{flags}", flags=flags)
    assert error.value.name == "org.freedesktop.DBus.Error.NoReply"
    wait_until("the daemon is dead", lambda: not faulty.daemon.running, 10)
    subject.start(faulty)
    outcome = await subject.agrees(api, guest, before, file_before)
    steps = list(Step)
    stands = steps.index(step) >= steps.index(subject.stands)
    assert outcome == ("snapshot" if stands else "nothing")
    assert guest.read("vda", "mark") == f"{step}-{flags}"
    created = await api.create(
        guest, method_xml=subject.xml, flags=QUIESCE_REQUIRED
    )  # and all is well again
    assert images.is_clean(subject.raw(created, scratch / "raw"))


@pytest.mark.parametrize(
    "step", [s for s in Step if s not in (Step.CHECKED, Step.STOPPED, Step.ENDED)]
)
async def test_an_error_at_any_step_undoes_all(
    connect: Connect, faulty: Lab, subject: Subject, step: Step
) -> None:
    guest = subject.guest
    before, file_before = subject.files(guest), active_file(guest)
    subject.start(faulty, "--at", step, "--do", "raise")
    api = await connect()
    with pytest.raises(ApiError) as error:
        await api.create(guest, method_xml=subject.xml, name=f"raised-{step}")
    assert error.value.name == "StorageFailed"
    assert await subject.agrees(api, guest, before, file_before) == "nothing"
    await api.create(
        guest, method_xml=subject.xml, name=f"raised-{step}"
    )  # the name is free, and the domain


@pytest.mark.parametrize("step", list(DeleteStep))
async def test_killed_in_a_delete_at(
    connect: Connect, faulty: Lab, subject: Subject, step: DeleteStep
) -> None:
    guest = subject.guest
    before, file_before = subject.files(guest), active_file(guest)
    subject.start(faulty, "--at", step, "--do", "kill")
    api = await connect()
    created = await api.create(guest, method_xml=subject.xml)
    assert (await api.properties(created.snapshot, SNAPSHOT))["Method"] == subject.method
    guest.write("vda", "mark", f"delete-{step}")
    with pytest.raises(ApiError) as error:
        await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)
    assert error.value.name == "org.freedesktop.DBus.Error.NoReply"
    await asyncio.to_thread(wait_until, "it is dead", lambda: not faulty.daemon.running, 10)
    subject.start(faulty)
    outcome = await subject.agrees(api, guest, before, file_before)
    assert outcome == ("snapshot" if step is DeleteStep.CHECKED else "nothing")
    for path in await api.snapshots_of(guest):
        await api.call(path, SNAPSHOT, "Delete", "u", 0)
    assert subject.files(guest) == before
    assert guest.read("vda", "mark") == f"delete-{step}"


async def test_what_a_dead_daemon_left_frozen_is_thawed_by_exec_stop_post(
    connect: Connect, faulty: Lab, guest: Guest
) -> None:
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.FROZEN, "--do", "kill"))
    api = await connect()
    with pytest.raises(ApiError):
        await api.create(guest)
    wait_until("the daemon is dead", lambda: not faulty.daemon.running, 10)
    guest.stands_still()
    argv = [*DAEMON, "--thaw-held"]
    done = attempt([*argv, "--config", faulty.daemon.config_file], env=faulty.bus.env, timeout=60)
    assert done.returncode == 0
    guest.writes_go_on()
    assert not guest.agent_says_frozen()
    faulty.daemon.start({}, argv=DAEMON)


async def test_a_lost_client_ends_nothing(connect: Connect, faulty: Lab, guest: Guest) -> None:
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.FROZEN, "--do", "sleep:1"))
    client, other = await connect(), await connect()
    call = asyncio.create_task(client.create(guest, name="left", flags=QUIESCE_REQUIRED))
    await asyncio.sleep(0.7)
    call.cancel()
    await asyncio.sleep(2)
    told = [row for row in (await other.snapshots_of(guest)).values() if row["Name"] == "left"]
    assert [row["Consistency"] for row in told] == ["quiesced"]
    guest.writes_go_on()


async def test_sigterm_in_mid_create_finishes_it(
    connect: Connect, faulty: Lab, guest: Guest
) -> None:
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.FROZEN, "--do", "sleep:2"))
    api = await connect()
    call = asyncio.create_task(api.create(guest, name="finished", flags=QUIESCE_REQUIRED))
    await asyncio.sleep(1)
    await asyncio.to_thread(faulty.daemon.stop)
    created = await call
    assert created.ours("consistency") == "quiesced"
    guest.writes_go_on()
    faulty.daemon.start({}, argv=DAEMON)
    assert (await api.properties(created.snapshot, "org.example.DiskSnapshot.Snapshot"))[
        "State"
    ] == "ready"
