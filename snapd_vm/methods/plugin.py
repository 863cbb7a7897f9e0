"""What a method from another distribution is written against, and nothing else of snapd-vm.

Documented in docs/writing-a-method.md. What is here changes with PROTOCOL_VERSION, by which the
daemon knows a plugin that was written for another one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from snapd_vm.command import Result
from snapd_vm.errors import (
    Busy,
    Cancelled,
    InvalidState,
    MethodNotSupported,
    NameInUse,
    NoSpace,
    NotUnderDisk,
    SnapdError,
    StorageFailed,
    TimedOut,
)
from snapd_vm.methods.method import (
    Explains,
    Forgets,
    Lists,
    Method,
    OnRequest,
    Record,
    Reverts,
    Standing,
    Stored,
    Warns,
    Watch,
    Ways,
)
from snapd_vm.model import Disk, Domain, Json, MethodRequest, Needs, Tag, Target

PROTOCOL_VERSION = 1
"""Of this file. A plugin says the number that it was written for as its own `protocol_version`."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a plugin is handed when it is made; all functions block, and raise SnapdErrors.

    `name`: by which it is listed in the configuration, and called; `options`: its table there.
    """

    name: str
    options: Mapping[str, object]
    log: logging.Logger
    run: Callable[[Sequence[str], float], Result]
    """Run a program (a list of arguments, no shell) for at most so many seconds; StorageFailed."""
    user_of: Callable[[str], str]
    """Which domain's definition, or image, has a file or device in its chain, in words; or ''."""
    other_user_of: Callable[[Domain, Disk], str]
    """The same of a disk's image, but for this very disk."""
    reader_of: Callable[[str], str]
    """Which process or kernel device has it open, in words; or ''."""
    domain: Callable[[str], Domain]
    """The domain of a UUID as libvirt describes it now; NoSuchDomain."""
    check_off: Callable[[Domain], None]
    """InvalidState unless it is off, and has no managed save image, as a revert needs it."""


class Plugin(Protocol):
    """What an entry point names: called once, at start, it gives the method."""

    @property
    def protocol_version(self) -> int: ...

    def __call__(self, context: Context) -> Method: ...


class HasSchema(Protocol):
    """A Method whose `<diskSnapshot>` may hold something."""

    @property
    def schema(self) -> str:
        """The RELAX NG schema of the whole element, as XML."""


__all__ = [
    "PROTOCOL_VERSION",
    "Busy",
    "Cancelled",
    "Context",
    "Disk",
    "Domain",
    "Explains",
    "Forgets",
    "HasSchema",
    "InvalidState",
    "Json",
    "Lists",
    "Method",
    "MethodNotSupported",
    "MethodRequest",
    "NameInUse",
    "Needs",
    "NoSpace",
    "NotUnderDisk",
    "OnRequest",
    "Plugin",
    "Record",
    "Result",
    "Reverts",
    "SnapdError",
    "Standing",
    "StorageFailed",
    "Stored",
    "Tag",
    "Target",
    "TimedOut",
    "Warns",
    "Watch",
    "Ways",
]
