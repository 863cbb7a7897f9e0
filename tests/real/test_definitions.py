"""What libvirt's definitions do to a snapshot, before, at and after its Create."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest
from lxml import etree

from snapd_vm.model import ROOT_PATH
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real import images
from tests.real.api import DOMAIN, QUIESCE_REQUIRED, SNAPSHOT, Api, ApiError, Created, path_of
from tests.real.places import (
    CONFIG,
    INACTIVE,
    Places,
    disk_of,
    file_of,
    image,
    refused,
    with_image,
)


@pytest.fixture
def places(lab: Lab) -> Iterator[Places]:
    """Domains of the test's own."""
    made = Places(lab)
    yield made
    made.forget()


async def state_of(api: Api, created: Created) -> str:
    return str((await api.properties(created.snapshot, SNAPSHOT))["State"])


async def until_state(api: Api, created: Created, wanted: str, timeout: float = 20) -> None:
    """Wait for libvirt's event to have come through."""
    deadline = asyncio.get_running_loop().time() + timeout
    while (found := await state_of(api, created)) != wanted:
        assert asyncio.get_running_loop().time() < deadline, f"{found}, not {wanted}"
        await asyncio.sleep(0.05)


async def warned(api: Api, created: Created) -> None:
    """Wait for the Warning of that snapshot; it must tell no path."""
    while True:
        signal = await api.client.heard("Warning", 20)
        if signal.path == created.snapshot:
            break
    code, message = signal.body
    assert re.fullmatch(r"[a-z-]+", code)
    assert message
    assert "/" not in message
    assert signal.interface == SNAPSHOT


# -- behind our back -----------------------------------------------------------------------------


async def test_undefined_while_it_runs_and_then_destroyed(api: Api, places: Places) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    first = await api.create(guest, name="first")
    guest.domain.undefine()
    second = await api.create(guest, name="second")
    files = first.file, second.file, second.overlay
    assert second.file == first.overlay
    assert await state_of(api, second) == "ready"
    guest.domain.destroy()
    await until_state(api, first, "detached")
    await until_state(api, second, "detached")
    assert all(map(os.path.exists, files))
    assert images.info(second.overlay)["backing-filename"] == second.file
    assert await api.backup_source(second.snapshot) == second.backup_source


@pytest.mark.parametrize("running", [False, True])
async def test_defined_again_from_an_old_xml(api: Api, places: Places, running: bool) -> None:
    guest = places.guest(start=running)
    await places.known(api)
    await api.client.listen()
    old = guest.domain.XMLDesc(INACTIVE)
    created = await api.create(guest)
    new = guest.domain.XMLDesc(INACTIVE)
    places.lab.hypervisor.define(old)
    await until_state(api, created, "failed")
    await warned(api, created)
    places.lab.hypervisor.define(new)
    await until_state(api, created, "ready")


async def test_the_base_as_another_domains_own_image(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    await api.client.listen()
    created = await api.create(guest)
    (Path(created.file).parent / "link").symlink_to(created.file)
    other = places.guest(with_image(Path(created.file).parent / "link"))
    await places.known(api)
    with pytest.raises(ApiError) as error:  # it may change, and is handed out no more
        await api.backup_source(created.snapshot)
    assert error.value.name == "InvalidState"
    assert await state_of(api, created) == "failed"
    await warned(api, created)
    await places.unknown(api, other)
    await api.backup_source(created.snapshot)
    assert await state_of(api, created) == "ready"


async def test_a_linked_clone_on_the_base_does_no_harm(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    created = await api.create(guest)
    places.guest(with_image(image(places.folder() / "clone.qcow2", created.file)))
    await places.known(api)
    await api.backup_source(created.snapshot)
    assert await state_of(api, created) == "ready"


async def test_the_domain_renamed(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    created = await api.create(guest)
    guest.domain.rename(f"{guest.name}-renamed")
    guest.name += "-renamed"
    await places.known(api)
    told = await api.properties(created.snapshot, SNAPSHOT)
    assert (told["State"], told["Domain"], told["DomainUUID"]) == (
        "ready",
        path_of(guest),
        guest.uuid,
    )
    by_name = f"<domain><name>{guest.name}</name><devices><disk><target dev='vda'/></disk>"
    again = await api.create_on_root(f"{by_name}</devices></domain>")
    assert again.file == created.overlay
    assert (await api.properties(path_of(guest), DOMAIN))["Name"] == guest.name


async def test_the_disk_detached(api: Api, places: Places) -> None:
    guest = places.guest(places.disk(), places.disk())
    await places.known(api)
    created = await api.create(guest, "<disk><target dev='vdb'/></disk>")
    xml = etree.tostring(disk_of(guest, target="vdb"), encoding="unicode")
    guest.domain.detachDeviceFlags(xml, CONFIG)
    assert await api.backup_source(created.snapshot) == created.backup_source
    assert await state_of(api, created) == "detached"
    guest.domain.attachDeviceFlags(xml, CONFIG)
    await api.backup_source(created.snapshot)
    assert await state_of(api, created) == "ready"


@pytest.mark.timeout(180)
async def test_what_libvirt_sends_no_event_for_is_seen_all_the_same(
    api: Api, places: Places
) -> None:
    """Within a minute, by itself."""
    guest, other = places.guest(), places.guest()
    await places.known(api)
    created = await api.create(guest)
    other.domain.attachDeviceFlags(
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
        f"<source file='{created.file}'/><target dev='vdb' bus='virtio'/></disk>",
        CONFIG,
    )
    await until_state(api, created, "failed", 110)


async def test_another_image_in_the_disks_place(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    created = await api.create(guest)
    other = image(places.folder() / "other.qcow2")
    xml = guest.domain.XMLDesc().replace(quoteattr(created.overlay)[1:-1], str(other))
    places.lab.hypervisor.define(xml)
    assert file_of(guest) == str(other)
    await until_state(api, created, "detached")


async def test_the_origin_deleted(api: Api, places: Places) -> None:
    guest = places.guest()
    await places.known(api)
    created = await api.create(guest)
    os.rename(created.file, f"{created.file}.away")
    await refused(api.backup_source(created.snapshot), "StorageFailed")
    assert await state_of(api, created) == "missing"
    os.rename(f"{created.file}.away", created.file)
    assert await api.backup_source(created.snapshot) == created.backup_source
    assert await state_of(api, created) == "ready"


# -- live and persistent -------------------------------------------------------------------------


async def test_a_definition_that_names_another_image_is_left_as_it_is(
    api: Api, places: Places
) -> None:
    guest = places.guest(start=True)
    await places.known(api)
    other = image(places.folder() / "other.qcow2")
    changed = guest.domain.XMLDesc(INACTIVE).replace(str(guest.disk().path), str(other))
    places.lab.hypervisor.define(changed)
    definition = guest.domain.XMLDesc(INACTIVE)
    created = await api.create(guest)
    assert file_of(guest) == created.overlay
    assert guest.domain.XMLDesc(INACTIVE) == definition
    assert await state_of(api, created) == "ready"


@pytest.mark.parametrize("other_path", [False, True])
async def test_a_definition_that_was_edited_and_names_the_same_image_follows(
    api: Api, places: Places, other_path: bool
) -> None:
    """By another path as well, or the next start would boot the base."""
    guest = places.lab.guest([DiskSpec(folder=places.folder())])
    path = guest.disk().path
    changed = guest.domain.XMLDesc(INACTIVE).replace("<on_crash>destroy<", "<on_crash>preserve<")
    if other_path:
        (path.parent / "link").symlink_to(path)
        changed = changed.replace(f"'{path}'", f"'{path.parent}/link'")
    places.lab.hypervisor.define(changed)
    created = await api.create(guest)
    assert file_of(guest) == file_of(guest, INACTIVE) == created.overlay
    assert "<on_crash>preserve<" in guest.domain.XMLDesc(INACTIVE)
    assert await state_of(api, created) == "ready"
    await boots(guest)


async def boots(guest: Guest) -> None:
    """What is written after the Create is there after the next start; then it is taken away."""
    guest.write("vda", "mark", "after")
    guest.poweroff()
    guest.start()
    assert guest.read("vda", "mark") == "after"
    guest.remove()


async def test_a_transient_domain(api: Api, places: Places, lab: Lab) -> None:
    guest = places.lab.guest([DiskSpec(folder=places.folder())])
    guest.domain.undefine()
    created = await api.create(guest, flags=QUIESCE_REQUIRED)
    assert (created.ours("consistency"), file_of(guest)) == ("quiesced", created.overlay)
    assert not guest.domain.isPersistent()
    guest.writes_go_on()
    guest.destroy()
    await until_state(api, created, "detached")
    assert os.path.exists(created.overlay)


@pytest.mark.parametrize("running", [False, True])
async def test_an_explicit_chain_in_the_definition(api: Api, places: Places, running: bool) -> None:
    spec = DiskSpec(folder=places.folder(), overlays=1)
    guest = places.lab.guest([spec], start=False)
    active, base = guest.disk().chain
    store = (
        f"<backingStore type='file'><format type='qcow2'/><source file='{base}'/>"
        "<backingStore/></backingStore>"
    )
    xml = guest.domain.XMLDesc().replace("<target dev='vda'", f"{store}<target dev='vda'", 1)
    places.lab.hypervisor.define(xml)
    assert disk_of(guest, INACTIVE).find("backingStore") is not None
    guest.start()
    if not running:
        guest.poweroff()
    created = await api.create(guest)
    assert created.file == str(active)
    assert file_of(guest) == file_of(guest, INACTIVE) == created.overlay
    if not running:
        guest.start()
    await boots(guest)


# -- names and places ----------------------------------------------------------------------------

ODD = [
    "with space",
    "it's",
    'say "hi"',
    "a&b<c>",
    "one,two",
    "nbd:host:1",
    "größe-日本",
    "-leading-dash",
    "json:{}",
    "per%20cent$(id)`id`",
]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("running", [False, True])
async def test_a_file_called(api: Api, places: Places, odd: str, running: bool) -> None:
    folder = places.folder() / odd
    folder.mkdir()
    folder.chmod(0o755)
    path = image(folder / f"{odd}.qcow2")
    guest = places.guest(with_image(path), start=running)
    await places.known(api)
    created = await api.create(guest, f"<disk><source file={quoteattr(str(path))}/></disk>")
    again = await api.create(guest, name="second")
    assert (created.file, again.file) == (str(path), created.overlay)
    assert again.overlay == str(folder / f"{odd}.second")
    assert file_of(guest) == file_of(guest, INACTIVE) == again.overlay
    chain = images.info(again.overlay)
    assert chain["backing-filename"] == created.overlay
    named = folder / f"{odd} named"
    method = f"<diskSnapshot method='qemu'><overlay file={quoteattr(str(named))}/></diskSnapshot>"
    assert (await api.create(guest, method_xml=method)).overlay == str(named)
    assert {row["State"] for row in (await api.snapshots_of(guest)).values()} == {"ready"}
    other = places.guest(with_image(image(places.folder() / "clone", named)))
    assert other.name in (await refused(api.create(guest), "Busy")).text
    if not running:
        guest.domain.create()  # QEMU opens the whole chain
        guest.domain.destroy()


@pytest.mark.parametrize("running", [False, True])
async def test_a_disk_behind_a_symlink(api: Api, places: Places, running: bool) -> None:
    real = image(places.folder() / "real.qcow2")
    link = places.folder() / "link.qcow2"
    link.symlink_to(real)
    guest = places.guest(with_image(link), start=running)
    await places.known(api)
    created = await api.create(guest, name="one")
    assert created.file == str(link)
    assert created.overlay == str(link.parent / "link.one")
    assert os.path.realpath(images.info(created.overlay)["backing-filename"]) == str(real)
    assert await state_of(api, created) == "ready"


@pytest.mark.parametrize("running", [False, True])
async def test_a_disk_of_a_pool(api: Api, places: Places, lab: Lab, running: bool) -> None:
    folder = places.folder()
    pool = lab.hypervisor.connection().storagePoolDefineXML(
        f"<pool type='dir'><name>{folder.name}</name><target><path>{folder}</path></target></pool>"
    )
    try:
        pool.create()
        made = lab.guest([DiskSpec(folder=folder)], start=False)
        path = made.disk().path
        pool.refresh()
        source = f"<source pool='{folder.name}' volume='{path.name}'/>"
        xml = made.domain.XMLDesc().replace(f"<source file='{path}'/>", source)
        lab.hypervisor.define(xml.replace("<disk type='file'", "<disk type='volume'"))
        made.start()
        if not running:
            made.poweroff()
        created: Any = await api.create_on_root(f"<disk type='volume'>{source}</disk>")
        assert (created.file, created.ours("type")) == (str(path), "file")
        assert file_of(made) == file_of(made, INACTIVE) == created.overlay
        assert await state_of(api, created) == "ready"
        row = (await api.disks(made))[0]
        assert etree.fromstring(row["source"]).get("file") == created.overlay
        if not running:
            made.start()
        await boots(made)
    finally:
        pool.destroy()
        pool.undefine()


async def test_the_root_object_knows_nothing_of_a_domain_that_is_gone(
    api: Api, places: Places
) -> None:
    guest = places.guest()
    await places.known(api)
    created = await api.create(guest)
    await places.unknown(api, guest)
    # Its image is taken away after it; nobody tells of that, and it is looked at twice a minute.
    async with asyncio.timeout(20):
        while await state_of(api, created) not in ("detached", "missing"):
            await asyncio.sleep(0.05)
    xml = f"<domain><uuid>{guest.uuid}</uuid><devices><disk><target dev='vda'/></disk>"
    await refused(api.create_on_root(f"{xml}</devices></domain>"), "NoSuchDomain")
    assert (await api.properties(ROOT_PATH, "org.example.DiskSnapshot.Manager"))["Connected"]
