"""Every error that snapd-vm tells a caller, with its D-Bus name; raises nothing itself.

    SnapdError
    ├── InvalidArgs                  flags (org.freedesktop.DBus.Error.InvalidArgs)
    ├── InvalidXML  InvalidName      what the caller said can't be read
    ├── NoSuchDomain  NoSuchDisk  NoSuchSnapshot
    ├── AmbiguousDisk  DiskMismatch  what the caller said fits several disks, or none
    ├── MethodUnknown  MethodNotSupported  NotUnderDisk  NameInUse
    ├── AgentUnavailable  QuiesceFailed  QuiesceTimedOut
    ├── Busy  InvalidState           not now
    ├── NoSpace  StorageFailed  HypervisorUnavailable  TimedOut  Cancelled
    ├── NotAuthorized  NotAuthorizedCanObtain  NotAuthorizedDismissed
    └── Internal                     a mistake of ours; the log says more

A message is one sentence that says what to do. It names no Python class, holds no traceback and no
secret, as it goes to the caller as it is.
"""

from __future__ import annotations

from typing import ClassVar

PREFIX = "org.example.DiskSnapshot.Error."
NOT_CONNECTED = "libvirt is not connected; try again when it is back."


class SnapdError(Exception):
    """An error that is answered to the caller under `dbus_name` with `str(self)` as the message."""

    dbus_name: ClassVar[str] = PREFIX + "Internal"

    def __init_subclass__(cls) -> None:
        if "dbus_name" not in cls.__dict__:
            cls.dbus_name = PREFIX + cls.__name__


class InvalidArgs(SnapdError):
    """Flags that are unknown or exclude each other."""

    dbus_name = "org.freedesktop.DBus.Error.InvalidArgs"


class InvalidXML(SnapdError):
    """The XML is not well-formed, too large, or not of the form that the contract allows."""


class InvalidName(SnapdError):
    """The label is not 1 to 64 of A-Za-z0-9._- that start with a letter or digit."""


class NoSuchDomain(SnapdError):
    """No domain of that name or UUID is known to libvirt."""


class NoSuchDisk(SnapdError):
    """The domain has no such disk."""


class NoSuchSnapshot(SnapdError):
    """No snapshot is recorded there."""


class AmbiguousDisk(SnapdError):
    """The source belongs to more than one domain or disk."""


class DiskMismatch(SnapdError):
    """Target and source are both given and do not belong together."""


class MethodUnknown(SnapdError):
    """No method of that name is available."""


class MethodNotSupported(SnapdError):
    """The method can't take this disk, or can't take it in this way."""


class NotUnderDisk(SnapdError):
    """The layer that was named does not hold this disk."""


class NameInUse(SnapdError):
    """The disk has a snapshot of that name, or the storage has something in its place."""


class AgentUnavailable(SnapdError):
    """Quiescing was required and no guest agent answers."""


class QuiesceFailed(SnapdError):
    """Quiescing was required and the agent froze nothing or failed."""


class QuiesceTimedOut(SnapdError):
    """Quiescing was required and took, or lasted, longer than the limits."""


class Busy(SnapdError):
    """Somebody else is using the domain, the disk or its files."""


class InvalidState(SnapdError):
    """The domain or snapshot is in a state in which this can't be done."""


class NoSpace(SnapdError):
    """The storage has no room for it, or the disk has as many snapshots as the limits allow."""


class StorageFailed(SnapdError):
    """A storage command or a file operation failed."""


class HypervisorUnavailable(SnapdError):
    """libvirt is not connected, or failed in a way that is none of the above."""


class TimedOut(SnapdError):
    """A step took longer than its limit."""


class Cancelled(SnapdError):
    """The operation was cancelled and undone."""


class NotAuthorized(SnapdError):
    """polkit says no."""


class NotAuthorizedCanObtain(SnapdError):
    """polkit would ask, but the call did not allow interaction."""


class NotAuthorizedDismissed(SnapdError):
    """The person asked by polkit dismissed the question."""


class Internal(SnapdError):
    """A mistake of the daemon's own."""
