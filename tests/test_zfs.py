"""Method zfs without ZFS: what its programs say and are told, the places of files, copies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapd_vm import command, mounts
from snapd_vm.command import CommandError, Result
from snapd_vm.errors import (
    Busy,
    MethodNotSupported,
    NameInUse,
    NoSpace,
    SnapdError,
    StorageFailed,
)
from snapd_vm.methods.zfs import zfsclaim, zfsdataset, zfsplace, zfstags
from snapd_vm.methods.zfs.zfs import Zfs
from snapd_vm.methods.zfs.zfstarget import ZfsTarget, device_of
from snapd_vm.model import Disk, Domain, Json, Tag, Target
from snapd_vm.mounts import Mount

UUID = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
OTHER = "2b4e28ba-2fa1-11d2-883f-0016d3cca427"
HOSTILE = "-r\ttank/other@x\n\x1b[2J%41=,;é$(reboot) \udcff"


class Programs:
    """In the place of command.run: what was run, and what it is to answer or raise."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []
        self.answer: str | CommandError = ""

    def run(self, argv: Sequence[str], **_: object) -> Result:
        self.ran.append(list(argv))
        if isinstance(self.answer, CommandError):
            raise self.answer
        return Result(0, self.answer, "")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Programs:
    """No program runs, and no pool is suspended."""
    made = Programs()
    monkeypatch.setattr(command, "run", made.run)
    monkeypatch.setattr(command, "installed", lambda _: True)
    monkeypatch.setattr(zfsdataset, "_KSTAT", tmp_path)
    return made


# -- properties ----------------------------------------------------------------------------------


@given(st.text(max_size=60) | st.just(HOSTILE))
def test_what_somebody_else_chose_is_one_printable_word_and_comes_back(text: str) -> None:
    value = zfstags.encoded(text)
    assert value.isascii()
    assert value.isprintable()
    assert value
    if text.strip(" ") == text and text not in ("", "-"):
        assert zfstags.decoded(value) == text


def test_a_long_name_is_cut() -> None:
    assert len(zfstags.encoded("é" * 5000)) <= 1000


def test_one_command_takes_all_with_our_properties(programs: Programs) -> None:
    tag = Tag(UUID, "nightly", OTHER, HOSTILE, 1_700_000_000_000_000)
    names = [f"tank/vm@snapd-vm-{UUID}", f"tank/vol 1@snapd-vm-{OTHER}"]
    zfsdataset.take(names, tag, {"vda": UUID, "sd b=": OTHER}, "mark")
    ((program, verb, *words),) = programs.ran
    assert (program, verb) == ("zfs", "snapshot")
    assert words[-2:] == names
    options, said = words[:-2:2], words[1:-2:2]
    assert set(options) == {"-o"}
    told = dict(one.split("=", 1) for one in said)
    assert told["org.snapd-vm:snapshots"] == f"vda={UUID} sd%20b%3D={OTHER}"
    assert told["org.snapd-vm:label"] == "nightly"
    assert told["org.snapd-vm:domain-uuid"] == OTHER
    assert zfstags.decoded(told["org.snapd-vm:domain"]) == HOSTILE
    assert all(one.isascii() and one.isprintable() for one in said)


def test_a_snapshot_says_what_it_is_of(programs: Programs) -> None:
    programs.answer = (
        "clones\ttank/a,tank/b\t-\n"
        f"org.snapd-vm:snapshots\tvda={UUID} sd%20b%3D={OTHER}\tlocal\n"
        "org.snapd-vm:label\tnightly\tlocal\n"
        f"org.snapd-vm:domain\t{zfstags.encoded('wéb %')}\tlocal\n"
    )
    found = zfsdataset.look("tank/vm@x")
    assert found is not None
    assert found.clones == ("tank/a", "tank/b")
    assert found.snapshots == {"vda": UUID, "sd b=": OTHER}
    assert (found.label, found.domain) == ("nightly", "wéb %")


def test_what_is_inherited_is_not_the_snapshots_own(programs: Programs) -> None:
    row = f"org.snapd-vm:snapshots\tvda={UUID}\tinherited from tank/vm\n"
    programs.answer = "clones\t\t-\n" + row
    found = zfsdataset.look("tank/vm@x")
    assert found is not None
    assert (found.clones, found.snapshots) == ((), {})
    programs.answer = "".join(
        f"tank/vm@{name}\tclones\t\t-\ntank/vm@{name}\torg.snapd-vm:snapshots\tvda={UUID}\t{source}\n"
        for name, source in (("ours", "local"), ("theirs", "inherited from tank/vm"))
    )
    assert list(zfsdataset.listed(["tank/vm"])) == ["tank/vm@ours"]


# -- what the programs say -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("cannot create snapshot 'tank/vm@x': dataset already exists\nno snap", NameInUse),
        ("cannot create snapshots : out of space\nno snapshots were created", NoSpace),
        ("cannot create 'tank/x': disk quota exceeded", NoSpace),
        ("cannot destroy snapshot tank/vm@x: dataset is busy", Busy),
        ("cannot destroy 'tank/vm@x': snapshot has dependent clones\nuse '-R' to", Busy),
        ("cannot create snapshot 'tank@x': pool I/O is currently suspended", StorageFailed),
        ("cannot open 'tank/vm': dataset does not exist", zfsdataset.NotThere),
        ("internal error: who knows", StorageFailed),
    ],
)
def test_an_error_is_one_of_ours(programs: Programs, said: str, error: type[SnapdError]) -> None:
    programs.answer = CommandError("zfs failed: " + said.splitlines()[-1], said)
    with pytest.raises(error) as raised:
        zfsdataset.roll_back("tank/vm@x")
    assert type(raised.value) is error
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize(
    "name", ["tank/suspended", "suspended", "tank/out of space", "tank/is busy"]
)
def test_how_a_dataset_is_called_says_nothing(programs: Programs, name: str) -> None:
    full = f"{name}@x"
    said = f"cannot hold snapshot '{full}': tag already exists on this dataset"
    programs.answer = CommandError("zfs failed: " + said, said)
    zfsdataset.hold(full)  # it is held already
    said = f"cannot rollback '{name}': who knows"  # libzfs names the dataset alone
    programs.answer = CommandError("zfs failed: " + said, said)
    with pytest.raises(StorageFailed, match="who knows"):
        zfsdataset.roll_back(full)
    said = f"cannot destroy snapshot {full}: dataset is busy"
    programs.answer = CommandError("zfs failed: " + said, said)
    with pytest.raises(Busy):
        zfsdataset.destroy(full)


def test_what_is_not_there_is_gone_already(programs: Programs) -> None:
    said = "could not find any snapshots to destroy; check snapshot names."
    programs.answer = CommandError(said, said)
    assert not zfsdataset.destroy("tank/vm@x")
    assert zfsdataset.look("tank/vm@x") is None
    programs.answer = CommandError("x", "no such tag on this dataset")
    zfsdataset.release("tank/vm@x")
    programs.answer = CommandError("x", "tag already exists on this dataset")
    zfsdataset.hold("tank/vm@x")
    programs.answer = CommandError("x", "something else")
    for function in (zfsdataset.hold, zfsdataset.release):
        with pytest.raises(StorageFailed):
            function("tank/vm@x")


def test_nothing_is_ever_destroyed_with_what_depends_on_it(programs: Programs) -> None:
    zfsdataset.destroy("tank/vm@x")
    zfsdataset.roll_back("tank/vm@x")
    assert programs.ran == [["zfs", "destroy", "tank/vm@x"], ["zfs", "rollback", "tank/vm@x"]]


def test_a_pool_that_is_suspended_is_asked_for_nothing(programs: Programs, tmp_path: Path) -> None:
    for pool, state in (("tank", "SUSPENDED"), ("other", "ONLINE")):
        (tmp_path / pool).mkdir()
        (tmp_path / pool / "state").write_text(state + "\n")
    with pytest.raises(StorageFailed, match="suspended"):
        zfsdataset.look("tank/vm@x")
    assert not programs.ran
    programs.answer = "clones\t-\t-\n"
    zfsdataset.look("other/tank@x")
    assert programs.ran


def test_what_is_in_a_pool_that_is_not_imported_nobody_can_say(
    programs: Programs, tmp_path: Path
) -> None:
    with pytest.raises(StorageFailed, match="import it"):
        zfsdataset.refuse_absent("tank/vm")
    (tmp_path / "tank").mkdir()
    zfsdataset.refuse_absent("tank/vm")


def test_room_and_what_a_thick_volume_needs(programs: Programs) -> None:
    programs.answer = "tank/thin\t1000\t0\t300\ntank/thick\t5000\t4000\t700\ntank/none\t9\t-\t-\n"
    rooms = zfsdataset.rooms(["tank/thin", "tank/thick", "tank/none"])
    assert (rooms["tank/thin"].free, rooms["tank/thin"].needed) == (1000, 0)
    assert (rooms["tank/thick"].free, rooms["tank/thick"].needed) == (1000, 700)
    assert rooms["tank/none"].free == 9


def test_newer_snapshots_and_bookmarks(programs: Programs) -> None:
    programs.answer = "tank/v@a\t5\ntank/v@x\t7\ntank/v#b\t8\ntank/v@c\t9\n"
    assert zfsdataset.newer("tank/v@x") == ["tank/v#b", "tank/v@c"]
    assert zfsdataset.newer("tank/v@c") == []


def test_holds_of_others(programs: Programs) -> None:
    programs.answer = "tank/v@x\tsnapd-vm\tSat Nov 28 2026\ntank/v@x\tkeep me\tSat Nov 28 2026\n"
    assert zfsdataset.other_holds("tank/v@x") == ["keep me"]


# -- where a file is -----------------------------------------------------------------------------


def _mount(point: str, source: str, root: str = "/", receives: bool = True) -> Mount:
    return Mount(7, 3, root, point, "zfs", source, ("rw",), receives)


def _place_of(
    monkeypatch: pytest.MonkeyPatch, path: Path, own: Mount, *others: Mount
) -> zfsplace.Place | None:
    monkeypatch.setattr(mounts, "mount_of", lambda _: own)
    monkeypatch.setattr(mounts, "table", lambda: (own, *others))
    fd = os.open(path, os.O_RDONLY)
    try:
        return zfsplace.of_file(fd, str(path))
    finally:
        os.close(fd)


def test_the_dataset_is_that_of_the_files_own_mount(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = tmp_path / "deep" / "a.raw"
    image.parent.mkdir()
    image.touch()
    (tmp_path / ".zfs" / "snapshot").mkdir(parents=True)
    place = _place_of(monkeypatch, image, _mount(str(tmp_path), "tank/v m"))
    assert place == zfsplace.Place(
        "tank/v m", str(tmp_path), "deep/a.raw", "deep/a.raw", f"{tmp_path}/.zfs/snapshot"
    )
    # Where nobody else would see what the kernel mounts there.
    monkeypatch.setattr(mounts, "in_host", lambda: False)
    private = _mount(str(tmp_path), "tank/v m", receives=False)
    place = _place_of(monkeypatch, image, private)
    assert place is not None
    assert place.snapshots == ""


def test_a_bind_mount_of_a_folder_leads_to_the_datasets_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root, bound = tmp_path / "root", tmp_path / "bound"
    (root / "images").mkdir(parents=True)
    bound.mkdir()
    (root / "images" / "a.raw").touch()
    os.link(root / "images" / "a.raw", bound / "a.raw")
    own = _mount(str(bound), "tank/vm", "/images")
    place = _place_of(monkeypatch, bound / "a.raw", own, _mount(str(root), "tank/vm"))
    assert place is not None
    assert (place.root, place.below, place.inside) == (str(root), *["images/a.raw"] * 2)
    place = _place_of(monkeypatch, bound / "a.raw", own, _mount(str(root), "tank/other"))
    assert place == zfsplace.Place("tank/vm", str(bound), "a.raw", "images/a.raw", "")


def test_where_a_dataset_is_bound_as_a_whole_it_is_read_where_it_was_mounted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root, bound = tmp_path / "root", tmp_path / "bound"
    (root / ".zfs" / "snapshot").mkdir(parents=True)
    bound.mkdir()
    (root / "a.raw").touch()
    os.link(root / "a.raw", bound / "a.raw")
    own, first = _mount(str(bound), "tank/vm"), _mount(str(root), "tank/vm")
    monkeypatch.setattr(mounts, "mount_of", lambda _: own)
    monkeypatch.setattr(mounts, "table", lambda: (first, own))
    with (bound / "a.raw").open() as file:
        place = zfsplace.of_file(file.fileno(), str(bound / "a.raw"))
    assert place is not None
    assert (place.root, place.snapshots) == (str(root), f"{root}/.zfs/snapshot")


def test_a_file_in_a_snapshot_and_one_that_is_a_mount(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = tmp_path / "a.raw"
    image.touch()
    for own in (_mount(str(tmp_path), "tank/vm@x"), _mount(str(image), "tank/vm", "/a.raw")):
        with pytest.raises(MethodNotSupported):
            _place_of(monkeypatch, image, own)
    elsewhere = Mount(7, 3, "/", str(tmp_path), "ext4", "tank/vm", ("rw",))
    assert _place_of(monkeypatch, image, elsewhere) is None


def test_no_other_device_is_a_volume(tmp_path: Path) -> None:
    for path in ("/dev/null", "/dev/zvol/tank/none", str(tmp_path), "a\0b", "/proc/self/fd/0"):
        assert not zfsplace.is_volume(path)
    assert device_of("tank/v m") == "/dev/zvol/tank/v+m"


def test_a_disk_that_is_not_on_zfs_starts_no_program(programs: Programs, tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    image.touch()
    source = f"<source file='{image}'/>"
    disk = Disk("vda", "disk", "file", "raw", str(image), source, "<disk/>")
    domain = Domain(UUID, "web", -1, "shutoff", "qemu", True, (disk,))
    tag = Tag(UUID, "x", UUID, "web", 1)
    with pytest.raises(MethodNotSupported):
        zfsclaim.claim(domain, disk, tag, asked=True, named="")
    with pytest.raises(SnapdError) as error:
        zfsclaim.claim(domain, disk, tag, asked=True, named="tank/vm")
    assert error.value.dbus_name.endswith("NotUnderDisk")
    assert not programs.ran


def test_a_target_is_what_it_was_as_json() -> None:
    data: dict[str, Json] = {
        "snapshot": UUID,
        "domain": OTHER,
        "active": True,
        "declared": "/a",
        "image": "/b",
        "image_device": 1,
        "image_inode": 2,
        "held": 2,
        "format": "raw",
        "dataset": "t/v",
        "name": f"snapd-vm-{UUID}",
        "root": "/t",
        "inside": "c/b",
        "clone": "",
        "folder": "/t/.zfs/snapshot/x",
        "mounted": False,
    }
    one = ZfsTarget.of(Target("zfs", "vda", data))
    assert (one.full, one.path) == (f"t/v@snapd-vm-{UUID}", "/t/.zfs/snapshot/x/c/b")
    volume = ZfsTarget.of(Target("zfs", "vda", {**data, "clone": "t/x", "shared": True}))
    assert (volume.is_volume, volume.path, volume.shared) == (True, "/dev/zvol/t/x", True)


# -- what is there -------------------------------------------------------------------------------


def test_the_snapshots_of_a_dataset_are_looked_at_by_one_program(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "table", tuple)
    uuids = [f"{number}b4e28ba-2fa1-11d2-883f-0016d3cca427" for number in range(5)]
    rows = [f"tank/vm@s{uuid}\torg.snapd-vm:snapshots\tvda={uuid}\tlocal\n" for uuid in uuids]
    programs.answer = "".join(rows)
    hypervisor: Any = None
    method = Zfs(hypervisor, 10)
    targets = [snapshot_of("tank/vm", uuid) for uuid in uuids]
    assert [method.standing(target, {}).state for target in targets] == ["ready"] * 5
    assert len(programs.ran) == 1
    programs.answer = CommandError("", "cannot open 'tank/vm': dataset does not exist")
    gone = snapshot_of("tank/vm", OTHER.replace("2", "9"))
    assert method.standing(gone, {}).state == "missing"  # and that is asked for anew
    assert len(programs.ran) == 2


def snapshot_of(dataset: str, uuid: str) -> Target:
    """The Target of a file there."""
    data: dict[str, Json] = {
        "snapshot": uuid,
        "domain": OTHER,
        "active": False,
        "declared": "/vm/a",
        "format": "raw",
        "dataset": dataset,
        "name": f"s{uuid}",
        "root": "/vm",
        "inside": "a",
        "clone": "",
        "folder": f"/vm/.zfs/snapshot/s{uuid}",
        "mounted": False,
    }
    return Target("zfs", "vda", data)
