"""A guest that is to stand still, where agent and hypervisor do what real ones do not on demand."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from snapd_vm.engine import freeze, stop
from snapd_vm.errors import HypervisorUnavailable
from snapd_vm.virt.agent import AgentRefused


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


@pytest.mark.parametrize("delay", [0.0, 1.5])
def test_the_limit_holds_whenever_they_stop(delay: float) -> None:
    slow, switched = Slow(delay), []

    def switch() -> None:
        switched.append(True)
        time.sleep(3)

    with pytest.raises(stop.StoodTooLong):
        stop.around(switch, slow, "uuid", 0.5, lambda step: None)
    assert slow.stopped_at is None
    assert slow.stood < 2
    # What stopped after it had been let run is not watched any more, so nothing is begun.
    assert bool(switched) is (delay == 0.0)


class Refusing:
    """An agent that freezes nothing, and thaws all the same."""

    def freeze(self, *_: Any) -> int:
        raise AgentRefused("a hook has failed")

    def thaw(self, *_: Any) -> int:
        return 0


@pytest.mark.parametrize("required", [True, False])
def test_what_may_have_been_stopped_is_told_although_nothing_is_frozen(required: bool) -> None:
    """As when libvirtd goes away before the vCPUs were let run again."""

    def switch() -> None:
        raise HypervisorUnavailable("libvirt is not connected.")

    agent: Any = Refusing()
    with pytest.raises(freeze.SwitchFailed) as failed:
        freeze.around(
            switch,
            agent,
            agent,
            None,
            required=required,
            freeze_timeout=1,
            frozen_limit=1,
            reach=lambda step: None,
        )
    assert (failed.value.held, failed.value.begun) == (False, not required)
