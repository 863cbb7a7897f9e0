"""What a revert by the method qemu has in its Target, and so in the journal, before it is done."""

from __future__ import annotations

from dataclasses import dataclass, replace

from snapd_vm.methods.image import Image, images, revert_of
from snapd_vm.model import Json, Target


@dataclass(frozen=True, slots=True)
class Plan:
    """What a revert has written down: the new overlay, the one to discard, and all that we made.

    `below` is what lies below the one to discard. `made` is the new overlay's identity, from the
    moment on at which there is one.
    """

    overlay: str
    size: int
    discarded: Image
    known: tuple[Image, ...]
    below: tuple[Image, ...]
    made: Image | None

    @classmethod
    def of(cls, target: Target) -> Plan:
        data = revert_of(target)
        size, made = data["size"], data.get("made")
        return cls(
            str(data["overlay"]),
            size if isinstance(size, int) else 0,
            Image.of(data["discarded"]),
            images(data["known"]),
            images(data["below"]),
            Image.of(made) if made else None,
        )

    def into(self, target: Target) -> Target:
        """The Target with this in it."""
        data: dict[str, Json] = {
            "overlay": self.overlay,
            "size": self.size,
            "discarded": self.discarded.as_json(),
            "known": [image.as_json() for image in self.known],
            "below": [image.as_json() for image in self.below],
            "made": self.made.as_json() if self.made else None,
        }
        return replace(target, data={**target.data, "revert": data})
