"""Freezes a guest's file systems around a switch, and thaws them whatever happens.

Blocking, for a worker thread. Freeze, switch and thaw are called from one thread without a turn of
the event loop in between, as the guest stands still meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from snapd_vm.engine.journal import Step
from snapd_vm.errors import (
    AgentUnavailable,
    Busy,
    QuiesceFailed,
    QuiesceTimedOut,
    SnapdError,
)
from snapd_vm.virt.agent import Agent, AgentGone, AgentRefused, AgentTimeout

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Frozen:
    """What came of it. `frozen_us`: from sending the freeze to the thaw's answer, in µs.

    `error` is what a caller who requires quiescing is told, or None where the guest was frozen all
    through the switch and thawed. `held`: the guest may be frozen still.
    """

    filesystems: int = 0
    frozen_us: int = 0
    error: SnapdError | None = None
    held: bool = False

    @property
    def quiesced(self) -> bool:
        """Whether the agent froze at least one file system, and thawed all that it froze."""
        return self.filesystems > 0 and self.error is None


def survey(agent: Agent, disks: Sequence[str], timeout: float) -> Sequence[str] | None:
    """The mount points on `disks` (targets), or None to freeze all as the agent can't say.

    It is the ping as well: an agent that does not answer within `timeout` seconds is not there.
    Raises AgentUnavailable, Busy where the guest is frozen already, and QuiesceFailed where no file
    system is mounted on those disks.
    """
    try:
        found = agent.fsinfo(timeout)
    except (AgentGone, AgentTimeout) as error:
        raise AgentUnavailable(f"The guest agent does not answer: {error}.") from error
    except AgentRefused as error:
        if error.frozen_already:
            raise Busy(
                "The guest's file systems are frozen already, by another program; thaw them first."
            ) from error
        log.info("the agent can't say which disks its file systems are on: %s", error)
        return None
    if any(filesystem.targets is None for filesystem in found):
        return None
    wanted = set(disks)
    mountpoints = [f.mountpoint for f in found if wanted.intersection(f.targets or ())]
    if not mountpoints:
        raise QuiesceFailed("The guest has no file system mounted on the disk, so none to freeze.")
    return mountpoints


def around(
    switch: Callable[[], None],
    agent: Agent,
    rescuer: Agent,
    mountpoints: Sequence[str] | None,
    *,
    required: bool,
    freeze_timeout: float,
    frozen_limit: float,
    reach: Callable[[Step], None],
) -> Frozen:
    """Freeze, call `switch`, thaw. Times in seconds.

    With `required`, a freeze that failed raises (QuiesceFailed, QuiesceTimedOut) before the switch;
    else the switch goes on without. Raises Busy, without a thaw, where somebody else froze the
    guest. An error of `switch` is raised after the thaw, as SwitchFailed, which says if the guest
    is held. A timer in a thread of its own thaws by way of `rescuer` at `frozen_limit`.
    """
    started = time.monotonic()
    try:
        count = agent.freeze(mountpoints, freeze_timeout)
    except AgentTimeout as error:
        # It may freeze later still: whoever called goes on thawing until the agent answers.
        failure: SnapdError = QuiesceTimedOut(
            f"The guest agent did not freeze within {freeze_timeout:g} s: {error}."
        )
        return _unfrozen(switch, failure, held=True, required=required, reach=reach)
    except (AgentRefused, AgentGone) as error:
        if isinstance(error, AgentRefused) and error.frozen_already:
            raise Busy(
                "The guest's file systems are frozen already, by another program; thaw them first."
            ) from error
        failure = QuiesceFailed(f"The guest agent could not freeze: {error}.")
        held = not _thaw(agent, freeze_timeout)[1]  # some may be frozen although it failed
        return _unfrozen(switch, failure, held=held, required=required, reach=reach)
    except SnapdError as error:  # the connection went away in mid-call
        raise SwitchFailed(error, held=True) from error
    if count == 0:
        failure = QuiesceFailed("The guest agent froze no file system.")
        held = not _thaw(agent, freeze_timeout)[1]
        return _unfrozen(switch, failure, held=held, required=required, reach=reach)

    timer = _Timer(frozen_limit, rescuer)
    reach(Step.FROZEN)
    try:
        switch()
    except BaseException as error:
        timer.cancel()
        _, thawed = _thaw(agent, freeze_timeout)
        raise SwitchFailed(error, held=not thawed) from error
    reach(Step.SWITCHED)
    timer.cancel()
    released, thawed = _thaw(agent, freeze_timeout)
    frozen_us = int((time.monotonic() - started) * 1e6)
    reach(Step.THAWED)
    problem: SnapdError | None = None
    if timer.fired:
        problem = QuiesceTimedOut(f"The guest was frozen for {frozen_limit:g} s and was thawed.")
    elif not thawed:
        problem = QuiesceFailed("The guest agent did not answer the thaw; it is tried again.")
    elif released < count:
        problem = QuiesceTimedOut(
            f"Only {released} of {count} file systems were still frozen at the thaw."
        )
    return Frozen(count, frozen_us, problem, held=not thawed)


class SwitchFailed(Exception):
    """The switch failed, and why; `held`: the guest may be frozen still."""

    def __init__(self, error: BaseException, *, held: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.held = held


def _unfrozen(
    switch: Callable[[], None],
    failure: SnapdError,
    *,
    held: bool,
    required: bool,
    reach: Callable[[Step], None],
) -> Frozen:
    """Go on without a frozen guest, or not."""
    if required:
        raise SwitchFailed(failure, held=held)
    log.warning("going on without quiescing: %s", failure)
    try:
        switch()
    except BaseException as error:
        raise SwitchFailed(error, held=held) from error
    reach(Step.SWITCHED)
    return Frozen(0, 0, failure, held)


def _thaw(agent: Agent, timeout: float) -> tuple[int, bool]:
    """How many file systems were thawed, and whether the agent answered at all."""
    try:
        return agent.thaw(timeout), True
    except (AgentGone, AgentTimeout, AgentRefused, SnapdError) as error:
        log.error("the guest was not thawed, and it is tried again: %s", error)
        return 0, False


class _Timer:
    """Thaws after a time, from a thread that nothing of ours can block."""

    def __init__(self, seconds: float, rescuer: Agent) -> None:
        self.fired = False
        self._rescuer = rescuer
        self._timer = threading.Timer(seconds, self._fire)
        self._timer.daemon = True
        self._timer.start()

    def _fire(self) -> None:
        self.fired = True
        log.error("the guest has been frozen for too long; thawing it")
        _thaw(self._rescuer, 5.0)

    def cancel(self) -> None:
        self._timer.cancel()
