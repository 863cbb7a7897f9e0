"""The daemon, started so that it stumbles where a test says; everything else is the real thing.

    python -m tests.real.faulty_daemon --at STEP --do FAULT [--stop-limit SECONDS] --config FILE

FAULT is kill, stop, raise, sleep:SECONDS, wait:FILE (which it makes, and waits for its removal),
raise-wait:FILE (and an error then) or, which is none, programs:FILE (each program that is started
from there to the end of the switch is a line of it). It comes the first time that an operation
reaches STEP, only in this life of the daemon. The stop limit is how long its end waits, in place of
a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from snapd_vm import config, daemon, journald
from snapd_vm.engine.journal import AnyStep, DeleteStep, Journal, RevertStep, Step
from snapd_vm.errors import StorageFailed

_STARTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn")


class Fault:
    """Calls for the fault once."""

    def __init__(self, step: str, do: str) -> None:
        self._step = step
        self._then_raise = do.startswith("raise-")
        self._do = do.removeprefix("raise-")
        self._done = False
        self._programs: Path | None = None

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook (sys.addaudithook): of whatever way to start a program."""
        programs = self._programs
        if programs is not None and event in _STARTS:
            with programs.open("a") as file:
                file.write(f"{' '.join(map(os.fsdecode, arguments[1]))}\n")

    def __call__(self, step: AnyStep) -> None:
        if step == Step.SWITCHED:
            self._programs = None
        if step != self._step or self._done:
            return
        self._done = True
        if self._do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._do == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self._do == "raise":
            raise StorageFailed("A fault was asked for.")
        elif self._do.startswith("programs:"):
            self._programs = Path(self._do.removeprefix("programs:"))
            self._programs.touch()
            sys.addaudithook(self._heard)
        elif self._do.startswith("sleep:"):
            time.sleep(float(self._do.removeprefix("sleep:")))
        elif self._do.startswith("wait:"):
            # Tell the test that the moment has come, and wait until it has done its worst.
            flag = Path(self._do.removeprefix("wait:"))
            flag.touch()
            deadline = time.monotonic() + 60
            while flag.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            if self._then_raise:
                raise StorageFailed("A fault was asked for.")


def main() -> int:
    """Run it; the daemon's exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--at", choices=[*Step, *DeleteStep, *RevertStep], required=True)
    parser.add_argument("--do", required=True)
    parser.add_argument("--stop-limit", type=float)
    parser.add_argument("--config", type=Path, required=True)
    asked = parser.parse_args()
    if asked.stop_limit is not None:
        daemon._STOP_LIMIT_S = asked.stop_limit
    journald.set_up()
    settings = config.load(asked.config)
    journal = Journal(settings.state_dir)
    try:
        status = asyncio.run(daemon.serve(settings, journal, reach=Fault(asked.at, asked.do)))
    finally:
        journal.close()
    daemon._leave_hung_threads(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
