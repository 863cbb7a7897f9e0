"""Method lvm on real volumes without a daemon: cheap enough for all that can happen to it.

Snapshots taken, filled, reverted to in pieces, lost; an lvcreate that is killed while the volume
stands still. What asks the hypervisor is answered by `OneDomain`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import threading
import time
import uuid as uuids
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from snapd_vm import mounts
from snapd_vm.config import LvmConfig
from snapd_vm.errors import Busy, InvalidState, NameInUse, NoSpace, StorageFailed
from snapd_vm.methods.lvm import devicemapper, lvmtags, lvmvolumes
from snapd_vm.methods.lvm.lvm import Lvm
from snapd_vm.methods.lvm.lvmtarget import LvmTarget
from snapd_vm.model import Disk, Domain, MethodRequest, Tag, Target
from tests.lab.program import run
from tests.lab.volumegroup import MIB, Group, fill, read

DATA, MORE_DATA = (Path(f"/dev/disk/by-id/virtio-data{number}") for number in (1, 2))
KINDS = ("thick", "thin")


class OneDomain:
    """A domain that is off until it is started, and all that the hypervisor is asked of it."""

    def __init__(self, kind: str, path: Path, image_format: str = "raw") -> None:
        source = "<source/>"
        self.disk = Disk("vda", "disk", kind, image_format, str(path), source, "<disk/>")
        self.domain = Domain("uuid", "wéb 1", -1, "shutoff", "qemu", True, (self.disk,))

    def read(self, uuid: str) -> Domain:
        return self.domain

    def managed_save(self, uuid: str) -> bool:
        return False

    def user_of(self, path: str, uuid: str, target: str, *, beside: bool = True) -> str:
        return ""

    def qemu_user(self) -> tuple[int, int]:
        return 0, 0

    def start(self) -> None:
        self.domain = dataclasses.replace(self.domain, id=1, state="running")

    def stop(self) -> None:
        self.domain = dataclasses.replace(self.domain, id=-1, state="shutoff")


class Watcher:
    """Somebody who lets all happen."""

    cancelled = False
    spoilt = False

    def progress(self, done: int, total: int) -> None: ...

    def past_return(self) -> None: ...

    def spoil(self) -> None: ...


class Taken:
    """A snapshot being taken, step by step, of the disk of one domain."""

    def __init__(self, folder: Path, kind: str, path: Path, **options: str) -> None:
        self.hypervisor = OneDomain(kind, path)
        self._folder = folder
        self.method = self.another()
        uuid = str(uuids.uuid4())
        self.tag = Tag(uuid, "nightly", "uuid", "wéb 1", 5)
        request = MethodRequest("lvm", options) if options else None
        domain = self.hypervisor.domain
        target = self.method.claim(domain, self.hypervisor.disk, request, self.tag)
        assert target is not None
        self.target: Target = target

    def another(self) -> Lvm:
        """The method as a daemon has it that was started anew."""
        hypervisor: Any = self.hypervisor
        return Lvm(hypervisor, str(self._folder), LvmConfig(), 10)

    @property
    def one(self) -> LvmTarget:
        return LvmTarget.of(self.target)

    def prepare(self) -> None:
        self.method.check([self.target], self.tag)
        (self.target,) = self.method.prepare([self.target], self.tag, lambda _: None)

    def take(self) -> Taken:
        self.prepare()
        self.method.create([self.target], self.tag)
        assert self.method.taken(self.target, self.tag)
        assert self.method.standing(self.target, {}).state == "ready"
        return self

    def contents(self) -> bytes:
        return read(self.one.file)

    def begin_revert(self) -> None:
        self.target = self.method.check_revert(self.target, self.tag, [])
        self.target = self.method.prepare_revert(self.target, self.tag, lambda _: None)

    def revert(self) -> None:
        self.begin_revert()
        self.method.revert(self.target, self.tag, Watcher())
        assert self.settled() is True
        self.target = self.method.reverted(self.target, self.target) or self.target

    def settled(self) -> bool:
        """Whether it is reverted, as the next daemon would find it; nothing tells of it then."""
        method = self.another()
        done = method.settle_revert(self.target, self.tag)
        assert method.settle_revert(self.target, self.tag) is done
        if done:
            method.forget_revert(self.target)
            method.forget_revert(self.target)
        return done

    def delete(self) -> None:
        self.method.check_delete(self.target, self.tag)
        self.method.delete(self.target, self.tag, Watcher())
        assert self.method.standing(self.target, {}).state == "missing"
        assert self.method.undo(self.target, self.tag, again=True) is False


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    """With a volume of each kind."""
    made = Group(DATA, "snapd-vm-t")
    made.pool()
    made.linear("thick")
    made.thin("thin")
    yield made
    made.remove()


@pytest.fixture(autouse=True)
def nothing_left(group: Group) -> Iterator[None]:
    """Take away what a test that failed has left, for the next one's sake."""
    yield
    for name in group.suspended():
        run("dmsetup", "resume", name)
    group.remove_volumes("thick", "thin", "pool")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that only root can write to, as are those above it."""
    made = Path(f"/var/lib/snapd-vm-test-{uuids.uuid4()}")
    made.mkdir(0o700)
    yield made
    for mount in reversed(mounts.table()):  # of a test that failed
        if Path(mount.point).is_relative_to(made):
            run("umount", mount.point)
    shutil.rmtree(made)


def kinds(group: Group, before: list[str]) -> bool:
    """Whether the volumes are those, but for the origins of thin ones, which reverts change."""
    return [one.split()[:2] for one in group.contents()] == [one.split()[:2] for one in before]


def test_the_kernel_is_told_what_a_snapshot_will_need(group: Group, folder: Path) -> None:
    module = Path("/sys/module/dm_snapshot")
    taken = Taken(folder, "block", group.device("thick"))
    run("modprobe", "-r", module.name)
    assert not module.exists()
    taken.prepare()
    assert module.exists()
    taken.method.create([taken.target], taken.tag)
    run("vgchange", "-q", "-an", group.name)  # and somebody has it active again, but for ours
    run("modprobe", "-r", module.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lvmvolumes, "activate", lambda *_: None)  # lvchange calls modprobe itself
        taken.method.show(taken.target)
    assert module.exists()
    run("vgchange", "-q", "-ay", group.name)
    taken.delete()


@pytest.mark.parametrize("kind", KINDS)
def test_several_are_taken_reverted_to_and_deleted(group: Group, folder: Path, kind: str) -> None:
    device, before = group.device(kind), group.contents()
    run("lvchange", "-q", "--addtag", "somebody", device)
    fill(device, 4)
    made, sums = [], []
    for number in range(2):
        fill(device, 2, number)
        sums.append(read(device))
        made.append(Taken(folder, "block", device).take())
    said = group.volumes()[made[0].one.name]
    assert said["lv_attr"][1] == "r"
    assert {"snapd-vm.name=nightly", "snapd-vm.domain=w+C3+A9b+201"} <= set(
        said["lv_tags"].split(",")
    )
    fill(device, 3, 20)
    for number in (0, 1):
        made[number].revert()
        assert read(device) == sums[number]
        assert [one.contents() for one in made] == sums
        fill(device, 1, 25)
    tags = group.volumes()[kind]["lv_tags"]
    assert "somebody" in tags
    assert "revert" not in tags
    stored = {one.snapshot: one for one in made[0].method.stored({})}
    assert set(stored) == {one.tag.uuid for one in made}
    assert {(one.name, one.domain) for one in stored.values()} == {("nightly", "wéb 1")}
    made[0].delete()
    subprocess.run(stored[made[1].tag.uuid].command, shell=True, check=True, timeout=60)
    assert made[1].method.standing(made[1].target, {}).state == "missing"
    run("lvchange", "-q", "--deltag", "somebody", device)
    assert kinds(group, before)


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_a_file_is_read_in_the_snapshot(group: Group, folder: Path, filesystem: str) -> None:
    device, before = group.linear("files", 320), group.contents()
    run(f"mkfs.{filesystem}", "-q", device)
    point = folder / "point"
    point.mkdir(0o755)
    run("mount", device, point)
    try:
        image = point / "disk.raw"
        image.write_bytes(os.urandom(3 * MIB))
        was = image.read_bytes()
        taken = Taken(folder / "mounts", "file", image, device=str(device)).take()
        options = run("findmnt", "-n", "-o", "OPTIONS", taken.one.mount).strip().split(",")
        assert {"ro", "nosuid", "nodev", "noexec", "norecovery"} <= set(options)
        image.write_bytes(b"new")
        assert taken.contents() == was
        unit = run("systemd-escape", "--path", "--suffix=mount", taken.one.mount).strip()
        assert run("systemctl", "is-active", unit).strip() == "active"
        run("umount", taken.one.mount)  # as by a restart of the host
        taken.method.show(taken.target)
        assert taken.contents() == was
        with open(taken.one.file, "rb") as file:
            reader = subprocess.Popen(["sleep", "60"], stdin=file)
        try:
            with pytest.raises(Busy, match="sleep"):
                taken.method.check_delete(taken.target, taken.tag)
        finally:
            reader.kill()
            reader.wait()
        taken.revert()
        assert image.read_bytes() == was
        assert [path.name for path in point.iterdir() if path.name != "lost+found"] == ["disk.raw"]
        taken.delete()
        assert not Path(taken.one.mount).exists()
    finally:
        run("umount", point)
    assert group.contents() == before


def test_one_that_overflows(group: Group, folder: Path) -> None:
    device = group.device("thick")
    taken = Taken(folder, "block", device, size=str(8 * MIB)).take()
    assert not taken.method.warnings(taken.target, {})
    fill(device, 7)
    warned = taken.another().warnings(taken.target, {})
    assert list(warned) == ["filling"]
    assert "/" not in warned["filling"]
    fill(device, 8, 8)
    standing = taken.method.standing(taken.target, {})
    assert (standing.state, standing.code, standing.removable) == ("failed", "overflowed", True)
    taken.delete()


def test_no_room(group: Group, folder: Path) -> None:
    run("lvcreate", "-q", "-y", "-Wn", "-n", "filler", "-l", "100%FREE", group.name)
    with pytest.raises(NoSpace, match="bytes free"):
        Taken(folder, "block", group.device("thick")).prepare()


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_is_taken(group: Group, folder: Path, kind: str) -> None:
    """Before the check, and between check and use; somebody else's volume is left alone."""
    taken = Taken(folder, "block", group.device(kind))
    taken.prepare()
    group.linear(taken.one.name, 4)
    with pytest.raises(NameInUse):
        taken.method.create([taken.target], taken.tag)
    assert taken.method.undo(taken.target, taken.tag, again=False) is False
    assert taken.another().undo(taken.target, taken.tag, again=True) is False
    assert taken.another().standing(taken.target, {}).state == "missing"
    with pytest.raises(NameInUse):
        taken.prepare()
    assert taken.one.name in group.volumes()


def test_a_volume_that_is_replaced_between_check_and_use(group: Group, folder: Path) -> None:
    group.linear("one", 8)
    taken = Taken(folder, "block", group.device("one"))
    taken.prepare()
    run("lvrename", "-q", group.name, "one", "two")
    group.linear("one", 8)
    with pytest.raises(StorageFailed, match="renamed or replaced"):
        taken.prepare()
    taken.method.create([taken.target], taken.tag)
    assert taken.method.taken(taken.target, taken.tag) is False
    assert taken.method.undo(taken.target, taken.tag, again=False) is True


# -- reverts that are cut off ----------------------------------------------------------------------


@pytest.mark.parametrize("pieces", range(4))
def test_a_thin_revert_that_is_cut_off(group: Group, folder: Path, pieces: int) -> None:
    """After as many of its pieces: the copy, the two renames, the removal."""
    device = group.device("thin")
    fill(device, 2)
    taken, wanted = Taken(folder, "block", device).take(), read(device)
    fill(device, 2, 1)
    was, before = read(device), group.contents()
    taken.begin_revert()
    one = taken.one
    if pieces >= 1:
        lvmvolumes.rename(one.vg, one.lv, f"{one.name}.discarded")
    if pieces >= 2:
        lvmvolumes.rename(one.vg, f"{one.name}.revert", one.lv)
    if pieces >= 3:
        name = f"{one.name}.discarded"
        lvmvolumes.remove(next(lv for lv in lvmvolumes.report(one.vg) if lv.name == name))
    for _ in range(2):  # and again, as after one more crash
        done = taken.another().settle_revert(taken.target, taken.tag)
        assert done is (pieces >= 2)
        assert read(device) == (wanted if done else was)
        assert kinds(group, before)
    assert taken.contents() == wanted
    taken.delete()


def test_a_thick_revert_that_is_cut_off_is_gone_on_with(group: Group, folder: Path) -> None:
    device = group.device("thick")
    fill(device, 12)
    taken, wanted = Taken(folder, "block", device).take(), read(device)
    fill(device, 12)
    taken.begin_revert()

    class Killed(BaseException):
        """As if the daemon was."""

    real = os.pwrite

    def write(fd: int, data: bytes, at: int) -> int:
        if at >= 8 * MIB:
            raise Killed
        return real(fd, data, at)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "pwrite", write)
        taken.method.revert(taken.target, taken.tag, Watcher())
    assert wanted[: 8 * MIB] == read(device)[: 8 * MIB]
    assert wanted != read(device)
    taken.hypervisor.start()
    with pytest.raises(Busy, match="half reverted"):
        taken.another().settle_revert(taken.target, taken.tag)
    taken.hypervisor.stop()
    assert taken.settled() is True
    assert read(device) == wanted == taken.contents()
    assert "snapd-vm.revert" not in group.volumes()[device.name]["lv_tags"]
    taken.delete()


@pytest.mark.parametrize("done", [False, True])
def test_what_was_written_before_or_after_a_thick_revert_that_was_cut_off_stays(
    group: Group, folder: Path, done: bool
) -> None:
    """As by a guest that was started after the daemon was killed, and is off again."""
    device = group.device("thick")
    fill(device, 2)
    taken = Taken(folder, "block", device).take()
    fill(device, 2)
    taken.begin_revert()
    if done:
        taken.method.revert(taken.target, taken.tag, Watcher())
    fill(device, 2, 1)
    was = read(device)
    assert taken.settled() is done
    assert read(device) == was
    assert "snapd-vm.revert" not in group.volumes()[device.name]["lv_tags"]
    taken.revert()
    assert read(device) == taken.contents()
    taken.delete()


def test_a_domain_that_was_started_on_what_was_to_be_discarded_keeps_it(
    group: Group, folder: Path
) -> None:
    """Between the check and the renames, which no lock prevents."""
    device = group.device("thin")
    fill(device, 1)
    taken = Taken(folder, "block", device).take()
    fill(device, 1, 1)
    was, before = read(device), group.contents()
    taken.begin_revert()
    with device.open("rb"):
        taken.method.revert(taken.target, taken.tag, Watcher())
        assert read(device) != was
        taken.hypervisor.start()
        assert taken.method.settle_revert(taken.target, taken.tag) is False
        assert read(device) == was
    assert kinds(group, before)
    with pytest.raises(InvalidState):
        taken.method.check_revert(taken.target, taken.tag, [])
    taken.delete()


# -- an lvcreate that is killed --------------------------------------------------------------------


@pytest.fixture
def slow() -> Iterator[Group]:
    """A group on a disk that takes a while for each write: of its metadata too, which lvcreate
    writes while the origin is suspended.
    """
    run("wipefs", "-q", "-a", MORE_DATA)
    name, skipped = "snapd-vm-slow", 8192  # so that the label is not at the disk's own begin, too
    size = int(run("blockdev", "--getsz", MORE_DATA)) - skipped
    place = f"{MORE_DATA} {skipped}"
    run("dmsetup", "create", name, "--table", f"0 {size} delay {place} 0 {place} 150")
    made = Group(Path("/dev/mapper", name), "snapd-vm-s")
    made.pool()
    made.linear("thick")
    made.thin("thin")
    yield made
    for stands in made.suspended():
        run("dmsetup", "resume", stands)
    made.remove()
    run("dmsetup", "remove", "--retry", name)


@pytest.mark.parametrize("kind", KINDS)
def test_an_lvcreate_that_is_killed_while_the_volume_stands_still(
    slow: Group, folder: Path, kind: str
) -> None:
    device, before = slow.device(kind), slow.contents()
    taken = Taken(folder, "block", device)
    taken.prepare()
    work = threading.Thread(target=create, args=(taken,))
    work.start()
    kill_when_suspended(device, work)
    work.join(60)
    assert slow.suspended(), "no kill came while the volume stood still"
    restarted = taken.another()
    assert restarted.taken(taken.target, taken.tag) is False
    restarted.undo(taken.target, taken.tag, again=True)
    assert not slow.suspended()
    assert slow.contents() == before
    fill(device, 1)  # it takes writes
    taken = Taken(folder, "block", device).take()
    taken.delete()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("made", ["nothing", "a volume of its own", "the snapshot"])
def test_what_an_lvcreate_that_was_killed_has_left_goes_and_the_volume_goes_on(
    group: Group, folder: Path, kind: str, made: str
) -> None:
    """It makes a volume first, and then the snapshot of that, with the origin suspended."""
    device, before = group.device(kind), group.contents()
    taken = Taken(folder, "block", device)
    taken.prepare()
    if made == "the snapshot":
        taken.method.create([taken.target], taken.tag)
    elif made != "nothing":
        said = lvmtags.made(taken.one.snapshot, taken.tag)
        tags = [word for tag in said for word in ("--addtag", tag)]
        run("lvcreate", "-q", "-y", "-Wn", "-n", taken.one.name, "-L", "36M", *tags, group.name)
    run("dmsetup", "suspend", device)
    restarted = taken.another()
    assert restarted.taken(taken.target, taken.tag) is False
    assert restarted.undo(taken.target, taken.tag, again=True) is (made != "nothing")
    assert not group.suspended()
    assert group.contents() == before
    fill(device, 1)


def create(taken: Taken) -> None:
    with suppress(StorageFailed):
        taken.method.create([taken.target], taken.tag)


def kill_when_suspended(device: Path, work: threading.Thread) -> None:
    """Kill lvcreate as soon as the device stands still; one that is new does so for a moment."""
    number = device.stat().st_rdev
    deadline = time.monotonic() + 60
    pid = 0
    while work.is_alive() and not (pid and devicemapper.is_suspended(number)):
        assert time.monotonic() < deadline
        pid = pid or pid_of("lvcreate")
        time.sleep(0.001)
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def pid_of(name: str) -> int:
    """The process of this name, 0 where there is none; to look through all takes a while here."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "comm").read_text().strip() == name:
                return int(entry.name)
    return 0
