"""A window into a daemon that a test has started: questions in, answers out, over a unix socket.

One line of JSON each way. The daemon's end answers in a thread of its own.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Answer = Callable[..., Any]


def open_window(path: Path, answers: Mapping[str, Answer]) -> None:
    """In the daemon: answer each question `{"ask": NAME, …}` with `answers[NAME](…)`."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    os.chmod(path, 0o600)
    listener.listen()
    threading.Thread(target=_serve, args=(listener, answers), daemon=True, name="window").start()


def _serve(listener: socket.socket, answers: Mapping[str, Answer]) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rw") as lines, suppress(OSError):
            for line in lines:
                question = json.loads(line)
                try:
                    said = {"answer": answers[question.pop("ask")](**question)}
                except Exception as error:
                    said = {"error": repr(error)}
                lines.write(json.dumps(said) + "\n")
                lines.flush()


class Window:
    """In the test: asks. Times that come back are time.monotonic() of the same machine."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rw")

    def ask(self, name: str, **more: Any) -> Any:
        """The answer; raises AssertionError with what went wrong over there."""
        self._lines.write(json.dumps({"ask": name, **more}) + "\n")
        self._lines.flush()
        said = json.loads(self._lines.readline())
        assert "error" not in said, said["error"]
        return said["answer"]

    def close(self) -> None:
        """Let go of it."""
        self._lines.close()
        self._socket.close()
