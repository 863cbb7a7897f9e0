"""Create and Delete with method rbd on a real guest that writes to images in a Ceph cluster."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from snapd_vm.methods.rbd.rbdtarget import Access, Place
from tests.lab.ceph import Ceph
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import attempt, run
from tests.real import images
from tests.real.api import (
    NO_QUIESCE,
    QUIESCE_REQUIRED,
    SNAPSHOT,
    VDA,
    Api,
    Created,
)
from tests.real.conftest import Connect
from tests.real.other_driver import create, other_domain, taken_by
from tests.real.places import refused

VDB = "<disk><target dev='vdb'/></disk>"
VDC = "<disk><target dev='vdc'/></disk>"
MIB = 1 << 20


@pytest.fixture(scope="module")
def ceph(lab: Lab) -> Ceph:
    """The lab's cluster, which is there until the lab's end."""
    return lab.ceph.start()


@pytest.fixture(scope="module")
def own(lab: Lab, ceph: Ceph) -> Iterator[Guest]:
    """A guest with a raw and a qcow2 image in the cluster, and a file."""
    disks = [
        ceph.disk("own-a", driver="cache='writeback'"),
        ceph.disk("own-b", "qcow2"),
        DiskSpec(),
    ]
    running = lab.guest(disks)
    yield running
    running.remove()


def seen_by_admin(ceph: Ceph, image: str) -> Place:
    """An image of the pool, by the way of a ceph.conf with a keyring."""
    return Place(Access("", "", "", str(ceph.conf), ()), "vm", "", image)


class Unasked:
    """Secrets, of which none is needed: the ceph.conf names a keyring."""

    def secret(self, uuid: str, usage: str) -> str:
        raise AssertionError(uuid + usage)


def snaps(ceph: Ceph, image: str) -> dict[str, bool]:
    """The snapshots of an image in the pool, and whether they are protected."""
    found = json.loads(ceph.rbd("snap", "ls", f"vm/{image}", "--format=json"))
    return {one["name"]: one["protected"] in (True, "true") for one in found}


def metadata(ceph: Ceph, image: str) -> dict[str, str]:
    """What is said of an image there."""
    found: dict[str, str] = json.loads(
        ceph.rbd("image-meta", "list", f"vm/{image}", "--format=json") or "{}"
    )
    return found


def name_of(created: Created) -> str:
    """The snapshot's name in the cluster."""
    snapshot = created.source.find("snapshot")
    assert snapshot is not None
    return snapshot.get("name") or ""


def checksum(ceph: Ceph, image: str, scratch: Path) -> str:
    return hashlib.sha256(ceph.read(image, scratch / "copy.raw").read_bytes()).hexdigest()


async def delete(api: Api, created: Created) -> str:
    return str((await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0))[0])


def text_in(image: Path, file: str) -> str:
    """What a file in an ext4 image holds; '' if it is not there."""
    return attempt(["debugfs", "-R", f"cat {file}", image], timeout=60).stdout.strip()


async def test_a_snapshot_is_what_the_guest_had_and_stays_so(
    api: Api, own: Guest, ceph: Ceph, tmp_path: Path
) -> None:
    before, xml = snaps(ceph, "own-a"), own.domain.XMLDesc()
    own.write("vda", "mark", "before")
    created = await api.create(own, VDA, name="nightly", flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert (told["Method"], told["Format"], told["Size"]) == ("rbd", "raw", 64 * MIB)
    assert (told["State"], told["Consistency"], told["FrozenFilesystems"]) == (
        "ready",
        "quiesced",
        1,
    )
    assert created.modified_disk == ""
    assert own.domain.XMLDesc() == xml
    uuid = created.snapshot.rpartition("/_")[2].replace("_", "-")
    name = f"snapd-vm-{uuid}"
    assert snaps(ceph, "own-a") == before | {name: True}
    said = metadata(ceph, "own-a")[name]
    assert all(word in said for word in (own.uuid, own.name, "nightly"))
    assert (created.ours("type"), created.ours("format")) == ("network", "raw")
    source = created.source
    assert (source.get("protocol"), source.get("name")) == ("rbd", "vm/own-a")
    assert [(child.tag, dict(child.attrib)) for child in source.iter() if child is not source] == [
        ("host", {"name": "127.0.0.1", "port": str(ceph.port)}),
        ("snapshot", {"name": name}),
        ("auth", {"username": ceph.user}),
        ("secret", {"type": "ceph", "uuid": ceph.secret}),
    ]
    assert await api.backup_source(created.snapshot) == created.backup_source
    assert images.info(ceph.uri(f"own-a@{name}"))["virtual-size"] == 64 * MIB
    raw = ceph.read(f"own-a@{name}", tmp_path / "raw")
    assert images.is_clean(raw)
    assert not images.needs_recovery(raw)
    assert text_in(raw, "mark") == "before"
    first = checksum(ceph, f"own-a@{name}", tmp_path)
    own.writes_go_on()
    own.fill("vda", "filling", 4)
    own.sync()
    assert checksum(ceph, f"own-a@{name}", tmp_path) == first
    refusal = attempt(["rbd", "-c", ceph.conf, "snap", "rm", f"vm/own-a@{name}"], timeout=60)
    assert refusal.returncode != 0
    assert await delete(api, created) == ""
    assert snaps(ceph, "own-a") == before
    assert name not in metadata(ceph, "own-a")
    assert own.domain.XMLDesc() == xml
    assert not await api.snapshots_of(own)
    assert own.read("vda", "mark") == "after"
    own.writes_go_on()


async def test_quiesced_snapshots_are_clean_and_others_need_recovery(
    api: Api, own: Guest, ceph: Ceph, tmp_path: Path
) -> None:
    for number in range(3):
        own.write("vda", f"mark{number}", "there")
        made = await api.create(own, VDA, flags=QUIESCE_REQUIRED)
        crash = await api.create(own, VDA, flags=NO_QUIESCE)
        raw = ceph.read(f"own-a@{name_of(made)}", tmp_path / "raw")
        assert images.is_clean(raw)
        assert not images.needs_recovery(raw)
        assert text_in(raw, f"mark{number}") == "there"
        assert crash.ours("consistency") == "crash"
        assert images.needs_recovery(ceph.read(f"own-a@{name_of(crash)}", tmp_path / "raw"))
        await delete(api, made)
        await delete(api, crash)
    assert not snaps(ceph, "own-a")
    assert not metadata(ceph, "own-a")


async def test_a_qcow2_in_an_rbd_image_is_never_torn(
    api: Api, own: Guest, ceph: Ceph, tmp_path: Path
) -> None:
    for number in range(4):
        flags = (QUIESCE_REQUIRED, NO_QUIESCE)[number % 2]
        made = await api.create(own, VDB, flags=flags)
        assert made.ours("format") == "qcow2"
        assert made.ours("consistency") == ("quiesced", "paused")[number % 2]
        told = await api.properties(made.snapshot, SNAPSHOT)
        assert (told["Method"], told["Format"], told["Size"]) == ("rbd", "qcow2", 64 * MIB)
        image = ceph.read(f"own-b@{name_of(made)}", tmp_path / "qcow2")
        run("qemu-img", "check", "-f", "qcow2", image)
        if flags == QUIESCE_REQUIRED:
            assert images.is_clean(images.raw_copy(image, "qcow2", tmp_path / "raw"))
        await delete(api, made)
        own.writes_go_on()
    reasons = {row["target"]: (row["method"], row["reason"]) for row in await api.disks(own)}
    assert reasons["vda"] == ("rbd", "the default for an RBD image")
    assert reasons["vdb"] == ("rbd", "the default for an RBD image, qcow2 too")
    assert reasons["vdc"][0] == "qemu"


async def test_the_key_is_nowhere(
    daemon: Lab, api: Api, own: Guest, ceph: Ceph, tmp_path: Path
) -> None:
    """Not on a command line, in an environment, a log, the journal, or an answer."""
    for _ in range(2):
        made = await api.create(own, VDA)
        everything = [str(await api.disks(own)), str(await api.plan(own)), made.backup_source]
        pids = [daemon.daemon.pid, *_children(daemon.daemon.pid)]
        assert len(pids) > 1, "there is no process that speaks with Ceph"
        for pid in pids:
            everything += [
                Path(f"/proc/{pid}/{name}").read_text() for name in ("cmdline", "environ")
            ]
        # Not of others: what a vendor's program says, as in test_array, is the vendor's affair.
        said = "".join(everything[3:]) + daemon.daemon.log_of_this_life
        for word in (ceph.host, ceph.secret, f"client.{ceph.user}"):
            assert word not in said
        # The log is full of longer numbers, which may have these digits in them.
        assert not re.search(rf"(?<![0-9A-Za-z-]){ceph.port}(?![0-9A-Za-z-])", said)
        await delete(api, made)
    everything.append(daemon.daemon.log)
    for file in daemon.daemon.state_dir.iterdir():
        everything.append(file.read_bytes().decode("latin1"))
    assert not [text for text in everything if ceph.key in text]


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # the thread has ended
            found += [int(word) for word in (task / "children").read_text().split()]
    return found


async def test_only_the_disks_own_image_can_be_named(api: Api, own: Guest, ceph: Ceph) -> None:
    named = "<diskSnapshot method='rbd'><image pool='{}' name='{}'/></diskSnapshot>"
    made = await api.create(own, VDA, named.format("vm", "own-a"))
    await delete(api, made)
    for pool, image in (("vm", "own-b"), ("rbd", "own-a"), ("vm", "nothing")):
        error = await refused(api.create(own, VDA, named.format(pool, image)), "NotUnderDisk")
        assert "vm/own-a" in error.text
    await refused(api.create(own, VDC, "<diskSnapshot method='rbd'/>"), "MethodNotSupported")
    for method in ("qemu", "reflink"):
        error = await refused(
            api.create(own, VDA, f"<diskSnapshot method='{method}'/>"), "MethodNotSupported"
        )
        assert "network" in error.text
    source = f"<disk type='network'>{ceph.source('own-b')}</disk>"
    made = await api.create(own, source)
    assert made.source.get("name") == "vm/own-b"
    await delete(api, made)


async def test_several_disks_are_taken_while_the_guest_stands_still(
    api: Api, own: Guest, ceph: Ceph, tmp_path: Path
) -> None:
    made = await api.create_set(own, "vda", "vdb", "vdc", name="set", flags=QUIESCE_REQUIRED)
    assert {created.ours("consistency") for _, created in made} == {"quiesced"}
    a, b, c = (created for _, created in made)
    assert images.is_clean(ceph.read(f"own-a@{name_of(a)}", tmp_path / "raw"))
    image = ceph.read(f"own-b@{name_of(b)}", tmp_path / "qcow2")
    assert images.is_clean(images.raw_copy(image, "qcow2", tmp_path / "raw"))
    assert os.path.exists(c.file)
    for _, created in made:
        await delete(api, created)
    own.writes_go_on()
    assert not snaps(ceph, "own-a")
    assert not snaps(ceph, "own-b")


# -- a driver without QEMU -------------------------------------------------------------------------


async def test_a_domain_that_qemu_does_not_run(
    lab: Lab, connect: Connect, ceph: Ceph, tmp_path: Path
) -> None:
    """libvirt's test driver has no secrets; the key comes by way of Ceph's own file."""
    content, new = tmp_path / "content", tmp_path / "new"
    content.write_bytes(os.urandom(8 * MIB))
    new.write_bytes(os.urandom(8 * MIB))
    ceph.image("unrun", content)
    source = f"<source protocol='rbd' name='vm/unrun'><config file='{ceph.conf}'/></source>"
    async with taken_by("rbd", lab, connect, "network", source) as created:
        assert snaps(ceph, "unrun") == {name_of(created): True}
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", new, ceph.uri("unrun"))
        taken = ceph.read(f"unrun@{name_of(created)}", tmp_path / "taken")
        assert taken.read_bytes() == content.read_bytes()
        assert ceph.read("unrun", tmp_path / "now").read_bytes() == new.read_bytes()
    assert not snaps(ceph, "unrun")


async def test_a_driver_that_has_no_secrets(lab: Lab, connect: Connect, ceph: Ceph) -> None:
    ceph.disk("secretless", size_mib=8)
    with other_domain(lab, "network", ceph.source("secretless")) as path:
        api = await connect()
        error = await refused(create(api, path), "StorageFailed")
        assert "keeps no secrets" in error.text
        assert not await api.snapshots()
    assert not snaps(ceph, "secretless")
