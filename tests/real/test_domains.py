"""Domain objects follow libvirt: they come, go and change, and the bus is told."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real.api import DOMAIN, Api, path_of

ROOT = "/org/example/DiskSnapshot"


async def heard(api: Api, member: str, path: str, about: str = "") -> list[Any]:
    """The body of the next such signal, which may have come already; it is taken away."""
    deadline = time.monotonic() + 10
    while True:
        for signal in api.client.signals:
            if (signal.member, signal.path) == (member, path) and about in str(signal.body):
                api.client.signals.remove(signal)
                return list(signal.body)
        assert time.monotonic() < deadline, (member, path, about, api.client.signals)
        await asyncio.sleep(0.01)


async def test_a_domain_comes_changes_and_goes(daemon: Lab, api: Api, lab: Lab) -> None:
    await api.client.listen()
    guest = await asyncio.to_thread(lab.guest, start=False)
    path, interfaces = await heard(api, "InterfacesAdded", ROOT, path_of(guest))
    assert path == path_of(guest)
    assert set(interfaces) == {"org.example.DiskSnapshot", DOMAIN}
    assert interfaces[DOMAIN]["State"].value == "shutoff"
    await asyncio.to_thread(guest.start)
    await heard(api, "PropertiesChanged", path_of(guest), "running")
    await heard(api, "PropertiesChanged", path_of(guest), "GuestAgent")
    told = await api.properties(path_of(guest), DOMAIN)
    assert told == {
        "Name": guest.name,
        "UUID": guest.uuid,
        "State": "running",
        "GuestAgent": True,
    }
    for change, state in ((guest.domain.suspend, "paused"), (guest.domain.resume, "running")):
        api.client.signals.clear()  # a domain that starts is paused for a moment, too
        change()
        body = await heard(api, "PropertiesChanged", path_of(guest), state)
        assert (body[0], set(body[1])) == (DOMAIN, {"State"})
    guest.kill_agent()
    body = await heard(api, "PropertiesChanged", path_of(guest), "GuestAgent")
    assert body[1]["GuestAgent"].value is False
    await asyncio.to_thread(guest.remove)
    path, gone = await heard(api, "InterfacesRemoved", ROOT, path_of(guest))
    assert path == path_of(guest)
    assert set(gone) == {"org.example.DiskSnapshot", DOMAIN}


async def test_what_changed_while_libvirt_was_away_is_found(
    daemon: Lab, api: Api, lab: Lab, guest: Guest
) -> None:
    other = await asyncio.to_thread(lab.guest, start=False)
    await asyncio.to_thread(daemon.daemon.stop)
    other.domain.undefine()
    await asyncio.to_thread(daemon.daemon.start)
    objects = await api.call(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
    assert path_of(guest) in objects[0]
    assert path_of(other) not in objects[0]


async def test_snapshots_are_announced(daemon: Lab, api: Api, guest: Guest) -> None:
    await api.client.listen()
    created = await api.create(guest)
    path, interfaces = await heard(api, "InterfacesAdded", ROOT, created.snapshot)
    assert path == created.snapshot
    assert interfaces["org.example.DiskSnapshot.Snapshot"]["State"].value == "ready"
