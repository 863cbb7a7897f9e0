"""Domains and disks of which Create by qemu takes no snapshot, and what Create and Disks say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real.api import NO_QUIESCE, QUIESCE_REQUIRED, Api
from tests.real.places import Places, disk_of, file_of, reconnected, unchanged, world

VDB = "<disk><target dev='vdb'/></disk>"


@pytest.fixture
def places(lab: Lab) -> Iterator[Places]:
    """Domains of the test's own."""
    made = Places(lab)
    yield made
    made.forget()


async def why_not(api: Api, guest: Guest, target: str) -> str:
    """The reason that Disks gives for a disk that no method takes."""
    row = next(row for row in await api.disks(guest) if row["target"] == target)
    assert row["method"] == ""
    return row["reason"]


# -- the domain ----------------------------------------------------------------------------------


async def test_a_domain_with_a_managed_save_image(api: Api, places: Places, lab: Lab) -> None:
    """What it saved would go on with the old disk; and it was never shut down cleanly."""
    guest = places.guest(start=True)
    await places.known(api)
    guest.domain.managedSave()
    for flags in (0, QUIESCE_REQUIRED, NO_QUIESCE):
        assert "managedsave" in (await unchanged(api, guest, "InvalidState", flags=flags)).text
    lab.libvirtd.restart()
    await reconnected(api, guest)
    await unchanged(api, guest, "InvalidState")
    guest.domain.managedSaveRemove()
    await unchanged(api, guest, "QuiesceFailed", flags=QUIESCE_REQUIRED)
    assert (await api.create(guest)).ours("consistency") == "crash"


async def test_a_domain_whose_managed_save_image_was_removed_is_not_offline(
    api: Api, places: Places, lab: Lab
) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    guest.domain.managedSave()
    guest.domain.managedSaveRemove()
    assert (await api.plan(guest))["consistency"] == "crash"
    lab.libvirtd.restart()  # libvirt forgets why it is off
    await reconnected(api, guest)
    await unchanged(api, guest, "QuiesceFailed", flags=QUIESCE_REQUIRED)
    assert (await api.create(guest)).ours("consistency") == "crash"


async def test_a_domain_with_checkpoints(api: Api, places: Places) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    guest.domain.checkpointCreateXML("<domaincheckpoint><name>one</name></domaincheckpoint>")
    created = await api.create(guest)  # running, it makes no difference
    assert file_of(guest) == created.overlay
    guest.destroy()
    assert "checkpoints" in (await unchanged(api, guest, "InvalidState")).text
    guest.domain.checkpointLookupByName("one").delete(
        libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
    )
    await api.create(guest)


# -- jobs ----------------------------------------------------------------------------------------


class Job:
    """A block job or backup that a test holds, neither ended nor failed."""

    def __init__(self, guest: Guest, scratch: Path) -> None:
        self.domain: Any = guest.domain
        self.base = str(guest.disk().chain[-1])
        self.scratch = scratch

    def begin(self, kind: str) -> None:
        """Begin it, and wait until it only waits for its end."""
        if kind == "blockcopy":
            copy = f"<disk type='file'><source file='{self.scratch}'/><driver type='qcow2'/></disk>"
            self.domain.blockCopy("vda", copy, {}, libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
        elif kind == "active commit":
            active = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
            self.domain.blockCommit("vda", self.base, None, 0, active)
        elif kind == "slow copy":
            copy = f"<disk type='file'><source file='{self.scratch}'/><driver type='raw'/></disk>"
            slow = {libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: 1 << 20}
            self.domain.blockCopy("vda", copy, slow, libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
        else:
            server = f"<server transport='unix' socket='{self.scratch}.socket'/>"
            disk = f"<disk name='vda' type='file'><scratch file='{self.scratch}'/></disk>"
            disks = f"<disks>{disk}<disk name='vdb' backup='no'/></disks>"
            self.domain.backupBegin(
                f"<domainbackup mode='pull'>{server}{disks}</domainbackup>", None
            )
        if kind in ("blockcopy", "active commit"):

            def ready() -> bool:
                info = self.domain.blockJobInfo("vda")
                return bool(info) and info["cur"] == info["end"]

            wait_until(f"the {kind} is ready", ready, 30)

    def end(self, kind: str) -> None:
        """End it without a pivot."""
        if kind == "backup":
            self.domain.abortJob()
        else:
            self.domain.blockJobAbort("vda")
        wait_until("the job ends", lambda: not self.domain.blockJobInfo("vda"), 30)


@pytest.mark.parametrize("kind", ["blockcopy", "active commit", "slow copy", "backup"])
async def test_a_job_on_the_disk(api: Api, places: Places, kind: str) -> None:
    folder = places.folder()
    specs = (DiskSpec(folder=folder, overlays=1), DiskSpec(folder=folder))
    guest = places.lab.guest(specs)
    try:
        await places.known(api)
        scratch = places.lab.folder("scratch") / kind.replace(" ", "-")
        scratch.parent.chmod(0o777)
        job = Job(guest, scratch)
        guest.fill("vda", "big", 30)
        job.begin(kind)
        error = await unchanged(api, guest, "Busy")
        assert "block job is running" in error.text
        assert "block job is running" in await why_not(api, guest, "vda")
        if kind == "backup":  # which is the whole domain's
            assert "backup" in (await unchanged(api, guest, "Busy", disk="vdb")).text
        else:
            await api.create(guest, VDB)
        assert guest.domain.blockJobInfo("vda")  # it was left alone
        job.end(kind)
        created = await api.create(guest, flags=QUIESCE_REQUIRED)
        assert created.ours("consistency") == "quiesced"
        guest.writes_go_on()
    finally:
        guest.remove()


# -- the disk ------------------------------------------------------------------------------------

SECRET = "<secret type='passphrase' uuid='0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f'/>"
KINDS = {
    "cdrom": (
        "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>"
        "<source file='{file}'/><target dev='sda' bus='sata'/><readonly/></disk>",
        "CD-ROM",
    ),
    "empty cdrom": (
        "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>",
        "CD-ROM",
    ),
    "floppy": (
        "<disk type='file' device='floppy'><driver name='qemu' type='raw'/>"
        "<source file='{file}'/><target dev='fda' bus='fdc'/></disk>",
        "floppy",
    ),
    "lun": (
        "<controller type='scsi' model='virtio-scsi'/>"
        "<disk type='block' device='lun'><driver name='qemu' type='raw'/>"
        "<source dev='/dev/loop0'/><target dev='sda' bus='scsi'/></disk>",
        "SCSI device passed through",
    ),
    "shareable": (
        "<disk type='file'><driver name='qemu' type='raw'/><source file='{file}'/>"
        "<target dev='vdb' bus='virtio'/><shareable/></disk>",
        "shareable",
    ),
    "transient": (
        "<disk type='file'><driver name='qemu' type='qcow2'/><source file='{file}'/>"
        "<target dev='vdb' bus='virtio'/><transient/></disk>",
        "transient",
    ),
    "readonly": (
        "<disk type='file'><driver name='qemu' type='qcow2'/><source file='{file}'/>"
        "<target dev='vdb' bus='virtio'/><readonly/></disk>",
        "read-only",
    ),
    "encrypted": (
        "<disk type='file'><driver name='qemu' type='qcow2'/><source file='{file}'>"
        f"<encryption format='luks'>{SECRET}</encryption></source>"
        "<target dev='vdb' bus='virtio'/></disk>",
        "encrypted",
    ),
    "of another format": (
        "<disk type='file'><driver name='qemu' type='vmdk'/><source file='{file}'/>"
        "<target dev='vdb' bus='virtio'/></disk>",
        "vmdk",
    ),
    "on the network": (
        "<disk type='network'><driver name='qemu' type='raw'/><source protocol='nbd' name='x'>"
        "<host name='127.0.0.1' port='1'/></source><target dev='vdb' bus='virtio'/></disk>",
        "network",
    ),
    "a folder": (
        "<disk type='dir'><driver name='qemu' type='fat'/><source dir='{folder}'/>"
        "<target dev='vdb' bus='virtio'/><readonly/></disk>",
        "read-only",
    ),
    "a slice": (
        "<disk type='file'><driver name='qemu' type='raw'/><source file='{file}'>"
        "<slices><slice type='storage' offset='512' size='4096'/></slices></source>"
        "<target dev='vdb' bus='virtio'/></disk>",
        "slice",
    ),
    "of a pool that is not there": (
        "<disk type='volume'><driver name='qemu' type='raw'/><source pool='no' volume='no'/>"
        "<target dev='vdb' bus='virtio'/></disk>",
        "volume",
    ),
}


@pytest.mark.parametrize("kind", list(KINDS))
async def test_a_disk_that_is(api: Api, places: Places, kind: str) -> None:
    xml, word = KINDS[kind]
    folder = places.folder()
    (folder / "other.img").write_bytes(bytes(1 << 20))
    devices = xml.format(file=folder / "other.img", folder=folder)
    guest = places.guest(devices=devices)
    await places.known(api)
    target = {"cdrom": "sda", "empty cdrom": "sda", "floppy": "fda", "lun": "sda"}.get(kind, "vdb")
    assert disk_of(guest, target=target) is not None
    before = world(guest)
    error = await unchanged(api, guest, "MethodNotSupported", disk=target)
    assert word in error.text
    assert await why_not(api, guest, target) == error.text
    asked = "<diskSnapshot method='qemu'/>"
    again = await unchanged(api, guest, "MethodNotSupported", disk=target, method_xml=asked)
    assert word in again.text
    assert world(guest) == before
    await api.create(guest)  # the disk beside it
