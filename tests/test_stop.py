"""Stopping the vCPUs where the hypervisor takes its time, which a real one does not on demand."""

from __future__ import annotations

import threading
import time

import pytest

from snapd_vm.engine import stop


class Slow:
    """A domain that stops only `delay` seconds after it was asked to."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._lock = threading.Lock()
        self.stopped_at: float | None = None
        self.stood = 0.0

    def suspend(self, uuid: str) -> None:
        time.sleep(self._delay)
        with self._lock:
            self.stopped_at = time.monotonic()

    def resume(self, uuid: str) -> bool:
        with self._lock:
            if self.stopped_at is None:
                return False
            self.stood = time.monotonic() - self.stopped_at
            self.stopped_at = None
            return True


@pytest.mark.parametrize("delay", [0.0, 0.4])
def test_the_limit_holds_whenever_they_stop(delay: float) -> None:
    slow, switched = Slow(delay), []

    def switch() -> None:
        switched.append(True)
        time.sleep(2)

    with pytest.raises(stop.StoodTooLong):
        stop.around(switch, slow, "uuid", 0.2, lambda step: None)
    assert slow.stopped_at is None
    assert slow.stood < 1
    # What stopped after it had been let run is not watched any more, so nothing is begun.
    assert bool(switched) is (delay == 0.0)
