"""What the method zfs keeps in a Target, with its types: a file in a dataset, or a volume."""

from __future__ import annotations

import os
from dataclasses import dataclass

from snapd_vm.methods.taken import Taken
from snapd_vm.model import Target


@dataclass(frozen=True, slots=True)
class ZfsTarget(Taken):
    """A Target's data.

    `dataset` holds the image, or is the volume, whose device is the image then; `name` is that of
    the snapshot after the `@`.

    Of a file: `inside` is its path in the dataset; `folder` that of the snapshot's root, and
    `mounted` whether that is a folder of ours, and none in `.zfs/snapshot`. Of a volume: `clone`
    is the read-only clone whose device is handed out, and `folder` ''.

    `shared`: other snapshots on record, of disks taken together, are in the same one.
    """

    dataset: str
    name: str
    root: str
    inside: str
    folder: str
    mounted: bool
    clone: str
    shared: bool

    @classmethod
    def of(cls, target: Target) -> ZfsTarget:
        data = target.data
        return cls(
            **cls.fields_of(data),
            dataset=str(data["dataset"]),
            name=str(data["name"]),
            root=str(data["root"]),
            inside=str(data["inside"]),
            folder=str(data["folder"]),
            mounted=bool(data["mounted"]),
            clone=str(data["clone"]),
            shared=bool(data.get("shared")),
        )

    @property
    def full(self) -> str:
        """The snapshot as ZFS names it."""
        return f"{self.dataset}@{self.name}"

    @property
    def is_volume(self) -> bool:
        """Whether it is a volume, and no file."""
        return bool(self.clone)

    @property
    def path(self) -> str:
        """What is read: the file in the snapshot, or the clone's device."""
        if self.is_volume:
            return device_of(self.clone)
        return os.path.join(self.folder, self.inside)


def device_of(volume: str) -> str:
    """The path that udev gives a volume's device (zvol_id, in zfsutils-linux)."""
    return f"/dev/zvol/{volume.replace(' ', '+')}"
