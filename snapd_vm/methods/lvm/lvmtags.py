"""What a logical volume says by its tags of the snapshot that it is; lvm(8) says what they hold.

What is not among those characters is written as `+` and two hexadecimal digits a byte.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from snapd_vm.model import Tag

_PREFIX = "snapd-vm."
_LONGEST = 900  # lvm has tags of 1024 characters
_PLAIN = re.compile(rb"[A-Za-z0-9_.-]")


@dataclass(frozen=True, slots=True)
class Said:
    """What the tags of a volume say; each '' where they don't."""

    snapshot: str
    name: str
    domain: str


def made(snapshot: str, tag: Tag) -> list[str]:
    """The tags of a snapshot; `snapshot` is its UUID, and `tag` that of its operation."""
    said = {
        "snapshot": snapshot,
        "name": tag.label,
        "domain": tag.domain_name,
        "domain-uuid": tag.domain_uuid,
        "created": str(tag.created_us),
    }
    return [f"{_PREFIX}{key}={_encoded(value)}" for key, value in said.items()]


def reverting(snapshot: str) -> str:
    """The tag of what takes a disk's place in a revert to this snapshot, or is overwritten."""
    return f"{_PREFIX}revert={snapshot}"


def reverted(snapshot: str) -> str:
    """The tag of a disk that a revert to this snapshot has overwritten."""
    return f"{_PREFIX}reverted={snapshot}"


def is_ours(tag: str) -> bool:
    """Whether it is a tag such as we give."""
    return tag.startswith(_PREFIX)


def read(tags: Sequence[str]) -> Said:
    """What these say, whoever wrote them."""
    found = dict(tag.removeprefix(_PREFIX).partition("=")[::2] for tag in tags if is_ours(tag))
    return Said(*(_decoded(found.get(key, "")) for key in ("snapshot", "name", "domain")))


def _encoded(text: str) -> str:
    out = ""
    for byte in text.encode(errors="surrogateescape"):
        one = bytes([byte])
        piece = one.decode() if _PLAIN.match(one) else f"+{byte:02X}"
        if len(out) + len(piece) > _LONGEST:
            break
        out += piece
    return out


def _decoded(text: str) -> str:
    raw = re.sub(
        rb"\+([0-9A-F]{2})",
        lambda found: bytes([int(found[1], 16)]),
        text.encode(errors="replace"),
    )
    return raw.decode(errors="replace")
