"""The method `rbd`: a snapshot of the disk's image in its Ceph cluster, protected while it is ours.

Protected, `rbd snap rm` and `rbd snap purge` leave it alone; Delete takes the protection away. The
snapshot's name is `snapd-vm-` and its UUID; what it is of is said in the image's metadata, with
the cluster's own numbers of image and snapshot, so that another of that name is not taken for it.

An image that is a clone has a parent in the same cluster, which is a snapshot and never changes: to
the disk it is a part of the image.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lxml import etree

from snapd_vm import qcow2, safexml
from snapd_vm.errors import (
    Busy,
    MethodNotSupported,
    NameInUse,
    NoSpace,
    NotUnderDisk,
    SnapdError,
    StorageFailed,
)
from snapd_vm.methods.method import Record, Standing, Stored, Watch
from snapd_vm.methods.rbd import rbdsaid, rbdstray, rbduse, rollback
from snapd_vm.methods.rbd.cluster import Clusters, Lost, NotThere, Session
from snapd_vm.methods.rbd.rbdtarget import RbdTarget, data_of, place_of
from snapd_vm.model import Disk, Domain, Json, MethodRequest, Needs, Tag, Target

log = logging.getLogger(__name__)

_HEADER = 1 << 16
_RESERVE = 64 << 20
"""Bytes that must be free: what a guest overwrites after a snapshot takes whole objects, 4 MiB by
default, of new room."""


class Hypervisor(rollback.Hypervisor, rbduse.Hypervisor, Protocol):
    """What the method needs of the hypervisor; blocking, raises SnapdErrors."""

    def secret(self, uuid: str, usage: str) -> str: ...


@dataclass(slots=True)
class _Armed:
    """A session with the image open. `asked`: the snapshot may be there; `made`: it is."""

    session: Session
    asked: bool = False
    made: bool = False


class Rbd:
    """See the top of the file."""

    name = "rbd"
    redirects = False

    def __init__(self, hypervisor: Hypervisor, low_space_percent: int) -> None:
        self._hypervisor = hypervisor
        self._clusters = Clusters(hypervisor)
        self._low_space_percent = low_space_percent
        self._armed: dict[tuple[str, str], _Armed] = {}

    def together(self, targets: Sequence[Target]) -> bool:
        """One image after the other."""
        return len(targets) == 1

    def suits(self, disk: Disk) -> str:
        """See Method. QEMU makes no overlay on an image over the network, whatever its format."""
        return "an RBD image" if disk.format == "raw" else f"an RBD image, {disk.format} too"

    def claim(
        self, domain: Domain, disk: Disk, request: MethodRequest | None, tag: Tag
    ) -> Target | None:
        """See Method. Where no image is named nothing is asked of the cluster: libvirt says what
        the disk is.
        """
        place = place_of(disk.source_xml) if disk.type == "network" else None
        if place is None:
            if request is None:
                return None
            error_type = NotUnderDisk if "image" in request.options else MethodNotSupported
            raise error_type(f"Disk {disk.target} is not an RBD image.")
        named = request.options.get("image") if request is not None else None
        if named is not None and named != str(place):
            raise NotUnderDisk(f"Disk {disk.target} is not the image {named}, but {place}.")
        problem = _unfit(disk) or self._clusters.missing()
        if problem:
            raise MethodNotSupported(problem)
        data = data_of(tag.uuid, domain.uuid, disk.format, disk.source_xml)
        target = Target(method=self.name, disk=disk.target, data=data)
        if named is not None and disk.format == "qcow2":
            found = RbdTarget.of(target)
            with self._clusters.session(found.place.access) as session:
                _check_alone(session, found, disk.target, NotUnderDisk)
        return target

    def source(self, target: Target, disk: Disk) -> tuple[Disk, str]:
        """The same image at the snapshot."""
        found = RbdTarget.of(target)
        source = safexml.parse(found.source)
        source.insert(len(source.findall("host")), etree.Element("snapshot", name=found.name))
        return dataclasses.replace(disk, source_xml=safexml.clean(source)), found.format

    def size(self, target: Target) -> int:
        """What librbd says, in whole sectors as QEMU has it; for qcow2, what the header does."""
        found = RbdTarget.of(target)
        with self._clusters.session(found.place.access) as session:
            if found.format == "qcow2":
                return _header(session, found).size
            size = int(session.ask("info", image=found.place.words)["size"])
        return -(-size // 512) * 512

    def check(self, targets: Sequence[Target], tag: Tag) -> Needs:
        """See Method. Whether the user may write is tried by opening the image for that."""
        available, warnings = 0, list[str]()
        for target in targets:
            found = RbdTarget.of(target)
            with self._clusters.session(found.place.access) as session:
                info = session.ask("info", image=found.place.words)
                if found.name in info["snaps"]:
                    raise NameInUse(f"There is a snapshot {found} already; remove it.")
                _check_alone(session, found, target.disk, MethodNotSupported)
                space = session.ask("space", pool=found.place.pool, data_pool=info["data_pool"])
                available = int(space["available"])
                if space["full"] or 0 < available < _RESERVE:
                    raise NoSpace(
                        f"The Ceph pool of disk {target.disk} is full; what the guest overwrites "
                        "after the snapshot needs new room, so make some first."
                    )
                # Of a pool that is full it would wait for ever.
                session.ask("arm", image=rbduse.image(self._hypervisor, found))
                session.ask("disarm")
            if 0 < available < target.size:
                warnings.append(
                    f"As the guest overwrites disk {target.disk}, up to {target.size} bytes more "
                    f"are needed, and {available} are free; the guest stops when there are none."
                )
            if not info["layering"]:
                warnings.append(
                    f"The image of disk {target.disk} has not the feature 'layering', so that "
                    "Ceph can't protect the snapshot from being removed by others."
                )
        return Needs(_RESERVE * len(targets), available, tuple(warnings))

    def prepare(self, targets: Sequence[Target], tag: Tag, record: Record) -> Sequence[Target]:
        """Have the images open, so that for each the snapshot is all that is left to ask for."""
        prepared = []
        for target in targets:
            found = RbdTarget.of(target)
            session = self._clusters.take(found.place.access)
            self._armed[tag.uuid, target.disk] = _Armed(session)
            info = session.ask("info", image=found.place.words)
            session.ask("arm", image=rbduse.image(self._hypervisor, found))
            known: dict[str, Json] = {"image_id": str(info["id"]), "data_pool": info["data_pool"]}
            data: dict[str, Json] = {**target.data, **known}
            prepared.append(dataclasses.replace(target, data=data))
        record(prepared)
        return prepared

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        """One request each, and nothing else."""
        for target in targets:
            armed = self._armed[tag.uuid, target.disk]
            armed.asked = True
            try:
                armed.session.ask("create", name=RbdTarget.of(target).name)
            except Lost:
                raise
            except Busy as error:  # whoever has the image locked was asked, and may do it late
                raise Lost(str(error)) from error
            except SnapdError:
                armed.asked = False  # what has its name now is not ours
                raise
            armed.made = True

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        """Whether the snapshot is there; it is protected here, and its metadata written."""
        found = RbdTarget.of(target)
        armed = self._armed.get((tag.uuid, target.disk))
        if armed is not None and not armed.made:
            return False
        with self._clusters.session(found.place.access) as session:
            try:
                if armed is None and self._snap(session, found) is None:
                    return False
            except NotThere:  # the image itself has gone
                return False
            said = {
                "name": tag.label,
                "domain_name": tag.domain_name,
                "domain": tag.domain_uuid,
                "created_us": tag.created_us,
            }
            image = rbduse.image(self._hypervisor, found)
            kept = session.ask("keep", image=image, name=found.name, key=found.key, said=said)
        self._disarm(target, tag, found)
        if not kept["protected"]:
            log.warning("%s can't be protected: the image has not the feature layering", found)
        return bool(kept["own"])

    def undo(self, target: Target, tag: Tag, *, again: bool) -> bool:
        """See Method. Where it is not known what came of it, the snapshot may come late: a cluster
        that was away does what it was asked when it is back. See rbdworker.Session.remove.
        """
        found = RbdTarget.of(target)
        armed = self._armed.get((tag.uuid, target.disk))
        if not found.image_id or (armed is not None and not armed.asked):
            self._disarm(target, tag, found)
            return False
        try:
            with self._clusters.session(found.place.access) as session:
                there = self._remove(session, found, fence=armed is None or not armed.made)
        except NotThere:  # the image itself has gone
            there = False
        self._disarm(target, tag, found)
        return there

    def check_delete(self, target: Target, tag: Tag) -> None:
        """Refused while anybody reads it, as far as Ceph and this host know of it."""
        found = RbdTarget.of(target)
        with self._clusters.session(found.place.access) as session:
            rbduse.refuse(self._hypervisor, session, found)

    def delete(self, target: Target, tag: Tag, watch: Watch) -> None:
        """Remove the snapshot; its room is given back by the cluster, in its own time."""
        found = RbdTarget.of(target)
        watch.past_return()
        try:
            with self._clusters.session(found.place.access) as session:
                self._remove(session, found, fence=False)
        except NotThere:
            log.warning("%s is not there any more", found)

    def moved(self, deleted: Target, other: Target) -> Target | None:
        """No snapshot depends on another."""
        return None

    def check_revert(self, target: Target, tag: Tag, others: Sequence[Target]) -> Target:
        """See Reverts and rollback.check. Others stay as they are, newer ones too."""
        return rollback.check(self._hypervisor, self._clusters, target)

    def prepare_revert(self, target: Target, tag: Tag, record: Record) -> Target:
        """See Reverts and rollback.prepare."""
        return rollback.prepare(self._clusters, target, record)

    def revert(self, target: Target, tag: Tag, watch: Watch) -> None:
        """See Reverts and rollback.roll_back."""
        rollback.roll_back(self._hypervisor, self._clusters, target, watch)

    def settle_revert(self, target: Target, tag: Tag) -> bool:
        """See Reverts and rollback.settle."""
        return rollback.settle(self._hypervisor, self._clusters, target)

    def forget_revert(self, target: Target) -> None:
        """See Forgets."""
        rollback.forget(self._clusters, target)

    def reverted(self, target: Target, other: Target) -> Target | None:
        """Every snapshot is what it was."""
        return None

    def among(self, target: Target, others: Sequence[Target]) -> Target:
        """No snapshot depends on another."""
        return target

    def state(self, target: Target, domains: Mapping[str, Domain]) -> str:
        """See Method."""
        return self.standing(target, domains).state

    def standing(self, target: Target, domains: Mapping[str, Domain]) -> Standing:
        """See Explains. A snapshot stands by itself, whatever becomes of its domain."""
        found = RbdTarget.of(target)
        try:
            with self._clusters.session(found.place.access, patient=False) as session:
                there = self._snap(session, found)
        except NotThere:
            return Standing("missing", f"the image {found.place} is not there")
        if there is None:
            return Standing("missing", f"{found} is not there, or not the one that was made")
        return Standing("ready")

    def files(self, target: Target) -> Sequence[str]:
        """The snapshot, as the program rbd names it."""
        return [str(RbdTarget.of(target))]

    def stored(self, domains: Mapping[str, Domain]) -> Iterable[Stored]:
        """See Lists and rbdstray.py."""
        return rbdstray.stored(self._clusters, domains)

    def warnings(self, target: Target, domains: Mapping[str, Domain]) -> Mapping[str, str]:
        """See Warns: what the guest overwrites of what it shares with a snapshot needs new room."""
        found = RbdTarget.of(target)
        with self._clusters.session(found.place.access, patient=False) as session:
            pool = found.place.pool
            space = session.ask("space", pool=pool, data_pool=found.data_pool)
        available, total = int(space["available"]), int(space["total"])
        if not space["full"] and available * 100 >= total * self._low_space_percent:
            return {}
        return {
            "low-space": f"Disk {target.disk} is written to a Ceph pool with {available} bytes "
            "left, and the guest stops when there are none; make room, or delete snapshots."
        }

    def _snap(self, session: Session, found: RbdTarget) -> int | None:
        """The cluster's number of the snapshot that we made, or None."""
        info = session.ask("info", image=found.place.words, key=found.key)
        number = info["snaps"].get(found.name)
        if number is None or (found.image_id and info["id"] != found.image_id):
            return None
        said = rbdsaid.read(info["said"])
        return int(number) if said.get("snap", number) == number else None

    def _remove(self, session: Session, found: RbdTarget, *, fence: bool) -> bool:
        image = rbduse.image(self._hypervisor, found)
        answer = session.ask("remove", image=image, name=found.name, key=found.key, fence=fence)
        if answer["there"]:
            log.info("removed %s", found)
        return bool(answer["there"])

    def _disarm(self, target: Target, tag: Tag, found: RbdTarget) -> None:
        armed = self._armed.pop((tag.uuid, target.disk), None)
        if armed is None:
            return
        try:
            armed.session.ask("disarm")
        except SnapdError as error:  # its process is gone, and has nothing open any more
            log.debug("an image was not closed: %s", error)
        self._clusters.give_back(found.place.access, armed.session)


def _unfit(disk: Disk) -> str:
    """Why the disk can't be taken, whatever its cluster says, or ''."""
    if disk.format not in ("raw", "qcow2"):
        return f"Disk {disk.target} has the format '{disk.format}'; method rbd takes raw and qcow2."
    if disk.encrypted:
        return f"Disk {disk.target} is encrypted, and its snapshot would not say with which key."
    if "<slice" in disk.source_xml:
        return f"Disk {disk.target} is a slice of its image, and a snapshot would be of the whole."
    if "<snapshot" in disk.source_xml:
        return f"Disk {disk.target} is a snapshot of an RBD image already, and never changes."
    return ""


def _check_alone(session: Session, found: RbdTarget, disk: str, error: type[SnapdError]) -> None:
    """Refuse an image, with this error, that a snapshot of the RBD image does not hold whole."""
    if found.format == "qcow2" and _header(session, found).lies_on_others:
        raise error(
            f"The image of disk {disk} lies on others, which a snapshot of the RBD image does not "
            "hold."
        )


def _header(session: Session, found: RbdTarget) -> qcow2.Header:
    """The header of a qcow2 image in an RBD image. Raises StorageFailed."""
    answer = session.ask("head", image=found.place.words, length=_HEADER)
    fd = os.memfd_create("header")
    try:
        os.write(fd, base64.b64decode(answer["data"]))
        return qcow2.read_header(fd)
    except (OSError, qcow2.NotQcow2) as error:
        raise StorageFailed(f"The image {found.place} can't be read as qcow2: {error}.") from error
    finally:
        os.close(fd)
