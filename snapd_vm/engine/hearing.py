"""What is done when the inventory tells of domains and of the connection to libvirt.

On the asyncio loop; see virt/inventory.py for who calls this, and when.
"""

from __future__ import annotations

import asyncio

from snapd_vm.engine.keeper import Keeper
from snapd_vm.engine.shelf import Shelf
from snapd_vm.engine.tasks import Tasks
from snapd_vm.engine.world import World
from snapd_vm.model import Domain


class Hearing:
    """Passes on what it hears, and has the snapshots of the domain looked at.

    `resumed` are the domains whose vCPUs were started since somebody took them out; `found` is set
    when libvirt has told of all domains.
    """

    def __init__(self, world: World, shelf: Shelf, keeper: Keeper, tasks: Tasks) -> None:
        self.resumed: set[str] = set()
        self.found = asyncio.Event()
        self._world = world
        self._shelf = shelf
        self._keeper = keeper
        self._tasks = tasks
        self._marking = asyncio.Lock()

    def domain_added(self, domain: Domain) -> None:
        if domain.active:
            self._mark(domain.uuid, clean=False)
        for listener in self._shelf.listeners:
            listener.domain_added(domain)
        self._tasks.spawn(self._shelf.look_at_domain(domain.uuid))

    def domain_changed(self, old: Domain, new: Domain) -> None:
        if new.active and not old.active:
            self._mark(new.uuid, clean=False)
        for listener in self._shelf.listeners:
            listener.domain_changed(old, new)
        self._tasks.spawn(self._shelf.look_at_domain(new.uuid))

    def domain_removed(self, domain: Domain) -> None:
        self.resumed.discard(domain.uuid)
        for listener in self._shelf.listeners:
            listener.domain_removed(domain)
        self._tasks.spawn(self._shelf.look_at_domain(domain.uuid))

    def domain_resumed(self, uuid: str) -> None:
        self.resumed.add(uuid)

    def domain_stopped(self, uuid: str, clean: bool, ended: bool) -> None:
        self._mark(uuid, clean=clean, ended=ended)

    def _mark(self, uuid: str, *, clean: bool, ended: bool = False) -> None:
        """Remember whether the disks of a domain that is off, when it is, are clean.

        One that runs is not: should the host go down, or should it stop while we don't look, nobody
        says later how it ended.
        """

        async def write() -> None:
            async with self._marking:  # in their order: the last word counts
                stopped = self._world.journal.stopped
                await self._world.run(stopped, uuid, clean=clean, ended=ended)

        self._tasks.spawn(write())

    def connection_changed(self, connected: bool) -> None:
        for listener in self._shelf.listeners:
            listener.connection_changed(connected)
        if connected:
            self._keeper.wake()
            self.found.set()
