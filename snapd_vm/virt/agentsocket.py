"""The guest agent on the unix socket of a channel that libvirt does not own.

QEMU speaks to one client at a time, and a second one waits unseen in the socket's backlog. From a
freeze until the thaw that succeeds the connection stays open, so that nobody comes in between and
keeps us from thawing. It is shared by all SocketAgents of this process on the same path, so that
whoever has to can thaw, and it ends with the process, so that another can. All other operations
close theirs.

Wherever a command has not been answered, the next operation begins with a handshake, which proves
that the agent has worked off all that was sent before, a freeze that timed out too: a thaw that
succeeds is the last word. Only a thaw right after the freeze's answer does without.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakValueDictionary

from snapd_vm.model import Disk, Json
from snapd_vm.virt.agent import AgentError, AgentGone, AgentRefused, AgentTimeout, FileSystem
from snapd_vm.virt.agentwire import Wire


class _Line:
    """The way to one socket: who speaks on it now, and the connection kept since a freeze."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: Wire | None = None

    def close(self) -> None:
        if self.kept is not None:
            self.kept.close()
            self.kept = None

    def __del__(self) -> None:
        self.close()


_lines: WeakValueDictionary[str, _Line] = WeakValueDictionary()
_lines_lock = threading.Lock()


class SocketAgent:
    """A guest agent behind a unix socket; see agent.Agent.

    May be used from several threads: one waits for the other, within its own timeout. `disks` are
    the domain's, to tell which of them a file system is on. While it, or another on the same path,
    is alive, the connection that a freeze kept is.
    """

    def __init__(self, path: str, disks: Sequence[Disk] = ()) -> None:
        self._path = path
        self._disks = tuple(disks)
        with _lines_lock:
            self._line = _lines.setdefault(path, _Line())

    def ping(self, timeout: float) -> None:
        """Returns if the agent answers."""
        with self._speak(timeout) as wire:
            wire.call("guest-ping")

    def status(self, timeout: float) -> str:
        """'thawed' or 'frozen'."""
        with self._speak(timeout) as wire:
            return _status(wire)

    def fsinfo(self, timeout: float) -> list[FileSystem]:
        """The mounted file systems; refused while the guest is frozen."""
        with self._speak(timeout) as wire:
            answer = _call(wire, "guest-get-fsinfo")
        if not isinstance(answer, list):
            raise AgentRefused("the agent's list of file systems is none")
        return [_filesystem(entry, self._disks) for entry in answer]

    def freeze(self, mountpoints: Sequence[str] | None, timeout: float) -> int:
        """Freezes these, or all if None; answers how many it froze, which may be none.

        After AgentTimeout the guest may freeze late: repeat thaw until it succeeds.
        """
        with self._speak(timeout, keep=True) as wire:
            if mountpoints is None:
                return _count(_call(wire, "guest-fsfreeze-freeze"))
            names: list[Json] = list(mountpoints)
            return _count(_call(wire, "guest-fsfreeze-freeze-list", {"mountpoints": names}))

    def thaw(self, timeout: float) -> int:
        """Thaws all; answers how many it thawed, 0 for a guest that was not frozen.

        When it returns, no freeze that was sent before can take effect any more.
        """
        with self._speak(timeout, keep=False) as wire:
            return _count(_call(wire, "guest-fsfreeze-thaw"))

    def arm(self, timeout: float) -> int | None:
        """Nothing to prepare or to put back: each operation has its own deadline."""
        return None

    def close(self) -> None:
        """Lets go of the connection that a freeze kept; a thaw that succeeded has done so."""
        with self._line.lock:
            self._line.close()

    @contextmanager
    def _speak(self, timeout: float, keep: bool | None = None) -> Iterator[Wire]:
        """A connection in step with the agent; `timeout` is for all that is done with it.

        The kept one is used if there is one. `keep`: keep it if the command succeeded, or may yet;
        False: let go of it if the command succeeded; None: leave that as it is.
        """
        deadline = time.monotonic() + timeout
        line = self._line
        if not line.lock.acquire(timeout=max(0.0, timeout)):
            raise AgentGone("the agent is busy with another command of ours")
        if line.kept is not None and line.kept.hung_up():  # the domain was stopped, say
            line.close()
        wire, kept = line.kept, line.kept is not None
        try:
            wire = wire or Wire(self._path, deadline)
            wire.deadline = deadline
            if not wire.in_step():
                wire.sync()
            yield wire
            kept = kept if keep is None else keep
        except AgentTimeout:
            kept = kept or bool(keep)
            raise
        finally:
            if wire is not None:
                line.kept = wire
                if not kept:
                    line.close()
            line.lock.release()


def _call(wire: Wire, command: str, arguments: Mapping[str, Json] | None = None) -> Json:
    """A command that a frozen guest refuses, and then says so.

    The words differ between releases, but each calls the command disabled; so does an
    administrator's block list. The status tells the two apart.
    """
    try:
        return wire.call(command, arguments)
    except AgentRefused as refusal:
        if "disabled" not in str(refusal):
            raise
        try:
            frozen = _status(wire) == "frozen"
        except AgentError:
            frozen = "frozen" in str(refusal)
        raise AgentRefused(str(refusal), frozen) from None


def _status(wire: Wire) -> str:
    answer = wire.call("guest-fsfreeze-status")
    if answer not in ("thawed", "frozen"):
        raise AgentRefused("the agent's status is neither thawed nor frozen")
    return str(answer)


def _count(answer: Json) -> int:
    if type(answer) is not int or not 0 <= answer < 2**31:
        raise AgentRefused("the agent does not say how many file systems")
    return answer


def _filesystem(entry: Json, disks: Sequence[Disk]) -> FileSystem:
    if not isinstance(entry, dict):
        raise AgentRefused("the agent's list of file systems holds something else")
    mountpoint, kind = _text(entry.get("mountpoint")), _text(entry.get("type"))
    below = entry.get("disk")
    targets = [_target(disk, disks) for disk in below] if isinstance(below, list) else []
    known = sorted({target for target in targets if target is not None})
    return FileSystem(mountpoint, kind, tuple(known) if known and None not in targets else None)


def _target(said: Json, disks: Sequence[Disk]) -> str | None:
    """The domain's disk that the agent means; None if that is unknown or contradicts itself.

    PCI addresses are compared as they are, as libvirt does, but the guest may count its buses in
    another way: the serial, where both know one, has to agree. virtio-blk cuts it at 20 bytes.
    """
    if not isinstance(said, dict):
        return None
    serial = said.get("serial")
    if not isinstance(serial, str):
        serial = ""
    address = _address(said.get("pci-controller"))
    found = [disk for disk in disks if address and disk.address == address]
    if not found:
        found = [disk for disk in disks if serial and _has_serial(disk, serial)]
    elif serial and found[0].serial and not _has_serial(found[0], serial):
        return None
    return found[0].target if len(found) == 1 else None


def _has_serial(disk: Disk, serial: str) -> bool:
    return serial in (disk.serial, disk.serial[:20])


def _address(pci: Json) -> str:
    """A PCI address as model.Disk has it; empty where it is none (the agent says -1 if unsure)."""
    if not isinstance(pci, dict):
        return ""
    numbers: list[int] = []
    for key, limit in (("domain", 0xFFFF), ("bus", 0xFF), ("slot", 0x1F), ("function", 7)):
        number = pci.get(key)
        if type(number) is not int or not 0 <= number <= limit:
            return ""
        numbers.append(number)
    domain, bus, slot, function = numbers
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"


def _text(value: Json) -> str:
    """A name that can be logged, stored and sent back: text without NUL and lone surrogates."""
    if isinstance(value, str) and value and "\0" not in value:
        try:
            value.encode()
        except UnicodeEncodeError:
            pass
        else:
            return value
    raise AgentRefused("the agent names a file system in a way that can't be")
