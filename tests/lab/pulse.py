"""Listens to a guest's writers: one byte for each write that is done, by the host's clock.

Only this sees vCPUs that are stopped: the guest's own clock stops with them.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType


class Pulse:
    """`with guest.watch() as pulse: …`, then `pulse.longest_s`; one at a time for a guest."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: dict[int, float] = {}
        self._longest: dict[int, float] = {}
        self._started = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._listen, daemon=True, name="lab: pulse")

    @property
    def longest_s(self) -> float:
        """The longest time between two writes on a disk so far, or since the last."""
        now = time.monotonic()
        gaps = [now - last for last in list(self._last.values())]
        return max([*gaps, *list(self._longest.values())], default=0.0)

    def __enter__(self) -> Pulse:
        self._socket.connect(str(self._path))
        self._thread.start()
        self._started.wait(5)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()
        now = time.monotonic()
        for disk, last in self._last.items():
            self._longest[disk] = max(self._longest.get(disk, 0.0), now - last)
        self._last.clear()

    def _listen(self) -> None:
        with suppress(OSError):  # QEMU ended: nothing more to hear
            while disks := self._socket.recv(4096):
                now = time.monotonic()
                for disk in disks:
                    gap = now - self._last.get(disk, now)
                    self._longest[disk] = max(self._longest.get(disk, 0.0), gap)
                    self._last[disk] = now
                self._started.set()
