"""What the method btrfs keeps in a Target, with its types: a file in a snapshot of a subvolume."""

from __future__ import annotations

import os
from dataclasses import dataclass

from snapd_vm.methods.taken import Taken
from snapd_vm.model import Target


@dataclass(frozen=True, slots=True)
class SubvolumeTarget(Taken):
    """A Target's data.

    `source` is the UUID of the subvolume, `root` its root folder, `inside` the image's path below
    that. The snapshot `name` is in `folder`, a folder of its own in `place`. `shared`: other
    snapshots on record, of disks taken together, are in it too.
    """

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
            **cls.fields_of(data),
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
