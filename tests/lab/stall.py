"""What a writer in a guest has felt, as guestd reports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stall:
    """What the writer on one disk has seen since the last reset, by the guest's clock.

    That clock stands still while the vCPUs are stopped; `Guest.watch()` goes by the host's.
    """

    longest_s: float  # between two writes that were completed, or since the last one
    current_s: float  # since the last one that was completed: how long it stands still now
    writes: int
    sequence: int  # of the last record; ring.py finds it in an image
    mounted: bool
    busy: bool  # a record is on its way
    failed: bool  # a write failed: the writer has given up


def stall_of(seen: Mapping[str, Any]) -> Stall:
    """From guestd's JSON for one disk."""
    return Stall(
        longest_s=seen["longest_ns"] / 1e9,
        current_s=seen["current_ns"] / 1e9,
        writes=seen["writes"],
        sequence=seen["sequence"],
        mounted=seen["mounted"],
        busy=seen["busy"],
        failed=seen["failed"],
    )
