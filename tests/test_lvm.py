"""Method lvm without a volume: names, tags, sizes, and what lvs might answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapd_vm import command
from snapd_vm.command import Result
from snapd_vm.config import LvmConfig
from snapd_vm.errors import Busy, InvalidState, NameInUse, NoSpace, StorageFailed
from snapd_vm.methods import folder
from snapd_vm.methods.lvm import devicemapper, lvmrevert, lvmsizes, lvmtags, lvmvolumes
from snapd_vm.methods.lvm.lvmvolumes import GroupAbsent, Lv
from snapd_vm.model import Domain, Tag

MIB = 1 << 20
EXTENT = 4 * MIB
ROW = {
    "vg_name": "vg",
    "vg_uuid": "abcdef-ghij-klmn-opqr-stuv-wxyz-012345",
    "vg_free": "1073741824",
    "vg_extent_size": "4194304",
    "lv_name": "snapd-vm-1",
    "lv_uuid": "ABCDEF-GHIJ-KLMN-OPQR-STUV-WXYZ-012345",
    "lv_attr": "sri-a-s---",
    "lv_layout": "linear",
    "lv_size": "104857600",
    "lv_metadata_size": "",
    "lv_tags": "a,snapd-vm.name=x",
    "origin": "lv",
    "pool_lv": "",
    "data_percent": "12.50",
    "metadata_percent": "",
    "lv_device_open": "",
    "vg_partial": "",
}
NAMES = st.from_regex(r"[A-Za-z0-9_+.][A-Za-z0-9_+.-]{0,20}", fullmatch=True)


def report(*rows: object) -> str:
    return json.dumps({"report": [{"lv": list(rows)}], "log": []})


def lv(**said: str) -> Lv:
    (found,) = lvmvolumes.parse(report({**ROW, **said}))
    return found


# -- names -----------------------------------------------------------------------------------------


@given(NAMES.filter(lambda name: not name.startswith("-")), NAMES)
def test_a_devices_name_is_parted_into_what_it_was_joined_from(vg: str, name: str) -> None:
    assert devicemapper.parted(devicemapper.joined(vg, name)) == [vg, name]


def test_what_a_volume_needs_inside_has_three_parts() -> None:
    assert devicemapper.parted("v--g-l--v-real") == ["v-g", "l-v", "real"]


# -- tags ------------------------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=60))
def test_tags_tell_what_they_were_made_of(domain: str) -> None:
    made = lvmtags.made("uuid-1", Tag("op", "label.1", "domain-uuid", domain, 5))
    assert all(lvmvolumes._TAG.fullmatch(tag) and len(tag) <= 1024 for tag in made)
    said = lvmtags.read([*made, "somebody-elses"])
    assert (said.snapshot, said.name) == ("uuid-1", "label.1")
    assert said.domain == domain.encode(errors="surrogateescape").decode(errors="replace")


def test_a_name_that_is_too_long_is_cut() -> None:
    made = lvmtags.made("u", Tag("op", "l", "d", "ü" * 5000, 5))
    assert max(map(len, made)) <= 1024
    assert lvmtags.read(made).domain.startswith("üüü")


@given(st.lists(st.text()))
def test_tags_of_others_may_be_anything(tags: list[str]) -> None:
    lvmtags.read(tags)
    lvmtags.read([f"snapd-vm.{tag}" for tag in tags])


# -- what lvs says ---------------------------------------------------------------------------------


def test_a_report_is_read() -> None:
    found = lv()
    assert (found.vg_uuid, found.uuid) == (
        "abcdefghijklmnopqrstuvwxyz012345",
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ012345",
    )
    assert (found.size, found.data_percent, found.metadata_percent) == (100 * MIB, 12.5, None)
    assert found.is_snapshot
    assert found.active
    assert not (found.writable or found.overflowed or found.opened or found.is_thin)
    assert found.tags == ("a", "snapd-vm.name=x")
    assert lv(lv_attr="sri-I-s---").overflowed
    assert lv(lv_attr="Vwi-a-tz--", lv_layout="thin,sparse").is_thin
    assert lv(lv_attr="swi-a-s---").writable
    assert lv(lv_device_open="open").opened


@pytest.mark.parametrize(
    "said",
    [
        {"lv_name": "../../etc"},
        {"lv_name": "-rf"},
        {"lv_name": "a b"},
        {"vg_name": ""},
        {"origin": "$(reboot)"},
        {"pool_lv": "a/b"},
        {"lv_size": "many"},
        {"lv_size": "1.5"},
        {"vg_free": None},
        {"lv_attr": ""},
        {"lv_tags": ["a"]},
    ],
)
def test_a_row_that_lvm_does_not_give_is_passed_over(said: dict[str, object]) -> None:
    assert [one.name for one in lvmvolumes.parse(report({**ROW, **said}, ROW))] == ["snapd-vm-1"]


@pytest.mark.parametrize("row", [None, 3, "x", [], {}, {"lv_name": "x"}])
def test_a_row_that_is_none_is_passed_over(row: object) -> None:
    assert lvmvolumes.parse(report(row)) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"report": []}', '{"report": [{"lv": 3}]}', "[" * 100000]
)
def test_what_is_no_report_is_an_error(text: str) -> None:
    with pytest.raises(StorageFailed):
        lvmvolumes.parse(text)


def test_tags_and_percentages_are_taken_as_anybody_may_have_written_them() -> None:
    found = lv(lv_tags="ok,a b,,\x1b[2J", data_percent="nan", metadata_percent="-1")
    assert found.tags == ("ok",)
    assert (found.data_percent, found.metadata_percent) == (None, None)


@pytest.mark.parametrize(
    ("stderr", "why"),
    [
        ("  Invalid thing.\n  Run `lvcreate --help' for more information.\n", "Invalid thing."),
        ("  WARNING: full\n  /dev/sdz: open failed\n  No room\n", "No room."),
        ("  Run `lvs --help' for more information.\n", "Run `lvs --help' for more information."),
        ("", "it gave no reason."),
    ],
)
def test_the_reason_is_the_first_line_that_gives_one(stderr: str, why: str) -> None:
    assert lvmvolumes.reason(stderr) == why


@pytest.mark.parametrize(
    ("why", "kind"),
    [
        ('Logical Volume "x" already exists in volume group "vg"', NameInUse),
        ('Volume group "vg" has insufficient free space (3 extents): 9 required.', NoSpace),
        ("Cannot create new thin volume, free space in thin pool vg/p reached threshold.", NoSpace),
        ("Logical volume vg/x in use.", Busy),
        ("Logical volume vg/x contains a filesystem in use.", Busy),
        ("Something else.", StorageFailed),
    ],
)
def test_what_lvm_says_has_its_error(why: str, kind: type[Exception]) -> None:
    assert lvmvolumes._kind_of(why) is kind


# -- room ------------------------------------------------------------------------------------------


def origin(size: int, free: int = 1 << 40) -> Lv:
    return lv(lv_size=str(size), vg_free=str(free), lv_attr="owi-aos---", origin="")


def test_a_thick_snapshot_has_the_size_that_was_asked_for_in_whole_extents() -> None:
    assert lvmsizes.thick_size(origin(1000 * MIB), 1, LvmConfig()) == EXTENT
    assert lvmsizes.thick_size(origin(1000 * MIB), 9 * MIB, LvmConfig()) == 12 * MIB


def test_else_a_share_and_never_more_than_the_volume_needs() -> None:
    config = LvmConfig(snapshot_percent=20, snapshot_min_mib=100)
    assert lvmsizes.thick_size(origin(1000 * MIB), 0, config) == 200 * MIB
    assert lvmsizes.thick_size(origin(200 * MIB), 0, config) == 100 * MIB
    small = origin(64 * MIB)
    assert lvmsizes.thick_size(small, 0, config) == lvmsizes.whole(small)
    assert lvmsizes.thick_size(small, 1 << 60, config) == lvmsizes.whole(small)
    assert 64 * MIB < lvmsizes.whole(small) <= 72 * MIB


def test_one_that_can_overflow_is_warned_of() -> None:
    big = origin(1000 * MIB)
    (warning,) = lvmsizes.thick("vda", big, 200 * MIB).warnings
    assert f"room for {200 * MIB} bytes of the {1000 * MIB}" in warning
    assert not lvmsizes.thick("vda", big, lvmsizes.whole(big)).warnings


def test_a_group_must_have_room_for_all_of_a_set() -> None:
    rooms = [lvmsizes.thick("vda", origin(1000 * MIB, 300 * MIB), 200 * MIB)] * 2
    lvmsizes.check_group("vg", rooms[:1])
    with pytest.raises(NoSpace, match="314572800 bytes free, and 419430400 are needed"):
        lvmsizes.check_group("vg", rooms)


def pool(data: str, metadata: str) -> Lv:
    said = {"data_percent": data, "metadata_percent": metadata}
    return lv(lv_size=str(1000 * MIB), lv_metadata_size=str(8 * MIB), lv_attr="twi-aotz--", **said)


def test_a_pool_must_have_room_for_data_and_metadata() -> None:
    of = lv(lv_size=str(100 * MIB), data_percent="50.00", lv_attr="Vwi-aotz--")
    assert not lvmsizes.thin("vda", of, pool("10.00", "10.00")).warnings
    new = lv(lv_size=str(100 * MIB), data_percent="0.00", lv_attr="Vwi-a-tz--")
    assert not lvmsizes.thin("vda", new, pool("97.00", "10.00")).warnings
    (warning,) = lvmsizes.thin("vda", of, pool("97.00", "10.00")).warnings
    assert f"up to {50 * MIB} bytes more" in warning
    with pytest.raises(NoSpace, match="thin pool of disk vda"):
        lvmsizes.thin("vda", of, pool("99.00", "10.00"))
    with pytest.raises(NoSpace, match="metadata"):
        lvmsizes.thin("vda", of, pool("10.00", "76.00"))


# -- what a revert copies --------------------------------------------------------------------------


def test_only_pages_that_differ_are_written(tmp_path: Path) -> None:
    page = 4096
    was = bytearray(os.urandom(20 * page))
    now = bytearray(was)
    for number in (0, 5, 6, 7, 19):
        now[number * page + 9] ^= 1
    (tmp_path / "was").write_bytes(was)
    (tmp_path / "now").write_bytes(now)
    with open(tmp_path / "was", "rb") as one, open(tmp_path / "now", "rb") as other:
        found = list(lvmrevert.differing(one.fileno(), other.fileno(), 0))
    assert [(at // page, len(data) // page) for at, data in found] == [(0, 1), (5, 3), (19, 1)]
    for at, data in found:
        now[at : at + len(data)] = data
    assert now == was


# -- what a revert must not harm -------------------------------------------------------------------


def test_snapshots_must_have_room_for_what_is_overwritten() -> None:
    origin = lv(lv_name="lv", lv_attr="owi-a-s---", lv_size=str(1024 * MIB), origin="")
    other = lv(lv_size=str(100 * MIB), data_percent="50.00")
    lvmsizes.check_overwriting(origin, [other], 30 * MIB)
    with pytest.raises(NoSpace, match="snapd-vm-1"):
        lvmsizes.check_overwriting(origin, [other], 40 * MIB)
    whole = lv(lv_size=str(lvmsizes.whole(origin)), data_percent="90.00")
    lost = lv(lv_attr="swi-I-s---", data_percent="100.00")
    lvmsizes.check_overwriting(origin, [whole, lost], 500 * MIB)


def test_the_ways_a_path_leads(tmp_path: Path) -> None:
    (tmp_path / "dm-1").touch()
    (tmp_path / "vg").mkdir()
    (tmp_path / "vg/lv").symlink_to("../dm-1")
    (tmp_path / "mine").symlink_to("vg/lv")
    (tmp_path / "loop").symlink_to("loop")
    paths = [str(tmp_path / name) for name in ("mine", "vg/lv", "dm-1")]
    assert list(folder.links(paths[0])) == paths
    assert list(folder.links(paths[2])) == paths[2:]
    assert len(list(folder.links(str(tmp_path / "loop")))) == 40


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        ('  Volume group "vg" not found\n  Cannot process volume group vg\n', GroupAbsent),
        ("  WARNING: PVID x not found on /dev/sdz\n  vg: metadata lost\n", StorageFailed),
        ('  Volume group "other" not found\n', StorageFailed),
    ],
)
def test_a_group_that_is_away_is_told_from_what_else_fails(
    monkeypatch: pytest.MonkeyPatch, stderr: str, kind: type[Exception]
) -> None:
    monkeypatch.setattr(command, "run", lambda *_, **__: Result(5, "", stderr))
    with pytest.raises(StorageFailed) as error:
        lvmvolumes.report("vg")
    assert type(error.value) is kind


# -- what is wrong with a group or pool ------------------------------------------------------------


@pytest.mark.parametrize(
    ("letter", "error"), [("F", StorageFailed), ("M", StorageFailed), ("D", NoSpace)]
)
def test_a_pool_that_can_take_none_is_told_before_the_freeze(
    letter: str, error: type[Exception]
) -> None:
    pool = lv(lv_name="pool", lv_attr=f"twi-aotz{letter}-", lv_layout="thin,pool", data_percent="")
    with pytest.raises(error, match="The thin pool vg/pool of disk vda") as raised:
        lvmsizes.thin("vda", lv(lv_attr="Vwi-a-tz--"), pool)
    assert type(raised.value) is error


def test_a_group_that_lacks_disks_is_told_before_the_freeze() -> None:
    lvmsizes.refuse_partial(lv())
    with pytest.raises(StorageFailed, match="lacks some of its physical volumes"):
        lvmsizes.refuse_partial(lv(vg_partial="partial"))


def test_a_domain_that_is_started_as_the_last_of_a_revert_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not told as reverted: what was written under the guest is written again."""
    (tmp_path / "snap").write_bytes(b"s" * (1 << 20))
    (tmp_path / "disk").write_bytes(b"d" * (1 << 20))
    tags = list[str]()
    monkeypatch.setattr(
        lvmvolumes, "retag", lambda *_, add="", remove="": tags.extend(filter(None, (add, remove)))
    )
    paths = {"device": tmp_path / "snap", "origin": tmp_path / "disk"}

    class Started:
        def read(self, uuid: str) -> Domain:
            return Domain(uuid, "web", 3, "running", "qemu", True, ())

    one = SimpleNamespace(**paths, snapshot="s", vg="vg", lv="lv", domain="uuid", name="n")
    revert = lvmrevert.VolumeRevert(Started())  # type: ignore[arg-type]
    with pytest.raises(InvalidState, match="was started"):
        revert._copy(one, None)  # type: ignore[arg-type]
    assert tags == [lvmtags.reverting("s")]
