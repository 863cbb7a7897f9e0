"""What the method lvm keeps in a Target, with its types: a snapshot of a logical volume."""

from __future__ import annotations

import os
from dataclasses import dataclass

from snapd_vm.methods.image import number
from snapd_vm.methods.lvm import devicemapper
from snapd_vm.methods.taken import Taken
from snapd_vm.model import Target


@dataclass(frozen=True, slots=True)
class LvmTarget(Taken):
    """A Target's data.

    The snapshot is one of the volume `lv`, which is `kind` (see devicemapper.Volume); `wanted` is
    the size that the caller asked for, 0 if none.

    Where the disk is a file on the volume's file system, it is the `image`, `inside` its path from
    the root of the `filesystem`, and `mount` where the snapshot's is mounted; else they are ''.
    """

    kind: str
    vg: str
    vg_uuid: str
    lv: str
    lv_uuid: str
    wanted: int
    filesystem: str
    inside: str
    mount: str

    @classmethod
    def of(cls, target: Target) -> LvmTarget:
        data = target.data
        return cls(
            **cls.fields_of(data),
            kind=str(data["kind"]),
            vg=str(data["vg"]),
            vg_uuid=str(data["vg_uuid"]),
            lv=str(data["lv"]),
            lv_uuid=str(data["lv_uuid"]),
            wanted=number(data["wanted"]),
            filesystem=str(data.get("filesystem", "")),
            inside=str(data.get("inside", "")),
            mount=str(data.get("mount", "")),
        )

    @property
    def name(self) -> str:
        """The snapshot's name in its volume group: Tag.storage_name of its own tag."""
        return f"snapd-vm-{self.snapshot}"

    @property
    def origin(self) -> str:
        """The volume's device."""
        return f"/dev/{self.vg}/{self.lv}"

    @property
    def device(self) -> str:
        """The snapshot's device."""
        return f"/dev/{self.vg}/{self.name}"

    @property
    def file(self) -> str:
        """What is read: the device, or the image in the file system that is mounted from it."""
        return os.path.join(self.mount, self.inside) if self.mount else self.device

    @property
    def thin(self) -> bool:
        """Whether it lies in a pool, and needs no size."""
        return self.kind == devicemapper.THIN
