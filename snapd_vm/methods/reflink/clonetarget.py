"""What the method reflink keeps in a Target, with its types: a clone of an image."""

from __future__ import annotations

import os
from dataclasses import dataclass

from snapd_vm.methods.image import number
from snapd_vm.methods.taken import Taken
from snapd_vm.model import Target


@dataclass(frozen=True, slots=True)
class CloneTarget(Taken):
    """A Target's data: `path` is the clone's, and `inode` its own, 0 before it was made."""

    path: str
    inode: int

    @classmethod
    def of(cls, target: Target) -> CloneTarget:
        data = target.data
        return cls(**cls.fields_of(data), path=str(data["clone"]), inode=number(data.get("inode")))

    @property
    def folder(self) -> str:
        """The folder of image and clone."""
        return os.path.dirname(self.path)

    @property
    def name(self) -> str:
        """The clone's name there."""
        return os.path.basename(self.path)
