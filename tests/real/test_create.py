"""Create with method qemu on real guests: formats, states, flags, names, and what it answers."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Literal

import libvirt
import psutil
import pytest
from lxml import etree

from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real import images
from tests.real.api import (
    NO_QUIESCE,
    QUIESCE_REQUIRED,
    SNAPSHOT,
    VDA,
    Api,
    ApiError,
    path_of,
)


def sources(guest: Guest) -> tuple[str, str]:
    """What the live and the persistent XML name as the source of vda."""
    found = []
    for flags in (0, 2):  # VIR_DOMAIN_XML_INACTIVE
        tree = etree.fromstring(guest.domain.XMLDesc(flags))
        source = tree.find("devices/disk/source")
        assert source is not None
        found.append(source.get("file") or source.get("dev") or "")
    return found[0], found[1]


async def test_the_answers_are_what_libvirt_says(api: Api, guest: Guest) -> None:
    former, _ = sources(guest)
    created = await api.create(guest, name="answers")
    live, persistent = sources(guest)
    assert created.file == former
    assert live == persistent == created.overlay != former
    assert created.overlay == f"{os.path.splitext(former)[0]}.answers"
    assert created.source.tag == "source"
    assert created.ours("type") == "file"
    assert created.ours("format") == "qcow2"
    disk = etree.fromstring(guest.domain.XMLDesc()).find("devices/disk")
    assert disk is not None
    assert created.modified_disk.strip() == etree.tostring(disk, encoding="unicode").strip()
    overlay = images.info(created.overlay)
    assert overlay["backing-filename"] == former
    assert overlay["backing-filename-format"] == "qcow2"


async def test_the_overlay_has_the_origins_owner_and_mode(api: Api, guest: Guest) -> None:
    former, _ = sources(guest)
    os.chmod(former, 0o640)
    created = await api.create(guest)
    origin, overlay = os.stat(former), os.stat(created.overlay)
    assert (overlay.st_uid, overlay.st_gid) == (origin.st_uid, origin.st_gid)
    assert stat.S_IMODE(overlay.st_mode) == 0o640


async def test_the_snapshot_object_says_what_was_achieved(api: Api, guest: Guest) -> None:
    created = await api.create(guest, name="told", flags=QUIESCE_REQUIRED)
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert told["Name"] == "told"
    assert told["Domain"] == path_of(guest)
    assert told["DomainUUID"] == guest.uuid
    assert (told["Target"], told["Method"], told["State"]) == ("vda", "qemu", "ready")
    assert (told["Consistency"], told["FrozenFilesystems"]) == ("quiesced", 1)
    assert 1_000 < told["FrozenTime"] < 5_000_000
    assert (told["Format"], told["Size"]) == ("qcow2", 64 << 20)
    assert await api.backup_source(created.snapshot) == created.backup_source


async def test_the_snapshot_survives_a_restart_and_is_missing_without_its_storage(
    daemon: Lab, api: Api, lab: Lab
) -> None:
    guest = lab.guest()
    created = await api.create(guest, name="lasting")
    before = await api.properties(created.snapshot, SNAPSHOT)
    daemon.daemon.restart()
    assert await api.properties(created.snapshot, SNAPSHOT) == before
    assert await api.backup_source(created.snapshot) == created.backup_source
    guest.destroy()
    os.rename(created.file, created.file + ".away")
    with pytest.raises(ApiError) as error:
        await api.backup_source(created.snapshot)
    assert error.value.name == "StorageFailed"
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "missing"
    os.rename(created.file + ".away", created.file)
    guest.remove()


async def test_the_guest_boots_from_the_overlay_and_its_data_are_there(api: Api, lab: Lab) -> None:
    guest = lab.guest()
    guest.write("vda", "before", "one")
    await api.create(guest)
    guest.write("vda", "after", "two")
    guest.poweroff()
    guest.start()
    assert (guest.read("vda", "before"), guest.read("vda", "after")) == ("one", "two")
    guest.remove()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("state", ["running", "paused", "shutoff"])
async def test_formats_and_states(
    api: Api, lab: Lab, scratch: Path, image_format: Literal["qcow2", "raw"], state: str
) -> None:
    guest = lab.guest([DiskSpec(format=image_format)])
    guest.write("vda", "mark", "there")
    if state == "paused":
        guest.domain.suspend()
    elif state == "shutoff":
        guest.poweroff()
    created = await api.create(guest)
    expected = {"running": "quiesced", "paused": "paused", "shutoff": "offline"}[state]
    assert created.ours("consistency") == expected
    assert created.ours("format") == image_format
    assert guest.state == state
    live, persistent = sources(guest)
    assert live == persistent == created.overlay
    raw = images.raw_copy(created.file, image_format, scratch / "raw")
    if expected != "paused":
        assert not images.needs_recovery(raw)
        assert images.is_clean(raw)
    if state == "paused":
        guest.domain.resume()
        guest.writes_go_on()
    elif state == "shutoff":
        guest.start()
    assert guest.read("vda", "mark") == "there"
    guest.remove()


async def test_quiesce_required_succeeds_for_a_domain_that_is_cleanly_off(
    api: Api, lab: Lab
) -> None:
    guest = lab.guest()
    guest.poweroff()
    created = await api.create(guest, flags=QUIESCE_REQUIRED)
    assert created.ours("consistency") == "offline"
    guest.remove()


async def test_a_destroyed_domain_is_not_offline(api: Api, lab: Lab) -> None:
    guest = lab.guest()
    guest.destroy()
    before = sources(guest)
    with pytest.raises(ApiError) as error:
        await api.create(guest, flags=QUIESCE_REQUIRED)
    assert error.value.name == "QuiesceFailed"
    assert sources(guest) == before
    # libvirt forgets why it is off when it is restarted; we do not.
    lab.libvirtd.restart()
    await asyncio.sleep(1)
    created = await api.create(guest)
    assert created.ours("consistency") == "crash"
    guest.remove()


async def test_a_domain_whose_qemu_was_ended_is_not_offline(api: Api, lab: Lab) -> None:
    """libvirt calls it shut down, as where its guest has done that; the guest knows nothing."""
    guest = lab.guest()
    for restart in (False, True):
        running = psutil.process_iter(["cmdline"])
        (qemu,) = [one for one in running if guest.uuid in (one.info["cmdline"] or ())]
        qemu.terminate()
        guest.wait_state("shutoff")
        assert guest.domain.state() == [
            libvirt.VIR_DOMAIN_SHUTOFF,
            libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN,
        ]
        if restart:
            lab.libvirtd.restart()
            await asyncio.sleep(1)
        with pytest.raises(ApiError) as error:
            await api.create(guest, flags=QUIESCE_REQUIRED)
        assert error.value.name == "QuiesceFailed"
        assert (await api.create(guest)).ours("consistency") == "crash"
        guest.control.close()
        guest.start()
    guest.poweroff()
    assert (await api.create(guest, flags=QUIESCE_REQUIRED)).ours("consistency") == "offline"
    guest.remove()


async def test_quiesce_required_fails_for_a_paused_domain(api: Api, lab: Lab) -> None:
    guest = lab.guest()
    guest.domain.suspend()
    before = sources(guest)
    with pytest.raises(ApiError) as error:
        await api.create(guest, flags=QUIESCE_REQUIRED)
    assert error.value.name == "AgentUnavailable"
    assert (guest.state, sources(guest)) == ("paused", before)
    guest.remove()


async def test_other_disks_are_untouched(api: Api, lab: Lab) -> None:
    guest = lab.guest([DiskSpec(), DiskSpec(format="raw")])
    before = etree.fromstring(guest.domain.XMLDesc()).findall("devices/disk")
    await api.create(guest, "<disk><target dev='vdb'/></disk>", "<diskSnapshot method='qemu'/>")
    after = etree.fromstring(guest.domain.XMLDesc()).findall("devices/disk")
    assert etree.tostring(before[0]) == etree.tostring(after[0])
    assert etree.tostring(before[1]) != etree.tostring(after[1])
    guest.remove()


async def test_a_block_devices_overlay_goes_where_the_configuration_says(
    daemon: Lab, api: Api, lab: Lab
) -> None:
    guest = lab.guest([DiskSpec(device=lab.block.loop().device)])
    with pytest.raises(ApiError) as error:
        await api.create(guest)
    assert error.value.name == "MethodNotSupported"
    folder = lab.folder("overlays")
    daemon.daemon.stop()
    daemon.daemon.start({"qemu": {"overlay_dirs": [str(folder)]}})
    created = await api.create(guest, flags=QUIESCE_REQUIRED)
    assert created.ours("type") == "block"
    assert created.source.get("dev") == str(guest.disk().path)
    assert os.path.dirname(created.overlay) == str(folder)
    named = folder / "named.qcow2"
    created = await api.create(
        guest, method_xml=f"<diskSnapshot method='qemu'><overlay file='{named}'/></diskSnapshot>"
    )
    assert created.overlay == str(named)
    guest.remove()


async def test_names(api: Api, guest: Guest) -> None:
    created = await api.create(guest, name="taken.1_a-b")
    assert (await api.properties(created.snapshot, SNAPSHOT))["Name"] == "taken.1_a-b"
    with pytest.raises(ApiError) as error:
        await api.create(guest, name="taken.1_a-b")
    assert error.value.name == "NameInUse"
    made_up = [await api.create(guest) for _ in range(3)]
    names = [(await api.properties(c.snapshot, SNAPSHOT))["Name"] for c in made_up]
    assert len(set(names)) == 3


async def test_an_existing_file_is_never_written_over(api: Api, guest: Guest) -> None:
    live, _ = sources(guest)
    there = Path(f"{os.path.splitext(live)[0]}.there")
    there.write_text("mine")
    with pytest.raises(ApiError) as error:
        await api.create(guest, name="there")
    assert error.value.name == "NameInUse"
    assert there.read_text() == "mine"
    there.unlink()
    there.symlink_to("/nowhere")
    with pytest.raises(ApiError):
        await api.create(guest, name="there")
    assert os.readlink(there) == "/nowhere"
    there.unlink()
    assert not [name for name in os.listdir(there.parent) if name.startswith(".snapd-vm")]


async def test_an_overlay_elsewhere_is_refused(api: Api, guest: Guest, lab: Lab) -> None:
    for place in ("/etc/overlay.qcow2", "/tmp/overlay.qcow2", str(lab.folder("else") / "x")):
        method = f"<diskSnapshot method='qemu'><overlay file='{place}'/></diskSnapshot>"
        with pytest.raises(ApiError) as error:
            await api.create(guest, method_xml=method)
        assert error.value.name == "MethodNotSupported"
        assert not os.path.lexists(place)


async def test_a_folder_that_others_can_write_is_refused(api: Api, lab: Lab) -> None:
    folder = lab.folder("open")
    guest = lab.guest([DiskSpec(folder=folder)])
    os.chmod(folder, 0o777)
    with pytest.raises(ApiError) as error:
        await api.create(guest)
    assert error.value.name == "MethodNotSupported"
    guest.remove()
    os.chmod(folder, 0o755)


async def test_the_disk_is_found_by_source_and_a_mismatch_is_told(api: Api, guest: Guest) -> None:
    live, _ = sources(guest)
    by_source = f"<disk type='file'><source file='{live}'/></disk>"
    created = await api.create(guest, by_source)
    assert created.file == live
    with pytest.raises(ApiError) as error:  # the domain uses another one now
        await api.create(guest, f"<disk><source file='{live}'/><target dev='vda'/></disk>")
    assert error.value.name == "DiskMismatch"
    with pytest.raises(ApiError) as error:
        await api.create(guest, "<disk><target dev='vdz'/></disk>")
    assert error.value.name == "NoSuchDisk"
    with pytest.raises(ApiError) as error:
        await api.create(guest, "<disk><source file='/etc/shadow'/></disk>")
    assert error.value.name == "NoSuchDisk"


async def test_create_on_the_root_object(api: Api, guest: Guest) -> None:
    for identity in (f"<name>{guest.name}</name>", f"<uuid>{guest.uuid}</uuid>"):
        xml = f"<domain>{identity}<devices>{VDA}</devices></domain>"
        created = await api.create_on_root(xml)
        assert (await api.properties(created.snapshot, SNAPSHOT))["DomainUUID"] == guest.uuid
    live, _ = sources(guest)
    created = await api.create_on_root(f"<disk><source file='{live}'/></disk>")
    assert created.file == live
    with pytest.raises(ApiError) as error:
        await api.create_on_root(f"<domain><name>nobody</name><devices>{VDA}</devices></domain>")
    assert error.value.name == "NoSuchDomain"


async def test_plan_tells_and_changes_nothing(api: Api, guest: Guest) -> None:
    before = sources(guest), sorted(os.listdir(os.path.dirname(guest.disk().path)))
    plan = await api.plan(guest, name="planned", flags=QUIESCE_REQUIRED)
    assert plan["method"] == "qemu"
    assert plan["consistency"] == "quiesced"
    assert 0 < plan["space_needed"] < plan["space_available"]
    assert etree.fromstring(plan["backup_source"]).get("file") == before[0][0]
    after = sources(guest), sorted(os.listdir(os.path.dirname(guest.disk().path)))
    assert after == before
    assert not await api.snapshots_of(guest)
    assert (await api.plan(guest, flags=NO_QUIESCE))["consistency"] == "crash"
    await api.create(guest, name="planned")
    with pytest.raises(ApiError) as error:
        await api.plan(guest, name="planned")
    assert error.value.name == "NameInUse"


async def test_disks_tell_why_not(api: Api, lab: Lab) -> None:
    cdrom = "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>"
    guest = lab.guest(devices=cdrom)
    by_target = {disk["target"]: disk for disk in await api.disks(guest)}
    assert by_target["vda"]["method"] == "qemu"
    assert by_target["vda"]["reason"]
    assert (by_target["sda"]["method"], by_target["sda"]["device"]) == ("", "cdrom")
    assert "CD-ROM" in by_target["sda"]["reason"]
    with pytest.raises(ApiError) as error:
        await api.create(guest, "<disk><target dev='sda'/></disk>")
    assert error.value.name == "MethodNotSupported"
    guest.remove()


async def test_the_overlay_has_the_origins_security_label(api: Api, guest: Guest) -> None:
    former, _ = sources(guest)
    label = b"system_u:object_r:svirt_image_t:s0:c1,c2\0"
    os.setxattr(former, "security.selinux", label)
    created = await api.create(guest)
    assert os.getxattr(created.overlay, "security.selinux") == label
