"""Method lvm: which volume a disk is on, from a sysfs that a test makes; who can trick it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapd_vm import command
from snapd_vm.config import LvmConfig
from snapd_vm.errors import MethodNotSupported, NotUnderDisk
from snapd_vm.methods import taken
from snapd_vm.methods.lvm import devicemapper, lvmclaim
from snapd_vm.methods.lvm.lvm import Lvm
from snapd_vm.methods.lvm.lvmtarget import LvmTarget
from snapd_vm.model import Disk, Domain, MethodRequest, Tag

VG, LV, OTHER = "v" * 32, "l" * 32, "o" * 32
TAG = Tag("0b9a2f10-1111-4222-8333-444455556666", "name", "uuid", "web", 0)


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(devicemapper, "SYSFS", tmp_path)
    monkeypatch.setattr(lvmclaim, "missing", lambda: "")
    return tmp_path


def device(
    sysfs: Path, number: int, name: str, uuid: str, below: tuple[int, ...] = (), suspended: int = 0
) -> int:
    """A device as the kernel shows it; its number is 253:`number`."""
    place = sysfs / f"253:{number}"
    (place / "slaves").mkdir(parents=True)
    if uuid:
        (place / "dm").mkdir()
        (place / "dm/name").write_text(f"{name}\n")
        (place / "dm/uuid").write_text(f"{uuid}\n")
        (place / "dm/suspended").write_text(f"{suspended}\n")
    for one in below:
        (place / "slaves" / f"dm-{one}").mkdir()
        (place / "slaves" / f"dm-{one}" / "dev").write_text(f"253:{one}\n")
    return os.makedev(253, number)


def plain(sysfs: Path) -> int:
    device(sysfs, 90, "", "")
    return device(sysfs, 0, "v--g-lv", f"LVM-{VG}{LV}", (90,))


def test_a_volume_is_known_by_its_uuid(sysfs: Path) -> None:
    found = devicemapper.volume_of(plain(sysfs))
    assert found is not None
    assert (found.vg, found.lv, found.vg_uuid, found.lv_uuid) == ("v-g", "lv", VG, LV)
    assert found.kind == devicemapper.THICK
    assert found.names == ("/dev/v-g/lv", "/dev/mapper/v--g-lv")


@pytest.mark.parametrize(
    ("name", "uuid"),
    [
        ("v--g-lv-real", f"LVM-{VG}{LV}-real"),
        ("v--g-lv", f"LVM-{VG}{LV}-cow"),
        ("luks", "CRYPT-LUKS2-0123456789abcdef"),
        ("v--g-lv1", f"part1-LVM-{VG}{LV}"),
        ("mpatha", "mpath-3600"),
        ("v--g-lv", f"LVM-{VG}"),
        ("v--g-lv", f"LVM-{VG}{LV}{LV}"),
        ("lv", f"LVM-{VG}{LV}"),
        ("v--g-lv-x", f"LVM-{VG}{LV}"),
        ("v--g-lv", ""),
    ],
)
def test_what_is_no_volume(sysfs: Path, name: str, uuid: str) -> None:
    assert devicemapper.volume_of(device(sysfs, 0, name, uuid)) is None


def test_kinds(sysfs: Path) -> None:
    device(sysfs, 90, "", "")
    device(sysfs, 1, "vg-pool-tpool", f"LVM-{VG}{OTHER}-tpool", (90,))
    device(sysfs, 2, "vg-a-real", f"LVM-{VG}{LV}-real", (90,))
    device(sysfs, 3, "vg-b-real", f"LVM-{VG}{LV}-real", (1,))
    device(sysfs, 4, "vg-s-cow", f"LVM-{VG}{OTHER}-cow", (90,))
    device(sysfs, 5, "vg-r_rimage_0", f"LVM-{VG}{OTHER}", (90,))
    device(sysfs, 6, "other-lv", f"LVM-{OTHER}{OTHER}", (90,))
    expected = {
        (1,): "thin",
        (2,): "thick",
        (3,): "thin",
        (2, 4): "",  # a snapshot itself
        (5,): "",  # a mirror
        (6,): "thick",  # a group on a volume of another
    }
    for number, (below, kind) in enumerate(expected.items(), 20):
        found = devicemapper.volume_of(device(sysfs, number, "vg-x", f"LVM-{VG}{LV}", below))
        assert found is not None
        assert found.kind == kind, below


def test_one_that_stands_still_is_seen_inside_too(sysfs: Path) -> None:
    device(sysfs, 1, "vg-a-real", f"LVM-{VG}{LV}-real", suspended=1)
    upper = device(sysfs, 2, "vg-a", f"LVM-{VG}{LV}", (1,))
    alone = device(sysfs, 3, "vg-b", f"LVM-{VG}{OTHER}")
    assert devicemapper.is_suspended(upper)
    assert not devicemapper.is_suspended(alone)


# -- what is claimed -------------------------------------------------------------------------------


def disk(path: str, kind: str = "block", image_format: str = "raw") -> Disk:
    return Disk("vda", "disk", kind, image_format, path, f"<source dev='{path}'/>", "<disk/>")


def domain(one: Disk) -> Domain:
    return Domain("uuid", "web", -1, "shutoff", "qemu", True, (one,))


def claim(one: Disk, **options: str) -> LvmTarget:
    request = MethodRequest("lvm", options) if options else None
    return LvmTarget.of(lvmclaim.claim(domain(one), one, request, TAG, "/mounts"))


@pytest.fixture
def volume(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A disk that is the volume v-g/lv."""
    numbers = {"/dev/v-g/lv": plain(sysfs), "/dev/sda": os.makedev(253, 90)}
    monkeypatch.setattr(devicemapper, "device_number", numbers.get)
    return disk("/dev/v-g/lv")


def test_a_raw_volume_is_one_by_default(volume: Disk) -> None:
    found = claim(volume)
    assert (found.vg, found.lv, found.kind, found.wanted) == ("v-g", "lv", "thick", 0)
    assert found.device == found.file == f"/dev/v-g/snapd-vm-{TAG.uuid}"


def test_it_is_found_without_a_program(volume: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Disks` of a host with hundreds of domains asks so of each disk."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(command, "run", started)
    method = Lvm(None, "/mounts", LvmConfig(), 10)  # type: ignore[arg-type]
    found = method.claim(domain(volume), volume, None, TAG)
    assert found is not None
    assert method.claim(domain(disk("/dev/sda")), disk("/dev/sda"), None, TAG) is None


@pytest.mark.parametrize("name", ["/dev/v-g/lv", "/dev/mapper/v--g-lv"])
def test_its_two_names_may_be_named(volume: Disk, name: str) -> None:
    assert claim(volume, device=name, size="12345678").wanted == 12345678


@pytest.mark.parametrize(
    "name",
    [
        "/dev/v-g/other",
        "/dev/dm-0",
        "/dev/v-g/../v-g/lv",
        "/dev/v-g/./lv",
        "/dev//v-g/lv",
        "/dev/v-g/lv/",
        "/dev/block/253:0",
        "/dev/disk/by-id/dm-uuid-LVM-x",
        "/dev/disk/by-uuid/1234",
        "/proc/self/root/dev/v-g/lv",
        "/proc/self/fd/3",
        "/dev/loop0",
        "/tmp/link-to-it",
        "/dev/mapper/v-g-lv",
        "/dev/mapper/v--g-lv\n",
        "v-g/lv",
        "/dev/sda",
    ],
)
def test_no_other_name_is_taken_wherever_it_leads(volume: Disk, name: str) -> None:
    with pytest.raises(NotUnderDisk, match="is on /dev/v-g/lv; name that device"):
        claim(volume, device=name)


def test_a_disk_that_is_no_volume(volume: Disk) -> None:
    with pytest.raises(MethodNotSupported, match="not a logical volume"):
        claim(disk("/dev/sda"))
    with pytest.raises(NotUnderDisk, match="nor on a logical volume"):
        claim(disk("/dev/sda"), device="/dev/v-g/lv")
    with pytest.raises(MethodNotSupported, match="not a logical volume"):
        claim(disk("/dev/gone"))


def test_what_is_asked_for_only(volume: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[object] = []
    monkeypatch.setattr(taken, "check_alone", lambda one, _, *, named: alone.append((one, named)))
    qcow2 = disk("/dev/v-g/lv", image_format="qcow2")
    with pytest.raises(MethodNotSupported, match="use method qemu"):
        claim(qcow2)
    assert claim(qcow2, device="/dev/v-g/lv").format == "qcow2"
    assert alone == [(qcow2, True)]
    with pytest.raises(MethodNotSupported, match="use method qemu"):
        claim(disk("/dev/v-g/lv", image_format="vmdk"), device="/dev/v-g/lv")


def test_a_file_is_taken_only_with_a_device(volume: Disk, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"")
    with pytest.raises(MethodNotSupported, match="name the logical volume"):
        claim(disk(str(image), "file"))
    for other in (disk(str(image), "file"), disk("", "network")):
        with pytest.raises(NotUnderDisk):
            claim(other, device="/dev/v-g/lv")


def test_a_group_with_too_long_a_name(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = device(sysfs, 0, f"{'a' * 70}-lv", f"LVM-{VG}{LV}")
    monkeypatch.setattr(devicemapper, "device_number", lambda _: number)
    with pytest.raises(MethodNotSupported, match="so long a name"):
        claim(disk("/dev/x"))


def test_thin_ones_have_no_size(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device(sysfs, 1, "vg-pool-tpool", f"LVM-{VG}{OTHER}-tpool")
    number = device(sysfs, 0, "vg-lv", f"LVM-{VG}{LV}", (1,))
    monkeypatch.setattr(devicemapper, "device_number", lambda _: number)
    assert claim(disk("/dev/vg/lv"), device="/dev/vg/lv").thin
    with pytest.raises(MethodNotSupported, match="leave out <size>"):
        claim(disk("/dev/vg/lv"), size="1")
