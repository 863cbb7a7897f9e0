"""What all methods that snapshot a layer below QEMU ask of a disk's image, and keep of it."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lxml import etree

from snapd_vm import storage
from snapd_vm.errors import Busy, MethodNotSupported, NotUnderDisk, StorageFailed
from snapd_vm.methods import chain
from snapd_vm.methods.image import number
from snapd_vm.model import Disk, Domain, Json, Tag
from snapd_vm.storage import FileId

IMAGE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""To open an image whose real path is known, whatever has come there since."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a Target's data says of a disk's image, whatever layer below it is snapshotted.

    `snapshot` and `domain` are UUIDs. `declared` is the image's path as the domain has it, `image`
    where that leads to, `identity` what that is, `held` the inode that it had when it was taken.
    A disk that is a device has no `image`, unless its method says otherwise.
    """

    snapshot: str
    domain: str
    active: bool
    declared: str
    image: str
    identity: FileId
    held: int
    format: str

    @staticmethod
    def fields_of(data: Mapping[str, Json]) -> dict[str, Any]:
        """These fields, for the `of` of a class that has more."""
        return {
            "snapshot": str(data["snapshot"]),
            "domain": str(data["domain"]),
            "active": bool(data["active"]),
            "declared": str(data["declared"]),
            "image": str(data.get("image", "")),
            "identity": FileId(number(data.get("image_device")), number(data.get("image_inode"))),
            "held": number(data.get("held")),
            "format": str(data["format"]),
        }


def described(domain: Domain, disk: Disk, tag: Tag) -> dict[str, Json]:
    """What a Target's data says of any disk, for Taken."""
    return {
        "snapshot": tag.uuid,
        "domain": domain.uuid,
        "active": domain.active,
        "declared": disk.path,
        "format": disk.format,
    }


def identified(image: str, identity: FileId) -> dict[str, Json]:
    """What it says of the image, for Taken."""
    return {
        "image": image,
        "image_device": identity.device,
        "image_inode": identity.inode,
        "held": identity.inode,
    }


def with_source(disk: Disk, path: str, *, device: bool = False) -> Disk:
    """The disk with a file or device in the snapshot for its source. Raises StorageFailed."""
    kind, attribute = ("block", "dev") if device else ("file", "file")
    try:
        source = etree.Element("source", {attribute: path})
    except ValueError:  # where a symlink leads to, libvirt has not looked at
        raise StorageFailed(
            "The path of the image behind a symlink has characters that XML can't hold."
        ) from None
    xml = etree.tostring(source, encoding="unicode")
    return dataclasses.replace(disk, type=kind, path=path, source_xml=xml)


RAW = ("raw",)
"""The formats that a layer takes by default: what a guest writes into others is several writes."""


def check_fit(
    disk: Disk, method: str, takes: Mapping[str, str], formats: Sequence[str], named: str = ""
) -> None:
    """Raise MethodNotSupported for a disk that a layer can't take, wherever it is.

    `takes` has the types of source that the method takes, with what to call them. Raises
    NotUnderDisk where the caller has `named` a layer, which can't hold another type.
    """
    problem = ""
    if disk.type not in takes:
        if named:
            raise NotUnderDisk(
                f"Disk {disk.target} has a {disk.type} source; it is not on {named}."
            )
        problem = f"has a {disk.type} source; method {method} takes {' and '.join(takes.values())}."
    elif disk.format not in formats:
        problem = (
            f"has the format '{disk.format}'; method {method} takes {' and '.join(formats)} "
            "images, so use method qemu."
        )
    elif disk.encrypted:
        problem = "is encrypted, and its snapshot would not say with which key."
    elif "<slice" in disk.source_xml:
        problem = f"is a slice of its image; method {method} takes whole images."
    if problem:
        raise MethodNotSupported(f"Disk {disk.target} {problem}")


def elsewhere(disk: str, holder: str) -> str:
    """Why an image with a part of itself in others is refused, of which `holder` is the one."""
    return (
        f"The image of disk {disk} has a backing file, or its data in another, which {holder} does "
        "not hold; use method qemu."
    )


def check_alone(disk: Disk, holder: str, *, named: bool) -> None:
    """Refuse a disk whose image, on a device, has a part of itself elsewhere.

    `holder` is what holds the image alone. Raises MethodNotSupported, or NotUnderDisk where the
    caller has `named` the layer; and StorageFailed.
    """
    if disk.chain or chain.path_lies_on_others(disk.path, disk.format):
        raise (NotUnderDisk if named else MethodNotSupported)(elsewhere(disk.target, holder))


def open_image(disk: Disk, image: str) -> int:
    """A descriptor of a disk's file, whose real path is `image`. Raises MethodNotSupported."""
    try:
        fd = os.open(image, IMAGE_FLAGS)
    except (OSError, ValueError):
        fd = -1
    if fd != -1 and stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    if fd != -1:
        os.close(fd)
    raise MethodNotSupported(f"The image of disk {disk.target} is not there, or not a file.")


def check_unwritten(image: str) -> None:
    """Nobody may be writing to a file or device whose domain is off. Raises Busy and StorageFailed.

    What is snapshotted then is called offline, and nothing is frozen for it.
    """
    found = storage.file_id(image)
    if found is not None and found.inode == 0:  # a device
        writer = storage.writer_of(image)
    else:
        writer = "another process" if storage.write_locked(image) else ""
    if writer:
        raise Busy(f"The image {image} is in use, or open for writing, by {writer}.")


def check_chain(root: int, inside: str, disk: Disk, *, named: bool) -> None:
    """The disk's image and all that it lies on must be below the folder `root`, which is closed.

    Raises MethodNotSupported; NotUnderDisk where the caller has `named` the layer.
    """
    try:
        chain.check(root, inside, disk.format, disk.chain)
    except chain.Outside as error:
        if named:
            raise NotUnderDisk(str(error)) from error
        raise
    finally:
        os.close(root)
