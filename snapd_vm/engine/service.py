"""What the engine offers to the bus, and what it tells it: the seam between the two.

The bus knows this file, the model and the errors, and nothing else of the engine; the tests put a
small engine of their own behind the same seam.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from snapd_vm.model import DiskReport, Domain, Found, Plan, Request, Snapshot


class Listener(Protocol):
    """Who wants to hear of changes; called on the event loop, in the order of the changes."""

    def domain_added(self, domain: Domain) -> None: ...
    def domain_changed(self, old: Domain, new: Domain) -> None: ...
    def domain_removed(self, domain: Domain) -> None: ...
    def snapshot_added(self, snapshot: Snapshot) -> None: ...
    def snapshot_changed(self, old: Snapshot, new: Snapshot) -> None: ...
    def snapshot_removed(self, snapshot: Snapshot) -> None: ...
    def connection_changed(self, connected: bool) -> None: ...
    def warning(self, snapshot: Snapshot, code: str, message: str) -> None:
        """Something is wrong with a snapshot; the message carries no path."""


class Service(Protocol):
    """The engine as the bus sees it.

    Properties and `find` answer from memory alone: no libvirt call, no file. The coroutines touch
    libvirt and files and are called after the guard's yes only; they raise SnapdError. What they
    start goes on when the caller's task is cancelled.
    """

    @property
    def uri(self) -> str: ...
    @property
    def connected(self) -> bool: ...
    @property
    def methods(self) -> Sequence[str]: ...
    @property
    def domains(self) -> Mapping[str, Domain]:
        """By UUID, with dashes."""

    @property
    def snapshots(self) -> Mapping[str, Snapshot]:
        """By UUID, with dashes."""

    def subscribe(self, listener: Listener) -> None: ...
    def find(self, request: Request) -> Found: ...
    async def create(self, found: Found, request: Request) -> Snapshot: ...
    async def plan(self, found: Found, request: Request) -> Plan: ...
    async def disks(self, domain_uuid: str) -> Sequence[DiskReport]: ...
    async def backup_source(self, snapshot_uuid: str) -> str: ...
    async def modified_disk(self, snapshot_uuid: str) -> str: ...
