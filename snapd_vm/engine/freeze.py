"""Freezes a guest's file systems around a switch, and thaws them whatever happens.

Blocking, for a worker thread. Freeze, switch and thaw are called from one thread without a turn of
the event loop in between, as the guest stands still meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from snapd_vm.engine.journal import Step
from snapd_vm.engine.rescue import Rescue
from snapd_vm.errors import (
    AgentUnavailable,
    Busy,
    QuiesceFailed,
    QuiesceTimedOut,
    SnapdError,
)
from snapd_vm.virt.agent import Agent, AgentGone, AgentRefused, AgentTimeout

log = logging.getLogger(__name__)

_RESCUE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Frozen:
    """What came of it. `frozen_us`: from sending the freeze to the answer of the first thaw, in µs.

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
            raise _frozen_by_others() from error
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

    With `required`, a freeze that failed ends it (QuiesceFailed, QuiesceTimedOut) before the
    switch; else the switch goes on without. All that goes wrong is raised as SwitchFailed, after
    the thaw, which says if the guest is held; Busy, without a thaw, where somebody else froze it. A
    thread that is there before the freeze thaws by way of `rescuer` at `frozen_limit`.
    """
    rescue = Rescue(frozen_limit, lambda: _thaw(rescuer, _RESCUE_TIMEOUT_S)[1])
    try:
        started = time.monotonic()
        try:
            count = agent.freeze(mountpoints, freeze_timeout)
        except AgentRefused as error:
            if error.frozen_already:
                raise SwitchFailed(_frozen_by_others(), held=False) from error
            failure: SnapdError = QuiesceFailed(f"The guest agent could not freeze: {error}.")
        except AgentGone as error:
            failure = QuiesceFailed(f"The guest agent could not freeze: {error}.")
        except AgentTimeout as error:
            # It may freeze later still: whoever called goes on thawing until the agent answers.
            rescue.begin()
            failure = QuiesceTimedOut(
                f"The guest agent did not freeze within {freeze_timeout:g} s: {error}."
            )
            return _unfrozen(switch, failure, held=True, required=required, reach=reach)
        else:
            rescue.begin()
            if count > 0:
                return _frozen(switch, agent, rescue, freeze_timeout, started, count, reach)
            failure = QuiesceFailed("The guest agent froze no file system.")
        held = not _thaw(agent, freeze_timeout)[1]  # some may be frozen although it failed
        if held:
            rescue.begin()
        return _unfrozen(switch, failure, held=held, required=required, reach=reach)
    except SwitchFailed:
        raise
    except BaseException as error:  # the connection went away in mid-call, or a mistake of ours
        raise SwitchFailed(error, held=True) from error
    finally:
        rescue.end()


def _frozen(
    switch: Callable[[], None],
    agent: Agent,
    rescue: Rescue,
    timeout: float,
    started: float,
    count: int,
    reach: Callable[[Step], None],
) -> Frozen:
    """Switch while the guest is frozen, and thaw it."""
    try:
        reach(Step.FROZEN)
        switch()
        reach(Step.SWITCHED)
    except BaseException as error:
        _, thawed = _thaw(agent, timeout)
        raise SwitchFailed(error, held=not thawed, begun=True, late=rescue.fired) from error
    released, thawed = _thaw(agent, timeout)
    thawed_at = rescue.freed_at or time.monotonic()
    frozen_us = int((thawed_at - started) * 1e6)
    problem: SnapdError | None = None
    if rescue.fired:
        problem = QuiesceTimedOut("The guest was frozen for too long and was thawed meanwhile.")
    elif not thawed:
        problem = QuiesceFailed("The guest agent did not answer the thaw; it is tried again.")
    elif released < count:
        problem = QuiesceTimedOut(
            f"Only {released} of {count} file systems were still frozen at the thaw."
        )
    frozen = Frozen(count, frozen_us, problem, held=not thawed)
    try:
        reach(Step.THAWED)
    except BaseException as error:
        raise SwitchFailed(error, held=frozen.held) from error
    return frozen


def _frozen_by_others() -> Busy:
    return Busy("The guest's file systems are frozen already, by another program; thaw them first.")


class SwitchFailed(Exception):
    """The switch failed, and why. `held`: the guest may be frozen still; `begun`: it was not just
    the freeze; `late`: the guest was thawed meanwhile, as it had been frozen for too long.
    """

    def __init__(
        self, error: BaseException, *, held: bool, begun: bool = False, late: bool = False
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.held = held
        self.begun = begun
        self.late = late


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
        raise SwitchFailed(error, held=held, begun=True) from error
    reach(Step.SWITCHED)
    return Frozen(0, 0, failure, held)


def _thaw(agent: Agent, timeout: float) -> tuple[int, bool]:
    """How many file systems were thawed, and whether the agent answered at all."""
    try:
        return agent.thaw(timeout), True
    except Exception as error:  # whatever it is, the guest is to be thawed by somebody else
        log.error("the guest was not thawed, and it is tried again: %s", error)
        return 0, False
