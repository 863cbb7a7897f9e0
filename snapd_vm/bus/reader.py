"""Reads the socket of the bus and hands out whole messages, a turn at a time.

A turn is bounded, so that a flood of messages from one client does not keep the rest of the loop
(timers, the watchdog, other callers) waiting. Knows nothing of what the messages mean.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from snapd_vm.bus.wire import Frames, Incoming, StreamBroken

log = logging.getLogger(__name__)

CHUNK = 256 * 1024
TURN_S = 0.005


class Reader:
    """Calls `take` with every message and `broken` once, with the error that ends the stream.

    The owner registers `readable` with the loop; while messages wait for their turn the socket is
    not read, so that the bus holds back what comes next.
    """

    def __init__(
        self,
        sock: socket.socket,
        take: Callable[[Incoming], None],
        broken: Callable[[Exception], None],
    ) -> None:
        self._sock = sock
        self._descriptor = sock.fileno()
        self._take = take
        self._broken = broken
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        self._paused = False
        self._stopped = False

    def readable(self) -> None:
        """Reads what there is and works off what is whole."""
        try:
            data = self._sock.recv(CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(error)
            return
        if not data:
            self._break(EOFError("the bus closed the connection"))
            return
        self._frames.feed(data)
        self._work()

    def stop(self) -> None:
        """Hands out nothing more; the owner has closed, or is about to."""
        self._stopped = True

    def _work(self) -> None:
        until = self._loop.time() + TURN_S
        while not self._stopped:
            try:
                message = self._frames.next()
            except StreamBroken as error:
                self._break(error)
                return
            if message is None:
                break
            try:
                self._take(message)
            except Exception:
                log.exception("a message could not be handled")
            if self._loop.time() >= until:
                self._pause()
                return
        if self._paused and not self._stopped:
            self._loop.add_reader(self._descriptor, self.readable)
            self._paused = False

    def _pause(self) -> None:
        if not self._paused:
            self._loop.remove_reader(self._descriptor)
            self._paused = True
        self._loop.call_soon(self._work)

    def _break(self, error: Exception) -> None:
        self._stopped = True
        self._broken(error)
