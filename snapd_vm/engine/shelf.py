"""The snapshots on record: what they are called, and the State that storage and libvirt give them.

Runs on the asyncio loop. Takes nothing away and changes no storage.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

from snapd_vm.engine.service import Listener
from snapd_vm.engine.world import World
from snapd_vm.errors import NoSuchSnapshot, SnapdError
from snapd_vm.journald import MessageId, fields
from snapd_vm.methods.method import BASE_IN_USE, Explains, Method, Standing, Warns
from snapd_vm.model import Domain, Snapshot, SnapshotState, Target

log = logging.getLogger(__name__)

_LOOK_S = 30.0
"""Nobody tells of a file that was removed; so it is looked for this often."""

_LOOK_AHEAD_S = 5.0
"""A guest that writes 50 MiB/s fills a tenth of a thick snapshot of 2.5 GiB in this time."""

SPOILT = (
    "A delete of the snapshot was broken off, and its contents are no longer what they were; "
    "delete it."
)
"""Of a snapshot that is `spoilt`: what everybody may be told, and callers are."""

_UNSEEN = Standing("")
_AT_WORK = (SnapshotState.DELETING, SnapshotState.REVERTING)


class Shelf:
    """Snapshots by UUID, kept true."""

    def __init__(
        self,
        world: World,
        domains: Callable[[], Mapping[str, Domain]],
        connected: Callable[[], bool],
    ) -> None:
        self.snapshots: dict[str, Snapshot] = {}
        self.listeners: list[Listener] = []
        self._world = world
        self._domains = domains
        self._connected = connected
        self._looking: set[str] = set()
        self._look_again: set[str] = set()
        self._warned: dict[str, frozenset[str]] = {}
        self._stood: dict[str, Standing] = {}
        self._seen: dict[str, asyncio.Lock] = {}

    async def load(self) -> None:
        """Take the journal's."""
        found = await self._world.run(self._world.journal.snapshots)
        self.snapshots.update({snapshot.uuid: snapshot for snapshot in found})

    def get(self, uuid: str) -> Snapshot:
        """One of them. Raises NoSuchSnapshot."""
        snapshot = self.snapshots.get(uuid)
        if snapshot is None:
            raise NoSuchSnapshot("There is no such snapshot.")
        return snapshot

    def add(self, snapshot: Snapshot) -> None:
        """One that the journal has already."""
        self.snapshots[snapshot.uuid] = snapshot
        for listener in self.listeners:
            listener.snapshot_added(snapshot)

    def replace(self, snapshot: Snapshot) -> None:
        """Another record in the place of the one with its UUID; the journal has it already."""
        old = self.snapshots[snapshot.uuid]
        self.snapshots[snapshot.uuid] = snapshot
        for listener in self.listeners:
            listener.snapshot_changed(old, snapshot)

    def put_back(self, snapshot: Snapshot) -> None:
        """The record of one whose delete was broken off; the journal has it already."""
        was_spoilt = self.snapshots[snapshot.uuid].spoilt
        self.replace(snapshot)
        if snapshot.spoilt and not was_spoilt:
            log.warning(
                "snapshot %s of disk %s of domain %s is spoilt: its delete was broken off",
                snapshot.name,
                snapshot.target.disk,
                snapshot.domain_name,
                extra=fields(MessageId.STATE, snapshot, state=snapshot.state),
            )
            self.warn(
                snapshot,
                "spoilt",
                SPOILT,
            )

    def remove(self, uuid: str) -> None:
        """One that the journal has no more."""
        snapshot = self.snapshots.pop(uuid)
        self._warned.pop(uuid, None)
        self._stood.pop(uuid, None)
        self._seen.pop(uuid, None)
        for listener in self.listeners:
            listener.snapshot_removed(snapshot)

    def warn(self, snapshot: Snapshot, code: str, message: str) -> None:
        """Tell of something that concerns a snapshot; the message names no path."""
        for listener in self.listeners:
            listener.warning(snapshot, code, message)

    async def look(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with its State of now; tells of a change, and warns of a bad one.

        One look at a time: of two beside each other both would tell, and the older one be the last.
        """
        if snapshot.uuid not in self.snapshots:
            return snapshot
        async with self._seen.setdefault(snapshot.uuid, asyncio.Lock()):
            return await self._look(self.snapshots.get(snapshot.uuid, snapshot))

    async def _look(self, snapshot: Snapshot) -> Snapshot:
        method = self._world.methods.get(snapshot.target.method)
        if method is None or not self._connected() or self._at_work(snapshot):
            return snapshot
        domains = dict(self._domains())
        standing = await self._world.run(standing_of, method, snapshot.target, domains)
        state = SnapshotState(standing.state)
        current = self.snapshots.get(snapshot.uuid)
        if current is None or current.target != snapshot.target:  # gone, or moved, meanwhile
            return current or snapshot
        if self._at_work(current):
            return current
        if current.spoilt and state is SnapshotState.READY:
            state = SnapshotState.FAILED
        domain = domains.get(current.domain_uuid)
        name = domain.name if domain is not None else current.domain_name
        new = dataclasses.replace(current, state=state, domain_name=name)
        told = self._stood.get(snapshot.uuid, _UNSEEN).why
        self._stood[snapshot.uuid] = standing
        if new.state is not current.state or standing.why not in ("", told):
            log.warning(
                "snapshot %s of disk %s of domain %s is %s%s",
                new.name,
                new.target.disk,
                new.domain_name,
                state,
                f": {standing.why}" if standing.why else "",
                extra=fields(MessageId.STATE, new, state=state),
            )
        if new == current:
            return current
        if name != current.domain_name:
            log.info(
                "domain %s of snapshot %s is called %s now",
                current.domain_name,
                new.name,
                name,
                extra=fields(MessageId.STATE, new, state=state),
            )
        await self._world.run(self._world.journal.put, new)
        if self.snapshots.get(snapshot.uuid) is not current:  # deleted, or changed, meanwhile
            return self.snapshots.get(snapshot.uuid, new)
        self.replace(new)
        if standing.code and new.state is not current.state:
            self.warn(new, standing.code, standing.message)
        return new

    def _at_work(self, snapshot: Snapshot) -> bool:
        """Whether what would be seen is not for long: delete and revert change others of the disk
        too, whose records are right again at their end."""
        return any(
            one.state in _AT_WORK and one.target.disk == snapshot.target.disk
            for one in self.of(snapshot.domain_uuid)
        )

    async def look_at_domain(self, uuid: str) -> None:
        """Look at all snapshots of a domain; what happens to it meanwhile causes one more look.

        A block job has many events, and a look for each of them would take a thread for each.
        """
        if uuid in self._looking:
            self._look_again.add(uuid)
            return
        self._looking.add(uuid)
        try:
            again = True
            while again:
                self._look_again.discard(uuid)
                for snapshot in self.of(uuid):
                    await self._look_or_log(snapshot)
                again = uuid in self._look_again
        finally:
            self._looking.discard(uuid)

    async def keep_looking(self) -> None:
        """Look at all of them now and again, for ever."""
        while True:
            for snapshot in list(self.snapshots.values()):
                await self._look_or_log(snapshot)
            await asyncio.sleep(_LOOK_S)

    async def keep_looking_ahead(self) -> None:
        """Warn in time, for ever: room that a guest writes to is gone within seconds."""
        await asyncio.gather(*map(self._keep_looking_ahead, self._world.methods))

    async def _keep_looking_ahead(self, method: str) -> None:
        """Those of one method, as a storage that does not answer must not hold up the others."""
        while True:
            await asyncio.sleep(_LOOK_AHEAD_S)
            for snapshot in [s for s in self.snapshots.values() if s.target.method == method]:
                try:
                    await self._look_ahead(snapshot)
                except SnapdError as error:
                    log.debug("snapshot %s was not looked at: %s", snapshot.uuid, error)
                except Exception:  # nor must a mistake in what looks at one
                    log.exception("snapshot %s was not looked at", snapshot.uuid)

    async def _look_or_log(self, snapshot: Snapshot) -> None:
        try:
            await self._look_ahead(await self.look(snapshot))
        except SnapdError as error:
            log.warning("snapshot %s was not looked at: %s", snapshot.uuid, error)
        except Exception:  # what is wrong with one keeps nobody from looking at the others
            log.exception("snapshot %s was not looked at", snapshot.uuid)

    async def _look_ahead(self, snapshot: Snapshot) -> None:
        """Warn of what will go wrong: once, and again only if it was in order in between."""
        method: object = self._world.methods.get(snapshot.target.method)
        if not isinstance(method, Warns) or not self._connected():
            return
        domains = dict(self._domains())
        found = await self._world.run(method.warnings, snapshot.target, domains)
        if found.keys() != self._warned.get(snapshot.uuid, frozenset()):
            snapshot = await self.look(snapshot)  # it may have come to what it was warned of, too
        if snapshot.uuid not in self.snapshots:
            return
        before = self._warned.get(snapshot.uuid, frozenset())
        self._warned[snapshot.uuid] = frozenset(found)
        for code in before - found.keys():
            log.info(
                "snapshot %s of disk %s of domain %s: no more %s",
                snapshot.name,
                snapshot.target.disk,
                snapshot.domain_name,
                code,
                extra=fields(MessageId.WARNING, snapshot, code=code),
            )
        stood = self._stood.get(snapshot.uuid, _UNSEEN)
        for code in found.keys() - before - {stood.code}:  # which was told with its State
            log.warning(
                "snapshot %s of disk %s of domain %s: %s",
                snapshot.name,
                snapshot.target.disk,
                snapshot.domain_name,
                found[code],
                extra=fields(MessageId.WARNING, snapshot, code=code),
            )
            self.warn(snapshot, code, found[code])

    def of(self, domain_uuid: str) -> Sequence[Snapshot]:
        """All of a domain."""
        return [s for s in self.snapshots.values() if s.domain_uuid == domain_uuid]


def standing_of(method: Method, target: Target, domains: Mapping[str, Domain]) -> Standing:
    """How the snapshot stands, and why if the method can say; blocks."""
    explains: object = method
    if isinstance(explains, Explains):
        return explains.standing(target, domains)
    state = method.state(target, domains)
    if state == SnapshotState.FAILED:
        return Standing(state, code="base-in-use", message=BASE_IN_USE)
    return Standing(state)
