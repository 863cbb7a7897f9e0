"""Takes snapshots of one guest under write load in all the ways, in turn, and notes what it felt.

Each round has every way once, in an order that is drawn anew; after each turn the disk is back on
its first image, so that no way meets a longer chain than another.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.series import Series
from tests.bench.ways import TARGET, Taken, Way
from tests.lab.deadline import LabError, wait_until
from tests.lab.guest import Guest
from tests.lab.program import run

SEED = 20
SETTLE_S = 0.25
"""Between the end of one turn and the start of the next: events are told, state is looked at."""


@dataclass
class Seen:
    """What was measured of one way, in seconds."""

    way: Way
    taken: list[Taken] = field(default_factory=list)
    any_disk: list[float] = field(default_factory=list)
    that_disk: list[float] = field(default_factory=list)

    @property
    def call(self) -> Series:
        """The whole call."""
        return Series.of_seconds([one.call_s for one in self.taken])

    @property
    def frozen(self) -> Series | None:
        """The frozen time, where it is told."""
        known = [one.frozen_s for one in self.taken if one.frozen_s is not None]
        return Series.of_seconds(known) if known else None


def measure(
    guest: Guest,
    ways: Sequence[Way],
    rounds: int,
    uri: str,
    between: Callable[[int], None],
) -> list[Seen]:
    """What each way took, over so many rounds; one round more comes first and is not counted.

    `between` is called before each round with its number, 0 for the first.
    """
    order = random.Random(SEED)
    seen = [Seen(way) for way in ways]
    number = 0
    for turn in range(rounds + 1):
        between(turn)
        for one in order.sample(seen, len(seen)):
            number += 1
            overlay = guest.disk(TARGET).path.with_suffix(f".b{number}")
            _turn(guest, one, overlay, uri, counts=turn > 0)
    return seen


def _turn(guest: Guest, one: Seen, overlay: Path, uri: str, *, counts: bool) -> None:
    time.sleep(SETTLE_S)
    guest.reset()
    guest.writes_go_on()
    taken = one.way.take(guest, overlay)
    guest.writes_go_on()
    stalls = guest.stalls()
    if counts:
        one.taken.append(taken)
        one.any_disk.append(max(stall.longest_s for stall in stalls.values()))
        one.that_disk.append(stalls[TARGET].longest_s)
    if taken.has_overlay:
        _back(guest, overlay, uri)


def _back(guest: Guest, overlay: Path, uri: str) -> None:
    """Commit what was written since, and go on with the first image."""

    def pivoted() -> bool:
        with suppress(LabError):  # "not ready" although it waited; others had to try again, too
            run("virsh", "-c", uri, "blockcommit", guest.name, TARGET, *COMMIT)
            return True
        return str(overlay) not in guest.domain.XMLDesc()

    wait_until("the overlay is committed", pivoted, 30, 0.2)
    overlay.unlink()


COMMIT = ("--active", "--shallow", "--pivot", "--wait")
