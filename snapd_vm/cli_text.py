"""How the client shows things to a person: tables, sizes, times. Pure functions on text."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence


def printable(text: str) -> str:
    """The text on one line, with what could play tricks on a terminal written as escapes.

    A domain's name is chosen by whoever may define domains, and shown in root's terminal.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def as_json(answer: object) -> str:
    """What `--json` prints of an answer."""
    return json.dumps(answer, indent=2, ensure_ascii=False) + "\n"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns, two spaces apart; no space at the ends of lines."""
    cells = [list(headings), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
    return "\n".join(lines) + "\n"


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, one pair a line; further lines of a value start below its first."""
    width = max(len(name) for name, _ in pairs) + 2
    lines = []
    for name, value in pairs:
        first, *further = value.splitlines() or [""]
        lines.append(f"{name.ljust(width)}{printable(first)}".rstrip())
        lines += [" " * width + printable(line) for line in further]
    return "\n".join(lines) + "\n"


def size(count: int) -> str:
    """A number of bytes for a person: 512 B, 1.5 GiB."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            return f"{count} B" if unit == "B" else f"{amount:.1f}".removesuffix(".0") + f" {unit}"
        amount /= 1024
    return f"{amount:.1f} PiB"


def duration(microseconds: int) -> str:
    """A time in µs for a person: 61 ms, 1.25 s."""
    if microseconds < 1_000_000:
        return f"{microseconds / 1000:.0f} ms"
    return f"{microseconds / 1_000_000:.2f} s"


def age(microseconds: int) -> str:
    """How long ago something was, in its largest unit: 5 s, 12 min, 3 h, 1 day, 40 days."""
    seconds = max(0, microseconds // 1_000_000)
    for length, unit in ((86_400, "day"), (3600, "h"), (60, "min")):
        if (count := seconds // length) > 0:
            return f"{count} {unit}" + ("s" if unit == "day" and count > 1 else "")
    return f"{seconds} s"


def progress(label: str, fraction: float | None, total: int) -> str:
    """How far something is, in a line; `fraction` from 0 to 1 or unknown, `total` in bytes or 0."""
    if fraction is None:
        return f"{label} ..."
    fraction = min(max(fraction, 0.0), 1.0)
    done = int(fraction * 20)
    # Not rounded: 100 % is said of nothing that is not finished.
    of = f" of {size(total)}" if total else ""
    return f"{label} [{'#' * done}{'.' * (20 - done)}] {int(fraction * 100):3} %{of}"


def moment(microseconds: int) -> str:
    """µs since the epoch as local time in ISO 8601, to the second, with the offset from UTC."""
    seconds = microseconds // 1_000_000
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(" ")
