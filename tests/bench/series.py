"""Measured values as people read them: median, spread and ratio. Measures nothing itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """Values of one kind, in ms or MB."""

    values: tuple[float, ...]
    unit: str = "ms"

    @classmethod
    def of_seconds(cls, values: Sequence[float]) -> Series:
        """Times given in seconds."""
        return cls(tuple(value * 1000 for value in values))

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The 10th and the 90th percentile; of less than five values, the least and the most."""
        if len(self.values) < 5:
            return min(self.values), max(self.values)
        tenths = statistics.quantiles(self.values, n=10, method="inclusive")
        return tenths[0], tenths[-1]

    def __str__(self) -> str:
        low, high = self.spread
        return f"{self.median:.1f} {self.unit} ({low:.1f} to {high:.1f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in columns as wide as they need to be."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def ratio(ours: Series, theirs: Series) -> str:
    """How the medians stand to each other."""
    return f"{ours.median / theirs.median:.2f}"
