"""A method that is a program which the configuration names: JSON in, JSON out.

The program says whether a disk is one for it, and makes, removes and tells of the snapshots. What
a backup reads is built here, of what it answers only after it was looked at: a file or device in a
folder that the configuration names, or a snapshot of the disk's own RBD image. It is never the
default for a disk, as to ask it costs a program. Only its `create` runs while the guest stands
still; where it takes too long for that the guest goes on, and the program does too.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from lxml import etree

from snapd_vm import storage
from snapd_vm.errors import Busy, MethodNotSupported, StorageFailed
from snapd_vm.methods.folder import refuse_reader
from snapd_vm.methods.method import BASE_IN_USE, Record, Standing, Stored, Watch
from snapd_vm.methods.outside.executabletarget import (
    Asked,
    as_told,
    not_there,
    unfit_disk,
    unfit_source,
    unsound,
)
from snapd_vm.methods.outside.program import Program, Refused, sentence
from snapd_vm.model import Disk, Domain, Json, MethodRequest, Needs, Tag, Target
from snapd_vm.outsideconfig import ExecutableConfig

log = logging.getLogger(__name__)

_PREFIX = "snapd-vm-"
_CHANGED = "What is to be read of the snapshot is no image of its own any more; delete it."


class Hypervisor(Protocol):
    """What is needed of the hypervisor; blocking, raises SnapdErrors."""

    def read(self, uuid: str) -> Domain: ...
    def managed_save(self, uuid: str) -> bool: ...
    def user_of(self, path: str, uuid: str, target: str) -> str: ...


class Executable:
    """See the top of the file."""

    redirects = False
    on_request = True

    def __init__(self, settings: ExecutableConfig, hypervisor: Hypervisor, mark: str) -> None:
        self.name = settings.name
        self._program = Program(settings, mark)
        self._source_dirs = settings.source_dirs
        self.hypervisor = hypervisor
        self._unsaid: dict[str, list[str]] = {}
        self._first = threading.Lock()
        self._is_alone = False

    def fit(self) -> None:
        """Raise StorageFailed where the program is not one to be run."""
        self._program.fit()

    def together(self, targets: Sequence[Target]) -> bool:
        """Whether the program called all of them one group."""
        groups = {Asked.of(target).group for target in targets}
        return len(targets) == 1 or (len(groups) == 1 and "" not in groups)

    def suits(self, disk: Disk) -> str:
        """None."""
        return f"no disk, as {self.name} has to be asked for"

    def claim(
        self, domain: Domain, disk: Disk, request: MethodRequest | None, tag: Tag
    ) -> Target | None:
        """See Method. No program is started where nobody asked for it."""
        if request is None:
            return None
        problem = unfit_disk(disk, self.name)
        if problem:
            raise MethodNotSupported(problem)
        snapshot: dict[str, Json] = {
            "name": tag.storage_name,
            "label": tag.label,
            "domain": {"name": domain.name, "uuid": domain.uuid, "active": domain.active},
            "disk": as_told(disk),
            "options": dict(request.options),
            "data": {},
        }
        answer = self.ask("claim", [snapshot])
        if not answer["mine"]:
            why = sentence(answer["reason"]) if answer.get("reason") else "It does not say why."
            raise MethodNotSupported(f"Method {self.name} does not take disk {disk.target}: {why}")
        if "source" not in answer:
            raise StorageFailed(
                f"Method {self.name} does not say where disk {disk.target} is read."
            )
        ((form, source),) = answer["source"].items()
        problem = unfit_source(form, source, disk, self._source_dirs)
        if problem:
            raise StorageFailed(f"What method {self.name} says is to be read can't be: {problem}")
        data: dict[str, Json] = {
            "snapshot": {**snapshot, "data": answer.get("data", {})},
            "form": form,
            "source": source,
            "group": answer.get("group", ""),
            "size": answer.get("size", 0),
        }
        return Target(self.name, disk.target, data)

    def source(self, target: Target, disk: Disk) -> tuple[Disk, str]:
        """A file, a device, or the disk's own RBD image with a `<snapshot>` in it."""
        asked = Asked.of(target)
        if asked.form == "snapshot":
            element = etree.fromstring(disk.source_xml)
            etree.SubElement(element, "snapshot", name=asked.source)
            told = dataclasses.replace(disk, source_xml=etree.tostring(element, encoding="unicode"))
            return told, disk.format
        kind, attribute = ("file", "file") if asked.form == "file" else ("block", "dev")
        element = etree.Element("source", {attribute: asked.source})
        xml = etree.tostring(element, encoding="unicode")
        return dataclasses.replace(disk, type=kind, path=asked.source, source_xml=xml), disk.format

    def size(self, target: Target) -> int:
        """Of the image, as QEMU sees it, where it has a path; else what the program said."""
        asked = Asked.of(target)
        disk = asked.snapshot["disk"]
        if disk["path"]:
            return storage.virtual_size(disk["path"], disk["format"])
        if not asked.size:
            raise StorageFailed(f"Method {self.name} does not say how large disk {target.disk} is.")
        return asked.size

    def check(self, targets: Sequence[Target], tag: Tag) -> Needs:
        """The program's own check."""
        answer = self.ask("check", [Asked.of(target).snapshot for target in targets])
        return Needs(
            answer.get("space_needed", 0),
            answer.get("space_available", 0),
            tuple(map(sentence, answer.get("warnings", ()))),
        )

    def prepare(self, targets: Sequence[Target], tag: Tag, record: Record) -> Sequence[Target]:
        """Nothing is made before the freeze."""
        record(targets)
        return targets

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        """One run for all; what it writes to stderr is told when the guest goes on."""
        snapshots = [Asked.of(target).snapshot for target in targets]
        self.ask("create", snapshots, said=self._unsaid.setdefault(tag.uuid, []))

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        """Whether the program says that it is ready, and its file or device is there, and no
        domain's.
        """
        self._tell(tag)
        standing = self.standing(target, {})
        if standing.state != "ready":
            log.error("snapshot %s is not to be read: %s", tag.uuid, standing.why or standing.state)
            return False
        user = self._user(target)
        if user:
            raise StorageFailed(f"What method {self.name} says is to be read is used by {user}.")
        return True

    def undo(self, target: Target, tag: Tag, *, again: bool) -> bool:
        """Asks to delete it, whatever is known of it."""
        self._tell(tag)
        return self._remove(target)

    def check_delete(self, target: Target, tag: Tag) -> None:
        """Refused while anybody reads its file or device, or a definition names that."""
        user = self._user(target)
        if user:
            raise Busy(f"The snapshot is used by {user}.")
        asked = Asked.of(target)
        if asked.form != "snapshot":
            refuse_reader(asked.source, "")

    def delete(self, target: Target, tag: Tag, watch: Watch) -> None:
        """Remove it, and make sure that it is gone."""
        watch.past_return()
        self._remove(target)

    def moved(self, deleted: Target, other: Target) -> Target | None:
        """The others' sources stay."""
        return None

    def state(self, target: Target, domains: Mapping[str, Domain]) -> str:
        """See Method."""
        return self.standing(target, domains).state

    def standing(self, target: Target, domains: Mapping[str, Domain]) -> Standing:
        """See Explains: what the program says, and what is at the path that it named."""
        asked = Asked.of(target)
        answer = self.ask("state", [asked.snapshot])
        if answer["state"] != "ready" or asked.form == "snapshot":
            why = sentence(answer["reason"]) if answer.get("reason") else ""
            return Standing(answer["state"], f"method {self.name} says: {why}" if why else "")
        problem = not_there(asked, self._source_dirs)
        if problem:
            return Standing("missing", problem)
        problem = unsound(asked)
        if problem:
            return Standing("failed", problem, "changed", _CHANGED, removable=True)
        identity = storage.file_id(asked.source)
        for domain in domains.values():
            for disk in (*domain.disks, *domain.persistent_disks):
                if not disk.readonly and disk.path and storage.file_id(disk.path) == identity:
                    where = f"disk {disk.target} of domain {domain.name}"
                    why = f"{asked.source} is the image of {where}"
                    return Standing("failed", why, "base-in-use", BASE_IN_USE)
        return Standing("ready")

    def files(self, target: Target) -> Sequence[str]:
        """Its name on the storage."""
        return [Asked.of(target).name]

    def stored(self, domains: Mapping[str, Domain]) -> Iterable[Stored]:
        """See Lists; the program is asked for all that it has."""
        for one in self.ask("list", [])["snapshots"]:
            yield Stored(
                place=one["name"],
                snapshot=one["name"].removeprefix(_PREFIX),
                name=sentence(one.get("label", "")).rstrip("."),
                domain=sentence(one.get("domain", "")).rstrip("."),
                use=f"the storage of method {self.name} has it",
                command="",
            )

    def ask(
        self, operation: str, snapshots: Sequence[Mapping[str, Json]], **how: Any
    ) -> Mapping[str, Any]:
        """The program's answer. Raises SnapdErrors."""
        try:
            return self.alone().ask(operation, snapshots, **how)
        except Refused as refused:
            raise refused.error from None

    def alone(self) -> Program:
        """The program, when nothing that an earlier daemon has started is at work any more."""
        with self._first:
            if not self._is_alone:
                self._program.end_leftovers()
                self._is_alone = True
        return self._program

    def _remove(self, target: Target) -> bool:
        snapshot = Asked.of(target).snapshot
        deleted = bool(self.ask("delete", [snapshot])["deleted"])
        if self.ask("state", [snapshot])["state"] != "missing":
            raise StorageFailed(f"Method {self.name} says that it was deleted, and it is there.")
        return deleted

    def _user(self, target: Target) -> str:
        """Which domain has its file or device, in words."""
        asked = Asked.of(target)
        if asked.form == "snapshot":
            return ""
        return self.hypervisor.user_of(asked.source, "", "")

    def _tell(self, tag: Tag) -> None:
        self._program.tell(self._unsaid.pop(tag.uuid, []))
