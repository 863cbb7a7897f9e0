"""The ways to take a quiesced snapshot of one disk of one guest: ours, virsh's and libvirt-dbus's.

Each is asked for the same: the guest frozen by its agent, an overlay for one disk, nothing kept by
libvirt. What it takes to ask (XML, messages) is made before the clock starts.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from xml.sax.saxutils import quoteattr

import libvirt

from snapd_vm.bus import wire
from snapd_vm.bus.connection import decode
from snapd_vm.model import domain_path
from tests.bus.clients import Client, RawPeer, marshalled
from tests.lab.deadline import LabError
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run

NAME = "org.example.DiskSnapshot"
LIBVIRT = "org.libvirt"
PROPERTIES = "org.freedesktop.DBus.Properties"
QUIESCE_REQUIRED = 1
TARGET = "vda"
LIBVIRT_FLAGS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
)


@dataclass(frozen=True)
class Taken:
    """One turn, in seconds. `frozen_s` is known of our own only, which says it itself."""

    call_s: float
    frozen_s: float | None = None
    has_overlay: bool = True


class Way(Protocol):
    """One way; `who` does it, asked `by` this client."""

    who: str
    by: str

    def take(self, guest: Guest, overlay: Path) -> Taken:
        """Take a snapshot of the disk TARGET, which then writes to `overlay`."""


class PlainCaller:
    """A client that is on the bus already: from the sending of the call to having its answer."""

    def __init__(self, address: str) -> None:
        self._peer = RawPeer(address)
        self._serial = 1

    def call(
        self, to: str, path: str, interface: str, member: str, signature: str, body: Sequence[Any]
    ) -> tuple[float, list[Any]]:
        """Seconds, and the arguments of the answer. Raises LabError for an error."""
        self._serial += 1
        message = Client.message(interface, member, signature, body, path, to)
        data = marshalled(message, self._serial)
        began = time.perf_counter()
        self._peer.send(data)
        answer = self._peer.reply_to(self._serial)
        took = time.perf_counter() - began
        if answer.kind == wire.ERROR:
            raise LabError(f"{member}: {answer.error_name}: {decode(answer, answer.signature)}")
        return took, decode(answer, answer.signature)

    def close(self) -> None:
        """Hang up."""
        self._peer.close()


class BusctlCaller:
    """`busctl call`, as a person does it: from its start to its end."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def call(
        self, to: str, path: str, interface: str, member: str, signature: str, body: Sequence[Any]
    ) -> tuple[float, list[Any]]:
        """Seconds, and the arguments of the answer. Raises LabError for an error."""
        words = ("--json=short", "call", to, path, interface, member, signature, *map(str, body))
        began = time.perf_counter()
        done = self._lab.busctl(*words)
        took = time.perf_counter() - began
        if done.returncode:
            raise LabError(f"{member}: {done.stderr.strip()}")
        return took, json.loads(done.stdout)["data"]


Caller = PlainCaller | BusctlCaller


class Ours:
    """Create with QUIESCE_REQUIRED, polkit asked, the journal durable."""

    who = "snapd-vm"

    def __init__(self, caller: Caller, by: str, reader: PlainCaller) -> None:
        self.by = by
        self._caller = caller
        self._reader = reader

    def take(self, guest: Guest, overlay: Path) -> Taken:
        """See Way. The overlay's name is the image's stem and our label."""
        label = overlay.suffix.removeprefix(".")
        body = [f"<disk><target dev='{TARGET}'/></disk>", "", label, QUIESCE_REQUIRED]
        took, (_, source) = self._caller.call(
            NAME, domain_path(guest.uuid), NAME, "Create", "sssu", body
        )
        path = re.search(r'ds:snapshot="([^"]+)"', source)
        assert path is not None, source
        _, (frozen,) = self._reader.call(
            NAME, path[1], PROPERTIES, "Get", "ss", [f"{NAME}.Snapshot", "FrozenTime"]
        )
        return Taken(took, frozen.value / 1e6)


class LibvirtDBus:
    """SnapshotCreateXML of libvirt-dbus, with QUIESCE."""

    who = "libvirt-dbus"

    def __init__(self, caller: Caller, by: str) -> None:
        self.by = by
        self._caller = caller

    def take(self, guest: Guest, overlay: Path) -> Taken:
        """See Way."""
        took, _ = self._caller.call(
            LIBVIRT,
            _path(guest),
            f"{LIBVIRT}.Domain",
            "SnapshotCreateXML",
            "su",
            [_snapshot_xml(guest, overlay), LIBVIRT_FLAGS],
        )
        return Taken(took)


class LibvirtDBusSteps:
    """The same outcome as ours by libvirt-dbus: only what is on the disk is frozen.

    QUIESCE freezes every file system of the guest, and does not tell which disk is in use then. So
    it is asked what there is, to freeze that, for the snapshot, to thaw, and for the domain's XML.
    """

    who = "libvirt-dbus, each step"
    by = "plain client"

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def take(self, guest: Guest, overlay: Path) -> Taken:
        """See Way. The thaw is asked for whatever becomes of the snapshot."""
        xml = _snapshot_xml(guest, overlay)
        seconds, (rows,) = self._ask(guest, "GetFSInfo", "u", 0)
        mountpoints = [row[0] for row in rows if TARGET in row[3]]
        seconds += self._ask(guest, "FSFreeze", "asu", mountpoints, 0)[0]
        try:
            flags = LIBVIRT_FLAGS & ~libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE
            seconds += self._ask(guest, "SnapshotCreateXML", "su", xml, flags)[0]
        finally:
            seconds += self._ask(guest, "FSThaw", "asu", [], 0)[0]
        seconds += self._ask(guest, "GetXMLDesc", "u", 0)[0]
        return Taken(seconds)

    def _ask(
        self, guest: Guest, member: str, signature: str, *body: Any
    ) -> tuple[float, list[Any]]:
        domain = f"{LIBVIRT}.Domain"
        return self._caller.call(LIBVIRT, _path(guest), domain, member, signature, list(body))


def _path(guest: Guest) -> str:
    return f"/org/libvirt/QEMU/domain/_{guest.uuid.replace('-', '_')}"


def _snapshot_xml(guest: Guest, overlay: Path) -> str:
    disks = [f"<disk name={quoteattr(disk.target)} snapshot='no'/>" for disk in guest.disks]
    disks[0] = (
        f"<disk name='{TARGET}' snapshot='external'><source file={quoteattr(str(overlay))}/></disk>"
    )
    return f"<domainsnapshot><disks>{''.join(disks)}</disks></domainsnapshot>"


class Virsh:
    """`virsh snapshot-create-as --disk-only --quiesce --atomic --no-metadata`."""

    who = "virsh"
    by = "virsh"

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def take(self, guest: Guest, overlay: Path) -> Taken:
        """See Way."""
        words = ["virsh", "-c", self._uri, "snapshot-create-as", guest.name, "--disk-only"]
        words += ["--quiesce", "--atomic", "--no-metadata"]
        words += ["--diskspec", f"{TARGET},snapshot=external,file={overlay}"]
        for disk in guest.disks[1:]:
            words += ["--diskspec", f"{disk.target},snapshot=no"]
        began = time.perf_counter()
        run(*words)
        return Taken(time.perf_counter() - began)


class FreezeAndThaw:
    """No snapshot: the two round trips to the agent, for what we freeze."""

    who = "freeze and thaw alone"
    by = "libvirt"

    def take(self, guest: Guest, overlay: Path) -> Taken:
        """See Way."""
        domain = guest.domain
        mountpoints = [row[0] for row in domain.fsInfo() if TARGET in (row[3] or ())]
        began = time.perf_counter()
        domain.fsFreeze(mountpoints)
        domain.fsThaw()
        return Taken(time.perf_counter() - began, has_overlay=False)


class Nothing:
    """Nobody does anything: what the writers feel by themselves."""

    who = "nothing done"
    by = "-"

    def take(self, guest: Guest, overlay: Path) -> Taken:
        """See Way."""
        time.sleep(0.15)
        return Taken(0.15, has_overlay=False)


def all_ways(lab: Lab, close_later: Callable[[Callable[[], None]], object]) -> Sequence[Way]:
    """Those that are measured beside each other."""
    plain, reader = PlainCaller(lab.address), PlainCaller(lab.address)
    close_later(plain.close)
    close_later(reader.close)
    busctl = BusctlCaller(lab)
    return (
        Ours(plain, "plain client", reader),
        Ours(busctl, "busctl", reader),
        LibvirtDBus(plain, "plain client"),
        LibvirtDBus(busctl, "busctl"),
        LibvirtDBusSteps(plain),
        Virsh(lab.libvirtd.uri),
        FreezeAndThaw(),
        Nothing(),
    )
