"""Brings a disk back to a snapshot by the method qemu: a new overlay on the snapshot's image.

The image itself stays as it is, and so does the snapshot. The overlay that the disk was, which is
on no snapshot's way, is removed once the domain's definition says the new one. Snapshots newer than
the one gone back to are not below the disk any more: they keep their files, and are beside its
chain (see beside.py) until one of them is gone back to.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Protocol

from snapd_vm import qcow2, storage
from snapd_vm.errors import (
    Busy,
    HypervisorUnavailable,
    InvalidState,
    NoSpace,
    NoSuchDomain,
    StorageFailed,
)
from snapd_vm.methods import overlay
from snapd_vm.methods.folder import open_folder, remove
from snapd_vm.methods.image import Image
from snapd_vm.methods.method import Record, Watch
from snapd_vm.methods.off import check_off
from snapd_vm.methods.qemu import commit
from snapd_vm.methods.qemu.layer import Layer
from snapd_vm.methods.qemu.revertplan import Plan
from snapd_vm.model import Disk, Domain, Json, Tag, Target

log = logging.getLogger(__name__)

_RESERVE = 1 << 20
_OURS = ("revert", "aside", "beside")
"""What is in a Target's data besides the overlay; only for as long as it is true."""


class Hypervisor(commit.Hypervisor, Protocol):
    """What is needed of the hypervisor here; blocking, raises SnapdErrors."""

    def checkpoints(self, uuid: str) -> bool: ...


def files(target: Target) -> Sequence[str]:
    """The files that a revert, begun and not settled, has to do with."""
    if "revert" not in target.data:
        return []
    plan = Plan.of(target)
    return [plan.overlay, plan.discarded.path]


def check(hypervisor: Hypervisor, target: Target, tag: Tag, others: Sequence[Target]) -> Target:
    """See Reverts.check_revert."""
    layer = Layer.of(target)
    alike = [target, *(other for other in others if other.method == target.method)]
    domain = hypervisor.read(layer.domain)
    _check_off(hypervisor, domain)
    disk = domain.disk(target.disk)
    if disk is None:
        raise InvalidState(
            f"The domain has no disk {target.disk} any more; there is nothing to do."
        )
    known = _made_by_us(alike)
    discarded = _to_discard(disk, known, alike)
    path = discarded.path
    user = hypervisor.user_of(path, layer.domain, target.disk)
    if user:
        raise Busy(f"The present image of disk {target.disk}, {path}, is also used by {user}.")
    reader = storage.reader_of(path, layer.domain)
    if reader:
        raise Busy(f"The present image of disk {target.disk} is being read by {reader}.")
    if storage.write_locked(layer.origin):
        raise Busy("The snapshot's image is open for writing by another process.")
    size = storage.virtual_size(layer.origin, layer.origin_format)
    name = _free_name(hypervisor, layer, tag)
    _check_space(os.path.dirname(name), size)
    below = [
        Image(path, found)
        for path in storage.backing_chain(discarded.path)
        if (found := storage.file_id(path)) is not None
    ]
    return Plan(name, size, discarded, known, tuple(below), None).into(target)


def _check_off(hypervisor: Hypervisor, domain: Domain) -> None:
    check_off(hypervisor, domain)
    if hypervisor.checkpoints(domain.uuid):
        raise InvalidState(
            "The domain has checkpoints, which are kept in the image that a revert discards; "
            "delete them with 'virsh checkpoint-delete --metadata' first."
        )


def _made_by_us(targets: Iterable[Target]) -> tuple[Image, ...]:
    """The images of the disk's snapshots that are overlays of ours, and are still the same."""
    found = []
    for layer in map(Layer.of, targets):
        if layer.aside is None and layer.inode is not None and commit.own_id(layer):
            found.append(Image(layer.path, layer.inode))
        if layer.ours is not None:
            found.append(layer.ours)
    return tuple(image for image in found if image.there())


def _to_discard(disk: Disk, known: Iterable[Image], targets: Iterable[Target]) -> Image:
    """The disk's present image. Raises InvalidState where it is not ours to remove."""
    present = storage.file_id(disk.path)
    sources = {storage.file_id(Layer.of(target).origin) for target in targets}
    image = _same(disk.path, known)
    if present is None or image is None or present in sources:
        raise InvalidState(
            f"The present image of disk {disk.target} is none that snapd-vm made, and a revert "
            "would discard it; make a snapshot of the disk first."
        )
    if qcow2.internal_snapshots(disk.path):
        raise InvalidState(
            f"The present image of disk {disk.target}, which a revert would discard, holds "
            "internal snapshots; delete them with 'virsh snapshot-delete' first."
        )
    return Image(disk.path, image.file)


def _same(path: str, among: Iterable[Image]) -> Image | None:
    found = storage.file_id(path)
    return next((i for i in among if found is not None and storage.file_id(i.path) == found), None)


def _free_name(hypervisor: Hypervisor, layer: Layer, tag: Tag) -> str:
    """The name that Create would give the snapshot's overlay, with a number where it is taken."""
    place = os.path.dirname(layer.path)
    stem = f"{os.path.splitext(os.path.basename(layer.origin))[0]}.{tag.label}"
    with open_folder(hypervisor, place) as fd:
        for number in itertools.count(1):
            name = stem if number == 1 else f"{stem}-{number}"
            if not overlay.exists(fd, name):
                break
    return overlay.fit(os.path.join(place, name))


def _check_space(place: str, size: int) -> None:
    if storage.read_only(place):
        raise StorageFailed(f"The folder {place} is read-only.")
    needed, available = qcow2.new_size(size) + _RESERVE, storage.space_available(place)
    if available < needed:
        raise NoSpace(
            f"The folder {place} has {available} bytes left, and the new overlay needs {needed}; "
            "make room first."
        )


def prepare(hypervisor: Hypervisor, target: Target, tag: Tag, record: Record) -> Target:
    """See Reverts.prepare_revert."""
    plan, layer = Plan.of(target), Layer.of(target)
    place, name = os.path.split(plan.overlay)
    with open_folder(hypervisor, place) as fd:
        found = overlay.make(
            fd, layer.draft(tag), layer.origin, layer.origin_format, plan.size, tag
        )
        target = dataclasses.replace(plan, made=Image(plan.overlay, found)).into(target)
        record([target])
        overlay.give_name(fd, layer.draft(tag), name)
    return target


def switch(hypervisor: Hypervisor, target: Target, watch: Watch) -> None:
    """See Reverts.revert. The domain can't start on what is discarded meanwhile: it is locked."""
    plan, uuid = Plan.of(target), Layer.of(target).domain
    watch.past_return()
    with storage.kept_from_writers(plan.discarded.path):
        domain = hypervisor.read(uuid)
        _check_off(hypervisor, domain)
        disk = domain.disk(target.disk)
        if disk is None or disk.path != plan.discarded.path:
            raise InvalidState(f"Disk {target.disk} has been given another image; try again.")
        hypervisor.redefine_disk(uuid, target.disk, plan.overlay, "file", "qcow2")
    if _defined(hypervisor.read(uuid), target.disk) != plan.overlay:
        raise HypervisorUnavailable("libvirt took the new definition and does not show it.")


def settle(hypervisor: Hypervisor, target: Target, tag: Tag) -> bool:
    """See Reverts.settle_revert.

    The definition decides: what it says is what the next start runs on.
    """
    plan, layer = Plan.of(target), Layer.of(target)
    try:
        domain = hypervisor.read(layer.domain)
    except NoSuchDomain:
        domain = None
    if domain is not None and plan.made is not None:
        live = domain.disk(target.disk) if domain.active else None
        if _defined(domain, target.disk) == plan.overlay:
            if live is None or live.path != plan.discarded.path:
                _discard(hypervisor, plan.discarded, layer.domain, target.disk)
                return True
            log.warning("domain %s runs on what was to be discarded, and keeps it", layer.domain)
            hypervisor.redefine_disk(
                layer.domain, target.disk, plan.discarded.path, "file", "qcow2"
            )
    remove(hypervisor, os.path.join(os.path.dirname(plan.overlay), layer.draft(tag)))
    if plan.made is not None and plan.made.there():
        if storage.write_locked(plan.overlay) or overlay.written(plan.overlay):
            log.error("%s was written to and is left alone", plan.overlay)
        else:
            remove(hypervisor, plan.overlay)
    return False


def _defined(domain: Domain, disk: str) -> str:
    """The image that the next start will use for the disk."""
    disks = domain.persistent_disks if domain.active else domain.disks
    return next((d.path for d in disks if d.target == disk), "")


def _discard(hypervisor: Hypervisor, image: Image, uuid: str, disk: str) -> None:
    if not image.there():
        return
    if storage.write_locked(image.path):
        raise Busy("The discarded image is still open for writing; its removal is tried again.")
    user = hypervisor.user_of(image.path, uuid, disk)
    if user:  # since the check
        log.error("%s is used by %s now and is left alone", image.path, user)
        return
    remove(hypervisor, image.path)


def reverted(target: Target, other: Target) -> Target | None:
    """See Reverts.reverted: each snapshot's overlay is what lies on its origin in the new chain."""
    if (other.method, other.disk) != (target.method, target.disk):
        return None
    plan, layer = Plan.of(target), Layer.of(other)
    known = [*([plan.made] if plan.made else []), *plan.known]
    origin = storage.file_id(layer.origin)
    data = {name: value for name, value in other.data.items() if name not in _OURS}
    made = _same(layer.origin, known)
    if made is not None:  # else it is what it was: a file that is away for a moment stays ours
        data["ours"] = Image(layer.origin, made.file).as_json()
    chain = [plan.overlay, *storage.backing_chain(plan.overlay)]
    for above, below in itertools.pairwise(chain):
        if origin is not None and storage.file_id(below) == origin:
            image = _same(above, known)
            if image is not None:
                data |= {
                    "overlay": image.path,
                    "device": image.file.device,
                    "inode": image.file.inode,
                }
            break
    else:
        image = _same(layer.origin, plan.below)
        if layer.aside is not None:
            data["aside"] = other.data["aside"]
        elif image is not None:
            data["aside"] = Image(layer.origin, image.file).as_json()
    return dataclasses.replace(other, data=data)


def among(target: Target, others: Iterable[Target]) -> Target:
    """See Reverts.among: the snapshots that are beside the chain."""
    found = [
        Image(layer.origin, layer.aside)
        for other in others
        if (other.method, other.disk) == (target.method, target.disk)
        and (layer := Layer.of(other)).aside is not None
    ]
    data: dict[str, Json] = {**target.data, "beside": [image.as_json() for image in found]}
    return dataclasses.replace(target, data=data)
