"""Speaks with the agent in the host VM (hostvm_inside/agent.py), which runs programs there."""

from __future__ import annotations

import base64
import json
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.lab.deadline import LabError

Output = Callable[[str, bytes], None]
"""Is called with "out" or "err" and a part of the output."""
GRACE_S = 15
"""What the agent may take longer than the program's limit before the VM counts as hung."""


class HungError(LabError):
    """The VM, or the agent in it, is past answering."""


def quiet(_stream: str, _part: bytes) -> None:
    """Nobody watches the output."""


class Port:
    """The outer end of the serial port; one program at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket: socket.socket | None = None
        self._rest = b""

    def answers(self, timeout: float = 2) -> bool:
        """Whether the agent is there."""
        try:
            return not self._run(["true"], {}, "/", timeout, b"", quiet, grace=0).returncode
        except (OSError, LabError):
            self.close()
            return False

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str,
        timeout: float,
        stdin: bytes = b"",
        output: Output = quiet,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the VM to its end; HungError if it does not answer."""
        try:
            return self._run(argv, env, cwd, timeout, stdin, output, grace=GRACE_S)
        except OSError as error:
            self.close()
            raise HungError(f"the host VM does not answer: {error}") from error

    def close(self) -> None:
        """Let go of it; what runs there is ended."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self._rest = None, b""

    def _run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        timeout: float,
        stdin: bytes,
        output: Output,
        *,
        grace: float,
    ) -> subprocess.CompletedProcess[str]:
        end = time.monotonic() + timeout + grace
        number = secrets.token_hex(4)
        whole: dict[str, bytearray] = {"out": bytearray(), "err": bytearray()}
        request = {"argv": list(argv), "env": dict(env), "cwd": cwd, "timeout": timeout}
        self._send({"id": number, **request, "stdin": base64.b64encode(stdin).decode()}, end)
        while "status" not in (message := self._message(end)) or message["id"] != number:
            if message.get("id") != number:  # of a program that was ended
                continue
            if "error" in message:
                raise LabError(f"could not run {argv[0]} in the VM: {message['error']}")
            for stream in whole.keys() & message:
                part = base64.b64decode(message[stream])
                whole[stream] += part
                output(stream, part)
        out, err = (bytes(whole[stream]).decode(errors="replace") for stream in ("out", "err"))
        if message["status"] is None:
            raise LabError(f"{' '.join(argv)}: not done after {timeout:g} s: {(out + err)[-4000:]}")
        return subprocess.CompletedProcess(list(argv), message["status"], out, err)

    def _send(self, request: dict[str, Any], end: float) -> None:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(5)
            self._socket.connect(str(self.path))
        self._socket.settimeout(max(end - time.monotonic(), 0.01))
        # On a line of its own, whatever was cut off before it.
        self._socket.sendall(b"\n" + json.dumps(request).encode() + b"\n")

    def _message(self, end: float) -> dict[str, Any]:
        """The next line that is whole: the first may be the rest of one for somebody before us."""
        assert self._socket is not None
        while True:
            while b"\n" not in self._rest:
                self._socket.settimeout(max(end - time.monotonic(), 0.01))
                part = self._socket.recv(1 << 20)
                if not part:
                    raise ConnectionResetError("it closed the port")
                self._rest += part
            line, _, self._rest = self._rest.partition(b"\n")
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if isinstance(message, dict):
                return message
