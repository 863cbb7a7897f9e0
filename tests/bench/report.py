"""Prints what was measured, and collects the figures that the project has targets for."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench import domains
from tests.bench.deletes import Deleted
from tests.bench.layers import Measured
from tests.bench.series import Series, ratio, table
from tests.bench.services import Service
from tests.bench.snapshots import Seen

STALL_TARGETS = {1: "1.00, aim 0.90", 2: "0.65"}


class Figures:
    """The last table: figure, reached, target."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str]] = []

    def add(self, figure: str, reached: str, target: str) -> None:
        """One row."""
        self._rows.append((figure, reached, target))

    def domains(self, measured: domains.Measured) -> None:
        """GetManagedObjects of 200 domains, and Disks of each of them."""
        self.add("GetManagedObjects, 200 domains", str(measured.objects), "under 100 ms")
        self.add("Disks of 200 domains with 2 disks each", str(measured.disks), "under 2 s")
        for name, series in measured.by_place.items():
            self.add(f"Disks of a domain on {name}", str(series), "")

    def table(self) -> str:
        """As text."""
        return table(("figure", "reached", "target"), self._rows)


def of_services(found: Sequence[Service], figures: Figures) -> None:
    """Start and memory."""
    rows = []
    for one in found:
        if one.start is None:
            rows.append((one.title, f"not measured: {one.trouble}", "", "", ""))
        else:
            memory = f"{one.rss:.1f} MB", f"{one.pss:.1f} MB"
            rows.append((one.title, str(one.start), str(one.answer), *memory))
    starts = next((len(one.started) for one in found if one.started), 0)
    print(f"\nServices, {starts} starts each; memory idle\n")
    head = ("service", "start to name held", "start to first answer", "RSS", "PSS")
    print(table(head, rows))
    ours, peers = found[0], {one.title: one for one in found[1:]}
    if ours.start is None:
        return
    firewalld = peers["firewalld"].start
    target = f"under firewalld's {firewalld.median:.0f} ms" if firewalld else "under firewalld's"
    figures.add("start to name held", str(ours.start), target)
    figures.add("idle memory, RSS (PSS)", f"{ours.rss:.1f} MB ({ours.pss:.1f} MB)", "under 40 MB")


def of_deletes(found: tuple[Deleted, Deleted], figures: Figures) -> None:
    """Time and stall of a delete of 1 GiB, beside virsh's."""
    rows = [(one.who, str(one.calls), str(one.stalls)) for one in found]
    print("\nDelete of an overlay of 1 GiB\n\n" + table(("who", "time", "longest stall"), rows))
    ours, virsh = found
    figures.add("delete of 1 GiB, to virsh's", ratio(ours.calls, virsh.calls), "under 1.10")
    figures.add("stall at the pivot, to virsh's", ratio(ours.stalls, virsh.stalls), "")


def of_layers(found: Sequence[Measured], figures: Figures) -> None:
    """Frozen time by method, beside the storage's own command."""
    rows = [
        (
            one.method,
            *(str(Series.of_seconds(seconds)) for seconds in (one.agent, one.alone, one.frozen)),
            one.command,
        )
        for one in found
    ]
    head = ("method", "freeze and thaw alone", "the command alone", "frozen", "the command")
    print("\nFrozen for a snapshot below QEMU\n\n" + table(head, rows))
    for one in found:
        figure = f"frozen by {one.method}, beyond freeze, thaw and command alone"
        figures.add(figure, f"{one.beyond:+.1f} ms", "+25 ms")


def of_creates(alone: Series, beside: Series, figures: Figures) -> None:
    """Create on one guest, alone and beside another's commit."""
    rows = [("alone", str(alone)), ("while 1 GiB is committed on another", str(beside))]
    print("\nCreate on one guest\n\n" + table(("when", "time"), rows))
    figures.add("Create beside a commit, to alone", ratio(beside, alone), "about 1")


def of_snapshots(count: int, seen: Sequence[Seen], figures: Figures) -> None:
    """Stall, frozen time and call of each way, and the ratios of ours to the others'."""
    rows = [
        (
            one.way.who,
            one.way.by,
            str(Series.of_seconds(one.any_disk)),
            str(Series.of_seconds(one.that_disk)),
            str(one.frozen or "-"),
            str(one.call),
        )
        for one in seen
    ]
    head = ("who", "asked by", "longest stall, any disk", "of the disk taken", "frozen", "call")
    print("\nMedian (10th to 90th percentile)\n\n" + table(head, rows))

    stalls = {who: _stalls(seen, who) for who in ("snapd-vm", "virsh", "libvirt-dbus")}
    ours = stalls["snapd-vm"]
    figures.add(
        f"stall, 1 of {count} disk{'s'[: count - 1]}, to virsh's",
        ratio(ours, stalls["virsh"]),
        STALL_TARGETS[count],
    )
    figures.add(
        f"the same to libvirt-dbus's, 1 of {count}", ratio(ours, stalls["libvirt-dbus"]), ""
    )
    alone = next(one for one in seen if one.way.who == "freeze and thaw alone").call
    frozen = Series(tuple(ms for one in seen if one.frozen for ms in one.frozen.values))
    more = frozen.median - alone.median
    figures.add(f"frozen, beyond freeze and thaw alone, 1 of {count}", f"{more:+.1f} ms", "+15 ms")
    for by in ("plain client", "busctl"):
        calls = {one.way.who: one.call for one in seen if one.way.by == by}
        figures.add(
            f"call by {by}, 1 of {count}, to libvirt-dbus's with QUIESCE",
            ratio(calls["snapd-vm"], calls["libvirt-dbus"]),
            "1.00",
        )
        if "libvirt-dbus, each step" in calls:
            figures.add(
                f"call by {by}, 1 of {count}, to libvirt-dbus's, each step",
                ratio(calls["snapd-vm"], calls["libvirt-dbus, each step"]),
                "1.00",
            )


def _stalls(seen: Sequence[Seen], who: str) -> Series:
    return Series.of_seconds([s for one in seen if one.way.who == who for s in one.any_disk])
