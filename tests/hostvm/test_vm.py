"""The host VM itself: one that hangs costs its tests one wait, and not one each."""

from __future__ import annotations

import signal
import time

import pytest

from tests.lab.deadline import LabError
from tests.lab.hostvm import HostVm


def test_one_that_hangs_is_powered_off_and_told_at_once_from_then_on(vm: HostVm) -> None:
    vm.signal(signal.SIGSTOP)
    with pytest.raises(LabError, match="does not answer"):
        vm.run(["true"], timeout=1)
    began = time.monotonic()
    with pytest.raises(LabError, match="does not run"):
        vm.check("true")
    assert time.monotonic() - began < 1
    vm.start()
    vm.check("true")
