"""The daemon, with a record of when each operation was open in its journal, and a window.

    python -m tests.real.observed_daemon --record FILE --window SOCKET --config FILE

The record has a line of JSON for each `begin` and `end`, written before the journal's begin and
after its end: whatever happens between the two happens under the domain's lock. The window answers
`tasks`: how many asyncio tasks there are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snapd_vm import config, daemon, journald
from snapd_vm.engine.journal import Journal, Operation
from snapd_vm.model import Snapshot
from tests.real.window import open_window


class RecordedJournal(Journal):
    """The journal, telling when."""

    def __init__(self, folder: Path, record: Path) -> None:
        super().__init__(folder)
        self._record = record.open("a")
        self._writing = threading.Lock()

    def begin(self, operation: Operation) -> None:
        self._note("begin", operation)
        super().begin(operation)

    def end(self, operation: Operation, snapshots: Sequence[Snapshot], release: bool) -> None:
        super().end(operation, snapshots, release)
        self._note("end", operation)

    def _note(self, what: str, operation: Operation) -> None:
        tag = operation.tag
        row: dict[str, Any] = {"what": what, "at": time.monotonic()}
        row |= {"operation": tag.uuid, "domain": tag.domain_uuid}
        with self._writing:
            self._record.write(json.dumps(row) + "\n")
            self._record.flush()


async def serve(asked: argparse.Namespace, settings: config.Config, journal: Journal) -> int:
    """Open the window, and be the daemon."""
    loop = asyncio.get_running_loop()
    open_window(asked.window, {"tasks": lambda: len(asyncio.all_tasks(loop))})
    return await daemon.serve(settings, journal)


def main() -> int:
    """Run it; the daemon's exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--window", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    asked = parser.parse_args()
    journald.set_up()
    settings = config.load(asked.config)
    journal = RecordedJournal(settings.state_dir, asked.record)
    try:
        return asyncio.run(serve(asked, settings, journal))
    finally:
        journal.close()


if __name__ == "__main__":
    sys.exit(main())
