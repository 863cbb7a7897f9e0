"""Looks for what bears our mark and is on no record, as when the database was lost.

Those are files, and snapshots that methods know from their storages. It tells of each in the log,
with the command that removes it as the chains are at that time, and changes nothing: whose the
contents are by now, only a person can say. Blocking, for one thread; files are bounded by time, and
by their number in each folder.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass

from snapd_vm import mark, storage
from snapd_vm.engine.world import World
from snapd_vm.errors import SnapdError
from snapd_vm.journald import MessageId, fields
from snapd_vm.methods.method import Explains, Lists
from snapd_vm.model import Disk, Domain, Json
from snapd_vm.storage import FileId
from snapd_vm.virt import users

log = logging.getLogger(__name__)

_LIMIT_S = 30.0
_DRAFT = re.compile(r"\.snapd-vm-([0-9a-f-]{36})\.[0-9A-Za-z_-]+\.new")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an image is in a chain: `top` if it is the disk's own, `below` is what it lies on.

    `used`: by what runs, or would be started now; else only the next start's definition names it.
    """

    domain: Domain
    disk: Disk
    used: bool
    path: str
    top: bool
    below: str


def look(world: World, domains: Mapping[str, Domain]) -> int:
    """Tell of all of them that these domains' storages hold; how many there are."""
    return _files(world, domains) + _stored(world, domains)


def _stored(world: World, domains: Mapping[str, Domain]) -> int:
    """Those that are a storage's own snapshots."""
    count = 0
    for method in world.methods.values():
        lists: object = method
        if not isinstance(lists, Lists):
            continue
        try:
            found = list(lists.stored(domains))
        except SnapdError as error:
            log.warning("method %s could not look for its snapshots: %s", method.name, error)
            continue
        if not found:
            continue
        uuids, _, names = _on_record(world)  # after the storage: see below
        for one in found:
            if one.snapshot in uuids or one.place in names:
                continue
            count += 1
            said: Mapping[str, Json] = {
                "name": one.name or one.snapshot or "unknown",
                "domain_name": one.domain or "unknown",
            }
            _tell(one.place, said, one.use, one.command, what="the")
    return count


def _files(world: World, domains: Mapping[str, Domain]) -> int:
    """Those that are files in the folders of the domains' images."""
    deadline = time.monotonic() + _LIMIT_S
    places: dict[FileId, _Place] = {}
    folders = {*world.config.qemu.overlay_dirs, *world.hypervisor.pool_folders()}
    for domain in domains.values():
        if time.monotonic() > deadline:
            break
        disks = [(disk, True) for disk in domain.disks]
        for disk, used in (*disks, *((disk, False) for disk in domain.persistent_disks)):
            chain = _chain(disk)
            folders |= {os.path.dirname(path) for path in chain}
            folders |= {os.path.dirname(os.path.realpath(path)) for path in chain}
            for number, path in enumerate(chain):
                found = storage.file_id(path)
                if found is not None:
                    below = chain[number + 1] if number + 1 < len(chain) else ""
                    place = _Place(domain, disk, used, path, number == 0, below)
                    places.setdefault(found, place)
    marked: list[tuple[str, FileId, Mapping[str, Json]]] = []
    for path in users.files_in(folders):
        if time.monotonic() > deadline:
            log.warning(
                "the search for files without a record was ended after %g s: %d folders are too "
                "many, or too slow",
                _LIMIT_S,
                len(folders),
            )
            break
        found = storage.file_id(path)
        said = mark.read(path) or _draft(path)
        if said and found is not None:
            marked.append((path, found, said))
    if not marked:
        return 0
    # After the files: what is made meanwhile is on record by now. And operations before snapshots,
    # as one that ends is a snapshot then.
    open_now, known, _ = _on_record(world)
    count = 0
    for path, found, said in marked:
        if found in known or said.get("snapshot") in open_now or storage.file_id(path) != found:
            continue
        count += 1
        if time.monotonic() > deadline:
            _tell(path, said, "there was no time to look who uses it", "")
            continue
        try:
            where, words = _removal(world, path, said, places.get(found))
        except SnapdError as error:
            where, words = f"who uses it is not known: {error}", ""
        _tell(path, said, where, words)
    return count


def _chain(disk: Disk) -> list[str]:
    """The paths of a disk's images, its own first, as read from the headers where they are."""
    if not disk.path:
        return []
    read = list(storage.backing_chain(disk.path)) if disk.format != "raw" else []
    return [disk.path, *(read or disk.chain)]


def _draft(path: str) -> Mapping[str, Json]:
    """What the name of a draft says: on some file systems it bears no mark."""
    found = _DRAFT.fullmatch(os.path.basename(path))
    return {"kind": mark.Kind.OVERLAY, "snapshot": found[1]} if found else {}


def _on_record(world: World) -> tuple[set[Json], set[FileId], set[str]]:
    """The UUIDs of operations that are under way, and the files that records are of, with names."""
    operations = world.journal.operations()
    snapshots = world.journal.snapshots()
    uuids: set[Json] = {operation.tag.uuid for operation in operations}
    targets = [target for operation in operations for target in operation.targets]
    targets += [snapshot.target for snapshot in snapshots]
    uuids |= {one.uuid for one in snapshots if one.target.method not in world.methods}
    names = set[str]()
    for target in targets:
        method: object = world.methods.get(target.method)
        if isinstance(method, Explains):
            names |= set(method.files(target))
    known = {found for path in names if (found := storage.file_id(path)) is not None}
    return uuids, known, names


def _tell(
    path: str, said: Mapping[str, Json], where: str, words: str, what: str = "a file of"
) -> None:
    log.warning(
        "%s is %s snapshot %s of domain %s that no record knows, and is left alone; %s%s",
        path,
        what,
        said.get("name", said.get("snapshot")),
        said.get("domain_name", "unknown"),
        where,
        f"; this would remove it: {words}" if words else "",
        extra=fields(MessageId.STRAY, path=path, command=words),
    )


def _removal(
    world: World, path: str, said: Mapping[str, Json], place: _Place | None
) -> tuple[str, str]:
    """Where the file is in use, in words, and the command; '' where there is no safe one.

    That no chain was found with it in memory is not enough: definitions are read anew (user_of).
    """
    remove = _words("rm", "--", path)
    if said.get("kind") == mark.Kind.CLONE:
        if user := world.hypervisor.user_of(path, "", ""):
            return f"it is used by {user}, which has to go first", ""
        return "nobody uses it", f"{_words('chattr', '-i', '--', path)} && {remove}"
    if place is None:
        if user := world.hypervisor.user_of(path, "", ""):
            return f"it is used by {user}, which has to go first", ""
        return "nobody uses it", remove
    domain, disk = place.domain, place.disk
    where = f"it is in the chain of disk {disk.target} of domain {domain.name}"
    if not place.used:
        return f"{where} at its next start", ""
    if not domain.active and world.hypervisor.off_state(domain.uuid).managed_save:
        return f"{where}, which has a managed save image and has to be started first", ""
    if not place.below:
        return f"{where}, and lies on nothing", ""
    for image in (place.below, place.path):
        if user := world.hypervisor.user_of(image, domain.uuid, disk.target):
            return f"{where}, and {image} is used by {user} too", ""
    virsh = ("virsh", "-c", world.config.uri)
    commit = ["blockcommit", domain.name, disk.target, "--base", place.below]
    commit += ["--active", "--pivot"] if place.top else ["--top", place.path]
    words = f"{_words(*virsh, *commit, '--wait')} && {remove}"
    if domain.active:
        return where, words
    # libvirt commits only while QEMU runs; paused, the guest does nothing. Nobody's else is ended.
    start = _words(*virsh, "start", "--paused", domain.name)
    end = _words(*virsh, "destroy", domain.name)
    return f"{where}, which is off", f"{start} && {{ {words}; {end}; }}"


def _words(*words: str) -> str:
    return shlex.join(words)
