"""A guest agent to order: keeps the protocol, and breaks it where a test says so."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCKED = "Command {} has been disabled"
IN_FROZEN = BLOCKED + ": the agent is in frozen state"
IN_FROZEN_STATE = {
    *("guest-ping", "guest-sync-delimited", "guest-fsfreeze-status", "guest-fsfreeze-thaw"),
}

Answer = bytes | None | Callable[["FakeAgent"], bytes | None]


def result(value: Any) -> bytes:
    return json.dumps({"return": value}).encode() + b"\n"


def refusal(text: str) -> bytes:
    return json.dumps({"error": {"class": "GenericError", "desc": text}}).encode() + b"\n"


class FakeAgent:
    """Serves one client at a time on `path`, in a thread of its own, while it is entered.

    `answers` replaces what a command is answered with, word for word; None says nothing at all.
    `greeting` is sent to each client unasked, and `flood` sends on without end. `slowly` sends byte
    by byte, `pause` seconds apart. `received` are the commands in the order they were read in.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.frozen = False
        self.can_freeze = True
        self.answers: dict[str, Answer] = {}
        self.greeting = b""
        self.flood = False
        self.before_sync = b""
        self.slowly = False
        self.pause = 0.0
        self.received: list[str] = []
        self.mountpoints: list[list[str] | None] = []
        self.clients = 0
        self.hold = threading.Event()
        self.hold.set()
        self._stop, self._stopped = socket.socketpair()

    def __enter__(self) -> FakeAgent:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        self._stop.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listener.close()
        self._stopped.close()

    def _readable(self, one: socket.socket) -> bool:
        """Waits; False when the fake is to stop."""
        ready, _, _ = select.select([one, self._stopped], [], [])
        return self._stopped not in ready

    def _serve(self) -> None:
        while self._readable(self._listener):
            client, _ = self._listener.accept()
            self.clients += 1
            with client:
                try:
                    self._talk(client)
                except OSError:
                    continue  # the client has gone

    def _talk(self, client: socket.socket) -> None:
        self._send(client, self.greeting)
        while self.flood:  # until the client has gone
            client.sendall(b"x" * 65536)
        buffer = b""
        while self._readable(client):
            data = client.recv(65536)
            if not data:
                return
            buffer += data
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                self.hold.wait()
                if not self._obey(client, line):
                    return

    def _obey(self, client: socket.socket, line: bytes) -> bool:
        """Answers one line; False: hang up."""
        broken, reset, line = line.rpartition(b"\xff")
        if broken or reset:
            self._send(client, refusal("JSON parse error, stray 'x'"))
        message = json.loads(line)
        command = message["execute"]
        self.received.append(command)
        answer = self.answers.get(command, b"")
        if callable(answer):
            answer = answer(self)
        if answer is None:
            return True
        if answer == b"HANG UP":
            return False
        self._send(client, answer or self._own_answer(command, message.get("arguments", {})))
        return True

    def _own_answer(self, command: str, arguments: dict[str, Any]) -> bytes:
        if self.frozen and command not in IN_FROZEN_STATE:
            return refusal(IN_FROZEN.format(command))
        match command:
            case "guest-sync-delimited":
                return self.before_sync + b"\xff" + result(arguments["id"])
            case "guest-ping":
                return result({})
            case "guest-fsfreeze-status":
                return result("frozen" if self.frozen else "thawed")
            case "guest-fsfreeze-freeze" | "guest-fsfreeze-freeze-list":
                if not self.can_freeze:
                    return refusal(BLOCKED.format(command))
                self.frozen = True
                self.mountpoints.append(arguments.get("mountpoints"))
                return result(2)
            case "guest-fsfreeze-thaw":
                was, self.frozen = self.frozen, False
                return result(2 if was else 0)
            case "guest-get-fsinfo":
                return result([{"name": "vda", "mountpoint": "/", "type": "ext4", "disk": []}])
        return refusal(f"The command {command} has not been found")

    def _send(self, client: socket.socket, data: bytes) -> None:
        if not self.slowly:
            client.sendall(data)
            return
        for i in range(len(data)):
            client.sendall(data[i : i + 1])
            if self.pause:
                select.select([self._stopped], [], [], self.pause)
