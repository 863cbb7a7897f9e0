"""What others do to a snapshot's files and domain, and what the record says and its Delete does.

Each is done while the daemon looks on, and while it is not there: the snapshots on record are held
against what is there by events and at start.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lxml import etree

from snapd_vm.engine.journal import DeleteStep
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real import images
from tests.real.api import SNAPSHOT, Api, ApiError, Created
from tests.real.conftest import Connect
from tests.real.places import CONFIG, INACTIVE, Places, disk_of, file_of, image, refused
from tests.real.test_crash import FAULTY, faulty
from tests.real.test_definitions import state_of, until_state

__all__ = ["faulty"]


WHEN = ["event", "start"]


@pytest.fixture
def places(lab: Lab) -> Iterator[Places]:
    """Domains of the test's own."""
    made = Places(lab)
    yield made
    made.forget()


class Scene:
    """A guest with a daemon, and changes made to it with the daemon there or away."""

    def __init__(self, daemon: Lab, connect: Connect, places: Places) -> None:
        self.daemon, self.places = daemon, places
        self._connect = connect
        self.api: Api

    async def begin(self, *, start: bool, disks: int = 1) -> Guest:
        """A guest that the daemon knows."""
        self.api = await self._connect()
        made = self.places.guest(*(self.places.disk() for _ in range(disks)), start=start)
        await self.places.known(self.api)
        return made

    async def meanwhile(self, when: str, change: Callable[[], object]) -> None:
        """Make a change that is seen by events, or at the daemon's next start."""
        if when == "start":
            self.daemon.daemon.stop()
        await asyncio.to_thread(change)
        if when == "start":
            self.daemon.daemon.start({}, argv=None)
            self.api = await self._connect()

    def virsh(self, *words: str | Path) -> Callable[[], object]:
        """Runs virsh."""
        return lambda: run("virsh", "-c", self.places.lab.hypervisor.uri, *words, timeout=60)

    async def delete(self, created: Created) -> str:
        return str((await self.api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0))[0])

    async def dropped(self, created: Created, *files: str) -> None:
        """Delete drops the record, touches none of the files, and says so in the log."""
        before = {file: (os.stat(file).st_ino, Path(file).read_bytes()) for file in files}
        await self.delete(created)
        assert created.snapshot not in await self.api.snapshots()
        assert {f: (os.stat(f).st_ino, Path(f).read_bytes()) for f in files} == before
        assert len(self.lines(created, "is dropped, and no file touched")) == 1

    def lines(self, created: Created, text: str) -> list[str]:
        """The log's lines on a snapshot that have this text; the log is one of many daemons."""
        uuid = created.snapshot.rpartition("/_")[2].replace("_", "-")
        found = [line for line in self.daemon.daemon.log.splitlines() if text in line]
        return [line for line in found if f"SNAPSHOT_UUID={uuid}" in line]


@pytest.fixture
def scene(daemon: Lab, connect: Connect, places: Places) -> Scene:
    """A scene without a guest yet."""
    return Scene(daemon, connect, places)


# -- somebody ran virsh --------------------------------------------------------------------------


@pytest.mark.parametrize("when", WHEN)
async def test_the_overlay_committed_and_pivoted_by_virsh(scene: Scene, when: str) -> None:
    guest = await scene.begin(start=True)
    created = await scene.api.create(guest, name="one")
    commit = scene.virsh("blockcommit", guest.name, "vda", "--active", "--pivot", "--wait")
    await scene.meanwhile(when, commit)
    assert file_of(guest) == created.file
    await until_state(scene.api, created, "failed")
    await refused(scene.api.backup_source(created.snapshot), "InvalidState")
    (line,) = scene.lines(created, " is failed: ")
    assert created.overlay in line
    assert "in no chain" in line
    await scene.dropped(created, created.overlay)
    assert file_of(guest) == file_of(guest, INACTIVE) == created.file
    os.unlink(created.overlay)
    assert (await scene.api.create(guest, name="one")).file == created.file


async def test_once_it_is_off_nobody_can_tell_that_from_an_old_definition(scene: Scene) -> None:
    guest = await scene.begin(start=True)
    created = await scene.api.create(guest)
    await scene.meanwhile(
        "event", scene.virsh("blockcommit", guest.name, "vda", "--active", "--pivot", "--wait")
    )
    guest.domain.destroy()
    await until_state(scene.api, created, "failed")
    await refused(scene.delete(created), "InvalidState")
    os.unlink(created.overlay)  # whoever did it knows
    await scene.dropped(created, created.file)


@pytest.mark.parametrize("running", [False, True])
async def test_an_old_definition_is_refused_until_it_runs(scene: Scene, running: bool) -> None:
    guest = await scene.begin(start=running)
    old = guest.domain.XMLDesc(INACTIVE)
    created = await scene.api.create(guest)
    right = guest.domain.XMLDesc(INACTIVE)
    scene.places.lab.hypervisor.define(old)
    await until_state(scene.api, created, "failed")
    await refused(scene.delete(created), "InvalidState")
    assert os.path.exists(created.overlay)
    scene.places.lab.hypervisor.define(right)
    await until_state(scene.api, created, "ready")
    scene.places.lab.hypervisor.define(old)
    if running:
        guest.domain.destroy()
    guest.domain.create()
    await until_state(scene.api, created, "failed")
    await scene.dropped(created, created.overlay)


@pytest.mark.parametrize("step", list(DeleteStep))
async def test_killed_while_a_record_is_dropped(
    faulty: Lab, connect: Connect, places: Places, step: DeleteStep
) -> None:
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "kill"))
    scene = Scene(faulty, connect, places)
    guest = await scene.begin(start=True)
    created = await scene.api.create(guest)
    commit = scene.virsh("blockcommit", guest.name, "vda", "--active", "--pivot", "--wait")
    await scene.meanwhile("event", commit)
    await until_state(scene.api, created, "failed")
    with pytest.raises(ApiError):
        await scene.delete(created)
    await asyncio.to_thread(wait_until, "it is dead", lambda: not faulty.daemon.running, 10)
    faulty.daemon.start({}, argv=DAEMON)
    scene.api = await connect()
    there = await scene.api.snapshots_of(guest)
    assert (created.snapshot in there) == (step is DeleteStep.CHECKED)
    assert os.path.exists(created.overlay)
    assert file_of(guest) == created.file
    if step is not DeleteStep.CHECKED:  # what is left counts as a user of the image until removed
        error = await refused(scene.api.create(guest, name="next"), "Busy")
        assert created.overlay in error.text
    os.unlink(created.overlay)
    await scene.api.create(guest, name="next")


async def test_on_the_base_live_and_on_the_overlay_at_the_next_start(scene: Scene) -> None:
    guest = await scene.begin(start=True)
    created = await scene.api.create(guest)
    with_overlay = guest.domain.XMLDesc(INACTIVE)
    commit = scene.virsh("blockcommit", guest.name, "vda", "--active", "--pivot", "--wait")
    await scene.meanwhile("event", commit)
    scene.places.lab.hypervisor.define(with_overlay)
    await refused(scene.delete(created), "InvalidState")


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("all_of_it", [False, True])
async def test_two_snapshots_and_one_commit_by_virsh(
    scene: Scene, when: str, all_of_it: bool
) -> None:
    """A record that is dropped takes no other snapshot's source with it."""
    guest = await scene.begin(start=True)
    one = await scene.api.create(guest, name="one")
    two = await scene.api.create(guest, name="two")
    deep = [] if all_of_it else ["--shallow"]
    words = ["blockcommit", guest.name, "vda", *deep, "--active", "--pivot", "--wait"]
    await scene.meanwhile(when, scene.virsh(*words))
    if all_of_it:
        await until_state(scene.api, one, "failed")
        await until_state(scene.api, two, "detached")
        await scene.dropped(one, one.overlay, two.overlay)
        assert two.file in await scene.api.backup_source(two.snapshot)
        await scene.dropped(two, one.overlay, two.overlay)
        return
    await until_state(scene.api, two, "failed")
    assert await state_of(scene.api, one) == "ready"
    await scene.dropped(two, two.overlay)
    os.unlink(two.overlay)
    await scene.delete(one)
    assert file_of(guest) == one.file
    assert not os.path.exists(one.overlay)


@pytest.mark.parametrize("when", WHEN)
async def test_a_commit_in_the_middle_of_the_chain(scene: Scene, when: str) -> None:
    guest = await scene.begin(start=True)
    one = await scene.api.create(guest, name="one")
    two = await scene.api.create(guest, name="two")
    words = ["blockcommit", guest.name, "vda", "--base", one.file, "--top", one.overlay, "--wait"]
    await scene.meanwhile(when, scene.virsh(*words))
    await until_state(scene.api, one, "failed")
    await until_state(scene.api, two, "detached")
    await refused(scene.api.backup_source(one.snapshot), "InvalidState")
    await scene.dropped(one, one.overlay)
    await scene.dropped(two, one.overlay)


@pytest.mark.parametrize("when", WHEN)
async def test_the_base_pulled_into_the_overlay(scene: Scene, when: str) -> None:
    guest = await scene.begin(start=True)
    created = await scene.api.create(guest)
    await scene.meanwhile(when, scene.virsh("blockpull", guest.name, "vda", "--wait"))
    await until_state(scene.api, created, "detached")
    assert await scene.api.backup_source(created.snapshot) == created.backup_source
    await scene.dropped(created, created.file)


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("how", ["missing", "foreign"])
async def test_the_overlay_is(scene: Scene, when: str, how: str) -> None:
    guest = await scene.begin(start=False)
    created = await scene.api.create(guest)

    def change() -> None:
        os.rename(created.overlay, f"{created.overlay}.away")
        if how == "foreign":
            shutil.copy(f"{created.overlay}.away", created.overlay)

    await scene.meanwhile(when, change)
    source = await scene.api.backup_source(created.snapshot)  # it is as good as it was
    assert source == created.backup_source
    assert await state_of(scene.api, created) == "detached"
    (line,) = scene.lines(created, " is detached: ")
    assert created.overlay in line
    await scene.dropped(created, created.file, f"{created.overlay}.away")


@pytest.mark.parametrize("when", WHEN)
async def test_the_base_is_missing(scene: Scene, when: str) -> None:
    guest = await scene.begin(start=False)
    created = await scene.api.create(guest)
    away = f"{created.file}.away"
    await scene.meanwhile(when, lambda: os.rename(created.file, away))
    await refused(scene.api.backup_source(created.snapshot), "StorageFailed")
    assert await state_of(scene.api, created) == "missing"
    (line,) = scene.lines(created, " is missing: ")
    assert created.file in line
    await scene.dropped(created, created.overlay, away)


# -- domains and disks ---------------------------------------------------------------------------


@pytest.mark.parametrize("when", WHEN)
async def test_the_domain_undefined(scene: Scene, when: str) -> None:
    guest = await scene.begin(start=False)
    one = await scene.api.create(guest, name="one")
    two = await scene.api.create(guest, name="two")
    xml = guest.domain.XMLDesc(INACTIVE)
    await scene.meanwhile(when, guest.domain.undefine)
    await until_state(scene.api, one, "detached")
    await until_state(scene.api, two, "detached")
    assert [len(scene.lines(c, "is detached: libvirt has no such")) for c in (one, two)] == [1, 1]
    await scene.dropped(one, one.file, one.overlay, two.overlay)
    assert await scene.api.backup_source(two.snapshot) == two.backup_source
    scene.places.lab.hypervisor.define(xml)
    await until_state(scene.api, two, "ready")


@pytest.mark.parametrize("when", WHEN)
async def test_the_domain_renamed(scene: Scene, when: str) -> None:
    guest = await scene.begin(start=False)
    created = await scene.api.create(guest, name="one")

    def rename() -> None:
        guest.domain.rename(f"{guest.name}-renamed")
        guest.name += "-renamed"

    await scene.meanwhile(when, rename)
    await scene.places.known(scene.api)
    await scene.api.backup_source(created.snapshot)
    assert await state_of(scene.api, created) == "ready"
    assert len(scene.lines(created, f"is called {guest.name} now")) == 1
    await scene.meanwhile("start", lambda: None)
    await scene.delete(created)
    (line,) = scene.lines(created, "deleted snapshot")
    assert f"of domain {guest.name}" in line


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("instead", ["nothing", "another image"])
async def test_the_disk_detached(scene: Scene, when: str, instead: str) -> None:
    guest = await scene.begin(start=False, disks=2)
    created = await scene.api.create(guest, "<disk><target dev='vdb'/></disk>")
    xml = etree.tostring(disk_of(guest, target="vdb"), encoding="unicode")
    other = image(scene.places.folder() / "other.qcow2")

    def change() -> None:
        guest.domain.detachDeviceFlags(xml, CONFIG)
        if instead != "nothing":
            new = xml.replace(created.overlay, str(other))
            guest.domain.attachDeviceFlags(new, CONFIG)

    await scene.meanwhile(when, change)
    await scene.api.backup_source(created.snapshot)
    assert await state_of(scene.api, created) == "detached"
    *before, line = scene.lines(created, " is detached: ")
    assert "no disk vdb" in line if instead == "nothing" else str(other) in line
    assert len(before) <= (instead != "nothing")  # it may be seen between the two changes
    await scene.dropped(created, created.file, created.overlay, str(other))
    assert images.info(created.overlay)["backing-filename"] == created.file
