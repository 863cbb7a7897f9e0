"""What a snapshot's image holds, as QEMU's and e2fsprogs' own tools tell; changes nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.lab.program import attempt


def info(path: str | Path) -> dict[str, Any]:
    """`qemu-img info`, whoever has it open."""
    done = attempt(["qemu-img", "info", "-U", "--output=json", path], timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def is_open(path: str | Path) -> bool:
    """Whether a QEMU has it open for writing."""
    return attempt(["qemu-img", "info", path], timeout=60).returncode != 0


def raw_copy(path: str | Path, image_format: str, to: Path) -> Path:
    """The whole view of an image, its backing chain too, as a raw file."""
    to.unlink(missing_ok=True)
    argv = ["qemu-img", "convert", "-U", "-f", image_format, "-O", "raw", path, to]
    done = attempt(argv, timeout=120)
    assert done.returncode == 0, done.stderr
    return to


def checksum(path: str | Path, image_format: str, scratch: Path) -> str:
    """A checksum of the whole view."""
    copy = raw_copy(path, image_format, scratch / "checksum.raw")
    return hashlib.sha256(copy.read_bytes()).hexdigest()


def needs_recovery(raw: Path) -> bool:
    """Whether an ext4 image was taken while it was mounted and not frozen (dumpe2fs -h)."""
    done = attempt(["dumpe2fs", "-h", raw], timeout=60)
    assert done.returncode == 0, done.stderr
    return "needs_recovery" in done.stdout


def is_clean(raw: Path) -> bool:
    """Whether `e2fsck -fn` finds nothing to mend."""
    return attempt(["e2fsck", "-fn", raw], timeout=60).returncode == 0


def recovers(raw: Path) -> bool:
    """Whether e2fsck mends the image by its journal, and finds nothing afterwards."""
    return attempt(["e2fsck", "-fy", raw], timeout=60).returncode in (0, 1) and is_clean(raw)


def chain(path: str | Path) -> list[str]:
    """The files of an image's backing chain, itself first."""
    argv = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", path]
    done = attempt(argv, timeout=60)
    assert done.returncode == 0, done.stderr
    return [str(image["filename"]) for image in json.loads(done.stdout)]
