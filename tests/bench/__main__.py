"""`python -m tests.bench`: measures, prints, and asserts nothing. Needs root."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.bench import deletes, domains, layers, services, snapshots
from tests.bench.report import Figures, of_creates, of_deletes, of_layers, of_services, of_snapshots
from tests.bench.snapshots import Seen
from tests.bench.ways import LIBVIRT, TARGET, PlainCaller, all_ways
from tests.lab.deadline import LabError, wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.process import end

PARTS = ("services", "one", "two", "domains", "delete", "layers")
FRESH_EVERY = 5
"""Rounds after which our daemon starts anew: its old snapshots are undone behind its back here."""
QUIET = 0.5


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 if it could be measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of each way (default: 20)")
    parser.add_argument("--starts", type=int, default=10, help="of each service (default: 10)")
    parser.add_argument("--deletes", type=int, default=3, help="of 1 GiB each (default: 3)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="these parts only")
    parser.add_argument(
        "--methods",
        choices=layers.METHODS,
        nargs="+",
        default=layers.METHODS,
        help="of the layers, those of these methods only",
    )
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print(
            "The benchmark starts guests and services of its own: run it as root.", file=sys.stderr
        )
        return 1
    quiet = _say_how_quiet("before the start", QUIET)
    print(f"{platform.release()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    figures = Figures()
    try:
        with Lab() as lab, ExitStack() as stack:
            ours = services.install(lab)
            if "services" in options.only:
                found = services.services(lab, ours)
                services.measure(lab, found, options.starts)
                of_services(found, figures)
            if "domains" in options.only:
                figures.domains(domains.measure(lab, ours))
            if "delete" in options.only:
                of_deletes(deletes.measure(lab, ours, options.deletes), figures)
                of_creates(*deletes.measure_beside(lab, ours, options.deletes), figures)
            if "layers" in options.only:
                of_layers(layers.measure(lab, ours, options.rounds, options.methods), figures)
            if {"one", "two"} & set(options.only):
                dbus = lab.run.start(
                    "libvirt-dbus",
                    [*lab.libvirtd.inside(Path("/")), "/usr/sbin/libvirt-dbus", "--system"],
                    lab.run.folder / "libvirt-dbus.log",
                    env=lab.bus.env,
                )
                stack.callback(end, dbus)
                wait_until("libvirt-dbus has its name", lambda: lab.bus.owned(LIBVIRT), 20)
            for part, count in (("one", 1), ("two", 2)):
                if part in options.only:
                    seen = _snapshots(lab, ours, count, options.rounds)
                    of_snapshots(count, seen, figures)
    except LabError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print("\nFigures\n\n" + figures.table())
    if not quiet:
        print("\nThe machine was not quiet when this began: times are too long, ratios less so.")
    return 0


def _snapshots(lab: Lab, ours: Path, count: int, rounds: int) -> list[Seen]:
    disks = [DiskSpec() for _ in range(count)]
    guest = lab.guest(disks, name=f"bench{count}")
    began = time.monotonic()
    with ExitStack() as stack:
        ways = all_ways(lab, stack.callback)
        stack.callback(lab.daemon.stop)
        seen = snapshots.measure(guest, ways, rounds, lab.libvirtd.uri, _fresh(lab, ours, guest))
        rss, _ = services.memory(lab.daemon.pid)
    guest.remove()
    plural = "s"[: count - 1]
    print(
        f"\n{count} file system{plural} on {count} disk{plural}, {TARGET} taken: {rounds} rounds in"
        f" {time.monotonic() - began:.0f} s; our daemon has {rss:.0f} MB resident at the end"
    )
    _say_how_quiet("with the guest", QUIET + 1.5)
    return seen


def _fresh(lab: Lab, ours: Path, guest: Guest) -> Callable[[int], None]:
    """Starts our daemon anew now and then, without memory, and has it connected to all it needs."""

    def between(turn: int) -> None:
        if turn % FRESH_EVERY and lab.daemon.running:
            return
        lab.daemon.stop()
        shutil.rmtree(lab.daemon.state_dir, ignore_errors=True)
        lab.daemon.start({}, argv=(ours, "daemon"))
        caller = PlainCaller(lab.address)
        plan = [f"<disk><target dev='{TARGET}'/></disk>", "", "", 0]
        name = "org.example.DiskSnapshot"
        path = f"/org/example/DiskSnapshot/domain/_{guest.uuid.replace('-', '_')}"
        caller.call(name, path, f"{name}.Domain", "Plan", "sssu", plan)
        caller.close()

    return between


def _say_how_quiet(when: str, limit: float) -> bool:
    load = services.load()
    words = "quiet" if load <= limit else "NOT QUIET"
    print(f"load average {when}: {load:.2f} ({words})")
    return load <= limit


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
