"""What a method that is a program keeps in a Target, and what may be in it; starts nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lxml import etree

from snapd_vm import qcow2, storage
from snapd_vm.errors import SnapdError, StorageFailed
from snapd_vm.methods import chain
from snapd_vm.model import Disk, Json, Target


@dataclass(frozen=True, slots=True)
class Asked:
    """A Target's data: `snapshot` is what the program is told; what `source` holds is in one of its
    forms, file, device or snapshot. `group` is as the program said; `size` 0 if it did not.
    """

    snapshot: Mapping[str, Any]
    form: str
    source: str
    group: str
    size: int

    @classmethod
    def of(cls, target: Target) -> Asked:
        data: Mapping[str, Any] = target.data
        size = data["size"]
        return cls(
            data["snapshot"], str(data["form"]), str(data["source"]), str(data["group"]), int(size)
        )

    @property
    def name(self) -> str:
        """The snapshot's name on the storage."""
        return str(self.snapshot["name"])


def as_told(disk: Disk) -> dict[str, Json]:
    """A disk, as the program is told of it."""
    return {
        "target": disk.target,
        "type": disk.type,
        "format": disk.format,
        "path": disk.path,
        "source": {str(k): str(v) for k, v in etree.fromstring(disk.source_xml).attrib.items()},
    }


def _within(path: str, folders: Sequence[str]) -> bool:
    return any(path.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def not_there(asked: Asked, folders: Sequence[str]) -> str:
    """Why what is at the path is not what can be read, in words, or ''.

    A device may be a link in a folder that only root can change, as udev makes them.
    """
    wanted: Callable[[int], bool] = stat.S_ISREG if asked.form == "file" else stat.S_ISBLK
    try:
        found = os.stat(asked.source)
    except OSError as error:
        return f"{asked.source}: {error.strerror}"
    if not wanted(found.st_mode):
        return f"{asked.source} is not a {asked.form}"
    folder, name = os.path.split(asked.source)
    real = os.path.join(os.path.realpath(folder), name)
    if asked.form == "file" or not _is_roots(folder):
        real = os.path.realpath(asked.source)
    if not _within(real, [os.path.realpath(folder) for folder in folders]):
        return f"{asked.source} leads out of its folder"
    own = asked.snapshot["disk"]["path"]
    if own and storage.file_id(own) == storage.file_id(asked.source):
        return f"{asked.source} is the disk's own image"
    return ""


def unsound(asked: Asked) -> str:
    """Why what is there is not to be read as an image of the disk's format, in words, or ''.

    Whoever reads it would be led by its header to other files, which the program may not read.
    Raises StorageFailed where it can't be read, which says nothing about it.
    """
    if asked.snapshot["disk"]["format"] != "qcow2":
        return ""
    try:
        with open(asked.source, "rb", opener=_not_waiting) as file:
            header = qcow2.read_header(file.fileno())
    except qcow2.NotQcow2 as error:
        return f"{asked.source} is no image: {error}"
    except OSError as error:
        raise StorageFailed(f"{asked.source} can't be read: {error.strerror}.") from error
    return f"{asked.source} lies on other files" if header.lies_on_others else ""


def _not_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _is_roots(folder: str) -> bool:
    try:
        with storage.open_folder(folder, {0}, ()):
            return True
    except SnapdError:
        return False


def unfit_disk(disk: Disk, method: str) -> str:
    """Why the disk can't be taken, whatever the program says, or ''."""
    if disk.encrypted:
        return f"Disk {disk.target} is encrypted, and its snapshot would not say with which key."
    if "<slice" in disk.source_xml:
        return f"Disk {disk.target} is a slice of its image, and a snapshot would be of the whole."
    if disk.format not in chain.FORMATS:
        return f"Disk {disk.target} has the format '{disk.format}'; {method} takes raw and qcow2."
    if disk.chain or (disk.path and chain.path_lies_on_others(disk.path, disk.format)):
        return (
            f"Disk {disk.target} has images below its own, of which method {method} may not know; "
            "use method qemu."
        )
    return ""


def unfit_source(form: str, source: str, disk: Disk, folders: Sequence[str]) -> str:
    """Why a source can't be what the program says, whatever is there, or ''."""
    if form == "snapshot":
        source_xml = etree.fromstring(disk.source_xml)
        # The only one of which libvirt and QEMU know snapshots: of others the disk itself is read.
        if disk.type != "network" or source_xml.get("protocol") != "rbd":
            return f"disk {disk.target} is no RBD image that it could be a snapshot of."
        if source_xml.find("snapshot") is not None:
            return f"disk {disk.target} is a snapshot itself."
        return ""
    parts = source.split("/")
    if {".", ".."} & set(parts) or not source.isprintable():
        return "the path is not a normal one."
    if not _within(source, folders):
        return "it is in none of the folders of 'source_dirs'."
    if disk.path and os.path.realpath(source) == os.path.realpath(disk.path):
        return "it is the disk's own image."
    return ""
