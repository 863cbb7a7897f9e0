"""What the method reflink keeps in a Target, with its types: a clone of an image."""

from __future__ import annotations

import os
from dataclasses import dataclass

from snapd_vm.methods.image import number
from snapd_vm.model import Target
from snapd_vm.storage import FileId


@dataclass(frozen=True, slots=True)
class CloneTarget:
    """A Target's data. `inode` is the clone's, 0 before it was made.

    `declared` is the image's path as the domain has it, `image` where that leads to.
    """

    snapshot: str
    domain: str
    active: bool
    declared: str
    image: str
    identity: FileId
    path: str
    inode: int

    @classmethod
    def of(cls, target: Target) -> CloneTarget:
        data = target.data
        return cls(
            snapshot=str(data["snapshot"]),
            domain=str(data["domain"]),
            active=bool(data["active"]),
            declared=str(data["declared"]),
            image=str(data["image"]),
            identity=FileId(number(data["image_device"]), number(data["image_inode"])),
            path=str(data["clone"]),
            inode=number(data.get("inode")),
        )

    @property
    def folder(self) -> str:
        """The folder of image and clone."""
        return os.path.dirname(self.path)

    @property
    def name(self) -> str:
        """The clone's name there."""
        return os.path.basename(self.path)
