"""Runs the software under test: the daemon, on the lab's bus, configured by the test."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.lab.bus import NAME, Bus
from tests.lab.deadline import LabError, wait_until
from tests.lab.libvirtd import Libvirtd
from tests.lab.process import Process, end, tail
from tests.lab.program import CHECKOUT
from tests.lab.run import Run

DAEMON = (sys.executable, "-m", "snapd_vm", "daemon")
LIMITS = {"snapshot_limit": 1000, "chain_limit": 200}
"""Tests that share a guest make more snapshots of it than anybody should."""


def toml(values: Mapping[str, Any], prefix: str = "") -> str:
    """Write a TOML document: plain values of a table first, then the tables in it."""
    lines = []
    for key, value in values.items():
        if not _tables(value):
            # JSON's strings, numbers, true, false and lists of them are TOML's as well
            lines.append(f"{json.dumps(key)} = {json.dumps(value)}")
    for key, value in values.items():
        name = f"{prefix}{json.dumps(key)}"
        header = f"[{name}]" if isinstance(value, Mapping) else f"[[{name}]]"
        for table in _tables(value):
            lines += [header, toml(table, f"{name}.")]
    return "\n".join(lines) + "\n"


def _tables(value: Any) -> Sequence[Mapping[str, Any]]:
    """The table, or the tables of a list, that it is; none for a plain value."""
    if isinstance(value, Mapping):
        return [value]
    listed = isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value)
    return value if listed else []


class Daemon:
    """`snapd-vm daemon`, not running until `start()`."""

    def __init__(self, run: Run, bus: Bus, libvirtd: Libvirtd) -> None:
        self._run = run
        self._bus = bus
        self._libvirtd = libvirtd
        self._process: Process | None = None
        self.state_dir = run.folder / "daemon"
        self.config_file = run.folder / "snapd-vm.toml"
        self.log_file = run.folder / "daemon.log"
        self._begin = 0  # of this life's part of the log
        self.config: dict[str, Any] = {}
        self.argv: Sequence[str | Path] = DAEMON
        self.env: Mapping[str, str] = {}

    @property
    def pid(self) -> int:
        """The pid of the running daemon."""
        if self._process is None or not self.running:
            raise LabError("the daemon does not run")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.alive()

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal's number; None while it runs."""
        if self._process is None or self._run.nursery is None:
            raise LabError("the daemon was not started")
        nursery, process = self._run.nursery, self._process
        if process.alive():
            return None
        wait_until("the daemon's exit status", lambda: nursery.status(process) is not None, 5)
        return nursery.status(process)

    @property
    def log_of_this_life(self) -> str:
        """What it has written since it was last started."""
        return self.log_file.read_bytes()[self._begin :].decode(errors="replace")

    @property
    def log(self) -> str:
        """All it has written to stderr (and stdout) so far, in all its lives."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def start(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        argv: Sequence[str | Path] | None = None,
        env: Mapping[str, str] | None = None,
        wait: float = 30,
    ) -> None:
        """Start it, and wait until it owns its name; `wait=0` does not wait.

        `config` holds what differs from the lab's own (uri, state_dir, LIMITS), tables as dicts;
        `argv`, to which `--config FILE` is added, is another way to start it. With none of them it
        starts as it did the last time.
        """
        if self.running:
            raise LabError("the daemon runs already")
        if config is not None or argv is not None or env is not None:
            self.config, self.argv, self.env = dict(config or {}), argv or DAEMON, env or {}
        own = {"uri": self._libvirtd.uri, "state_dir": str(self.state_dir), **LIMITS}
        whole = {**own, **self.config}
        self.config_file.write_text(toml(whole))
        self._begin = self.log_file.stat().st_size if self.log_file.exists() else 0
        self._process = self._run.start(
            "daemon",
            [*self._libvirtd.inside(CHECKOUT), *self.argv, "--config", self.config_file],
            self.log_file,
            env={"PYTHONUNBUFFERED": "1", **self._bus.env, **self.env},
            cwd=CHECKOUT,
        )
        if wait:
            self.wait_ready(wait)

    def wait_ready(self, timeout: float = 30) -> None:
        """Wait until it owns its name on the bus."""

        def ready() -> bool:
            if not self.running:
                raise LabError(f"the daemon ended:\n{tail(self.log_file, 4000)}")
            return self._bus.owned(NAME)

        wait_until("the daemon owns its name", ready, timeout, 0.05)

    def stop(self, timeout: float = 30) -> None:
        """SIGTERM, and wait for the end; being still there after `timeout` is an error."""
        process = self._process
        if process is None or not process.alive():
            return
        process.signal(signal.SIGTERM)
        try:
            wait_until("the daemon ends after SIGTERM", lambda: not process.alive(), timeout)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.signal(signal.SIGKILL)
            end(self._process)
            # or the next start could take the name of the one before for its own
            wait_until("the daemon is off the bus", lambda: not self._bus.owned(NAME), 5)

    def restart(self) -> None:
        """Stop, and start as before."""
        self.stop()
        self.start()
