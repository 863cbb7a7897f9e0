"""Finds snapshots of RBD images that are ours by name and metadata, on record or not."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping

from snapd_vm.errors import SnapdError
from snapd_vm.methods.method import Stored
from snapd_vm.methods.rbd import rbdsaid
from snapd_vm.methods.rbd.cluster import Clusters, Session
from snapd_vm.methods.rbd.rbdtarget import Place, place_of
from snapd_vm.model import Domain

log = logging.getLogger(__name__)

_OURS = re.compile(r"snapd-vm-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")


def stored(clusters: Clusters, domains: Mapping[str, Domain]) -> Iterator[Stored]:
    """See Lists. An image that can't be asked is passed over, and that is said."""
    for place in _images(domains.values()):
        try:
            with clusters.session(place.access, patient=False) as session:
                yield from _of_image(session, place)
        except SnapdError as error:
            log.warning("the snapshots of %s were not looked at: %s", place, error)


def _images(domains: Iterable[Domain]) -> Iterable[Place]:
    found: dict[str, Place] = {}
    for domain in domains:
        for disk in (*domain.disks, *domain.persistent_disks):
            place = place_of(disk.source_xml) if disk.type == "network" else None
            if place is not None:
                found.setdefault(str(place), place)
    return found.values()


def _of_image(session: Session, place: Place) -> Iterator[Stored]:
    for name, number in session.ask("info", image=place.words)["snaps"].items():
        ours = _OURS.fullmatch(name)
        if ours is None:
            continue
        said = rbdsaid.read(session.ask("info", image=place.words, key=name)["said"])
        if said.get("snap") != number:  # anybody can give a snapshot such a name
            continue
        children = session.ask("users", image=place.words, name=name)["children"]
        snapshot = shlex.quote(f"{place}@{name}")
        yield Stored(
            place=f"{place}@{name}",
            snapshot=ours[1],
            name=str(said.get("name", "")),
            domain=str(said.get("domain_name", "")),
            use=f"it has the clones {', '.join(children)}, which have to go first"
            if children
            else "it has no clones",
            command=""
            if children
            else f"rbd snap unprotect {snapshot}; rbd snap rm {snapshot} && "
            f"rbd image-meta remove {shlex.quote(str(place))} {name}",
        )
