"""Who reads a snapshot of an RBD image: as far as Ceph, libvirt and this host can tell.

Ceph knows its clones, and who has the image open in a way that is watched: for writing, or at some
snapshot as QEMU and qemu-img do it, without telling at which. A program elsewhere that opens it
only to be read, such as `rbd export`, is seen by nobody.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from snapd_vm import storage
from snapd_vm.errors import Busy, NoSuchDomain
from snapd_vm.methods.rbd.cluster import Session
from snapd_vm.methods.rbd.rbdtarget import RbdTarget, place_of
from snapd_vm.model import Domain


class Hypervisor(Protocol):
    """What is needed of the hypervisor here; blocking, raises SnapdErrors."""

    def read(self, uuid: str) -> Domain: ...
    def user_of_snapshot(self, name: str) -> str: ...


def refuse(hypervisor: Hypervisor, session: Session, found: RbdTarget) -> None:
    """Raise Busy where the snapshot is in use."""
    user = hypervisor.user_of_snapshot(found.name)
    if user:
        raise Busy(f"The snapshot is the source of {user}; take that away first.")
    reader = _on_command_lines(found.name)
    if reader:
        raise Busy(f"The snapshot is being read by {reader}; wait for its end.")
    users = session.ask("users", image=found.place.words, name=found.name)
    if users["children"]:
        clones = ", ".join(users["children"])
        raise Busy(f"The snapshot has the clones {clones}; flatten or remove them first.")
    others = list(users["watchers"])
    own = _writers(hypervisor, found)
    if len(others) > own:
        raise Busy(
            f"The image of the snapshot is open at {_addresses(others)}, by one client more than "
            "the domain's own, and Ceph does not tell what it reads; wait for its end (half a "
            "minute, if it has crashed)."
        )


def refuse_any(session: Session, found: RbdTarget) -> None:
    """Raise Busy where anybody has the image itself open, the domain being off."""
    others = session.ask("users", image=found.place.words, name=found.name)["watchers"]
    if others:
        raise Busy(
            f"The image of the disk is open at {_addresses(others)}; wait for the end of that "
            "(half a minute, if that client has crashed)."
        )


def image(hypervisor: Hypervisor, found: RbdTarget) -> Mapping[str, Any]:
    """The image as rbdworker.py takes it, to write to: guarded unless the domain is off here."""
    try:
        domain = hypervisor.read(found.domain)
    except NoSuchDomain:
        return {**found.place.words, "guarded": True}
    return {**found.place.words, "guarded": domain.active or domain.migrated}


def _addresses(watchers: list[str]) -> str:
    """The hosts, without the port, which is none, and the number behind it."""
    return ", ".join(sorted({address.partition("/")[0].rpartition(":")[0] for address in watchers}))


def _writers(hypervisor: Hypervisor, found: RbdTarget) -> int:
    """How often the domain's own QEMU has the image open."""
    try:
        domain = hypervisor.read(found.domain)
    except NoSuchDomain:
        return 0
    if not domain.active:
        return 0
    return sum(str(place_of(disk.source_xml)) == str(found.place) for disk in domain.disks)


def _on_command_lines(name: str) -> str:
    """A process of this host that was told the snapshot's name, such as qemu-img; '' for none."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read()
            if name.encode() in words and int(pid) != os.getpid():
                return storage.named(Path("/proc", pid))
        except OSError:  # it has ended
            continue
    return ""
