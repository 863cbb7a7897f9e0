"""Says what failed in the lab, and waits for things with an end to the waiting.

It must not know what is waited for: every other file of the lab imports it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# Where all takes longer, as in a host VM or beside other tests, every wait of the lab may last so
# many times as long.
SLOWNESS = float(os.environ.get("SNAPD_VM_LAB_SLOWNESS", "1"))


class LabError(Exception):
    """The lab itself could not do something; the software under test is not to blame."""


def wait_until(what: str, probe: Callable[[], T | None], timeout: float, pause: float = 0.02) -> T:
    """Ask `probe` until its answer is true, and hand that back.

    Looking at the world again and again is the only way that needs no trust in the events of the
    thing under test; a fixed sleep would be both too long and, on a busy machine, too short.
    """
    timeout *= SLOWNESS
    end = time.monotonic() + timeout
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > end:
            raise LabError(f"waited {timeout:g} s in vain: {what}")
        time.sleep(pause)


def bounded(what: str, call: Callable[[], T], timeout: float) -> T:
    """Run a call that may block for ever (libvirt's do when libvirtd hangs), but wait only so long.

    The thread of a call that does not come back is left behind: there is no way to stop it, and it
    is a daemon thread, so that it does not keep the test run alive.
    """
    timeout *= SLOWNESS
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:  # handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name=f"lab: {what}")
    thread.start()
    thread.join(timeout)
    if errors:
        raise errors[0]
    if not answers:
        raise LabError(f"no answer in {timeout:g} s: {what}")
    return answers[0]
