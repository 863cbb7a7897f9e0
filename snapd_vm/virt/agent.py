"""What the engine asks of a guest agent, whichever way it is reached, and how it can fail.

The errors are for the parts below the engine, which turns them into those of snapd_vm.errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class AgentError(Exception):
    """An agent that did not do what it was asked; one of the three below."""


class AgentGone(AgentError):
    """There is no agent to speak to: no channel, or no answer to the handshake.

    The command was not sent, so the guest is as it was.
    """


class AgentTimeout(AgentError):
    """The command was sent, and its answer has not come: not in time, or the channel broke.

    It may still take effect, however late. For a freeze: repeat thaw until it succeeds.
    """


class AgentRefused(AgentError):
    """The agent answered that it did not do it, or with something that can't be understood.

    `frozen_already` says that it refuses because the guest is frozen, by somebody else.
    """

    def __init__(self, message: str, frozen_already: bool = False) -> None:
        super().__init__(message)
        self.frozen_already = frozen_already


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A file system that the guest has mounted.

    `targets` are the `<target dev>`s of the disks that hold it; None: the agent can't say, or says
    what does not fit the domain's disks.
    """

    mountpoint: str
    type: str
    targets: tuple[str, ...] | None


class Agent(Protocol):
    """A guest agent. Calls block, for `timeout` seconds at most, and raise AgentError."""

    def fsinfo(self, timeout: float) -> Sequence[FileSystem]:
        """The mounted file systems; refused while the guest is frozen."""

    def freeze(self, mountpoints: Sequence[str] | None, timeout: float) -> int:
        """Freezes these, or all if None; answers how many it froze, which may be none."""

    def thaw(self, timeout: float) -> int:
        """Thaws all; answers how many it thawed, 0 for a guest that was not frozen."""

    def arm(self, timeout: float) -> int | None:
        """Prepares for a freeze with this timeout, so that nothing else is done while frozen.

        Answers what `close` will put back, to be noted in the journal; None: nothing.
        """

    def close(self) -> None:
        """Ends the operation: puts back what was changed for it. Never raises."""
