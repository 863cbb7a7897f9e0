"""What callers say, and what is made of it: requests, and one clear error for each mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lxml import etree

from snapd_vm import request, safexml, schemas
from snapd_vm.errors import InvalidArgs, InvalidName, InvalidXML, MethodUnknown
from snapd_vm.model import DiskRequest, Flags, MethodRequest, Request

DISK = "<disk><target dev='vda'/></disk>"

FULL_DISK = """
<disk type='file' device='disk' snapshot='external' xmlns:q='urn:other'>
  <driver name='qemu' type='qcow2'/>
  <source file='/srv/a &amp; b.qcow2' index='3' startupPolicy='optional'>
    <seclabel model='dac' relabel='no'/>
  </source>
  <backingStore type='file' index='2'>
    <format type='qcow2'/>
    <source file='/srv/base.qcow2'/>
    <backingStore/>
  </backingStore>
  <mirror type='file' job='copy'><source file='/srv/m'/></mirror>
  <target dev='vda' bus='virtio'/>
  <q:source file='/etc/shadow'/><q:target dev='vdb'/>
  <alias name='virtio-disk0'/>
  <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
</disk>
"""


def disk(xml: str) -> DiskRequest:
    return request.create_request(xml, "", "", 0).disk


class TestDisk:
    def test_is_found_by_target_alone(self) -> None:
        assert disk(DISK) == DiskRequest("vda")

    def test_of_libvirt_itself_is_accepted_and_only_what_identifies_is_kept(self) -> None:
        assert disk(FULL_DISK) == DiskRequest("vda", {"file": "/srv/a & b.qcow2", "type": "file"})

    @pytest.mark.parametrize(
        ("xml", "source"),
        [
            ("<disk><source dev='/dev/vg/a'/></disk>", {"dev": "/dev/vg/a"}),
            (
                "<disk type='network'><source protocol='rbd' name='p/i'>"
                "<host name='mon'/></source></disk>",
                {"protocol": "rbd", "name": "p/i", "type": "network"},
            ),
            (
                "<disk type='volume'><source pool='p' volume='v' mode='host'/></disk>",
                {"pool": "p", "volume": "v", "type": "volume"},
            ),
        ],
    )
    def test_is_found_by_source_alone(self, xml: str, source: dict[str, str]) -> None:
        assert disk(xml) == DiskRequest("", source)

    @pytest.mark.parametrize("source", ["<source/>", "<source file=''/>", "<source index='1'/>"])
    def test_with_a_source_that_says_nothing_has_none(self, source: str) -> None:
        assert disk(f"<disk type='file'>{source}<target dev='sda'/></disk>") == DiskRequest("sda")

    def test_may_hold_a_method(self) -> None:
        found = disk("<disk><target dev='vda'/><diskSnapshot method='qemu'/></disk>")
        assert found.method == MethodRequest("qemu")

    @pytest.mark.parametrize(
        ("xml", "says"),
        [
            ("<disk/>", "<target dev='…'/> or a <source>"),
            ("<disk><source/></disk>", "<target dev='…'/> or a <source>"),
            ("<disk><target/></disk>", "line 1, element <target>"),
            ("<disk><target dev='../vda'/></disk>", "line 1, element <target>"),
            ("<disk><target dev='vda&#10;'/></disk>", "element <target>"),
            ("<disk><target dev='vda'/>\n<target dev='vdb'/></disk>", "line 2, element <target>"),
            ("<disk><source file='/a'/>\n<source file='/b'/></disk>", "line 2, element <source>"),
            ("<disk><source file='/a&#10;'/></disk>", "control characters"),
            (f"<disk><source file='/{'a' * 4096}'/></disk>", "4096 bytes"),
            ("<disk type='-x'><source file='/a'/></disk>", "disk's type"),
            ("<disks/>", "must be a <disk>"),
            ("<domain/>", "must be a <disk>"),
            ("<disk xmlns='urn:x'><target dev='vda'/></disk>", "must be a <disk>"),
            (
                DISK.replace("</disk>", "<diskSnapshot method='qemu'/>" * 2 + "</disk>"),
                "<diskSnapshot> only",
            ),
            (
                DISK.replace("</disk>", "\n<diskSnapshot method='qemu'><x/></diskSnapshot></disk>"),
                "line 2, element <x>",
            ),
            (
                "<disk><target dev='vda'/><diskSnapshot method='qemu' "
                "xmlns='https://example.org/xmlns/disk-snapshot/1'/></disk>",
                "without namespace",
            ),
        ],
    )
    def test_that_is_wrong_is_one_error(self, xml: str, says: str) -> None:
        with pytest.raises(InvalidXML, match=re.escape(says)):
            disk(xml)


UUID = "0f5c7a9e-1b2c-4d3e-8f90-a1b2c3d4e5f6"


def domain(head: str, devices: str = f"<devices>{DISK}</devices>") -> Request:
    xml = f"<domain type='kvm'>{head}{devices}</domain>"
    return request.root_request(xml, "", "", 0)


class TestRoot:
    def test_takes_a_domain_with_name_uuid_or_both(self) -> None:
        assert domain("<name>vm 1</name>").domain == "vm 1"
        assert domain(f"<uuid>\n {UUID.replace('-', '').upper()} </uuid>").uuid == UUID
        both = domain(f"<name>vm</name><uuid>{UUID}</uuid>")
        assert (both.domain, both.uuid, both.disk) == ("vm", UUID, DiskRequest("vda"))

    def test_takes_a_bare_disk(self) -> None:
        found = request.root_request("<disk><source file='/a'/></disk>", "", "", 0)
        assert (found.domain, found.uuid, found.disk.source) == ("", "", {"file": "/a"})

    @pytest.mark.parametrize(
        ("head", "devices", "says"),
        [
            ("", f"<devices>{DISK}</devices>", "<name> or a <uuid>"),
            ("<name/>", f"<devices>{DISK}</devices>", "<name> or a <uuid>"),
            ("<uuid>x</uuid>", f"<devices>{DISK}</devices>", "not a UUID"),
            (f"<uuid>{UUID}\n0</uuid>", f"<devices>{DISK}</devices>", "not a UUID"),
            ("<name>a</name><name>b</name>", f"<devices>{DISK}</devices>", "<name> only"),
            ("<name><b>a</b></name>", f"<devices>{DISK}</devices>", "nothing but text"),
            ("<name>a\n</name>", f"<devices>{DISK}</devices>", "control characters"),
            ("<name>a</name>", "", "has 0"),
            ("<name>a</name>", "<devices/>", "has 0"),
            ("<name>a</name>", DISK, "has 0"),
            ("<name>a</name>", f"<devices>{DISK * 2}</devices>", "has 2"),
            ("<name>a</name>", f"<devices>{DISK}</devices>" * 2, "<devices> only"),
            ("<name>a</name>", "<devices><disk/></devices>", "<target dev='…'/> or a <source>"),
        ],
    )
    def test_refuses_another_domain(self, head: str, devices: str, says: str) -> None:
        with pytest.raises(InvalidXML, match=re.escape(says)):
            domain(head, devices)

    def test_refuses_another_root(self) -> None:
        with pytest.raises(InvalidXML, match="a <domain> or a <disk>"):
            request.root_request("<network/>", "", "", 0)


class TestMethod:
    @pytest.mark.parametrize(
        ("xml", "method", "options"),
        [
            ("method='qemu'/>", "qemu", {}),
            (
                "method='qemu'> <overlay file='/p/d é/n.qcow2'/>? </".replace("?", ""),
                "qemu",
                {"overlay": "/p/d é/n.qcow2"},
            ),
            ("method='qemu'><overlay file='/p/..a/.b'/></", "qemu", {"overlay": "/p/..a/.b"}),
            ("method='lvm'/>", "lvm", {}),
            (
                "method='lvm'><device path='/dev/vg/lv4'/><size unit='GiB'>2</size></",
                "lvm",
                {"device": "/dev/vg/lv4", "size": str(2 << 30)},
            ),
            ("method='btrfs'><subvolume path='/srv/vm'/></", "btrfs", {"subvolume": "/srv/vm"}),
            ("method='btrfs'><subvolume path='/'/></", "btrfs", {"subvolume": "/"}),
            ("method='zfs'><dataset name='tank/v m'/></", "zfs", {"dataset": "tank/v m"}),
            ("method='reflink'/>", "reflink", {}),
            ("method='rbd'><image pool='p' name='i'/></", "rbd", {"image": "p/i"}),
        ],
    )
    def test_form_of_the_contract(self, xml: str, method: str, options: dict[str, str]) -> None:
        xml = f"<diskSnapshot {xml}" + ("diskSnapshot>" if xml.endswith("</") else "")
        found = request.method_request(xml)
        assert found == MethodRequest(method, options)
        assert found.names_place == bool(set(options) - {"size"})

    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            ("<size>4096</size>", 4096),
            ("<size unit='bytes'> 7\n</size>", 7),
            ("<size unit='B'>7</size>", 7),
            ("<size unit='KB'>2</size>", 2000),
            ("<size unit='k'>2</size>", 2048),
            ("<size unit='KiB'>2</size>", 2048),
            ("<size unit='MB'>3</size>", 3 * 10**6),
            ("<size unit='M'>3</size>", 3 << 20),
            ("<size unit='tib'>1</size>", 1 << 40),
            ("<size unit='EiB'>7</size>", 7 << 60),
            ("<size>9223372036854775807</size>", 2**63 - 1),
        ],
    )
    def test_sizes_are_counted_as_libvirt_does(self, size: str, expected: int) -> None:
        found = request.method_request(f"<diskSnapshot method='lvm'>{size}</diskSnapshot>")
        assert found.options == {"size": str(expected)}
        assert not found.names_place

    @pytest.mark.parametrize(
        ("method", "inside", "element"),
        [
            ("qemu", "<device path='/dev/a'/>", "device"),
            ("qemu", "<overlay/>", "overlay"),
            ("qemu", "<overlay file='/a' path='/b'/>", "overlay"),
            ("qemu", "<overlay file='/a'/><overlay file='/b'/>", "overlay"),
            ("qemu", "text", "diskSnapshot"),
            ("qemu", "<overlay file='/a'>text</overlay>", "overlay"),
            *(
                ("qemu", f"<overlay file='{path}'/>", "overlay")
                for path in (
                    *("", "/", "a", "./a", "//a", "/a//b", "/a/", "/a/../b", "/..", "/a/."),
                    *("/a&#10;", "/&#127;", "/a&#x85;", "/a&#x2028;b", "/" + "é" * 2048),
                )
            ),
            ("lvm", "<device path='dev/a'/>", "device"),
            *(
                ("lvm", f"<size{size}</size>", "size")
                for size in (
                    *(">0", ">-1", ">1.5", ">", ">x", ">٣", ">9223372036854775808"),
                    *(" unit='EiB'>8", " unit='YB'>1", " unit=''>1", " unit='KB&#10;'>1"),
                    ">" + "9" * 5000,
                )
            ),
            ("btrfs", "<subvolume path='/a/'/>", "subvolume"),
            *(
                ("zfs", f"<dataset name='{name}'/>", "dataset")
                for name in ("", "-tank", "tank/-a", "tank//a", "tank/..", "/tank", "tank@s", "1a")
            ),
            ("reflink", "<overlay file='/a'/>", "overlay"),
            ("rbd", "<image pool='p'/>", "image"),
            ("rbd", "<image pool='p' name='-i'/>", "image"),
            ("rbd", "<image pool='p' name='..'/>", "image"),
            ("rbd", "<image pool='p' name='i@s'/>", "image"),
            ("rbd", "<image pool='p:conf=/x' name='i'/>", "image"),
        ],
    )
    def test_content_that_is_not_allowed_is_named_by_line_and_element(
        self, method: str, inside: str, element: str
    ) -> None:
        xml = f"<diskSnapshot\n method='{method}'>{inside}</diskSnapshot>"
        with pytest.raises(InvalidXML, match=rf"line \d.*element <{element}>") as caught:
            request.method_request(xml)
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize("method", ["backup", "ceph", "Qemu", "x" * 32, "my_own-1"])
    def test_that_is_not_known_is_unknown_whatever_it_holds(self, method: str) -> None:
        with pytest.raises(MethodUnknown, match=method):
            request.method_request(f"<diskSnapshot method='{method}'><x y='z'/></diskSnapshot>")

    @pytest.mark.parametrize("method", ["", "-x", "1", "a b", "a/b", "x" * 33, "qemu&#10;", "é"])
    def test_whose_name_is_none_is_invalid(self, method: str) -> None:
        with pytest.raises(InvalidXML, match="line 1, element <diskSnapshot>"):
            request.method_request(f"<diskSnapshot method='{method}'/>")

    @pytest.mark.parametrize("xml", ["<diskSnapshot/>", "<disk/>", " ", "qemu"])
    def test_must_be_one(self, xml: str) -> None:
        with pytest.raises(InvalidXML):
            request.create_request(DISK, xml, "", 0)

    def test_of_the_argument_comes_before_the_embedded_one(self) -> None:
        xml = "<disk><target dev='vda'/><diskSnapshot method='lvm'/></disk>"
        found = request.create_request(xml, "<diskSnapshot method='qemu'/>", "", 0)
        assert found.wanted_method == MethodRequest("qemu")
        found = request.create_request(xml, "", "", 0)
        assert found.wanted_method == MethodRequest("lvm")

    def test_schema_as_a_whole_agrees_with_its_parts(self) -> None:
        path = Path(safexml.__file__).parent / "data" / "diskSnapshot.rng"
        schema = etree.RelaxNG(etree.parse(path))
        for method in schemas.KNOWN_METHODS:
            assert schema.validate(etree.XML(f"<diskSnapshot method='{method}'/>"))
            bad = etree.XML(f"<diskSnapshot method='{method}'><bogus/></diskSnapshot>")
            assert not schema.validate(bad)
        other = etree.XML("<diskSnapshot method='mine'>a<b c='d'><e/></b></diskSnapshot>")
        assert schema.validate(other)


@pytest.mark.parametrize("name", ["", "a", "0", "A.b_c-9", "x" * 64, "nightly..1"])
def test_a_name_that_is_fine(name: str) -> None:
    assert request.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "-a",
            ".a",
            "_a",
            "a/b",
            "../a",
            "/",
            "a b",
            "a\n",
            "\n",
            "x" * 65,
            "é",
            "٣",
            "1٣",
            "a\0",
        ),
        *("ａ", "\u212a", "a\u200b", "a;b", "$(a)", "\udcff"),
    ],
)
def test_a_name_that_is_not(name: str) -> None:
    with pytest.raises(InvalidName, match="1 to 64"):
        request.create_request(DISK, "", name, 0)


def test_flags_are_none_required_or_no_quiesce() -> None:
    assert [request.check_flags(f) for f in (0, 1, 2)] == [
        Flags(0),
        Flags.QUIESCE_REQUIRED,
        Flags.NO_QUIESCE,
    ]
    for flags in (3, 4, 5, 8, 1 << 31, 2**32 - 1, -1):
        with pytest.raises(InvalidArgs, match=r"1 \(QUIESCE_REQUIRED\) or 2 \(NO_QUIESCE\)"):
            request.root_request(DISK, "", "", flags)
