"""libvirt's XML read into the model, and what is written for libvirt and for the callers."""

from __future__ import annotations

import pytest
from lxml import etree

from snapd_vm.errors import InvalidXML, NoSuchDisk, StorageFailed
from snapd_vm.model import NAMESPACE, AgentChannel, Consistency, Disk, Domain
from snapd_vm.virt import domainxml

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"

QCOW2 = """<disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
      <source file='/srv/vm &amp; "co"/é.qcow2' startupPolicy='optional' index='3'>
        <seclabel model='dac' relabel='no'/>
        <privateData><nodenames/></privateData>
      </source>
      <backingStore type='file' index='4'>
        <format type='qcow2'/>
        <source file='/srv/base.qcow2'/>
        <backingStore type='block' index='5'>
          <format type='raw'/>
          <source dev='/dev/vg/golden'/>
          <backingStore/>
        </backingStore>
      </backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>S1</serial>
      <alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x0a' function='0x1'/>
    </disk>"""

RBD = """<disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <auth username='libvirt'>
        <secret type='ceph' uuid='2ec115d7-3a88-3ceb-bc12-0ac909a6fd87'/>
      </auth>
      <source protocol='rbd' name='pool/image' index='1' tls='no'>
        <host name='mon1' port='6789'/>
        <host name='mon2' port='6789'/>
        <snapshot name='golden'/>
        <config file='/etc/ceph/x.conf'/>
      </source>
      <target dev='vdb' bus='virtio'/>
      <address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/>
    </disk>"""

CHANNEL = """<channel type='unix'>
      <source mode='bind' path='{path}'/>
      <target type='virtio' name='{name}' {state}/>
    </channel>"""


def domain_xml(*devices: str, live: bool = True) -> str:
    indented = "\n    ".join(devices)
    number = " id='7'" if live else ""
    return f"""<domain type='kvm'{number}>
  <name>vm 1 &lt;é&gt;</name>
  <uuid>{UUID}</uuid>
  <metadata>
    <!-- kept -->
    <q:x xmlns:q='urn:q'><![CDATA[<&>]]></q:x>
  </metadata>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {indented}
  </devices>
</domain>
"""


def no_pool(_pool: str, _volume: str) -> tuple[str, str] | None:
    raise AssertionError("no pool was named")


def parse(*devices: str, active: bool = True) -> Domain:
    return domainxml.parse_domain(
        domain_xml(*devices, live=active),
        None,
        id=7 if active else -1,
        state="running" if active else "shutoff",
        persistent=True,
        resolve_volume=no_pool,
    )


def read(disk: str) -> Disk:
    (found,) = parse(disk).disks
    return found


def simple(source: str, kind: str = "file", more: str = "") -> str:
    return f"<disk type='{kind}'>{source}<target dev='vda'/>{more}</disk>"


class TestDomain:
    def test_head(self) -> None:
        found = parse(QCOW2, "<tpm model='tpm-tis'/>")
        assert (found.uuid, found.name, found.id) == (UUID, "vm 1 <é>", 7)
        assert (found.state, found.driver, found.persistent) == ("running", "kvm", True)
        assert found.tpm
        assert not found.nvram

    def test_disks_in_use_and_of_the_next_start_are_told_apart(self) -> None:
        found = domainxml.parse_domain(
            domain_xml(simple("<source file='/overlay'/>")),
            domain_xml(simple("<source file='/base'/>"), live=False),
            id=7,
            state="running",
            persistent=True,
            resolve_volume=no_pool,
        )
        assert [d.path for d in found.disks] == ["/overlay"]
        assert [d.path for d in found.persistent_disks] == ["/base"]

    def test_off_has_both_the_same_and_transient_has_no_next_start(self) -> None:
        off = parse(QCOW2, active=False)
        assert off.disks == off.persistent_disks != ()
        transient = domainxml.parse_domain(
            domain_xml(QCOW2),
            None,
            id=7,
            state="running",
            persistent=False,
            resolve_volume=no_pool,
        )
        assert transient.persistent_disks == ()

    def test_of_libvirts_test_driver_is_read(self) -> None:
        libvirt = pytest.importorskip("libvirt")
        connection = libvirt.open("test:///default")
        try:
            domain = connection.lookupByName("test")
            found = domainxml.parse_domain(
                domain.XMLDesc(),
                domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE),
                id=domain.ID(),
                state="running",
                persistent=True,
                resolve_volume=no_pool,
            )
            changed = domainxml.replace_source(
                domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), "vda", "/x & y", "file", "qcow2"
            )
            again = connection.defineXML(changed).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        finally:
            connection.close()
        assert (found.name, found.driver, found.uuid) == ("test", "test", domain.UUIDString())
        (disk,) = found.disks
        assert (disk.target, disk.path, disk.address) == (
            "vda",
            "/guest/diskimage1",
            "0000:01:00.0",
        )
        assert "<source file='/x &amp; y'/>" in again
        assert "type='qcow2'" in again

    def test_larger_than_64_kib_is_read_and_than_16_mib_is_not(self) -> None:
        many = [simple("<source file='/a'/>").replace("vda", f"vd{i}") for i in range(2000)]
        assert len(parse(*many).disks) == 2000
        with pytest.raises(InvalidXML):
            parse("<!--" + "x" * (16 << 20) + "-->")


class TestDisk:
    def test_in_a_file(self) -> None:
        disk = read(QCOW2)
        assert (disk.target, disk.device, disk.type) == ("vda", "disk", "file")
        assert (disk.format, disk.serial, disk.address) == ("qcow2", "S1", "0000:04:0a.1")
        assert disk.path == '/srv/vm & "co"/é.qcow2'
        assert etree.fromstring(disk.source_xml).items() == [("file", disk.path)]
        assert disk.source_xml.startswith("<source ")
        assert len(etree.fromstring(disk.source_xml)) == 0
        assert disk.declared_source == {"type": "file", "file": disk.path}
        assert disk.chain == ("/srv/base.qcow2", "/dev/vg/golden")

    def test_chain_is_of_what_is_on_this_host(self) -> None:
        inner = "<backingStore type='file'><source file='/base'/></backingStore>"
        middle = "<source protocol='nbd' name='x'/>" + inner
        store = f"<backingStore type='network'>{middle}</backingStore>"
        assert read(simple("<source file='/a'/>", more=store)).chain == ("/base",)

    def test_on_a_block_device(self) -> None:
        disk = read(simple("<source dev='/dev/vg/a' index='1'/>", "block"))
        assert (disk.type, disk.path) == ("block", "/dev/vg/a")
        assert disk.source_xml == '<source dev="/dev/vg/a"/>'

    def test_on_ceph_keeps_hosts_snapshot_config_and_which_secret(self) -> None:
        disk = read(RBD)
        assert (disk.type, disk.path) == ("network", "")
        assert disk.source_xml == (
            '<source protocol="rbd" name="pool/image" tls="no"><host name="mon1" port="6789"/>'
            '<host name="mon2" port="6789"/><snapshot name="golden"/>'
            '<config file="/etc/ceph/x.conf"/><auth username="libvirt">'
            '<secret type="ceph" uuid="2ec115d7-3a88-3ceb-bc12-0ac909a6fd87"/></auth></source>'
        )

    def test_in_a_source_leaves_out_labels_cookies_and_whatever_is_secret(self) -> None:
        disk = read(
            simple(
                """<source protocol='https' name='i' query='a=1'>
                <host name='h' port='443'/><ssl verify='no'/>
                <cookies><cookie name='s'>SECRET</cookie></cookies>
                <auth username='u' x='SECRET'><secret type='iscsi' usage='n' x='SECRET'/>
                  <password>SECRET</password></auth>
                <encryption format='luks'><secret type='passphrase' uuid='SECRET'/></encryption>
                <reservations managed='yes'/><seclabel model='dac'/><keyfile path='SECRET'/>
                <slices><slice type='storage' offset='12' size='34'/></slices></source>""",
                "network",
            )
        )
        assert disk.encrypted
        assert disk.source_xml == (
            '<source protocol="https" name="i" query="a=1"><host name="h" port="443"/>'
            '<ssl verify="no"/><auth username="u"><secret type="iscsi" usage="n"/></auth>'
            '<slices><slice type="storage" offset="12" size="34"/></slices></source>'
        )

    @pytest.mark.parametrize(
        ("resolved", "kind", "path", "source"),
        [
            (("file", "/pool/a&b"), "file", "/pool/a&b", '<source file="/pool/a&amp;b"/>'),
            (("block", "/dev/vg/v"), "block", "/dev/vg/v", '<source dev="/dev/vg/v"/>'),
            (
                ("network", "<source protocol='rbd' name='rbd/v'><host name='h'/></source>"),
                "network",
                "",
                '<source protocol="rbd" name="rbd/v"><host name="h"/></source>',
            ),
            (None, "volume", "", '<source pool="p" volume="v"/>'),
        ],
    )
    def test_in_a_pool_counts_as_what_the_volume_is(
        self, resolved: tuple[str, str] | None, kind: str, path: str, source: str
    ) -> None:
        asked = []

        def resolve(pool: str, volume: str) -> tuple[str, str] | None:
            asked.append((pool, volume))
            return resolved

        (disk,) = domainxml.parse_domain(
            domain_xml(simple("<source pool='p' volume='v' index='2'/>", "volume")),
            None,
            id=7,
            state="running",
            persistent=False,
            resolve_volume=resolve,
        ).disks
        assert asked == [("p", "v")]
        assert (disk.type, disk.path, disk.source_xml) == (kind, path, source)
        assert disk.declared_source == {"type": "volume", "pool": "p", "volume": "v"}

    @pytest.mark.parametrize("source", ["", "<source/>", "<source startupPolicy='optional'/>"])
    def test_that_is_empty_has_no_source(self, source: str) -> None:
        disk = read(simple(source))
        assert (disk.source_xml, disk.path) == ("", "")

    def test_type_is_not_mistaken_for_the_sources_own(self) -> None:
        nvme = "<source type='pci' managed='yes' namespace='1'><address bus='0x01'/></source>"
        assert read(simple(nvme, "nvme")).declared_source["type"] == "nvme"

    def test_whose_format_libvirt_does_not_say_has_none(self) -> None:
        assert read(simple("<source file='/a'/>")).format == ""

    @pytest.mark.parametrize(("kind", "format"), [("test", "raw"), ("xen", "raw"), ("vbox", "")])
    def test_but_where_libvirt_takes_it_for_raw(self, kind: str, format: str) -> None:  # noqa: A002
        for driver in ("", "<driver name='any'/>"):
            disk = simple("<source file='/a'/>", more=driver)
            xml = domain_xml(disk, live=False).replace(
                "<domain type='kvm'", f"<domain type='{kind}'"
            )
            found = domainxml.parse_domain(
                xml, None, id=-1, state="shutoff", persistent=True, resolve_volume=no_pool
            )
            assert (found.driver, found.disks[0].format) == (kind, format)

    @pytest.mark.parametrize("flag", ["readonly", "shareable", "transient", "mirror"])
    def test_flag(self, flag: str) -> None:
        assert getattr(read(simple("<source file='/a'/>", more=f"<{flag}/>")), flag)
        assert not getattr(read(QCOW2), flag)

    def test_encrypted_either_way(self) -> None:
        encryption = "<encryption format='luks'/>"
        assert read(simple("<source file='/a'/>", more=encryption)).encrypted
        assert read(simple(f"<source file='/a'>{encryption}</source>")).encrypted
        assert not read(QCOW2).encrypted

    def test_address_that_is_not_pci_is_none(self) -> None:
        drive = "<address type='drive' controller='0' bus='0' target='0' unit='0'/>"
        assert read(simple("", more=drive)).address == ""

    def test_xml_is_the_whole_disk_alone(self) -> None:
        disk = read(QCOW2)
        assert etree.fromstring(disk.xml).find("backingStore/format") is not None
        assert disk.xml.endswith("</disk>")
        assert domainxml.disk_xml(domain_xml(RBD, QCOW2), "vda") == disk.xml
        with pytest.raises(NoSuchDisk):
            domainxml.disk_xml(domain_xml(QCOW2), "vdb")


def channel(name: str, path: str = "/run/q.sock", state: str = "") -> str:
    return CHANNEL.format(name=name, path=path, state=state)


OWN = "org.qemu.guest_agent.0"
OTHER = "org.example.guest_agent.1"


class TestAgent:
    @pytest.mark.parametrize(
        ("channels", "agent"),
        [
            ([], None),
            ([channel("org.spice.0")], None),
            ([channel(OWN, state="state='connected'")], AgentChannel(OWN, "", True)),
            ([channel(OWN, state="state='disconnected'")], AgentChannel(OWN, "", False)),
            ([channel(OWN)], AgentChannel(OWN, "", False)),
            ([channel(OTHER, "/a &amp; b")], AgentChannel(OTHER, "/a & b", True)),
            ([channel(OTHER), channel(OWN)], AgentChannel(OWN, "", False)),
            ([channel(OTHER, "/1"), channel(OTHER, "/2")], AgentChannel(OTHER, "/1", True)),
            ([channel(OTHER).replace("bind", "connect")], None),
            ([channel(OTHER).replace("type='unix'", "type='pty'")], None),
            ([channel(OWN).replace("type='unix'", "type='spicevmc'")], None),
        ],
    )
    def test_channel(self, channels: list[str], agent: AgentChannel | None) -> None:
        assert parse(*channels).agent == agent

    def test_is_not_connected_while_the_domain_is_off(self) -> None:
        for name in (OWN, OTHER):
            found = parse(channel(name, state="state='connected'"), active=False).agent
            assert found is not None
            assert not found.connected


class TestBackupSource:
    SNAPSHOT = "/org/example/DiskSnapshot/snapshot/_1"

    def make(self, xml: str, image_format: str = "qcow2") -> etree._Element:
        text = domainxml.backup_source(
            read(xml),
            format=image_format,
            consistency=Consistency.QUIESCED,
            snapshot_path=self.SNAPSHOT,
        )
        assert text.startswith("<source ")
        assert f'xmlns:ds="{NAMESPACE}"' in text
        return etree.fromstring(text)

    @pytest.mark.parametrize(("xml", "kind"), [(QCOW2, "file"), (RBD, "network")])
    def test_is_the_source_and_what_to_know_of_it(self, xml: str, kind: str) -> None:
        source = self.make(xml)
        own = {k: v for k, v in source.attrib.items() if str(k).startswith("{")}
        assert own == {
            f"{{{NAMESPACE}}}type": kind,
            f"{{{NAMESPACE}}}format": "qcow2",
            f"{{{NAMESPACE}}}consistency": "quiesced",
            f"{{{NAMESPACE}}}snapshot": self.SNAPSHOT,
        }
        for name in own:
            del source.attrib[name]
        etree.cleanup_namespaces(source)
        assert etree.tostring(source, encoding="unicode") == read(xml).source_xml

    def test_changes_in_consistency_and_snapshot_alone(self) -> None:
        quiesced = etree.tostring(self.make(RBD), encoding="unicode")
        path = f"{{{NAMESPACE}}}snapshot"
        former = etree.fromstring(quiesced).get(path) or ""
        crash = domainxml.with_attributes(
            quiesced, consistency=Consistency.CRASH, snapshot_path="/other"
        )
        expected = quiesced.replace('"quiesced"', '"crash"').replace(former, "/other")
        assert crash == expected != quiesced


class TestReplaceSource:
    def test_changes_one_disks_image_and_nothing_else(self) -> None:
        before = domain_xml(RBD, QCOW2, live=False)
        after = domainxml.replace_source(before, "vda", "/o &'\"é<", "file", "raw")
        start, end = before.index("<backingStore"), before.rindex("</backingStore>")
        expected = (
            (before[:start].rstrip() + before[end + len("</backingStore>") :])
            .replace("<driver name='qemu' type='qcow2'", "<driver name='qemu' type='raw'")
            .replace("file='/srv/vm &amp; \"co\"/é.qcow2'", "file='/o &amp;&apos;&quot;é&lt;'")
            .replace(" index='3'", "")
            .replace("<privateData><nodenames/></privateData>\n      ", "")
            .replace("relabel='no'/>\n        </source>", "relabel='no'/>\n      </source>")
        )
        assert etree.canonicalize(after) == etree.canonicalize(expected)
        assert "<!-- kept -->" in after
        assert "<![CDATA[<&>]]>" in after
        assert parse_again(after).path == "/o &'\"é<"

    def test_of_a_volume_or_device_becomes_a_file(self) -> None:
        for disk in (
            simple("<source pool='p' volume='v'/>", "volume"),
            simple("<source dev='/dev/a'><reservations/></source>", "block"),
            simple(""),
        ):
            after = domainxml.replace_source(domain_xml(disk), "vda", "/o", "file", "qcow2")
            found = parse_again(after)
            assert (found.type, found.format, found.path) == ("file", "qcow2", "/o")
            assert found.declared_source == {"type": "file", "file": "/o"}
            assert "<reservations" not in found.xml

    def test_of_a_file_becomes_a_device(self) -> None:
        after = domainxml.replace_source(domain_xml(QCOW2), "vda", "/dev/x", "block", "raw")
        found = parse_again(after)
        assert (found.type, found.format, found.path) == ("block", "raw", "/dev/x")

    def test_wants_a_disk_that_is_there_and_a_path_that_can_be_one(self) -> None:
        with pytest.raises(NoSuchDisk):
            domainxml.replace_source(domain_xml(QCOW2), "vdb", "/o", "file", "raw")
        for path in ("/a\nb", "/a\0", "/a\x7f"):
            with pytest.raises(StorageFailed):
                domainxml.replace_source(domain_xml(QCOW2), "vda", path, "file", "raw")


def parse_again(xml: str) -> Disk:
    found = domainxml.parse_domain(
        xml, None, id=-1, state="shutoff", persistent=True, resolve_volume=no_pool
    ).disk("vda")
    assert found is not None
    return found


class TestSnapshotXml:
    def test_takes_the_named_disks_and_says_no_to_all_others(self) -> None:
        xml = domainxml.snapshot_xml(["vda", "sda", "vdb"], {"vdb": ("/o &\"é'", "qcow2")})
        assert etree.canonicalize(xml) == etree.canonicalize(
            "<domainsnapshot><disks><disk name='vda' snapshot='no'/>"
            "<disk name='sda' snapshot='no'/>"
            "<disk name='vdb' snapshot='external' type='file'><driver type='qcow2'/>"
            "<source file='/o &amp;&quot;é&apos;'/></disk></disks></domainsnapshot>"
        )

    def test_refuses_a_path_that_libvirt_would_read_otherwise(self) -> None:
        with pytest.raises(StorageFailed):
            domainxml.snapshot_xml(["vda"], {"vda": ("/a\nb", "qcow2")})

    def test_targets_are_those_of_the_domain(self) -> None:
        assert list(domainxml.targets(domain_xml(QCOW2, RBD))) == ["vda", "vdb"]


def test_a_mirror_is_ready_when_libvirt_says_so() -> None:
    for mirror, ready in (
        ("", False),
        ("<mirror/>", False),
        ("<mirror ready='abort'/>", False),
        ("<mirror ready='yes'/>", True),
    ):
        xml = domain_xml(simple("<source file='/a'/>", more=mirror))
        assert domainxml.mirror_ready(xml, "vda") is ready
