"""Images as methods keep them in a Target, and what a revert has written down there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from snapd_vm.model import Json, Target
from snapd_vm.storage import FileId, file_id


@dataclass(frozen=True, slots=True)
class Image:
    """A file that we made, and its identity."""

    path: str
    file: FileId

    @classmethod
    def of(cls, value: Json) -> Image:
        """From what `as_json` gave."""
        if not isinstance(value, list) or len(value) != 3:
            raise TypeError("an image is not of the form that was written")
        path, device, inode = value
        if not isinstance(device, int) or not isinstance(inode, int):
            raise TypeError("an image has no identity")
        return cls(str(path), FileId(device, inode))

    def as_json(self) -> Json:
        """As it goes into the journal."""
        return [self.path, self.file.device, self.file.inode]

    def there(self) -> bool:
        """Whether the path still stands for it: a device's number may be another after a reboot."""
        found = file_id(self.path)
        return found is not None and found.inode == self.file.inode


def number(value: Json | None) -> int:
    """The number; 0 for what is none."""
    return value if isinstance(value, int) else 0


def images(value: Json) -> tuple[Image, ...]:
    """The images of a list of them; none for what is no list."""
    return tuple(Image.of(one) for one in value) if isinstance(value, list) else ()


def revert_of(target: Target) -> Mapping[str, Json]:
    """What a revert that was begun has written down in the Target. Raises TypeError for nothing."""
    data = target.data["revert"]
    if not isinstance(data, dict):
        raise TypeError("no revert was written down")
    return data
