"""What a ZFS snapshot of ours says of itself, in user properties of its own, set together with it.

A value has no character in it but printable ones of ASCII: others, and the percent sign, are
written as in URLs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from snapd_vm.model import Tag

_SPACE = "org.snapd-vm:"
CLONE_OF = f"{_SPACE}clone-of"
PROPERTIES = ("clones", *(_SPACE + key for key in ("snapshots", "label", "domain")))
"""What `found` is given."""

_LONGEST = 1000  # of a property's value that somebody else chose; ZFS itself allows 8191
_PRINTABLE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%") + " "


@dataclass(frozen=True, slots=True)
class Found:
    """A snapshot that there is; `tags` are our own properties of it, without their prefix."""

    clones: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def snapshots(self) -> Mapping[str, str]:
        """The UUIDs of the snapshots that it was taken for, by disk."""
        pairs = (word.partition("=") for word in self.tags.get("snapshots", "").split())
        return {decoded(disk): uuid for disk, _, uuid in pairs}

    @property
    def label(self) -> str:
        """The label."""
        return decoded(self.tags.get("label", ""))

    @property
    def domain(self) -> str:
        """The domain's name."""
        return decoded(self.tags.get("domain", ""))


def encoded(text: str) -> str:
    """Somebody else's text as a property's value, which has one line and no tab."""
    return quote(text, safe=_PRINTABLE, errors="surrogateescape")[:_LONGEST].strip() or "-"


def decoded(value: str) -> str:
    """What `encoded` was given."""
    return unquote(value, errors="surrogateescape")


def said(tag: Tag, disks: Mapping[str, str]) -> Sequence[str]:
    """The properties of a new snapshot, as `zfs snapshot -o` takes them.

    `disks` are the UUIDs of what it is taken for, by disk.
    """
    values = {
        "snapshots": " ".join(f"{quote(disk, safe='')}={uuid}" for disk, uuid in disks.items()),
        "label": encoded(tag.label),
        "domain": encoded(tag.domain_name),
        "domain-uuid": tag.domain_uuid,
        "created-us": str(tag.created_us),
    }
    return [f"{_SPACE}{key}={value}" for key, value in values.items()]


def found(rows: Iterable[Sequence[str]]) -> Found:
    """Of rows of property, value and source: what is inherited is of the dataset, and not ours."""
    clones, tags = "", dict[str, str]()
    for key, value, source in rows:
        if key == "clones":
            clones = value
        elif source == "local":
            tags[key.removeprefix(_SPACE)] = value
    return Found(tuple(name for name in clones.split(",") if name not in ("", "-")), tags)
