"""What the method zfs keeps in a Target, with its types: a file in a dataset, or a volume."""

from __future__ import annotations

import os
from dataclasses import dataclass

from snapd_vm.model import Json, Target
from snapd_vm.storage import FileId


@dataclass(frozen=True, slots=True)
class ZfsTarget:
    """A Target's data.

    `declared` is the image's path as the domain has it, `image` where that leads to, `identity`
    what that is, `held` the inode that it had when it was taken. `dataset` holds it, or is the
    volume; `name` is that of the snapshot after the `@`.

    Of a file: `inside` is its path in the dataset; `folder` that of the snapshot's root, and
    `mounted` whether we have to mount the snapshot there. Of a volume: `clone` is the read-only
    clone whose device is handed out, and `folder` ''.

    `shared`: other snapshots on record, of disks taken together, are in the same one.
    """

    snapshot: str
    domain: str
    active: bool
    declared: str
    image: str
    identity: FileId
    held: int
    format: str
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
            snapshot=str(data["snapshot"]),
            domain=str(data["domain"]),
            active=bool(data["active"]),
            declared=str(data["declared"]),
            image=str(data["image"]),
            identity=FileId(_number(data["image_device"]), _number(data["image_inode"])),
            held=_number(data["held"]),
            format=str(data["format"]),
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


def _number(value: Json) -> int:
    return value if isinstance(value, int) else 0
