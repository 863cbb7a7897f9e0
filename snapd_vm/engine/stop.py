"""Stops a guest's vCPUs around a switch, and lets them run again whatever happens.

For disks that are taken one after the other, and for images that QEMU buffers: it flushes what it
has in buffers of its own when it stops (virDomainSuspend, QMP `stop`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from snapd_vm.engine.journal import Step
from snapd_vm.engine.rescue import Rescue
from snapd_vm.errors import Busy, NoSuchDomain, SnapdError, TimedOut

log = logging.getLogger(__name__)


class Hypervisor(Protocol):
    """What is needed of it here; blocking, raises SnapdErrors."""

    def suspend(self, uuid: str) -> None: ...
    def resume(self, uuid: str) -> bool: ...


class StoodTooLong(TimedOut):
    """The vCPUs ran again before the switch had ended."""

    dbus_name = TimedOut.dbus_name


def around(
    switch: Callable[[], None],
    hypervisor: Hypervisor,
    uuid: str,
    limit: float,
    reach: Callable[[Step], None],
) -> None:
    """Stop the vCPUs of a running domain, call `switch`, let them run.

    Raises what `switch` raises, and StoodTooLong where it took longer than `limit` seconds: the
    vCPUs then ran again before it had ended; Busy where they did because of somebody else. What
    could not be resumed raises too; whoever called sees to it from there.
    """
    rescue = Rescue(limit, lambda: _resumed(hypervisor, uuid))
    try:
        rescue.begin()  # a suspend that fails late may have stopped them
        try:
            hypervisor.suspend(uuid)
            reach(Step.STOPPED)
            if not rescue.fired:  # else they stopped after they were let run, and nobody watches
                switch()
        finally:
            stood = hypervisor.resume(uuid)
    finally:
        rescue.end()
    if rescue.fired:
        raise StoodTooLong(
            "The domain stood still for too long and was resumed meanwhile; try again."
        )
    if not stood:
        raise Busy("The domain was resumed by somebody else meanwhile; try again.")


def _resumed(hypervisor: Hypervisor, uuid: str) -> bool:
    try:
        hypervisor.resume(uuid)
    except NoSuchDomain:
        return True
    except SnapdError as error:
        log.error("the domain was not resumed, and it is tried again: %s", error)
        return False
    return True
