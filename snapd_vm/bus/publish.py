"""Signals: what changes in the engine is told on the bus, from the path of what has changed.

Carries no path of a disk. Failing to tell never hurts what has changed.
"""

from __future__ import annotations

import logging
from typing import Any

from snapd_vm.bus.connection import Connection
from snapd_vm.bus.contract import JOB, MANAGER, OBJECT_MANAGER, PROPERTIES, SNAPSHOT
from snapd_vm.bus.tree import INTERFACES, Node, Tree
from snapd_vm.bus.wire import Typed
from snapd_vm.model import ROOT_PATH, Domain, Job, Snapshot, domain_path, job_path, snapshot_path

log = logging.getLogger(__name__)


class Publisher:
    """Hears of changes, as engine.service.Listener, and sends their signals."""

    def __init__(self, connection: Connection, tree: Tree) -> None:
        self._connection = connection
        self._tree = tree

    def domain_added(self, domain: Domain) -> None:
        """InterfacesAdded, with all properties."""
        self._added(domain_path(domain.uuid), domain)

    def domain_changed(self, old: Domain, new: Domain) -> None:
        """PropertiesChanged, if a property did."""
        self._changed(domain_path(new.uuid), old, new)

    def domain_removed(self, domain: Domain) -> None:
        """InterfacesRemoved."""
        self._removed(domain_path(domain.uuid), domain)

    def snapshot_added(self, snapshot: Snapshot) -> None:
        """InterfacesAdded, with all properties."""
        self._added(snapshot_path(snapshot.uuid), snapshot)

    def snapshot_changed(self, old: Snapshot, new: Snapshot) -> None:
        """PropertiesChanged, if a property did."""
        self._changed(snapshot_path(new.uuid), old, new)

    def snapshot_removed(self, snapshot: Snapshot) -> None:
        """InterfacesRemoved."""
        self._removed(snapshot_path(snapshot.uuid), snapshot)

    def job_added(self, job: Job) -> None:
        """InterfacesAdded, with all properties."""
        self._added(job_path(job.number), job)

    def job_changed(self, old: Job, new: Job) -> None:
        """PropertiesChanged, if a property did."""
        self._changed(job_path(new.number), old, new)

    def job_removed(self, job: Job) -> None:
        """InterfacesRemoved."""
        self._removed(job_path(job.number), job)

    def job_completed(self, job: Job, success: bool, message: str) -> None:
        """The Completed of a job."""
        self._emit(job_path(job.number), JOB, "Completed", "bs", [success, message])

    def connection_changed(self, connected: bool) -> None:
        """PropertiesChanged of Connected."""
        self._properties_changed(ROOT_PATH, MANAGER, {"Connected": Typed("b", connected)})

    def warning(self, snapshot: Snapshot, code: str, message: str) -> None:
        """The Warning of a snapshot."""
        self._emit(snapshot_path(snapshot.uuid), SNAPSHOT, "Warning", "ss", [code, message])

    def _added(self, path: str, node: Node) -> None:
        self._emit(
            ROOT_PATH,
            OBJECT_MANAGER,
            "InterfacesAdded",
            "oa{sa{sv}}",
            [path, self._tree.all_properties(node)],
        )

    def _removed(self, path: str, node: Node) -> None:
        interfaces = list(INTERFACES[type(node)])
        self._emit(ROOT_PATH, OBJECT_MANAGER, "InterfacesRemoved", "oas", [path, interfaces])

    def _changed(self, path: str, old: Node, new: Node) -> None:
        for interface in INTERFACES[type(new)]:
            before = self._tree.properties(old, interface)
            declared = self._tree.contract.own[interface].properties
            changed = {
                name: value
                for name, value in self._tree.properties(new, interface).items()
                if value != before[name] and not declared[name].constant
            }
            if changed:
                self._properties_changed(path, interface, changed)

    def _properties_changed(self, path: str, interface: str, changed: dict[str, Typed]) -> None:
        self._emit(path, PROPERTIES, "PropertiesChanged", "sa{sv}as", [interface, changed, []])

    def _emit(
        self, path: str, interface: str, member: str, signature: str, body: list[Any]
    ) -> None:
        try:
            self._connection.emit(path, interface, member, signature, body)
        except Exception:
            log.exception("%s of %s could not be sent", member, path)
