"""The timer that lets a guest go: nothing of ours that hangs keeps it standing still."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from snapd_vm.journald import MessageId, fields

log = logging.getLogger(__name__)

_PAUSE_S = 1.0


class Rescue:
    """Releases a guest after a time, from a thread of its own, until it is told to end.

    The thread is there before the guest is held, as it could fail to start after it. `release` says
    whether the guest is free for certain; until then it is called again. `fired`: it was called, or
    is about to be; `freed_at`: when the guest was free by it (time.monotonic), or None.
    """

    def __init__(self, seconds: float, release: Callable[[], bool]) -> None:
        self.fired = False
        self.freed_at: float | None = None
        self._seconds = seconds
        self._release = release
        self._begun = threading.Event()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="rescue", daemon=True).start()

    def begin(self) -> None:
        """The guest stands still, or may."""
        self._begun.set()

    def end(self) -> None:
        """Somebody else sees to the release from here."""
        self._ended.set()
        self._begun.set()

    def _watch(self) -> None:
        self._begun.wait()
        if self._ended.wait(self._seconds):
            return
        self.fired = True
        log.critical(
            "a guest has stood still for %g s; releasing it",
            self._seconds,
            extra=fields(MessageId.FROZEN_TOO_LONG),
        )
        while not self._release():
            if self._ended.wait(_PAUSE_S):
                return
        self.freed_at = time.monotonic()
