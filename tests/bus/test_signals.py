"""What changes is told once, from the path of what has changed, and no more than that."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_vm.bus.contract import DISK_SNAPSHOT, DOMAIN, MANAGER, SNAPSHOT
from snapd_vm.bus.served import DiskSnapshotBus
from snapd_vm.model import ROOT_PATH, SnapshotState, domain_path, snapshot_path
from tests.bus.clients import Client
from tests.bus.fakes import FakeEngine, make_disk, make_domain, make_snapshot, uuid


@pytest.fixture
async def listener(client: Client) -> Client:
    await client.listen()
    client.signals.clear()
    return client


async def all_signals(client: Client, engine: FakeEngine) -> list[Message]:
    """Those that came before one that is known to be the last."""
    engine.tell("warning", make_snapshot(999), "end", "")
    await client.heard("Warning")
    return client.signals


async def test_a_new_domain(listener: Client, engine: FakeEngine) -> None:
    engine.tell("domain_added", make_domain(5))
    signal = await listener.heard("InterfacesAdded")
    assert (signal.path, signal.signature) == (ROOT_PATH, "oa{sa{sv}}")
    path, interfaces = signal.body
    assert path == domain_path(uuid(5))
    assert set(interfaces) == {DISK_SNAPSHOT, DOMAIN}
    assert interfaces[DOMAIN]["UUID"] == Variant("s", uuid(5))
    assert len(interfaces[DOMAIN]) == 4


async def test_a_domain_that_goes(listener: Client, engine: FakeEngine) -> None:
    engine.tell("domain_removed", make_domain(5))
    signal = await listener.heard("InterfacesRemoved")
    assert signal.path == ROOT_PATH
    assert signal.body == [domain_path(uuid(5)), [DISK_SNAPSHOT, DOMAIN]]


async def test_a_new_snapshot_and_its_end(listener: Client, engine: FakeEngine) -> None:
    snapshot = make_snapshot()
    engine.tell("snapshot_added", snapshot)
    signal = await listener.heard("InterfacesAdded")
    assert (signal.path, signal.body[0]) == (ROOT_PATH, snapshot_path(snapshot.uuid))
    assert len(signal.body[1][SNAPSHOT]) == 12
    engine.tell("snapshot_removed", snapshot)
    signal = await listener.heard("InterfacesRemoved")
    assert signal.body == [snapshot_path(snapshot.uuid), [SNAPSHOT]]


async def test_only_what_has_changed_is_told(listener: Client, engine: FakeEngine) -> None:
    old = make_domain(1)
    assert old.agent is not None
    paused = replace(old, state="paused")
    engine.tell("domain_changed", old, paused)
    renamed = replace(paused, name="new", agent=replace(old.agent, connected=False))
    engine.tell("domain_changed", paused, renamed)
    engine.tell("domain_changed", renamed, replace(renamed, disks=(make_disk("vdb"),)))
    first, second = await all_signals(listener, engine)
    assert (first.path, first.interface, first.member) == (
        domain_path(uuid(1)),
        "org.freedesktop.DBus.Properties",
        "PropertiesChanged",
    )
    assert first.body == [DOMAIN, {"State": Variant("s", "paused")}, []]
    assert second.body == [
        DOMAIN,
        {"Name": Variant("s", "new"), "GuestAgent": Variant("b", False)},
        [],
    ]


async def test_the_state_of_a_snapshot(listener: Client, engine: FakeEngine) -> None:
    old = make_snapshot()
    new = replace(old, state=SnapshotState.MISSING, modified_disk="<disk/>")
    engine.tell("snapshot_changed", old, new)
    (signal,) = await all_signals(listener, engine)
    assert signal.path == snapshot_path(old.uuid)
    assert signal.body == [SNAPSHOT, {"State": Variant("s", "missing")}, []]


async def test_connected(listener: Client, engine: FakeEngine) -> None:
    engine.tell("connection_changed", False)
    (signal,) = await all_signals(listener, engine)
    assert signal.path == ROOT_PATH
    assert signal.body == [MANAGER, {"Connected": Variant("b", False)}, []]


async def test_a_warning_comes_from_its_snapshot(listener: Client, engine: FakeEngine) -> None:
    engine.tell("warning", make_snapshot(), "redefined", "The domain was re-defined.")
    signal = await listener.heard("Warning")
    assert (signal.path, signal.interface) == (snapshot_path(make_snapshot().uuid), SNAPSHOT)
    assert signal.body == ["redefined", "The domain was re-defined."]


async def test_telling_nobody_does_not_hurt_the_engine(
    engine: FakeEngine, served: DiskSnapshotBus
) -> None:
    engine.tell("domain_changed", make_domain(1), make_domain(1, state=None))
    await served.close(1)
    engine.tell("connection_changed", False)
    engine.tell("domain_added", make_domain(5))
