"""Speaks with guestd inside a guest, over a serial port of the guest's that is a unix socket here.

One line each way: `ID COMMAND ARGUMENTS`, `ID ok JSON` or `ID error REASON`. Answers may come in
another order than the questions: a command that waits for a frozen disk does not hold up others.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.lab.deadline import SLOWNESS, LabError


class NoAnswerError(LabError):
    """The guest did not answer in time: it is not there, or what was asked waits in it."""


class Control:
    """The host's end of the control port; safe to use from several threads, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._rest = b""

    def ask(self, *words: str, timeout: float = 10) -> dict[str, Any]:
        """Send a command, and hand back what the guest answers to it."""
        timeout *= SLOWNESS
        with self._lock:
            end = time.monotonic() + timeout
            number = str(next(self._ids))
            try:
                self._send(" ".join([number, *words]).encode() + b"\n", timeout)
                while True:
                    line = self._line(end)
                    known, _, rest = line.partition(" ")
                    if known == number:  # others are late answers, which nobody waits for any more
                        break
            except OSError as error:
                self._drop()
                raise NoAnswerError(f"the guest does not answer {words}: {error!r}") from error
        kind, _, body = rest.partition(" ")
        if kind != "ok":
            raise LabError(f"the guest could not {' '.join(words)}: {body}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def send(self, line: str) -> None:
        """Send what is not answered."""
        with self._lock:
            try:
                self._send(line.encode() + b"\n", 10 * SLOWNESS)
            except OSError as error:
                self._drop()
                raise NoAnswerError(f"the guest can't be told {line!r}: {error!r}") from error

    def close(self) -> None:
        """Hang up; the next command connects again."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.close()
        self._socket, self._rest = None, b""

    def _send(self, line: bytes, timeout: float) -> None:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(timeout)
            self._socket.connect(str(self.path))
        self._socket.settimeout(timeout)
        self._socket.sendall(line)

    def _line(self, end: float) -> str:
        assert self._socket is not None
        while b"\n" not in self._rest:
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            part = self._socket.recv(65536)
            if not part:
                raise ConnectionResetError("QEMU hung up")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")
