"""Starts processes that stay, through the run's nursery, and ends them.

A process is known by its pid and start time together: pids are used again, and the lab never ends a
process that it did not start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.lab.deadline import LabError, wait_until

SCRIPT = Path(__file__).with_name("nursery.py")


@dataclass(frozen=True)
class Process:
    """One process on this machine, for all time."""

    pid: int
    start: int
    name: str

    def alive(self) -> bool:
        """Whether it still runs. A zombie does not, once none of its threads does: until then what
        it had open is open, and what it had locked is locked.
        """
        stat = _stat(self.pid)
        return stat is not None and stat[1] == self.start and (stat[0] not in "ZX" or stat[2] > 1)

    def signal(self, number: int) -> None:
        """Send to the process and its group: each is the leader of a session of its own."""
        if self.alive():
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, start time and number of threads, from the fields behind the command's name, which may
    hold anything (proc(5)).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19]), int(fields[17])


def open_files(pid: int) -> list[str]:
    """What its descriptors lead to (proc(5), /proc/PID/fd); one may be closed meanwhile."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(entry))
    return found


def end(process: Process, timeout: float = 5) -> None:
    """Terminate, wait, kill, wait."""
    for number, patience in ((signal.SIGTERM, timeout), (signal.SIGKILL, 10.0)):
        process.signal(number)
        with suppress(LabError):
            wait_until("end", lambda: not process.alive(), patience)
            return
    raise LabError(f"{process.name} ({process.pid}) does not die")


class Ledger:
    """The file that names the processes a run has started, for whoever cleans up after it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def processes(self) -> list[Process]:
        """Those written down, living or not; none if the file is missing or was cut off."""
        try:
            return [Process(**entry) for entry in json.loads(self._path.read_text())]
        except (OSError, ValueError, TypeError):
            return []

    def add(self, process: Process) -> None:
        """Write one down; those that have ended are left out."""
        known = [old for old in self.processes() if old.alive()]
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps([asdict(entry) for entry in [*known, process]]))
        new.replace(self._path)

    def end_all(self) -> None:
        """End what still runs of them, the youngest first: services before the bus they are on."""
        for process in reversed(self.processes()):
            end(process)


class Nursery:
    """The run's nursery (see nursery.py), and the way to have it start a process."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._script = subprocess.Popen(
            [sys.executable, "-I", "-S", SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # the terminal's ^C is for the tests, which then end us
        )
        self._note(self._script.pid, "nursery")

    def start(
        self,
        name: str,
        argv: Sequence[str | Path],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = Path("/"),
    ) -> Process:
        """Start a service, its output appended to `log`, and write it down."""
        answer = self._ask(
            argv=[str(word) for word in argv],
            env={**os.environ, **(env or {})},
            cwd=str(cwd),
            log=str(log),
        )
        if "error" in answer:
            raise LabError(f"could not start {name}: {answer['error']}")
        return self._note(answer["pid"], name)

    def status(self, process: Process) -> int | None:
        """Its exit status, negative for a signal's number; None while it runs."""
        status: int | None = self._ask(pid=process.pid)["status"]
        return status

    def close(self, timeout: float = 15) -> None:
        """End all it has started, what those have left, and the nursery."""
        pipes = self._script.stdin, self._script.stdout
        for pipe in pipes:
            if pipe is not None:
                pipe.close()
        try:
            self._script.wait(timeout)
        except subprocess.TimeoutExpired as error:
            self._script.kill()
            self._script.wait()
            raise LabError("some process of the run does not die") from error

    def _note(self, pid: int, name: str) -> Process:
        stat = _stat(pid)
        # One that has ended already is told by its log; 0 is nobody's start time.
        process = Process(pid, stat[1] if stat else 0, name)
        self._ledger.add(process)
        return process

    def _ask(self, **request: Any) -> dict[str, Any]:
        with self._lock:
            assert self._script.stdin is not None
            assert self._script.stdout is not None
            try:
                self._script.stdin.write(json.dumps(request).encode() + b"\n")
                self._script.stdin.flush()
                answer: dict[str, Any] = json.loads(self._script.stdout.readline())
            except (OSError, ValueError) as error:
                raise LabError(f"the nursery has gone: {error}") from error
        return answer


def tail(log: Path, characters: int = 2000) -> str:
    """The end of a log, for the message of an error."""
    try:
        return log.read_text(errors="replace")[-characters:].strip()
    except OSError:
        return "(no log)"
