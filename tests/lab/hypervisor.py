"""The lab's own connection to libvirt: the only file here that imports it.

The software under test has a connection of its own; nothing is shared with it.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import libvirt

from tests.lab.deadline import LabError, bounded

T = TypeVar("T")
FORGET = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)
INACTIVE = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
STATES = {
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_SHUTOFF: "shutoff",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
}

# libvirt prints every error to stderr by itself; the lab raises them, or expects them.
libvirt.registerErrorHandler(lambda _context, _error: None, None)


class Hypervisor:
    """A connection that is opened when it is needed, and again after libvirtd was restarted."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._connection: Any = None
        self._lock = threading.Lock()

    def connection(self) -> Any:
        """A living virConnect."""
        with self._lock:
            if not self._answers():
                self._drop()
                self._connection = bounded("open libvirt", lambda: libvirt.open(self.uri), 20)
            return self._connection

    def _answers(self) -> bool:
        """A call to the other end: isAlive() says yes until the first one fails."""
        if self._connection is None:
            return False
        try:
            return bool(bounded("getHostname", self._connection.getHostname, 20))
        except libvirt.libvirtError:
            return False

    def define(self, xml: str) -> Any:
        """Define a domain; the virDomain is the caller's until libvirtd goes away."""
        return self._call("define", lambda connection: connection.defineXML(xml))

    def save(self, uuid: str, path: Path) -> None:
        """Write its state to a file, and end it."""
        self._call("save", lambda connection: connection.lookupByUUIDString(uuid).save(str(path)))

    def restore(self, path: Path) -> None:
        """Start the domain that a file has the definition and state of."""
        self._call("restore", lambda connection: connection.restore(str(path)))

    def domain(self, uuid: str) -> Any:
        """The domain of this UUID, on the present connection."""
        return self._call("look up", lambda connection: connection.lookupByUUIDString(uuid))

    def state(self, uuid: str) -> str:
        """Its run state, in libvirt's words."""
        number = self.domain(uuid).state()[0]
        return STATES.get(number, str(number))

    def ceph_secret(self, uuid: str, name: str, key: str) -> None:
        """Give libvirt a key of Ceph's (base64) as the secret `uuid`, until libvirtd ends."""
        xml = (
            f"<secret ephemeral='yes' private='no'><uuid>{uuid}</uuid>"
            f"<usage type='ceph'><name>{name}</name></usage></secret>"
        )

        def define(connection: Any) -> None:
            connection.secretDefineXML(xml).setValue(base64.b64decode(key))

        self._call("define a secret", define)

    def remove(self, domain: Any) -> None:
        """Destroy and undefine one domain; it may be off, transient or gone already."""
        name = domain.name()
        with suppress(libvirt.libvirtError):
            bounded(f"destroy {name}", domain.destroy, 30)
        with suppress(libvirt.libvirtError):
            bounded(f"undefine {name}", lambda: domain.undefineFlags(FORGET), 30)

    def close(self) -> None:
        """Let go of the connection."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        old, self._connection = self._connection, None
        if old is not None:
            with suppress(libvirt.libvirtError):
                old.close()

    def _call(self, what: str, call: Callable[[Any], T]) -> T:
        connection = self.connection()
        try:
            return bounded(what, lambda: call(connection), 30)
        except libvirt.libvirtError as error:
            raise LabError(f"libvirt: {what}: {error}") from error


def agent_answers(domain: Any) -> bool:
    """Whether a guest agent answers behind libvirt's channel, in good time."""
    try:
        return bool(bounded("fsInfo", domain.fsInfo, 10))
    except (libvirt.libvirtError, LabError):
        return False
