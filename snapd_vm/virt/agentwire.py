"""One connection to a guest agent's socket: deadlines, the handshake, one command, one answer.

QEMU's guest agent protocol (docs/interop/qemu-ga.rst): one JSON object a line, one command at a
time, answers in the order of the commands. An answer does not say of which command it is, and what
an earlier client left behind, half a command or an unread answer, is still in the channel. So first
comes guest-sync-delimited: the byte 0xFF resets the agent's parser, its answer begins with 0xFF,
and all that comes before the answer with our number is old.

What comes from the guest is hostile: bounded, checked, and never repeated unprintable. Which
commands there are, and when a connection is kept, is not decided here.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress

from snapd_vm.model import Json
from snapd_vm.virt.agent import AgentGone, AgentRefused, AgentTimeout

MAX_ANSWER = 1 << 20
"""Longest answer that is read, in bytes."""

_SENTINEL = b"\xff"
_CONNECT_AGAIN_S = 0.02


class _BrokenError(Exception):
    """The connection can't be used any more."""


class Wire:
    """A connected socket; `deadline` (monotonic, seconds) bounds every wait."""

    def __init__(self, path: str, deadline: float) -> None:
        """Connects. Raises AgentGone."""
        self.deadline = deadline
        self._answered = False
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(path)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Hangs up."""
        self._socket.close()

    def hung_up(self) -> bool:
        """Whether the other end is known to have gone; does not wait."""
        return self._peek() == b""

    def in_step(self) -> bool:
        """Whether all that was asked has been answered, and nothing else has come since.

        A handshake would prove no more: it would only keep a frozen guest waiting.
        """
        return self._answered and not self._buffer and self._peek() is None

    def sync(self) -> None:
        """The handshake. After it the agent has worked off all that was sent before.

        Raises AgentGone: nothing was asked of the agent.
        """
        self._answered = False
        number = int.from_bytes(os.urandom(6)) + 1  # any JSON reader holds it exactly
        try:
            self._send("guest-sync-delimited", {"id": number}, before=_SENTINEL)
            while True:
                self._skip_past_sentinel()
                line = self._line().rpartition(_SENTINEL)[2]
                try:
                    answer = _decode(line)
                except ValueError:
                    continue
                if isinstance(answer, dict) and answer.get("return") == number:
                    self._answered = True
                    return
        except TimeoutError:
            raise AgentGone("the agent does not answer the handshake in time") from None
        except _BrokenError as error:
            raise AgentGone(str(error)) from None

    def call(self, command: str, arguments: Mapping[str, Json] | None = None) -> Json:
        """Sends a command, while in step with the agent, and returns what it returned.

        Raises AgentTimeout, and AgentRefused with the agent's words or where there is no making
        sense of them.
        """
        self._answered = False
        try:
            self._send(command, arguments)
            line = b""
            while not line.strip():
                line = self._line()
        except TimeoutError:
            raise AgentTimeout(f"the agent does not answer {command} in time") from None
        except _TooLongError:
            raise AgentRefused(f"the agent's answer to {command} is too long") from None
        except _BrokenError as error:
            raise AgentTimeout(f"{error}, before it answered {command}") from None
        try:
            answer = _decode(line)
        except ValueError:
            raise AgentRefused(f"the agent's answer to {command} can't be read") from None
        self._answered = True
        if isinstance(answer, dict):
            if "error" in answer:
                failure = answer["error"]
                raise AgentRefused(
                    _printable(failure.get("desc") if isinstance(failure, dict) else "")
                )
            if "return" in answer:
                return answer["return"]
        raise AgentRefused(f"the agent's answer to {command} is neither a result nor an error")

    def _peek(self) -> bytes | None:
        """The next byte that has come, b'' after the end, None where there is none yet."""
        try:
            self._socket.settimeout(0)
            return self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _connect(self, path: str) -> None:
        try:
            while True:
                self._socket.settimeout(self._left())
                with suppress(BlockingIOError):  # the backlog is full: one is served, others wait
                    self._socket.connect(path)
                    return
                time.sleep(min(_CONNECT_AGAIN_S, self._left()))
        except TimeoutError:
            raise AgentGone("the agent's channel is in use by another client") from None
        except OSError as error:
            reason = error.strerror or error  # without a number where Python itself refuses
            raise AgentGone(f"the agent's channel can't be opened: {reason}") from None
        except UnicodeEncodeError:
            raise AgentGone("the agent's channel can't be opened: its path is none") from None

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _send(
        self, command: str, arguments: Mapping[str, Json] | None, before: bytes = b""
    ) -> None:
        message: dict[str, Json] = {"execute": command}
        if arguments:
            message["arguments"] = dict(arguments)
        try:
            self._socket.settimeout(self._left())
            self._socket.sendall(before + json.dumps(message).encode() + b"\n")
        except TimeoutError:
            raise
        except OSError:
            raise _BrokenError("the agent's channel was closed") from None

    def _receive(self) -> bytes:
        try:
            self._socket.settimeout(self._left())
            data = self._socket.recv(65536)
        except TimeoutError:
            raise
        except OSError:
            data = b""
        if not data:
            raise _BrokenError("the agent's channel was closed")
        return data

    def _skip_past_sentinel(self) -> None:
        while True:
            _, found, rest = self._buffer.partition(_SENTINEL)
            self._buffer = bytearray(rest)
            if found:
                return
            self._buffer += self._receive()

    def _line(self) -> bytes:
        """The next line, without its end."""
        searched = 0
        while True:
            end = self._buffer.find(b"\n", searched)
            if end > MAX_ANSWER or (end == -1 and len(self._buffer) > MAX_ANSWER):
                raise _TooLongError("the agent sends no end of line")
            if end != -1:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                return line
            searched = len(self._buffer)
            self._buffer += self._receive()


class _TooLongError(_BrokenError):
    """A line of more than MAX_ANSWER bytes."""


def _decode(line: bytes) -> Json:
    """JSON in which no key comes twice. Raises ValueError."""

    def once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key comes twice")
        return found

    try:
        value: Json = json.loads(line.decode(), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def _printable(text: Json) -> str:
    if not isinstance(text, str) or not text:
        return "the agent refused and gave no reason"
    return "".join(c if c.isprintable() else "?" for c in text[:200])
