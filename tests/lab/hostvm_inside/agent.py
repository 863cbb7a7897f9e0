"""Runs, in the host VM, what the tests outside ask for over a virtio-serial port.

JSON lines both ways. In: {"id", "argv", "env", "cwd", "timeout", "stdin"}, or {"id", "end": true}.
Out: {"id", "out"} and {"id", "err"} while it runs, each with a part of its output, and at last
{"id", "status"}, negative for a signal's number, None for one that was ended at its timeout; or
{"id", "error"} if it could not be started. One program at a time: a new request ends the one
before, and so does the other end when it goes away. Whatever is not text travels in base64.

It must import nothing of the lab.
"""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from typing import Any

PORT = "/dev/virtio-ports/org.example.lab.hostvm.0"
PART = 1 << 16


class Port:
    """The serial port, read without waiting; a write waits until somebody reads outside."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDWR)
        self._rest = b""

    def send(self, **message: Any) -> None:
        """One line, begun on a line of its own: whoever was cut off may have left half a one."""
        data = b"\n" + json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self.descriptor, data) :]

    def requests(self) -> list[dict[str, Any]] | None:
        """What has come; None when nobody is at the other end."""
        part = os.read(self.descriptor, 1 << 20)
        if not part:
            self._rest = b""
            return None
        *lines, self._rest = (self._rest + part).split(b"\n")
        found = []
        for line in lines:
            with suppress(ValueError):
                found.append(json.loads(line))
        return found


class Running:
    """A program that runs, in a session of its own."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.id = request["id"]
        self.end = time.monotonic() + request["timeout"]
        with tempfile.TemporaryFile() as stdin:
            stdin.write(base64.b64decode(request.get("stdin", "")))
            stdin.seek(0)
            self.child = subprocess.Popen(
                request["argv"],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=request.get("cwd", "/"),
                env={**os.environ, **request.get("env", {})},
                start_new_session=True,
            )
        assert self.child.stdout is not None
        assert self.child.stderr is not None
        self.ended = os.pidfd_open(self.child.pid)  # becomes readable
        self.pipes = {self.child.stdout.fileno(): "out", self.child.stderr.fileno(): "err"}

    def kill(self) -> None:
        """End it, and what it has started in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self.close()

    def close(self) -> None:
        """Let go of it."""
        os.close(self.ended)
        for pipe in (self.child.stdout, self.child.stderr):
            assert pipe is not None
            pipe.close()

    def pass_on(self, port: Port, pipe: int) -> None:
        """Send what has come from a pipe."""
        part = os.read(pipe, PART)
        if part:
            port.send(id=self.id, **{self.pipes[pipe]: base64.b64encode(part).decode()})
        else:
            del self.pipes[pipe]


def start(port: Port, request: dict[str, Any]) -> Running | None:
    """Start what was asked for."""
    try:
        return Running(request)
    except (OSError, ValueError, KeyError) as error:
        port.send(id=request.get("id"), error=str(error))
        return None


def turn(port: Port, running: Running | None) -> Running | None:
    """Wait for one thing to happen, do what it asks for, and say what runs then."""
    watched = [port.descriptor, *running.pipes, running.ended] if running else [port.descriptor]
    patience = max(running.end - time.monotonic(), 0) if running else None
    ready, _, _ = select.select(watched, [], [], patience)
    for pipe in ready:
        if running and pipe in running.pipes:
            running.pass_on(port, pipe)
    if port.descriptor in ready:
        requests = port.requests()
        if requests is None:
            time.sleep(0.5)  # there is no way to wait for somebody to come
        if running and requests != []:
            running.kill()
            running = None
        for request in requests or []:
            if running:
                running.kill()
            running = start(port, request) if "argv" in request else None
    if running is None:
        return None
    # It has ended when it has, though a service that it left behind may hold its output open.
    status = running.child.poll()
    if status is not None:
        for pipe in list(running.pipes):
            while pipe in running.pipes and select.select([pipe], [], [], 0)[0]:
                running.pass_on(port, pipe)
        running.close()
    elif time.monotonic() > running.end:
        running.kill()
    else:
        return running
    port.send(id=running.id, status=status)
    return None


def main() -> None:
    """Serve until the VM goes down."""
    port = Port(PORT)
    running = None
    while True:
        running = turn(port, running)


if __name__ == "__main__":
    main()
