"""The guest agent by way of libvirt, for domains whose agent channel is libvirt's own.

Response timeouts are set before each call and put back by `close`: without one a call to a hung
agent blocks without end, and the value belongs to the domain, for all clients
(virDomainAgentSetResponseTimeout).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import libvirt
from lxml import etree

from snapd_vm import errors
from snapd_vm.virt.agent import AgentGone, AgentRefused, AgentTimeout, FileSystem
from snapd_vm.virt.connection import LOST_DOMAINS, ConnectionPool

log = logging.getLogger(__name__)
T = TypeVar("T")

_STATUS_DIR = Path("/run/libvirt/qemu")

_GONE = (
    libvirt.VIR_ERR_OPERATION_INVALID,  # paused, or off
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,  # no channel
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
    libvirt.VIR_ERR_NO_SUPPORT,
    libvirt.VIR_ERR_NO_DOMAIN,
)


class LibvirtAgent:
    """The agent of one domain, for the length of one operation; not for use by two threads."""

    def __init__(
        self, pool: ConnectionPool, uuid: str, name: str, former_timeout: int | None = None
    ) -> None:
        """`former_timeout`: what to put back, where an earlier operation of ours has noted it."""
        self._pool = pool
        self._uuid = uuid
        self._status = _STATUS_DIR / f"{name}.xml"
        self._former = former_timeout
        self._set: int | None = None

    def _former_timeout(self) -> int:
        """The response timeout that stood before us, in seconds or as libvirt's constant.

        libvirt has no call that reads it; the domain's status XML has it, and no entry there means
        the default, which is to block.
        """
        if self._former is None:
            try:
                text = etree.parse(self._status).findtext("agentTimeout")
            except (OSError, etree.XMLSyntaxError):
                text = None
            self._former = int(text) if text else libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK
        return self._former

    def fsinfo(self, timeout: float) -> Sequence[FileSystem]:
        """The guest's mounted file systems and the disks they are on (virDomainGetFSInfo)."""
        rows = self._call(lambda domain: domain.fsInfo(), timeout)
        return [
            FileSystem(mountpoint, kind, tuple(targets) if targets else None)
            for mountpoint, _, kind, targets in rows
        ]

    def arm(self, timeout: float) -> int:
        """Set the response timeout now, so that the freeze need not; the former one, to note."""
        self._call(lambda _domain: None, timeout)
        return self._former_timeout()

    def freeze(self, mountpoints: Sequence[str] | None, timeout: float) -> int:
        """Freeze the named file systems, or all; how many were (virDomainFSFreeze)."""
        names = list(mountpoints) if mountpoints is not None else None
        return int(self._call(lambda domain: domain.fsFreeze(names), timeout))

    def thaw(self, timeout: float) -> int:
        """Thaw all file systems; how many were frozen (virDomainFSThaw)."""
        return int(self._call(lambda domain: domain.fsThaw(), timeout))

    def close(self) -> None:
        """Put the former response timeout back; a failure is logged, as nothing depends on it."""
        if self._set is None or self._set == self._former_timeout():
            return
        try:
            with self._pool.domain(self._uuid) as domain:
                domain.agentSetResponseTimeout(self._former_timeout())
            self._set = None
        except errors.SnapdError as error:
            log.debug("the agent timeout of %s was not put back: %s", self._uuid, error)

    def _call(self, function: Callable[[libvirt.virDomain], T], timeout: float) -> T:
        seconds = max(1, math.ceil(timeout))
        try:
            with self._pool.domain(self._uuid) as domain:
                return self._ask(domain, function, seconds)
        except errors.NoSuchDomain as error:
            raise AgentGone(str(error)) from error

    def _ask(
        self, domain: libvirt.virDomain, function: Callable[[libvirt.virDomain], T], seconds: int
    ) -> T:
        try:
            if self._set != seconds:
                self._former_timeout()
                domain.agentSetResponseTimeout(seconds)
                self._set = seconds
            return function(domain)
        except libvirt.libvirtError as error:
            found = _agent_error(error)
            if found is None:
                raise
            raise found from error


def _agent_error(error: libvirt.libvirtError) -> AgentGone | AgentTimeout | AgentRefused | None:
    """What an error says of the agent; None: it is not about the agent (libvirt-virterror)."""
    code = error.get_error_code()
    message = " ".join((error.get_error_message() or "").split())
    if code == libvirt.VIR_ERR_AGENT_UNRESPONSIVE and "not connected" in message:
        return AgentGone(message)  # nothing was sent
    if code in (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED):
        return AgentTimeout(message)
    if code in _GONE:
        return AgentGone(message)
    if code == libvirt.VIR_ERR_INTERNAL_ERROR and (error.get_error_domain() not in LOST_DOMAINS):
        return AgentRefused(message, frozen_already="disabled" in message and "frozen" in message)
    return None
