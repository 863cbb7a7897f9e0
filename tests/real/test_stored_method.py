"""SetMethod and GetMethod: a disk's method, kept in its domain's metadata by the real libvirt."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from lxml import etree

from snapd_vm.model import NAMESPACE
from tests.lab.blockdev import Mounted
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real.api import DOMAIN, VDA, Api, path_of
from tests.real.conftest import Connect
from tests.real.places import CONFIG, INACTIVE, LIVE, Places, reconnected, refused
from tests.real.test_delete import delete
from tests.real.test_reflink_files import cloning, guest_on, raw
from tests.real.test_revert import places

__all__ = ["cloning", "places"]

QEMU = "<diskSnapshot method='qemu'/>"
ELEMENT = 2  # VIR_DOMAIN_METADATA_ELEMENT


async def set_method(api: Api, guest: Guest, method_xml: str, disk_xml: str = VDA) -> None:
    assert await api.call(path_of(guest), DOMAIN, "SetMethod", "ss", disk_xml, method_xml) == []


async def get_method(api: Api, guest: Guest, disk_xml: str = VDA) -> str:
    return str((await api.call(path_of(guest), DOMAIN, "GetMethod", "s", disk_xml))[0])


async def chosen(api: Api, guest: Guest) -> tuple[str, str]:
    """The method of vda, and why it."""
    row = next(row for row in await api.disks(guest) if row["target"] == "vda")
    return row["method"], row["reason"]


def as_stored(text: str) -> bytes:
    return etree.tostring(etree.fromstring(text), method="c14n")


def in_metadata(guest: Guest, flags: int = 0) -> bool:
    return NAMESPACE in guest.domain.XMLDesc(flags)


async def test_kept_for_what_runs_and_for_what_starts_next(
    daemon: Lab, api: Api, connect: Connect, places: Places, cloning: Mounted
) -> None:
    guest = await guest_on(api, places, raw(cloning.path))
    default = await chosen(api, guest)
    assert default[0] != "qemu"
    assert await get_method(api, guest) == ""
    await set_method(api, guest, QEMU)
    assert as_stored(await get_method(api, guest)) == as_stored(QEMU)
    assert await chosen(api, guest) == ("qemu", "stored for the disk")
    assert (await api.plan(guest))["method"] == "qemu"

    guest.domain.create()
    assert await chosen(api, guest) == ("qemu", "stored for the disk")
    await set_method(api, guest, "")
    assert not in_metadata(guest)
    assert not in_metadata(guest, INACTIVE)
    assert await chosen(api, guest) == default
    await set_method(api, guest, QEMU)
    assert in_metadata(guest)
    assert in_metadata(guest, INACTIVE)
    created = await api.create(guest)
    assert created.modified_disk
    asked = await api.create(guest, method_xml="<diskSnapshot method='qemu'/>", name="asked")
    for one in (asked, created):
        await delete(api, one)

    daemon.libvirtd.restart()
    await reconnected(api, guest)
    assert as_stored(await get_method(api, guest)) == as_stored(QEMU)
    guest.domain.destroy()
    assert await chosen(api, guest) == ("qemu", "stored for the disk")
    xml = guest.domain.XMLDesc(INACTIVE)
    guest.domain.connect().defineXML(xml)
    assert as_stored(await get_method(api, guest)) == as_stored(QEMU)
    daemon.daemon.stop()
    daemon.daemon.start({})
    api = await connect()
    assert as_stored(await get_method(api, guest)) == as_stored(QEMU)


async def test_each_disk_has_its_own_and_other_metadata_stays(
    daemon: Lab, api: Api, places: Places
) -> None:
    guest = places.guest(places.disk(), places.disk())
    await places.known(api)
    guest.domain.setMetadata(ELEMENT, "<theirs n='1'/>", "x", "urn:theirs", CONFIG)
    overlay = (
        "<diskSnapshot method='qemu'><overlay file='/srv/with &amp; &lt;.qcow2'/></diskSnapshot>"
    )
    vdb = "<disk><target dev='vdb'/></disk>"
    await set_method(api, guest, QEMU)
    await refused(set_method(api, guest, overlay, vdb), "MethodNotSupported")  # not a place for it
    folder = Path(guest.disk("vdb").path).parent
    overlay = overlay.replace("/srv", str(folder))
    await set_method(api, guest, overlay, vdb)
    assert as_stored(await get_method(api, guest)) == as_stored(QEMU)
    assert as_stored(await get_method(api, guest, vdb)) == as_stored(overlay)
    made = await api.create(guest, vdb)
    assert made.overlay == str(folder / "with & <.qcow2")
    await refused(api.create(guest, vdb), "NameInUse")
    await delete(api, made)
    await set_method(api, guest, "")
    assert (await get_method(api, guest), in_metadata(guest)) == ("", True)
    assert as_stored(await get_method(api, guest, vdb)) == as_stored(overlay)
    await set_method(api, guest, "", vdb)
    assert not in_metadata(guest)
    assert "urn:theirs" in guest.domain.XMLDesc()


async def test_bad_ones_are_refused_and_change_nothing(
    daemon: Lab, api: Api, places: Places
) -> None:
    guest = places.guest()
    await places.known(api)
    await set_method(api, guest, QEMU)
    before = guest.domain.XMLDesc()
    for method_xml, disk_xml, error in (
        ("<diskSnapshot method='nonsense'/>", VDA, "MethodUnknown"),
        ("<diskSnapshot method='qemu'><size>1</size></diskSnapshot>", VDA, "InvalidXML"),
        ("<diskSnapshot method='rbd'/>", VDA, "MethodNotSupported"),
        (QEMU, "<disk><target dev='vdz'/></disk>", "NoSuchDisk"),
        (QEMU, "<disk><target dev='vda'/><source file='/else'/></disk>", "DiskMismatch"),
        ("", "<disk><target dev='vdz'/></disk>", "NoSuchDisk"),
    ):
        await refused(set_method(api, guest, method_xml, disk_xml), error)
    assert guest.domain.XMLDesc() == before


@pytest.mark.parametrize(
    ("stored", "error"),
    [
        ("<diskSnapshot method='nonsense'/>", "MethodUnknown"),
        ("<diskSnapshot method='qemu'><evil/></diskSnapshot>", "InvalidXML"),
        ("<diskSnapshot/>", "InvalidXML"),
        (
            "<diskSnapshot method='qemu'><overlay file='/etc/../etc/x'/></diskSnapshot>",
            "InvalidXML",
        ),
        (
            "<diskSnapshot method='qemu'><overlay file='/etc/passwd'/></diskSnapshot>",
            "MethodNotSupported",
        ),
    ],
)
async def test_what_others_have_written_there_is_checked_at_use(
    daemon: Lab, api: Api, places: Places, stored: str, error: str
) -> None:
    guest = places.guest()
    await places.known(api)
    text = f"<disks><disk target='vda'>{stored}</disk></disks>"
    guest.domain.setMetadata(ELEMENT, text, "whatever", NAMESPACE, CONFIG)
    found = await refused(api.create(guest), error)
    assert found.text.startswith("The method stored for disk vda can't be used, so name another")
    method, reason = await chosen(api, guest)
    assert (method, reason) == ("", found.text)
    made = await api.create(guest, method_xml=QEMU)  # another can be named
    await delete(api, made)
    await set_method(api, guest, "")
    await delete(api, await api.create(guest))


async def test_of_a_transient_domain(daemon: Lab, api: Api, places: Places) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    guest.domain.undefine()
    await set_method(api, guest, QEMU)
    assert in_metadata(guest)
    assert await chosen(api, guest) == ("qemu", "stored for the disk")


async def test_changed_behind_our_back(daemon: Lab, api: Api, places: Places) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    await set_method(api, guest, QEMU)
    guest.domain.setMetadata(ELEMENT, None, "snapd-vm", NAMESPACE, LIVE)
    assert await get_method(api, guest) == ""
    assert (await chosen(api, guest))[1] != "stored for the disk"


async def test_what_only_the_definition_has_lost_is_stored_again(
    daemon: Lab, api: Api, places: Places
) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    await set_method(api, guest, QEMU)
    guest.domain.setMetadata(ELEMENT, None, "snapd-vm", NAMESPACE, CONFIG)
    assert in_metadata(guest)
    assert not in_metadata(guest, INACTIVE)
    await set_method(api, guest, QEMU)
    assert in_metadata(guest, INACTIVE)
    guest.domain.setMetadata(ELEMENT, None, "snapd-vm", NAMESPACE, LIVE)
    await set_method(api, guest, "")
    assert not in_metadata(guest, INACTIVE)


def test_who_may(daemon: Lab, places: Places) -> None:
    guest = places.guest()
    words = ("call", "org.example.DiskSnapshot", path_of(guest), DOMAIN)
    for member, *arguments in (("SetMethod", "ss", VDA, QEMU), ("GetMethod", "s", VDA)):
        done: subprocess.CompletedProcess[str] = daemon.busctl(
            *words, member, *arguments, user="nobody"
        )
        assert done.returncode == 1
        assert "authentication" in done.stderr or "NotAuthorized" in done.stderr
    daemon.polkit.rules(
        'polkit.addRule(function(a, s) { if (a.id == "org.example.DiskSnapshot.read") '
        'return "yes"; });'
    )
    try:
        assert daemon.busctl(*words, "GetMethod", "s", VDA, user="nobody").returncode == 0
        assert daemon.busctl(*words, "SetMethod", "ss", VDA, QEMU, user="nobody").returncode == 1
    finally:
        daemon.polkit.rules("")
    assert not in_metadata(guest)
