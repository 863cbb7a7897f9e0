"""The daemon on libvirt's test driver, with a storage method that takes its time, and a window.

    python -m tests.real.many_domains_daemon --window SOCKET [--seconds SECONDS] --config FILE

The domains of a test:/// connection live in the process that has opened it, so what happens to them
must be caused in here: the window's `do` calls a method of a domain, or defines one, on the very
connection that the daemon uses, and answers with the moment before the call.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from snapd_vm import config, daemon, journald
from snapd_vm.config import Config
from snapd_vm.engine.journal import Journal
from snapd_vm.methods.method import Method, Record, Watch
from snapd_vm.model import Disk, Domain, MethodRequest, Needs, Tag, Target
from snapd_vm.virt.hypervisor import Hypervisor
from tests.real.window import open_window


class Slow:
    """A storage method for files of the test driver's domains; a snapshot takes `seconds`."""

    name = "slow"

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._taken: set[str] = set()

    def claim(
        self, domain: Domain, disk: Disk, request: MethodRequest | None, tag: Tag
    ) -> Target | None:
        if domain.driver != "test" or disk.type != "file":
            return None
        return Target(self.name, disk.target, {"path": disk.path})

    def source(self, target: Target, disk: Disk) -> tuple[Disk, str]:
        return disk, "raw"

    def size(self, target: Target) -> int:
        return 1 << 30

    def check(self, targets: Sequence[Target], tag: Tag) -> Needs:
        return Needs()

    def prepare(self, targets: Sequence[Target], tag: Tag, record: Record) -> Sequence[Target]:
        record(targets)
        return targets

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        time.sleep(self._seconds)
        self._taken.add(tag.uuid)

    redirects = False

    def together(self, targets: Sequence[Target]) -> bool:
        return False

    def suits(self, disk: Disk) -> str:
        return "any disk"

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        return tag.uuid in self._taken

    def undo(self, target: Target, tag: Tag, *, again: bool) -> bool:
        there = tag.uuid in self._taken
        self._taken.discard(tag.uuid)
        return there

    def check_delete(self, target: Target, tag: Tag) -> None:
        pass

    def delete(self, target: Target, tag: Tag, watch: Watch) -> None:
        self.undo(target, tag, again=False)

    def moved(self, deleted: Target, other: Target) -> Target | None:
        return None

    def state(self, target: Target, domains: Mapping[str, Domain]) -> str:
        return "ready"


def open_on(window: Path, hypervisor: Hypervisor) -> None:
    """Open the window, on the connection that this hypervisor uses."""

    def do(what: str, uuid: str) -> float:
        with hypervisor._pool.connection() as connection:
            domain = connection.lookupByUUIDString(uuid)
            before = time.monotonic()
            getattr(domain, what)()
            return before

    def define(xml: str) -> float:
        with hypervisor._pool.connection() as connection:
            before = time.monotonic()
            connection.defineXML(xml)
            return before

    open_window(window, {"do": do, "define": define})


def main() -> int:
    """Run it; the daemon's exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--window", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--config", type=Path, required=True)
    asked = parser.parse_args()

    def methods(settings: Config, hypervisor: Hypervisor) -> Mapping[str, Method]:
        open_on(asked.window, hypervisor)
        slow = Slow(asked.seconds)
        return {slow.name: slow, **daemon.built_in_methods(settings, hypervisor)}

    journald.set_up()
    settings = config.load(asked.config)
    journal = Journal(settings.state_dir)
    try:
        return asyncio.run(daemon.serve(settings, journal, methods))
    finally:
        journal.close()


if __name__ == "__main__":
    sys.exit(main())
