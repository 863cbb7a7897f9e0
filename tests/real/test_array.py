"""The array of docs/example-array: Ceph's RBD, driven by a program as a vendor would write one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.ceph import POOL
from tests.lab.disks import MKFS, DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real import images
from tests.real.api import NO_QUIESCE, QUIESCE_REQUIRED, SNAPSHOT, Api
from tests.real.conftest import Connect
from tests.real.places import refused
from tests.real.test_crash import faulty

__all__ = ["faulty"]

PROGRAM = Path(__file__).parents[2] / "docs/example-array/rbd-array"
METHOD = "<diskSnapshot method='vendor'/>"
USER = "backup"


@pytest.fixture(scope="module")
def own(lab: Lab) -> Iterator[Guest]:
    """A guest whose disk is an image in Ceph, which it has open through librbd."""
    ceph = lab.ceph.start()
    raw = lab.folder("array-image") / "raw"
    with raw.open("wb") as file:
        file.truncate(64 << 20)
    run(*MKFS["ext4"], raw)
    ceph.image("array", raw)
    spec = DiskSpec(format="raw", source=ceph.source("array"), type="network")
    running = lab.guest([spec, DiskSpec(format="raw", filesystem=None)])
    yield running
    running.remove()


@pytest.fixture
def served(lab: Lab, faulty: Lab) -> Lab:
    """A daemon with the program, which runs as another user, with a key of its own."""
    home = lab.folder("vendor")
    program = home / "rbd-array"
    shutil.copy(PROGRAM, program)
    program.chmod(0o755)
    keyring = home / "keyring"
    keyring.write_text(f"[client.{lab.ceph.user}]\nkey = {lab.ceph.key}\n")
    keyring.chmod(0o400)
    shutil.chown(keyring, USER)
    conf = home / "ceph.conf"
    conf.write_text(f"[global]\nmon host = {lab.ceph.host}\nkeyring = {keyring}\n")
    settings = {"conf": str(conf), "user": lab.ceph.user, "pool": POOL}
    program.with_suffix(".json").write_text(json.dumps(settings))
    one = {"name": "vendor", "path": str(program), "user": USER, "reverts": True}
    faulty.daemon.start({"executable": [one]})
    return faulty


@pytest.fixture
async def api(served: Lab, connect: Connect) -> Api:
    """A client of that daemon."""
    return await connect()


def snapshots(lab: Lab) -> list[str]:
    """Of the image, as Ceph has them."""
    told = lab.ceph.rbd("snap", "ls", "--format", "json", f"{POOL}/array")
    return [row["name"] for row in json.loads(told)]


async def test_a_disk_in_the_array_is_snapshotted_read_reverted_and_deleted(
    api: Api, served: Lab, own: Guest, tmp_path: Path
) -> None:
    xml = own.domain.XMLDesc()
    await refused(
        api.plan(own, "<disk><target dev='vdb'/></disk>", method_xml=METHOD), "MethodNotSupported"
    )
    plan = await api.plan(own, method_xml=METHOD)
    assert (plan["method"], plan["consistency"]) == ("vendor", "quiesced")
    assert snapshots(served) == []
    own.write("vda", "mark", "before")
    created = await api.create(own, method_xml=METHOD, name="one", flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    (name,) = snapshots(served)
    uuid = created.snapshot.rpartition("/_")[2].replace("_", "-")
    assert name == f"snapd-vm-{uuid}"
    source = created.source
    assert (source.get("protocol"), source.get("name")) == ("rbd", f"{POOL}/array")
    assert [s.get("name") for s in source.findall("snapshot")] == [name]
    assert (created.ours("type"), created.ours("format")) == ("network", "raw")
    assert served.ceph.key not in created.backup_source
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert (told["Size"], told["State"], told["Consistency"]) == (64 << 20, "ready", "quiesced")
    raw = served.ceph.read(f"array@{name}", tmp_path / "raw")
    assert images.is_clean(raw)
    assert not images.needs_recovery(raw)
    assert run("debugfs", "-R", "cat /mark", raw).strip() == "before"
    assert own.domain.XMLDesc() == xml
    own.poweroff()
    await api.call(created.snapshot, SNAPSHOT, "Revert", "u", 0)
    own.start()
    assert own.read("vda", "mark") == "before"
    assert await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0) == [""]
    assert snapshots(served) == []


async def test_what_is_not_there_any_more_is_missing_and_others_are_left_alone(
    api: Api, served: Lab, own: Guest
) -> None:
    served.ceph.rbd("snap", "create", "--no-progress", f"{POOL}/array@nightly")
    created = await api.create(own, method_xml=METHOD, flags=NO_QUIESCE)
    (name,) = set(snapshots(served)) - {"nightly"}
    served.ceph.rbd("snap", "rm", "--no-progress", f"{POOL}/array@{name}")
    await refused(api.backup_source(created.snapshot), "StorageFailed")
    assert (await api.properties(created.snapshot, SNAPSHOT))["State"] == "missing"
    await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0)
    assert snapshots(served) == ["nightly"]
    served.ceph.rbd("snap", "rm", "--no-progress", f"{POOL}/array@nightly")


async def test_the_program_says_why_it_can_not(api: Api, served: Lab, own: Guest) -> None:
    settings = served.folder("vendor") / "rbd-array.json"
    kept = settings.read_text()
    settings.write_text(kept.replace(served.ceph.user, "nobody-there"))
    error = await refused(api.create(own, method_xml=METHOD), "StorageFailed")
    assert "rbd info failed" in error.text
    assert "method vendor says" in served.daemon.log
    settings.write_text(kept)
    assert snapshots(served) == []


async def test_a_revert_that_is_asked_for_again_is_done_once(
    api: Api, served: Lab, own: Guest
) -> None:
    """And there is no answer where the program can't know how far it came."""
    program = served.folder("vendor") / "rbd-array"
    own.write("vda", "mark", "before")
    created = await api.create(own, method_xml=METHOD, flags=QUIESCE_REQUIRED)
    own.write("vda", "mark", "after")
    (name,) = snapshots(served)
    request = {
        "protocol": 1,
        "method": "vendor",
        "operation": "revert",
        "snapshots": [{"name": name, "data": {"image": f"{POOL}/array"}}],
    }

    def ask(revert_id: str) -> subprocess.CompletedProcess[str]:
        own.poweroff()
        asked = json.dumps({**request, "revert_id": revert_id})
        done = subprocess.run(
            [program], input=asked, capture_output=True, text=True, timeout=60, check=False
        )
        own.start()
        return done

    for revert_id, now in (("one", "before"), ("one", "since"), ("two", "before")):
        done = ask(revert_id)
        assert (done.returncode, json.loads(done.stdout)) == (0, {}), done.stderr
        assert own.read("vda", "mark") == now
        own.write("vda", "mark", "since")
    settings = program.with_suffix(".json")
    kept = settings.read_text()
    settings.write_text(kept.replace(served.ceph.user, "nobody-there"))
    done = ask("three")
    settings.write_text(kept)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "rbd image-meta failed" in done.stderr
    assert own.read("vda", "mark") == "since"
    assert await api.call(created.snapshot, SNAPSHOT, "Delete", "u", 0) == [""]
