"""Writes to the socket of the bus: at once if it takes it, else when it does.

In the place of dbus-next's writer, which takes a full socket (EAGAIN) for a broken one and drops
the connection: a client that floods us with calls would end the daemon.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable


class Writer:
    """Sends messages in order. `broken` is called once, with the error that ends the stream."""

    def __init__(self, sock: socket.socket, broken: Callable[[Exception], None]) -> None:
        self._sock = sock
        self._descriptor = sock.fileno()
        self._broken = broken
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[memoryview] = deque()
        self._registered = False
        self._stopped = False

    def write(self, message: bytes) -> None:
        """Sends a message, or keeps it until the bus takes it."""
        if not self._stopped:
            self._waiting.append(memoryview(message))
            if not self._registered:
                self._flush()

    def stop(self) -> None:
        """Sends nothing more."""
        self._stopped = True
        self._waiting.clear()
        self._unregister()

    def _flush(self) -> None:
        while self._waiting:
            rest = self._waiting[0]
            try:
                sent = self._sock.send(rest)
            except (BlockingIOError, InterruptedError):
                if not self._registered:
                    self._loop.add_writer(self._descriptor, self._flush)
                    self._registered = True
                return
            except OSError as error:
                self.stop()
                self._broken(error)
                return
            if sent < len(rest):
                self._waiting[0] = rest[sent:]
            else:
                self._waiting.popleft()
        self._unregister()

    def _unregister(self) -> None:
        if self._registered:
            self._loop.remove_writer(self._descriptor)
            self._registered = False
