"""Takes an overlay of ours away again: commits it into its origin, wherever it is in the chain.

Two ways in: `undo` after a Create that failed, whatever it had done, and `delete` of a snapshot
that stands. What the domain really uses is asked of libvirt every time, never remembered.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from typing import Protocol

from snapd_vm import command, storage
from snapd_vm.errors import (
    Busy,
    InvalidState,
    NoSpace,
    NoSuchDomain,
    StorageFailed,
)
from snapd_vm.methods import overlay
from snapd_vm.methods.folder import refuse_reader, remove
from snapd_vm.methods.method import Kept, Watch
from snapd_vm.methods.qemu import beside
from snapd_vm.methods.qemu.layer import Layer
from snapd_vm.model import Disk, Domain, Tag

log = logging.getLogger(__name__)

_MEND_LIMIT_S = 120.0
_SLOWEST_BYTES_S = 4 << 20
_ROUNDS = 4
_MARGIN = 1 << 20


class Hypervisor(beside.Hypervisor, Protocol):
    """What is needed of the hypervisor here; blocking, raises SnapdErrors."""

    def read(self, uuid: str) -> Domain: ...
    def capacity(self, uuid: str, target: str) -> int: ...
    def running_job(self, uuid: str, target: str) -> str: ...
    def managed_save(self, uuid: str) -> bool: ...
    def commit(
        self, uuid: str, target: str, base: str, top: str, bandwidth: int, watch: Watch
    ) -> None: ...
    def redefine_disk(
        self, uuid: str, target: str, path: str, disk_type: str, image_format: str
    ) -> None: ...
    def writes_to(self, uuid: str, overlay: str) -> bool: ...
    def commit_behind(self, uuid: str, overlay: str, origin: str, timeout: float) -> None: ...
    def drop_nodes(self, uuid: str, overlay: str) -> None: ...


class Unwatched:
    """A Watch that nobody is behind."""

    cancelled = False
    spoilt = False

    def progress(self, done: int, total: int) -> None:
        """Nobody asks."""

    def past_return(self) -> None:
        """Nobody wanted to."""

    def spoil(self) -> None:
        """It is no snapshot's."""


def undo(
    hypervisor: Hypervisor, layer: Layer, disk: str, tag: Tag, *, in_order: bool, again: bool
) -> bool:
    """Take back a Create; whether anything was there. See Method.undo and `_undo`.

    `in_order`: QEMU has no node of the overlay that libvirt does not know. `again`: an earlier undo
    may have been cut off.
    """
    removed = remove(hypervisor, os.path.join(os.path.dirname(layer.path), layer.draft(tag)))
    if layer.inode is None:  # killed before it had a name
        return removed
    current = storage.file_id(layer.path)
    if current is None:
        return removed
    if own_id(layer) is None:
        log.warning("%s is not the overlay that we made; left alone", layer.path)
        return removed
    _undo(hypervisor, layer, disk, in_order=in_order, again=again)
    return remove(hypervisor, layer.path) or removed


def _undo(hypervisor: Hypervisor, layer: Layer, disk: str, *, in_order: bool, again: bool) -> None:
    """Bring the domain back to the origin, whatever it uses now, or raise.

    libvirt says  | QEMU writes to | what happened                  | so
    overlay, live | overlay        | switched                       | commit and pivot
    overlay, off  | -              | switched, and ended since      | keep what has data
    origin, live  | origin         | not switched, or undone before | remove nodes, if any
    origin, live  | overlay        | switched behind libvirt        | commit by the monitor
    origin, off   | -              | ended since; data tells        | keep what has data
    """
    try:
        # Waits for the end of a switch that a client, killed meanwhile, has begun.
        with contextlib.suppress(StorageFailed):
            hypervisor.capacity(layer.domain, disk)
        domain = hypervisor.read(layer.domain)
    except NoSuchDomain:
        _keep_if_written(layer, "the domain is gone")
        return
    live = domain.disk(disk)
    path = live.path if live is not None else ""
    if path == layer.path and domain.active:
        _commit(hypervisor, layer, disk, Unwatched(), 0)  # it is small, and the caller waits
    elif path == layer.path:
        _keep_if_written(layer, "the domain ended after it had switched")
        _define_origin(hypervisor, layer, disk)
    elif path == layer.origin and domain.active:
        if not in_order:
            # In the very run of QEMU that had switched, an overlay can only have been left by a
            # commit: one of ours that was cut off before the overlay was removed.
            committed = again and domain.id == layer.instance
            _settle_nodes(hypervisor, layer, disk, committed=committed)
        _define_origin(hypervisor, layer, disk)
    elif path == layer.origin and again:
        _refuse_if_written(layer, "an undo was cut off and the domain has ended since")
    elif path == layer.origin:
        if overlay.written(layer.path):
            # QEMU had switched, and ended before libvirt knew: those writes are the guest's.
            log.error(
                "domain %s wrote to %s unknown to libvirt; its definition now says so",
                layer.domain,
                layer.path,
            )
            hypervisor.redefine_disk(layer.domain, disk, layer.path, "file", "qcow2")
            raise Kept("The domain had switched to the overlay, which is kept.")
    else:
        _keep_if_written(layer, f"disk {disk} has another image now")


def _settle_nodes(hypervisor: Hypervisor, layer: Layer, disk: str, *, committed: bool) -> None:
    if hypervisor.writes_to(layer.domain, layer.path):
        log.warning("QEMU writes to the overlay of disk %s unknown to libvirt", disk)
        hypervisor.commit_behind(layer.domain, layer.path, layer.origin, _MEND_LIMIT_S)
        return
    if not committed:
        _refuse_if_written(layer, "the domain runs on its base")
    hypervisor.drop_nodes(layer.domain, layer.path)


def check_delete(hypervisor: Hypervisor, layer: Layer, disk: str) -> None:
    """Refuse a delete that can't be done, or that somebody would suffer from. See Method."""
    if layer.aside is not None:
        beside.check_delete(hypervisor, layer, disk)
        return
    domain = hypervisor.read(layer.domain)
    if in_use(domain, layer, disk) is None:
        raise InvalidState(
            f"The overlay of the snapshot is not in the chain of disk {disk} any more; somebody "
            "has changed it."
        )
    if not domain.active and hypervisor.managed_save(layer.domain):
        raise InvalidState(
            "The domain has a managed save image, which would go on with the old chain; start it "
            "or remove the image with 'virsh managedsave-remove'."
        )
    job = hypervisor.running_job(layer.domain, disk)
    if job:
        raise Busy(f"{job[:1].upper()}{job[1:]}; wait for its end.")
    for path in (layer.origin, layer.path):
        user = hypervisor.user_of(path, layer.domain, disk, beside.known(layer))
        if user:
            raise Busy(f"An image of disk {disk} is also used by {user}.")
        refuse_reader(path, layer.domain)
    if layer.origin_type == "file":
        _check_space(layer)
    beside.check(layer)


def _check_space(layer: Layer) -> None:
    needed = os.stat(layer.path).st_blocks * 512 + _MARGIN
    available = storage.space_available(os.path.dirname(layer.origin))
    if available < needed:
        raise NoSpace(
            f"The snapshot's file system has {available} bytes left, and the delete may need "
            f"{needed}; make room first."
        )


def delete(hypervisor: Hypervisor, layer: Layer, disk: str, watch: Watch, bandwidth: int) -> None:
    """Commit the overlay of a snapshot that stands, and unlink it once nobody uses it.

    `bandwidth` is the most that it may write, in bytes a second; 0: as much as it can.
    """
    if layer.aside is not None:
        watch.past_return()
        beside.delete(hypervisor, layer)
        return
    if beside.has_any(layer):
        watch.past_return()
        beside.detach(layer)
    _commit(hypervisor, layer, disk, watch, bandwidth)
    if own_id(layer) is not None:
        beside.follow(layer)
        if storage.write_locked(layer.path):
            raise Busy("The overlay is still open for writing; its removal is tried again.")
        remove(hypervisor, layer.path)


def own_id(layer: Layer) -> storage.FileId | None:
    """What the overlay's path stands for, if it is still the overlay that we made.

    The inode and the header are compared: the number of a device may be another after a reboot.
    """
    found = storage.file_id(layer.path)
    if found is None or layer.inode is None or found.inode != layer.inode.inode:
        return None
    below = next(storage.backing_chain(layer.path), "")
    return found if below else None


def in_use(domain: Domain, layer: Layer, disk: str) -> Disk | None:
    """The disk, if the overlay is its image or in its chain."""
    own = own_id(layer)
    if own is None:
        return None
    found = domain.disk(disk)
    if found is None:
        return None
    chain = {storage.file_id(path) for path in (found.path, *storage.backing_chain(found.path))}
    return found if own in chain else None


def _commit(hypervisor: Hypervisor, layer: Layer, disk: str, watch: Watch, bandwidth: int) -> None:
    """Commit the overlay into its origin until it is in no chain of the domain's disk.

    The domain may be started or stopped in between, so what it uses is looked at again after each
    attempt.
    """
    for _ in range(_ROUNDS):
        domain = hypervisor.read(layer.domain)
        found = in_use(domain, layer, disk)
        if found is None:
            break
        if domain.active:
            top = "" if found.path == layer.path else layer.path
            hypervisor.commit(layer.domain, disk, layer.origin, top, bandwidth, watch)
        else:
            _commit_off(hypervisor, layer, found, watch, bandwidth)
    else:
        if layer.origin_type == "file":
            _check_space(layer)
        raise StorageFailed(f"The overlay of disk {disk} could not be committed.")
    _define_origin(hypervisor, layer, disk)


def _commit_off(
    hypervisor: Hypervisor, layer: Layer, disk: Disk, watch: Watch, bandwidth: int
) -> None:
    """Commit while the domain is off: libvirt has no call for it.

    qemu-img locks the images, so the domain can't start meanwhile (qemu-img(1), QEMU's image
    locks); one that starts right after it runs on the overlay, whose contents are the same.
    """
    watch.past_return()
    size = os.stat(layer.path).st_blocks * 512
    limit = 60 + size / _SLOWEST_BYTES_S + (2 * size / bandwidth if bandwidth else 0)
    rate = ["-r", str(bandwidth)] if bandwidth else []
    above = _above(layer, disk)
    watch.spoil()
    try:
        command.run(
            ["qemu-img", "commit", "-q", "-d", *rate, "-f", "qcow2", layer.path], timeout=limit
        )
        if above:
            command.run(
                [
                    *("qemu-img", "rebase", "-q", "-u", "-f", "qcow2"),
                    *("-b", layer.origin, "-F", layer.origin_format, above),
                ],
                timeout=60,
            )
    except command.CommandError as error:
        raise StorageFailed(f"{error}.") from error
    if above:
        # An explicit <backingStore> in the definition would no longer be true.
        hypervisor.redefine_disk(layer.domain, disk.target, disk.path, disk.type, disk.format)
    else:
        _define_origin(hypervisor, layer, disk.target)


def _above(layer: Layer, disk: Disk) -> str:
    """The image whose backing file is the overlay; '' if the overlay is the active one."""
    chain = [disk.path, *storage.backing_chain(disk.path)]
    for above, below in itertools.pairwise(chain):
        if storage.file_id(below) == own_id(layer):
            return above
    return ""


def _define_origin(hypervisor: Hypervisor, layer: Layer, disk: str) -> None:
    """Let the definition say the origin where it says the overlay."""
    domain = hypervisor.read(layer.domain)
    persistent = domain.persistent_disk(disk)
    if persistent is not None and persistent.path == layer.path:
        hypervisor.redefine_disk(
            layer.domain, disk, layer.origin, layer.origin_type, layer.origin_format
        )


def _refuse_if_written(layer: Layer, why: str) -> None:
    if overlay.written(layer.path):
        raise StorageFailed(
            f"The overlay {layer.path} holds data and {why}; look at both before removing it."
        )


def _keep_if_written(layer: Layer, why: str) -> None:
    if overlay.written(layer.path):
        raise Kept(f"The overlay holds data of the guest and is kept, as {why}.")
