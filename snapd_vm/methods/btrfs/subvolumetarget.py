"""What the method btrfs keeps in a Target, with its types: a file in a snapshot of a subvolume."""

from __future__ import annotations

import os
from dataclasses import dataclass

from snapd_vm.model import Json, Target
from snapd_vm.storage import FileId


@dataclass(frozen=True, slots=True)
class SubvolumeTarget:
    """A Target's data.

    `declared` is the image's path as the domain has it, `image` where that leads to, `held` the
    inode that it had when it was taken. `source` is the UUID of the subvolume, `root` its root
    folder, `inside` the image's path below that. The snapshot `name` is in `folder`, a folder of
    its own in `place`. `shared`: other snapshots on record, of disks taken together, are in it too.
    """

    snapshot: str
    domain: str
    active: bool
    declared: str
    image: str
    identity: FileId
    held: int
    format: str
    source: str
    root: str
    inside: str
    place: str
    folder: str
    name: str
    shared: bool

    @classmethod
    def of(cls, target: Target) -> SubvolumeTarget:
        data = target.data
        return cls(
            snapshot=str(data["snapshot"]),
            domain=str(data["domain"]),
            active=bool(data["active"]),
            declared=str(data["declared"]),
            image=str(data["image"]),
            identity=FileId(_number(data["image_device"]), _number(data["image_inode"])),
            held=_number(data["held"]),
            format=str(data["format"]),
            source=str(data["source"]),
            root=str(data["root"]),
            inside=str(data["inside"]),
            place=str(data["place"]),
            folder=str(data["folder"]),
            name=str(data["name"]),
            shared=bool(data.get("shared")),
        )

    @property
    def path(self) -> str:
        """The snapshot's root folder."""
        return os.path.join(self.place, self.folder, self.name)

    @property
    def file(self) -> str:
        """The image in it."""
        return os.path.join(self.path, self.inside)


def _number(value: Json) -> int:
    return value if isinstance(value, int) else 0
