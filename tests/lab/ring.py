"""Finds in a disk image what the guest's writer had written, and whether all of it is whole.

The records are those of inside/disks.c: change both together.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from tests.lab.deadline import LabError
from tests.lab.program import attempt

RECORD = 4096
RECORDS = 64
HEAD = struct.Struct("<8sQQ")


@dataclass(frozen=True)
class Ring:
    """The writer's file as an image has it."""

    newest: int  # the sequence number of the last record that is in it
    whole: bool  # every record is as it was written, and none before the newest is missing


def read_ring(raw_image: Path) -> Ring:
    """Read it from a raw ext4 image that nobody writes to; the image is not changed."""
    copy = raw_image.with_suffix(".ring")
    dumped = attempt(["debugfs", "-R", f"dump /.lab-ring {copy}", raw_image])
    if not copy.exists() or not copy.stat().st_size:
        raise LabError(f"no ring in {raw_image}: {dumped.stderr.strip()}")
    data = copy.read_bytes()
    copy.unlink()
    records = [data[start : start + RECORD] for start in range(0, len(data), RECORD)]
    sequences = [HEAD.unpack_from(record)[1] for record in records if len(record) == RECORD]
    newest = max(sequences)
    expected = {n % RECORDS: n for n in range(max(1, newest - RECORDS + 1), newest + 1)}
    whole = all(
        position < len(records)
        and sequences[position] == sequence
        and _checksum(records[position][:-8]) == struct.unpack("<Q", records[position][-8:])[0]
        for position, sequence in expected.items()
    )
    return Ring(newest, whole)


def _checksum(data: bytes) -> int:
    """FNV-1a, 64 bits."""
    value = 14695981039346656037
    for byte in data:
        value = (value ^ byte) * 1099511628211 & 0xFFFFFFFFFFFFFFFF
    return value
