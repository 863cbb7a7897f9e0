"""Asks the guest agent what is to be frozen, in a thread beside all else that precedes the freeze.

An answer takes the agent longer than libvirt and the storage take for everything they are asked
meanwhile. It freezes nothing; for what comes of the answer see freeze.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from snapd_vm.engine import freeze
from snapd_vm.engine.world import World
from snapd_vm.errors import AgentUnavailable, QuiesceFailed
from snapd_vm.model import Consistency, Domain, Flags
from snapd_vm.virt.agent import Agent, AgentError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Quiesce:
    """Mount points to freeze; None: all. `former` is the agent's response timeout to put back."""

    mountpoints: Sequence[str] | None
    former: int | None


class Survey:
    """The agent of one domain, asked for one operation.

    To be closed. One thread uses it; the agent is that thread's once `result` has returned.
    """

    def __init__(self, world: World, flags: Flags) -> None:
        self._world = world
        self._flags = flags
        self._targets: Sequence[str] = ()
        self._domain: Domain | None = None
        self._agent: Agent | None = None
        self._asked: Future[Quiesce] | None = None

    @property
    def agent(self) -> Agent:
        """The agent of the domain given last."""
        if self._agent is None:
            raise AssertionError("no domain was given")
        return self._agent

    def ask(self, domain: Domain, targets: Sequence[str]) -> None:
        """Begin to ask the agent of `domain` about these disks, unless it was asked already.

        Thus it may be begun with what is remembered of the domain, and made sure of with what
        libvirt says.
        """
        if (self._domain, self._targets) == (domain, targets):
            return
        self.close()
        self._asked = None
        self._domain, self._targets = domain, targets
        self._agent = self._world.hypervisor.agent(domain)
        answers = domain.active and domain.state != "paused" and domain.agent is not None
        if answers and Flags.NO_QUIESCE not in self._flags:
            self._asked = self._world.beside.submit(self._ask, self._agent, targets)

    def refuse(self, floor: Consistency) -> None:
        """Raise what `result` would, as far as it is known without the agent."""
        if self._asked is None:
            self.result(floor)

    def result(self, floor: Consistency) -> Quiesce | None:
        """What to freeze, or None where the guest is not quiesced; the agent is ready to freeze.

        `floor` is the consistency without. Waits for the agent, for agent_timeout_s at most. Raises
        AgentUnavailable and QuiesceFailed where quiescing is required, and Busy.
        """
        required = Flags.QUIESCE_REQUIRED in self._flags
        if Flags.NO_QUIESCE in self._flags or self._domain is None:
            return None
        try:
            if not self._domain.active:
                if required and floor is not Consistency.OFFLINE:
                    raise QuiesceFailed(
                        "The domain is off and was not shut down cleanly; its disk is not "
                        "consistent."
                    )
                return None
            if self._domain.state == "paused":
                raise AgentUnavailable(
                    "The domain is paused, so its agent can't answer; resume it."
                )
            if self._asked is None:
                raise AgentUnavailable("The domain has no guest agent channel.")
            return self._asked.result()
        except (AgentUnavailable, QuiesceFailed) as error:
            if required:
                raise
            log.info("not quiescing domain %s: %s", self._domain.name, error)
            return None

    def close(self) -> None:
        """Wait for the answer, and put back what was set for the agent. May be called again."""
        if self._asked is not None:  # the agent is not for two threads at a time
            wait([self._asked])
        if self._agent is not None:
            self._agent.close()

    def _ask(self, agent: Agent, targets: Sequence[str]) -> Quiesce:
        mountpoints = freeze.survey(agent, targets, self._world.config.agent_timeout_s)
        try:
            return Quiesce(mountpoints, agent.arm(self._world.config.freeze_timeout_s))
        except AgentError as error:
            raise AgentUnavailable(f"The guest agent can't be made ready: {error}.") from error
