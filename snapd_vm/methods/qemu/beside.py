"""Snapshots beside a disk's chain, where a revert to another one has left them.

Their origins are images that no domain uses, on images that the disk's chain may have too. All are
overlays of ours but the one that was there before the first snapshot, which is never removed. Here
is what a delete owes them: their contents stay, byte for byte, though what they lie on changes or
goes.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Protocol

from snapd_vm import command, qcow2, storage
from snapd_vm.errors import Busy, InvalidState, NoSpace, StorageFailed
from snapd_vm.methods import folder
from snapd_vm.methods.image import Image
from snapd_vm.methods.qemu.layer import Layer

log = logging.getLogger(__name__)

_MARGIN = 1 << 20
_SLOWEST_BYTES_S = 4 << 20


class Hypervisor(folder.Hypervisor, Protocol):
    """What is needed of the hypervisor here; blocking, raises SnapdErrors."""

    def user_of(self, path: str, uuid: str, target: str, known: Sequence[str] = ()) -> str: ...


def check(layer: Layer) -> None:
    """Refuse what a delete of this snapshot can't do to those beside it, without a change."""
    for image in layer.beside:
        if storage.file_id(image.path) is None:  # not mounted, it may be: it is not to be spoilt
            raise InvalidState(
                f"The image {image.path} of another snapshot of the disk is not there, so whether "
                "it lies on this one can't be told; delete that snapshot first, or mount it again."
            )
    for image in (*_on(layer, layer.origin), *_on(layer, layer.path)):
        reader = storage.reader_of(image.path, layer.domain)
        if reader:
            raise Busy(f"A snapshot that lies on this one is being read by {reader}; wait for it.")
    for image in _on(layer, layer.origin):
        needed = _allocated(layer.origin) + _MARGIN
        place = os.path.dirname(image.path)
        available = storage.space_available(place)
        if available < needed:
            raise NoSpace(
                f"A snapshot that lies on this one must be given up to {needed} bytes of its own, "
                f"and {place} has {available} left; make room or delete that one first."
            )


def check_delete(hypervisor: Hypervisor, layer: Layer, disk: str) -> None:
    """Refuse the delete of a snapshot that is beside the chain itself."""
    if not own(layer):
        raise InvalidState("The snapshot's file is not the one that it was; somebody changed it.")
    user = hypervisor.user_of(layer.origin, layer.domain, disk, known(layer))
    if user:
        raise Busy(f"The snapshot's image is also used by {user}.")
    folder.refuse_reader(layer.origin, layer.domain)
    check(layer)


def delete(hypervisor: Hypervisor, layer: Layer) -> None:
    """Remove a snapshot that is beside the chain, and its file if that is ours.

    May be called again.
    """
    if own(layer):
        detach(layer)
        if layer.ours is not None and layer.ours.there():
            folder.remove(hypervisor, layer.origin)
        else:
            log.warning("%s is none that snapd-vm made, and is left alone", layer.origin)


def own(layer: Layer) -> bool:
    """Whether the origin of a snapshot beside the chain is there, and still the file it was."""
    return layer.aside is not None and Image(layer.origin, layer.aside).there()


def known(layer: Layer) -> Sequence[str]:
    """The images of which it is known that they have this snapshot's in their chain."""
    return [image.path for image in layer.beside]


def has_any(layer: Layer) -> bool:
    """Whether any of them lies on the snapshot's origin."""
    return any(True for _ in _on(layer, layer.origin))


def detach(layer: Layer) -> None:
    """Let those that lie on the origin lie on what is below it, as it will change or go.

    What they had of the origin is copied to them (qemu-img(1), rebase in safe mode). Cut off at any
    moment, they have some data twice.
    """
    base, base_format = _below(layer)
    limit = 60 + _allocated(layer.origin) / _SLOWEST_BYTES_S
    for image in list(_on(layer, layer.origin)):
        named = ["-b", base, "-F", base_format] if base else ["-b", ""]
        _rebase([*named, image.path], limit)


def follow(layer: Layer) -> None:
    """Let those that lie on the overlay lie on the origin, once that has all of the overlay."""
    for image in list(_on(layer, layer.path)):
        _rebase(["-u", "-b", layer.origin, "-F", layer.origin_format, image.path], 60)


def _rebase(words: Sequence[str], limit: float) -> None:
    try:
        command.run(["qemu-img", "rebase", "-q", "-f", "qcow2", *words], timeout=limit)
    except command.CommandError as error:
        raise StorageFailed(f"{error}.") from error


def _on(layer: Layer, base: str) -> Iterator[Image]:
    """Those whose backing file is `base`."""
    wanted = storage.file_id(base)
    for image in layer.beside:
        below = next(storage.backing_chain(image.path), "")
        if below and wanted is not None and storage.file_id(below) == wanted and image.there():
            yield image


def _below(layer: Layer) -> tuple[str, str]:
    """The backing file of the origin, and its format; '' where it has none."""
    if layer.origin_format == "raw":
        return "", ""
    try:
        fd = os.open(layer.origin, os.O_RDONLY | os.O_CLOEXEC)
        try:
            header = qcow2.read_header(fd)
        finally:
            os.close(fd)
    except (OSError, qcow2.NotQcow2) as error:
        raise StorageFailed(f"The image {layer.origin} can't be read: {error}.") from error
    return qcow2.backing_path(layer.origin, header), header.backing_format


def _allocated(path: str) -> int:
    """The most bytes that its data take: of a device, all that it has."""
    found = os.stat(path)
    if stat.S_ISBLK(found.st_mode):
        return storage.virtual_size(path, "raw")
    return found.st_blocks * 512
