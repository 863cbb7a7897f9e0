"""What method rbd refuses, with a reason, and disks that are described in other ways.

The domains are off: all of it is decided before a guest would be frozen.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from snapd_vm.methods.rbd import rbdworker
from snapd_vm.methods.rbd.cluster import Clusters
from tests.lab.ceph import Ceph
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real.api import SNAPSHOT, VDA, Api, ApiError
from tests.real.conftest import Connect
from tests.real.places import Places, refused, unchanged
from tests.real.test_rbd import Unasked, ceph, delete, name_of, seen_by_admin, snaps
from tests.real.test_revert import places

__all__ = ["ceph", "places"]

OTHER = "<auth username='{}'><secret type='ceph' {}/></auth>"


@pytest.fixture(scope="module", autouse=True)
def images(ceph: Ceph) -> None:
    """An image that all of them use, and some of kinds of their own."""
    ceph.disk("refused", size_mib=16)
    ceph.disk("plain", "raw", "--image-feature", "striping", size_mib=8)


def on(
    ceph: Ceph, name: str = "vm/refused", *, auth: str | None = None, inside: str = "", **more: Any
) -> DiskSpec:
    """A disk on an image, whatever its `<auth>` is to be."""
    host = f"<host name='127.0.0.1' port='{ceph.port}'/>"
    auth = ceph.auth if auth is None else auth
    source = f"<source protocol='rbd' name='{name}'>{host}{inside}{auth}</source>"
    return DiskSpec(more.pop("format", "raw"), source=source, type="network", **more)


@contextmanager
def secret(lab: Lab, *, private: str = "no", value: str = "", usage: str = "") -> Iterator[str]:
    """A secret of libvirt's; its UUID."""
    connection = lab.hypervisor.connection()
    made = connection.secretDefineXML(
        f"<secret ephemeral='yes' private='{private}'>"
        f"<usage type='ceph'><name>{usage or 'of a test'}</name></usage></secret>"
    )
    if value:
        made.setValue(base64.b64decode(value))
    try:
        yield made.UUIDString()
    finally:
        made.undefine()


async def both(api: Api, guest: Guest, *names: str) -> str:
    """Plan and Create are refused alike; what they say."""
    planned = await refused(api.plan(guest), *names)
    error = await refused(api.create(guest), *names)
    assert planned.text == error.text
    assert not await api.snapshots_of(guest)
    return error.text


async def test_secrets_that_are_no_use(lab: Lab, api: Api, ceph: Ceph, places: Places) -> None:
    key = base64.b64decode(ceph.key)
    wrong = base64.b64encode(key[:-1] + bytes([key[-1] ^ 1])).decode()
    for how, error, words in (
        ({"value": ceph.key, "private": "yes"}, "StorageFailed", "is private"),
        ({}, "StorageFailed", "has no value"),
        ({"value": wrong}, "TimedOut", "user with the key"),
    ):
        with secret(lab, **how) as uuid:
            guest = places.guest(on(ceph, auth=OTHER.format(ceph.user, f"uuid='{uuid}'")))
            await places.known(api)
            text = await both(api, guest, error)
            assert words in text
            for hidden in (uuid, ceph.user, ceph.host, str(ceph.port), wrong):
                assert hidden not in text
            assert wrong not in lab.daemon.log and ceph.key not in lab.daemon.log
    with secret(lab, value=ceph.key, usage="named so") as uuid:
        guest = places.guest(on(ceph, auth=OTHER.format(ceph.user, "usage='named so'")))
        await places.known(api)
        await delete(api, await api.create(guest))


async def test_a_user_without_the_right_to_write(
    lab: Lab, api: Api, ceph: Ceph, places: Places
) -> None:
    caps = ("mon", "profile rbd", "osd", "profile rbd-read-only pool=vm")
    key = ceph.ceph("auth", "get-or-create-key", "client.reader", *caps).strip()
    with secret(lab, value=key) as uuid:
        guest = places.guest(on(ceph, auth=OTHER.format("reader", f"uuid='{uuid}'")))
        await places.known(api)
        assert "capabilities" in await both(api, guest, "StorageFailed")
    assert not snaps(ceph, "refused")


async def test_an_image_that_is_not_there(api: Api, ceph: Ceph, places: Places) -> None:
    for name in ("vm/nothing", "nothing/refused"):
        guest = places.guest(on(ceph, name))
        await places.known(api)
        assert "no such pool, image" in await both(api, guest, "StorageFailed")


async def test_formats_and_more_that_a_snapshot_would_not_hold(
    api: Api, ceph: Ceph, places: Places, tmp_path: Path
) -> None:
    base = tmp_path / "overlay.qcow2"
    words = ("-b", "/nowhere.raw", "-F", "raw", "-u", base, "16M")
    run("qemu-img", "create", "-q", "-f", "qcow2", *words)
    ceph.image("overlay", base)
    outside, elsewhere = tmp_path / "outside.qcow2", f"data_file={tmp_path / 'data'}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", elsewhere, outside, "16M")
    ceph.image("outside", outside)
    slices = "<slices><slice type='storage' offset='0' size='4096'/></slices>"
    for disk, word in (
        (on(ceph, "vm/overlay", format="qcow2"), "lies on others"),
        (on(ceph, "vm/outside", format="qcow2"), "lies on others"),
        (on(ceph, format="qcow2"), "can't be read as qcow2"),
        (on(ceph, format="vmdk"), "format 'vmdk'"),
        (on(ceph, inside=slices), "slice"),
    ):
        guest = places.guest(disk)
        await places.known(api)
        assert word in await both(api, guest, "MethodNotSupported", "StorageFailed")
        if word == "lies on others":
            image = etree.fromstring(disk.source).get("name", "").partition("/")[2]
            named = f"<diskSnapshot method='rbd'><image pool='vm' name='{image}'/></diskSnapshot>"
            await unchanged(api, guest, "NotUnderDisk", method_xml=named)


async def test_a_cluster_that_can_not_be_found_has_lost_nothing(
    daemon: Lab, connect: Connect, ceph: Ceph, places: Places, tmp_path: Path
) -> None:
    """What is not told from an image that is not there would drop the record of one that is."""
    conf, away = tmp_path / "ceph.conf", tmp_path / "away"
    shutil.copy(ceph.conf, conf)
    source = f"<source protocol='rbd' name='vm/refused'><config file='{conf}'/></source>"
    guest = places.guest(DiskSpec("raw", source=source, type="network"))
    api = await connect()
    await places.known(api)
    made = await api.create(guest)
    daemon.daemon.stop()
    conf.rename(away)
    daemon.daemon.start({})
    api = await connect()
    for member, arguments in (("GetBackupSource", ()), ("Delete", ("u", 0))):
        call = api.call(made.snapshot, SNAPSHOT, member, *arguments)
        assert "can't be found" in (await refused(call, "StorageFailed")).text
    assert (await api.properties(made.snapshot, SNAPSHOT))["State"] == "ready"
    assert snaps(ceph, "refused") == {name_of(made): True}
    away.rename(conf)
    ready = asyncio.get_running_loop().time() + 60
    while True:
        try:
            await delete(api, made)
            break
        except ApiError as error:
            assert error.name in ("Busy", "StorageFailed"), error
            assert asyncio.get_running_loop().time() < ready
            await asyncio.sleep(0.5)
    assert not snaps(ceph, "refused")


async def test_metadata_that_are_not_ours_to_read(api: Api, ceph: Ceph, places: Places) -> None:
    """Whoever may write to the image can write that as well."""
    guest = places.guest(on(ceph))
    await places.known(api)
    made = await api.create(guest)
    for text in ("[]", "7", "{", '{"snap": []}'):
        ceph.rbd("image-meta", "set", "vm/refused", name_of(made), text)
        with suppress(ApiError):
            await api.backup_source(made.snapshot)
        assert (await api.properties(made.snapshot, SNAPSHOT))["State"] in ("ready", "missing")
    ceph.rbd("image-meta", "remove", "vm/refused", name_of(made))
    assert await api.backup_source(made.snapshot) == made.backup_source
    await delete(api, made)
    assert not snaps(ceph, "refused")


async def test_without_layering_it_can_not_be_protected(
    api: Api, ceph: Ceph, places: Places
) -> None:
    guest = places.guest(on(ceph, "vm/plain"))
    await places.known(api)
    assert "layering" in str((await api.plan(guest))["warnings"])
    made = await api.create(guest)
    assert snaps(ceph, "plain") == {name_of(made): False}
    assert (await api.properties(made.snapshot, SNAPSHOT))["State"] == "ready"
    await delete(api, made)
    assert not snaps(ceph, "plain")


async def test_a_cluster_that_is_full(api: Api, ceph: Ceph, places: Places) -> None:
    guest = places.guest(on(ceph))
    await places.known(api)
    ceph.fill(True)
    try:
        assert "full" in await both(api, guest, "NoSpace")
    finally:
        ceph.fill(False)
    await delete(api, await api.create(guest))


async def test_an_image_whose_data_are_in_another_pool(
    api: Api, ceph: Ceph, places: Places, tmp_path: Path
) -> None:
    ceph.pool("data")
    rights = ("mon", "profile rbd", "osd", "profile rbd pool=vm, profile rbd pool=data")
    ceph.ceph("auth", "caps", f"client.{ceph.user}", *rights)
    guest = places.guest(ceph.disk("split", "raw", "--data-pool", "data", size_mib=16))
    await places.known(api)
    made = await api.create(guest)
    pools = json.loads(ceph.ceph("osd", "lspools", "--format=json"))
    numbers = {one["poolname"]: one["poolnum"] for one in pools}
    place = seen_by_admin(ceph, "split")
    with Clusters(Unasked()).session(place.access) as session:
        info = session.ask("info", image=place.words)
        assert info["data_pool"] == numbers["data"]
        assert not session.ask("space", pool="vm", data_pool=numbers["data"])["full"]
        session.close()
    assert ceph.read(f"split@{name_of(made)}", tmp_path / "read").stat().st_size == 16 << 20
    await delete(api, made)


@pytest.mark.parametrize("full", ["vm", "data", "", "other"])
def test_either_pool_that_is_full_takes_no_writes(full: str) -> None:
    """From what the monitors say: no pool of a cluster with one disk is full alone."""
    names = {"vm": 3, "data": 7, "other": 9}

    class Said:
        def command(self, **words: str) -> Any:
            if words["prefix"] == "df":
                stats = {name: {"max_avail": number << 30} for name, number in names.items()}
                return {"pools": [{"id": names[name], "stats": stats[name]} for name in names]}
            flags = {name: "hashpspool" + ",full" * (name == full) for name in names}
            rows = [{"pool_name": n, "pool": names[n], "flags_names": flags[n]} for n in names]
            return {"pools": rows, "flags_set": []}

    session = rbdworker.Session(Said(), lambda _: None)  # type: ignore[arg-type]
    space = session.space("vm", names["data"])
    assert space["full"] == (full in ("vm", "data"))
    assert space["available"] == 7 << 30
    assert session.space("vm")["available"] == 3 << 30
    assert session.space("vm")["full"] == (full == "vm")


async def test_an_image_in_a_namespace(api: Api, ceph: Ceph, places: Places) -> None:
    ceph.rbd("namespace", "create", "vm/inner")
    ceph.rbd("create", "vm/inner/refused", "--size", "16M")
    guest = places.guest(on(ceph, "vm/inner/refused"))
    await places.known(api)
    made = await api.create(guest)
    assert name_of(made) in ceph.rbd("snap", "ls", "vm/inner/refused")
    assert not snaps(ceph, "refused")
    named = "<diskSnapshot method='rbd'><image pool='vm' name='refused'/></diskSnapshot>"
    await refused(api.create(guest, VDA, named), "NotUnderDisk")
    await delete(api, made)
    assert name_of(made) not in ceph.rbd("snap", "ls", "vm/inner/refused")


async def test_a_volume_of_an_rbd_pool(lab: Lab, api: Api, ceph: Ceph, places: Places) -> None:
    connection = lab.hypervisor.connection()
    with secret(lab, value=ceph.key, usage="of a pool") as uuid:
        pool = connection.storagePoolCreateXML(
            "<pool type='rbd'><name>images</name><source>"
            f"<host name='127.0.0.1' port='{ceph.port}'/><name>vm</name>"
            f"<auth type='ceph' username='{ceph.user}'><secret uuid='{uuid}'/></auth>"
            "</source></pool>"
        )
        source = "<source pool='images' volume='refused'/>"
        guest = places.guest(DiskSpec("raw", source=source, type="volume"))
        await places.known(api)
        (row,) = await api.disks(guest)
        assert (row["type"], row["method"]) == ("network", "rbd")
        asked = "<disk type='volume'><source pool='images' volume='refused'/></disk>"
        made = await api.create(guest, asked)
        assert made.source.get("name") == "vm/refused"
        assert [host.get("port") for host in made.source.findall("host")] == [str(ceph.port)]
        (auth,) = made.source.findall("auth")
        assert etree.tostring(auth, method="c14n2").decode() == (
            f'<auth username="{ceph.user}"><secret type="ceph" uuid="{uuid}"></secret></auth>'
        )
        assert set(snaps(ceph, "refused")) == {name_of(made)}
        await delete(api, made)
        resolved = "<disk type='network'><source protocol='rbd' name='vm/refused'/></disk>"
        await delete(api, await api.create(guest, resolved))
        pool.destroy()
    assert not snaps(ceph, "refused")
