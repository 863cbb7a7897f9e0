"""Delete and Revert with method rbd, and what becomes of snapshots when others meddle.

The domains are off but for one: Ceph does the same for them, and they need no boot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapd_vm.engine.journal import RevertStep, Step
from snapd_vm.methods.rbd import cluster
from tests.lab.ceph import Ceph
from tests.lab.daemon import DAEMON
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real.api import SNAPSHOT, VDA, Api, ApiError, Created
from tests.real.conftest import Connect
from tests.real.places import Places, refused
from tests.real.test_crash import FAULTY, faulty
from tests.real.test_rbd import Unasked, ceph, delete, metadata, name_of, seen_by_admin, snaps
from tests.real.test_revert import places, revert

__all__ = ["ceph", "faulty", "places"]

_number = 0


@pytest.fixture
def off(ceph: Ceph, places: Places) -> Guest:
    """A domain that is off, on an image of its own."""
    return places.guest(ceph.disk(image_name(new=True), size_mib=16))


def image_name(*, new: bool = False) -> str:
    global _number
    _number += new
    return f"changes{_number}"


def put(ceph: Ceph, pattern: int) -> None:
    """Write a byte all over some of the image, which nobody uses."""
    words = ("-f", "raw", "-c", f"write -P {pattern} 1M 6M", ceph.uri(image_name()))
    run("qemu-io", *words)


def holds(ceph: Ceph, tmp_path: Path, at: str = "") -> int:
    """The byte that is there."""
    found = ceph.read(f"{image_name()}{at}", tmp_path / "read").read_bytes()[1 << 20 : 7 << 20]
    assert found == found[:1] * len(found)
    return found[0]


@contextmanager
def reading(lab: Lab, image: str) -> Iterator[None]:
    """One more QEMU that has an image (or image@snapshot) open, to be read."""

    def watchers() -> set[str]:
        told = lab.ceph.rbd("status", f"vm/{image.partition('@')[0]}")
        return {line for line in told.splitlines() if "watcher=" in line}

    before = watchers()
    program = lab.run.start(
        "reader",
        ["qemu-storage-daemon", "--blockdev", _node(lab.ceph, image)],
        lab.run.folder / "reader.log",
    )
    try:
        wait_until("it is open", lambda: bool(watchers() - before), 20)
        yield
    finally:
        program.signal(15)
        wait_until("it ends", lambda: not program.alive(), 10)


def _node(ceph: Ceph, image: str) -> str:
    name, _, snapshot = image.partition("@")
    words = f"driver=rbd,node-name=a,pool=vm,image={name},conf={ceph.conf},read-only=on"
    return f"{words},snapshot={snapshot}" if snapshot else words


async def stack(api: Api, guest: Guest, ceph: Ceph, count: int = 3) -> list[Created]:
    """So many snapshots, each with contents of its own, which are its number from 1 on."""
    made = []
    for number in range(1, count + 1):
        put(ceph, number)
        made.append(await api.create(guest, VDA, name=f"s{number}"))
        assert made[-1].ours("consistency") == "offline"
    put(ceph, 99)
    return made


async def test_a_revert_brings_back_the_contents_and_keeps_all_snapshots(
    api: Api, off: Guest, ceph: Ceph, places: Places, tmp_path: Path
) -> None:
    await places.known(api)
    made = await stack(api, off, ceph)
    xml = off.domain.XMLDesc()
    for number in (2, 1, 3, 1):
        assert await revert(api, made[number - 1]) == ""
        assert holds(ceph, tmp_path) == number
        assert "snapd-vm-revert" not in metadata(ceph, image_name())
        put(ceph, 50 + number)
    assert off.domain.XMLDesc() == xml
    for number, created in enumerate(made, 1):
        assert holds(ceph, tmp_path, f"@{name_of(created)}") == number
        assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "ready"
        await delete(api, created)
    assert holds(ceph, tmp_path) == 51
    assert not snaps(ceph, image_name())
    assert not metadata(ceph, image_name())


async def test_a_revert_is_refused(
    lab: Lab, api: Api, off: Guest, ceph: Ceph, places: Places, tmp_path: Path
) -> None:
    await places.known(api)
    (created,) = await stack(api, off, ceph, 1)
    off.domain.create()
    await refused(revert(api, created), "InvalidState")
    off.domain.destroy()
    with reading(lab, image_name()):
        error = await refused(revert(api, created), "Busy")
    assert "127.0.0.1" in error.text
    assert holds(ceph, tmp_path) == 99
    await revert(api, created)
    assert holds(ceph, tmp_path) == 1
    await delete(api, created)


@pytest.mark.parametrize("step", list(RevertStep))
async def test_killed_in_a_revert(
    connect: Connect,
    faulty: Lab,
    off: Guest,
    ceph: Ceph,
    places: Places,
    tmp_path: Path,
    step: RevertStep,
) -> None:
    faulty.daemon.start({}, argv=(*FAULTY, "--at", step, "--do", "kill"))
    api = await connect()
    await places.known(api)
    made = await stack(api, off, ceph, 2)
    with pytest.raises(ApiError):
        await revert(api, made[0])
    await asyncio.to_thread(wait_until, "it is dead", lambda: not faulty.daemon.running, 10)
    faulty.daemon.start({}, argv=DAEMON)
    steps = list(RevertStep)
    reverted = steps.index(step) >= steps.index(RevertStep.SWITCHED)
    assert holds(ceph, tmp_path) == (1 if reverted else 99)
    if RevertStep.CHECKED != step != RevertStep.ENDED:
        said = "went back to snapshot" if reverted else "undid the revert to snapshot"
        assert said in faulty.daemon.log_of_this_life
    await revert(api, made[1])  # and all is well again
    assert holds(ceph, tmp_path) == 2
    for created in made:
        await delete(api, created)
    assert not snaps(ceph, image_name())
    assert not metadata(ceph, image_name())


async def test_a_rollback_that_was_cut_off_is_gone_on_with(
    connect: Connect, faulty: Lab, off: Guest, ceph: Ceph, places: Places, tmp_path: Path
) -> None:
    """Killed while Ceph copies: what there is then is neither the one nor the other."""
    faulty.daemon.start({}, argv=(*FAULTY, "--at", RevertStep.ARMED, "--do", f"wait:{tmp_path}/at"))
    api = await connect()
    await places.known(api)
    (created,) = await stack(api, off, ceph, 1)
    call = asyncio.create_task(revert(api, created))
    await asyncio.to_thread(wait_until, "armed", (tmp_path / "at").exists, 20)
    # As a kill in mid-copy leaves it: begun, and a part of it done.
    uuid = name_of(created).removeprefix("snapd-vm-")
    faulty.daemon.kill()
    with pytest.raises(ApiError):
        await call
    ceph.rbd("image-meta", "set", f"vm/{image_name()}", "snapd-vm-revert", f"begun {uuid}")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 1M 3M", ceph.uri(image_name()))
    off.domain.create()
    faulty.daemon.start({}, argv=DAEMON, wait=60)
    error = await refused(api.create(off), "Busy")  # nothing is done below a guest that runs
    assert "half reverted" in faulty.daemon.log, error
    off.domain.destroy()
    deadline = asyncio.get_running_loop().time() + 60
    while True:
        try:
            await api.plan(off)
            break
        except ApiError as still:
            assert still.name == "Busy" and asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.3)
    assert holds(ceph, tmp_path) == 1
    await delete(api, created)


async def test_a_delete_is_refused_while_somebody_reads(
    lab: Lab, api: Api, off: Guest, ceph: Ceph, places: Places
) -> None:
    await places.known(api)
    (created,) = await stack(api, off, ceph, 1)
    image, name = image_name(), name_of(created)
    with reading(lab, f"{image}@{name}"):
        error = await refused(delete(api, created), "Busy")
        assert "qemu-storage-da" in error.text  # by its command line
    with reading(lab, image):
        error = await refused(delete(api, created), "Busy")  # it may be any snapshot that it reads
        assert "127.0.0.1" in error.text and ceph.host not in error.text
    ceph.rbd("clone", f"vm/{image}@{name}", f"vm/{image}-child")
    error = await refused(delete(api, created), "Busy")
    assert f"vm/{image}-child" in error.text
    child = places.guest(ceph_disk(ceph, f"{image}-child"))
    await places.known(api)
    own = await api.create(child, name="of-a-child")  # its parent is a snapshot, and never changes
    await delete(api, own)
    ceph.rbd("rm", f"vm/{image}-child")
    inside = f"<snapshot name='{name}'/>"
    reader = places.guest(ceph_disk(ceph, image, inside=inside))
    error = await refused(delete(api, created), "Busy")
    assert reader.name in error.text
    error = await refused(api.create(reader), "MethodNotSupported")
    assert "never changes" in error.text
    reader.remove()
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "ready"
    assert snaps(ceph, image) == {name: True}
    await delete(api, created)
    assert not snaps(ceph, image)


def ceph_disk(ceph: Ceph, image: str, inside: str = "") -> DiskSpec:
    return DiskSpec("raw", source=ceph.source(image, inside=inside), type="network")


@pytest.fixture
def running(lab: Lab, ceph: Ceph) -> Iterator[Guest]:
    """A guest that runs on an image of its own."""
    guest = lab.guest([ceph.disk(image_name(new=True))])
    yield guest
    guest.remove()


async def test_a_running_guest_is_no_reader(lab: Lab, api: Api, ceph: Ceph, running: Guest) -> None:
    made = await api.create(running)
    with reading(lab, image_name()):
        await refused(delete(api, made), "Busy")
    await delete(api, made)
    assert not snaps(ceph, image_name())


async def test_others_may_remove_it_and_foreign_ones_are_left_alone(
    api: Api, off: Guest, ceph: Ceph, places: Places
) -> None:
    await places.known(api)
    made = await stack(api, off, ceph, 3)
    image = image_name()
    ceph.rbd("snap", "create", f"vm/{image}@mine")
    gone, replaced, stays = (f"vm/{image}@{name_of(created)}" for created in made)
    for snapshot in (gone, replaced):
        ceph.rbd("snap", "unprotect", snapshot)
        ceph.rbd("snap", "rm", snapshot)
    ceph.rbd("snap", "create", replaced)  # another one of that name
    for created in made[:2]:
        await refused(api.backup_source(created.snapshot), "StorageFailed")
        assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "missing"
        await refused(revert(api, created), "StorageFailed")
        await delete(api, created)
    assert set(snaps(ceph, image)) == {"mine", *(s.partition("@")[2] for s in (replaced, stays))}
    await delete(api, made[2])
    assert "mine" in snaps(ceph, image)
    last = await api.create(off)
    ceph.rbd("snap", "unprotect", f"vm/{image}@{name_of(last)}")
    await delete(api, last)
    kept = await api.create(off)
    ceph.rbd("snap", "unprotect", f"vm/{image}@{name_of(kept)}")
    ceph.rbd("snap", "purge", f"vm/{image}")
    ceph.rbd("rm", f"vm/{image}")
    await refused(api.backup_source(kept.snapshot), "StorageFailed")
    await delete(api, kept)
    assert not await api.snapshots_of(off)


async def test_they_are_found_again_with_the_database_lost(
    connect: Connect, daemon: Lab, off: Guest, ceph: Ceph, places: Places
) -> None:
    api = await connect()
    await places.known(api)
    (created,) = await stack(api, off, ceph, 1)
    daemon.daemon.stop()
    for file in daemon.daemon.state_dir.glob("journal*"):
        file.unlink()
    daemon.daemon.start()
    told = f"vm/{image_name()}@{name_of(created)} is the snapshot s1 of domain {off.name}"
    wait_until("it is told of", lambda: told in daemon.daemon.log, 20)
    line = next(line for line in daemon.daemon.log.splitlines() if told in line)
    words = line.partition("this would remove it: ")[2].partition(" MESSAGE_ID")[0]
    assert words.startswith("rbd snap unprotect")
    run("sh", "-c", f"export CEPH_CONF={ceph.conf}; {words}")
    assert not snaps(ceph, image_name())
    assert not metadata(ceph, image_name())


# -- a Create that was cut off ---------------------------------------------------------------------


async def test_the_image_goes_while_the_daemon_is_away(
    connect: Connect, faulty: Lab, ceph: Ceph, places: Places
) -> None:
    """There is nothing left to undo, and the domain's other disk is free."""
    guest = places.guest(ceph.disk(image_name(new=True), size_mib=16), DiskSpec())
    faulty.daemon.start({}, argv=(*FAULTY, "--at", Step.PREPARED, "--do", "kill"))
    api = await connect()
    await places.known(api)
    with pytest.raises(ApiError):
        await api.create(guest)
    name = f"vm/{image_name()}"
    ceph.rbd("mv", name, f"{name}-away")
    faulty.daemon.start({}, argv=DAEMON)
    api = await connect()
    created = await api.create(guest, "<disk><target dev='vdb'/></disk>")
    await delete(api, created)
    assert "nothing is left of it" in faulty.daemon.log
    ceph.rbd("mv", f"{name}-away", name)
    assert not snaps(ceph, image_name())
    await delete(api, await api.create(guest))


def test_an_image_that_is_open_for_a_snapshot_is_not_given_up(
    ceph: Ceph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While other disks of the set are made ready, which takes what writing them out takes."""
    monkeypatch.setattr(cluster, "_TALK", "rbdworker; rbdworker.IDLE_S = 0.3; rbdworker.main()")
    (tmp_path / "raw").write_bytes(b"x" * (1 << 20))
    ceph.image("armed", tmp_path / "raw")
    place = seen_by_admin(ceph, "armed")
    clusters = cluster.Clusters(Unasked())
    with clusters.session(place.access) as session:
        session.ask("arm", image=place.words)
        time.sleep(1)
        session.ask("create", name="late")
        assert list(snaps(ceph, "armed")) == ["late"]
        session.ask("disarm")
        time.sleep(1)
        with pytest.raises(cluster.Lost):  # idle, it ends by itself
            session.ask("space", pool="vm")
    ceph.rbd("snap", "purge", "vm/armed")
    ceph.rbd("rm", "vm/armed")
