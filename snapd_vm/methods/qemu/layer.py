"""What the method qemu keeps in a Target, with its types: an overlay on an origin."""

from __future__ import annotations

from dataclasses import dataclass

from snapd_vm.methods.image import Image, images
from snapd_vm.model import Tag, Target
from snapd_vm.storage import FileId


@dataclass(frozen=True, slots=True)
class Layer:
    """A Target's data. `path` is the overlay, `inode` its identity once it was made.

    `instance` is libvirt's number of the domain's run at that time, -1 if it was off; `persistent`
    says that the definition named the same origin. `disk` is its `<target dev>`. `aside` is the
    origin's identity where a revert has left the snapshot beside the disk's chain: it has no
    overlay then. `ours` is the origin where we made that file, as the overlay of another snapshot,
    whose record may be gone; known since the last revert. `beside` are the origins of other such
    snapshots of the disk, as far as they were asked for (see Reverts.among).
    """

    disk: str
    domain: str
    instance: int
    origin: str
    origin_type: str
    origin_format: str
    persistent: bool
    path: str
    inode: FileId | None
    aside: FileId | None
    ours: Image | None
    beside: tuple[Image, ...]

    @classmethod
    def of(cls, target: Target) -> Layer:
        data = target.data
        device, inode, instance = data.get("device"), data.get("inode"), data["instance"]
        known = isinstance(device, int) and isinstance(inode, int)
        return cls(
            disk=target.disk,
            domain=str(data["domain"]),
            instance=instance if isinstance(instance, int) else -1,
            origin=str(data["origin"]),
            origin_type=str(data["origin_type"]),
            origin_format=str(data["origin_format"]),
            persistent=bool(data["persistent"]),
            path=str(data["overlay"]),
            inode=FileId(device, inode) if known else None,  # type: ignore[arg-type]
            aside=Image.of(data["aside"]).file if data.get("aside") else None,
            ours=Image.of(data["ours"]) if data.get("ours") else None,
            beside=images(data.get("beside")),
        )

    def draft(self, tag: Tag) -> str:
        """The name in the overlay's folder that it has until it is complete; ours by its UUID.

        `tag` is the operation's, which may take several disks.
        """
        return f".{tag.storage_name}.{self.disk}.new"
