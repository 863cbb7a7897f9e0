"""What the engine offers to the bus, and what it tells it: the seam between the two.

The bus knows this file, the model and the errors, and nothing else of the engine; the tests put a
small engine of their own behind the same seam.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from snapd_vm.model import DiskReport, Domain, Found, Job, Plan, Request, Snapshot


class Listener(Protocol):
    """Who wants to hear of changes; called on the event loop, in the order of the changes."""

    def domain_added(self, domain: Domain) -> None: ...
    def domain_changed(self, old: Domain, new: Domain) -> None: ...
    def domain_removed(self, domain: Domain) -> None: ...
    def snapshot_added(self, snapshot: Snapshot) -> None: ...
    def snapshot_changed(self, old: Snapshot, new: Snapshot) -> None: ...
    def snapshot_removed(self, snapshot: Snapshot) -> None: ...
    def job_added(self, job: Job) -> None: ...
    def job_changed(self, old: Job, new: Job) -> None: ...
    def job_removed(self, job: Job) -> None: ...
    def job_completed(self, job: Job, success: bool, message: str) -> None:
        """Once for each job; the message is empty or the error's sentence, without a path."""

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

    @property
    def jobs(self) -> Mapping[int, Job]:
        """By number; a job stays 60 s after its end."""

    def subscribe(self, listener: Listener) -> None: ...
    def find(self, request: Request) -> Found: ...
    async def create(
        self, found: Sequence[Found], requests: Sequence[Request], uid: int
    ) -> Sequence[Snapshot]:
        """Snapshots of several disks of one domain with one freeze, in their order: all or none.

        The requests have one name and the same flags.
        """

    async def delete(self, snapshot_uuid: str, uid: int) -> str:
        """Delete a snapshot for the caller with this uid; the `<disk>` now in use, or ''."""

    async def revert(self, snapshot_uuid: str, uid: int) -> str:
        """Bring a disk back to a snapshot, likewise; the `<disk>` now in use."""

    async def cancel(self, number: int) -> None:
        """Ask a job to stop and undo what it has done; returns when it has ended.

        Raises InvalidState where it can't be cancelled any more.
        """

    async def plan(self, found: Found, request: Request) -> Plan: ...
    async def disks(self, domain_uuid: str) -> Sequence[DiskReport]: ...
    async def set_method(self, found: Found, request: Request, method_xml: str) -> None:
        """Store `method_xml`, of which the request's method was read, for the disk; '': none."""

    async def stored_method(self, found: Found, request: Request) -> str:
        """The `<diskSnapshot>` stored for the disk, or ''."""

    async def backup_source(self, snapshot_uuid: str) -> str: ...
    async def modified_disk(self, snapshot_uuid: str) -> str: ...
