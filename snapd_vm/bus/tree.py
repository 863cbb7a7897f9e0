"""The tree of objects: what is at a path, its interfaces, and its properties, from memory alone.

An object is the thing itself: the root, a model.Domain, a model.Snapshot, a model.Job, or a Folder
between them.
Asks nobody for permission, as properties are open to all and carry no path of a disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from snapd_vm.bus.contract import (
    DISK_SNAPSHOT,
    DOMAIN,
    INTROSPECTABLE,
    JOB,
    MANAGER,
    OBJECT_MANAGER,
    PEER,
    PROPERTIES,
    SNAPSHOT,
    Contract,
)
from snapd_vm.bus.wire import Dictionary, Entry, Typed
from snapd_vm.engine.service import Service
from snapd_vm.model import ROOT_PATH, Domain, Job, Snapshot, domain_path, job_path, snapshot_path

DOMAIN_FOLDER = ROOT_PATH + "/domain"
SNAPSHOT_FOLDER = ROOT_PATH + "/snapshot"
JOB_FOLDER = ROOT_PATH + "/job"


@dataclass(frozen=True, slots=True)
class Root:
    """The root object, `version` being the daemon's."""

    service: Service
    version: str


@dataclass(frozen=True, slots=True)
class Folder:
    """A path that only leads to others."""

    path: str


Node: TypeAlias = Root | Folder | Domain | Snapshot | Job

INTERFACES: Mapping[type, tuple[str, ...]] = {
    Root: (DISK_SNAPSHOT, MANAGER),
    Domain: (DISK_SNAPSHOT, DOMAIN),
    Snapshot: (SNAPSHOT,),
    Job: (JOB,),
    Folder: (),
}
"""Our interfaces of each kind of object."""


def has_agent(domain: Domain) -> bool:
    """Whether a guest agent is connected; a channel of a domain that is off is not."""
    return domain.active and domain.agent is not None and domain.agent.connected


OPEN_RESULTS = {"snapshots": "ao", "error": "s"}
"""What of a job's result may be told to all, with its types: nothing that could hold a path."""


def open_result(job: Job) -> Mapping[str, Typed]:
    """What a job has come to, as far as it may be told to all."""
    return {
        name: Typed(OPEN_RESULTS[name], value)
        for name, value in job.result.items()
        if name in OPEN_RESULTS
    }


VALUES: Mapping[str, Mapping[str, Callable[[Any], object]]] = {
    DISK_SNAPSHOT: {},
    MANAGER: {
        "Version": lambda root: root.version,
        "URI": lambda root: root.service.uri,
        "Connected": lambda root: root.service.connected,
        "Methods": lambda root: list(root.service.methods),
    },
    DOMAIN: {
        "Name": lambda domain: domain.name,
        "UUID": lambda domain: domain.uuid,
        "State": lambda domain: domain.state,
        "GuestAgent": has_agent,
    },
    SNAPSHOT: {
        "Name": lambda snapshot: snapshot.name,
        "Domain": lambda snapshot: domain_path(snapshot.domain_uuid),
        "DomainUUID": lambda snapshot: snapshot.domain_uuid,
        "Target": lambda snapshot: snapshot.target.disk,
        "Method": lambda snapshot: snapshot.target.method,
        "Created": lambda snapshot: snapshot.created_us,
        "State": lambda snapshot: snapshot.state,
        "Consistency": lambda snapshot: snapshot.consistency,
        "FrozenFilesystems": lambda snapshot: snapshot.frozen_filesystems,
        "FrozenTime": lambda snapshot: snapshot.frozen_us,
        "Format": lambda snapshot: snapshot.format,
        "Size": lambda snapshot: snapshot.size,
    },
    JOB: {
        "Operation": lambda job: job.operation,
        "Progress": lambda job: job.progress,
        "ProgressValid": lambda job: job.progress_valid,
        "Bytes": lambda job: job.bytes,
        "StartTime": lambda job: job.start_us,
        "Objects": lambda job: job.objects,
        "StartedByUID": lambda job: job.uid,
        "Cancelable": lambda job: job.cancelable,
        "Result": open_result,
    },
}
"""How each property is read from its object."""


class Tree:
    """The objects that a Service has, at their paths. Raises ValueError if VALUES misses some."""

    def __init__(self, contract: Contract, service: Service, version: str) -> None:
        for interface in contract.own.values():
            if set(VALUES.get(interface.name, {})) != set(interface.properties):
                raise ValueError(
                    f"the properties of {interface.name} are not those of the contract"
                )
        self.contract = contract
        self.service = service
        self.root = Root(service, version)
        self._managed: dict[str, tuple[Node, Entry]] = {}

    def resolve(self, path: str) -> Node | None:
        """The object at a path, or None."""
        if path == ROOT_PATH:
            return self.root
        if (uuid := _uuid_below(path, DOMAIN_FOLDER)) is not None:
            return self.service.domains.get(uuid)
        if (uuid := _uuid_below(path, SNAPSHOT_FOLDER)) is not None:
            return self.service.snapshots.get(uuid)
        if (number := _number_below(path, JOB_FOLDER)) is not None:
            return self.service.jobs.get(number)
        if path in (DOMAIN_FOLDER, SNAPSHOT_FOLDER, JOB_FOLDER, "/") or leads_to_root(path):
            return Folder(path)
        return None

    def interfaces(self, node: Node) -> tuple[str, ...]:
        """Names of all interfaces of an object, ours first."""
        standard = (PROPERTIES, INTROSPECTABLE, PEER)
        last = (OBJECT_MANAGER,) if isinstance(node, Root) else ()
        return INTERFACES[type(node)] + standard + last

    def children(self, node: Node) -> Sequence[str]:
        """Names of the nodes right below an object."""
        if isinstance(node, Root):
            return ["domain", "snapshot", "job"]
        if not isinstance(node, Folder):
            return []
        if node.path == DOMAIN_FOLDER:
            return [_last(domain_path(uuid)) for uuid in self.service.domains]
        if node.path == SNAPSHOT_FOLDER:
            return [_last(snapshot_path(uuid)) for uuid in self.service.snapshots]
        if node.path == JOB_FOLDER:
            return [str(number) for number in self.service.jobs]
        return [ROOT_PATH.removeprefix(node.path).lstrip("/").partition("/")[0]]

    def properties(self, node: Node, interface: str) -> dict[str, Typed]:
        """The properties of one of our interfaces of an object."""
        types = self.contract.own[interface].properties
        return {
            name: Typed(types[name].signature, read(node))
            for name, read in VALUES[interface].items()
        }

    def all_properties(self, node: Node) -> dict[str, dict[str, Typed]]:
        """The properties of all our interfaces of an object, by interface."""
        return {name: self.properties(node, name) for name in INTERFACES[type(node)]}

    def managed_objects(self) -> Dictionary:
        """Every object below the root by its path, with all its properties.

        An object's entry is made anew only when the object is another than last time.
        """
        before, self._managed = self._managed, {}
        for path, node in self._below_root():
            known = before.get(path)
            if known is None or known[0] is not node:
                known = (node, Entry(path, self.all_properties(node)))
            self._managed[path] = known
        return Dictionary([entry for _, entry in self._managed.values()])

    def _below_root(self) -> Iterator[tuple[str, Node]]:
        for uuid, domain in self.service.domains.items():
            yield domain_path(uuid), domain
        for uuid, snapshot in self.service.snapshots.items():
            yield snapshot_path(uuid), snapshot
        for number, job in self.service.jobs.items():
            yield job_path(number), job


def leads_to_root(path: str) -> bool:
    """Whether the root object lies somewhere below this path."""
    return ROOT_PATH.startswith(path + "/")


def _uuid_below(path: str, folder: str) -> str | None:
    """The UUID that a path in this folder stands for; None for anything of another form."""
    if not path.startswith(folder + "/_"):
        return None
    return path[len(folder) + 2 :].replace("_", "-")


def _number_below(path: str, folder: str) -> int | None:
    """The number that a path in this folder stands for; None for anything of another form."""
    text = path.removeprefix(folder + "/")
    if len(text) > 20 or not text.isdecimal() or path != f"{folder}/{int(text)}":
        return None
    return int(text)


def _last(path: str) -> str:
    return path.rpartition("/")[2]
