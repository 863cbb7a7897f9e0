"""How a method is declared: with the polkit action that it needs, or open to all, and nothing else.

A guarded method has two parts. `prepare` parses what the caller said and looks in memory; what it
returns runs after polkit's yes only. An owned method is guarded likewise, but for the user whom
its object belongs to. A declaration without an action is refused when it is made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, TypeAlias


class Action(StrEnum):
    """The polkit actions in use."""

    CREATE = "org.example.DiskSnapshot.create"
    DELETE = "org.example.DiskSnapshot.delete"
    REVERT = "org.example.DiskSnapshot.revert"
    READ = "org.example.DiskSnapshot.read"
    CONFIGURE = "org.example.DiskSnapshot.configure"


@dataclass(frozen=True, slots=True)
class Details:
    """What polkit's rules can match; what was not said, or does not apply, is empty.

    `named` is the same without what the daemon has looked up: a caller's own authentication agent
    is shown the details of a question, and must not learn from them whose disk a source is.
    """

    domain: str = ""
    uuid: str = ""
    disk: str = ""
    method: str = ""
    name: str = ""
    named: Details | None = None

    def for_polkit(self) -> Mapping[str, str]:
        """As the `a{ss}` of CheckAuthorization."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "named"}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call that was understood. `also` are actions needed besides the method's own."""

    details: Details
    run: Callable[[], Awaitable[Sequence[object]]]
    also: tuple[Action, ...] = ()


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A call that was understood and starts a job: `start` is given the uid of who calls."""

    details: Details
    start: Callable[[int], Awaitable[Sequence[object]]]
    also: tuple[Action, ...] = ()


Prepare: TypeAlias = Callable[..., Prepared | PreparedJob]
PrepareOwned: TypeAlias = Callable[..., Prepared]
Answer: TypeAlias = Callable[..., Sequence[object]]


@dataclass(frozen=True, slots=True)
class Guarded:
    """A method that needs polkit's yes. `kind` is the kind of object that it is called on."""

    kind: type
    interface: str
    member: str
    action: Action
    prepare: Prepare

    def __post_init__(self) -> None:
        if not isinstance(self.action, Action):
            raise TypeError(f"{self.interface}.{self.member} names no polkit action")


@dataclass(frozen=True, slots=True)
class Ownership:
    """Whom an object belongs to, by uid, and the polkit action that anybody else needs."""

    uid: int
    action: Action

    def __post_init__(self) -> None:
        if not isinstance(self.action, Action):
            raise TypeError(f"{self.action!r} is no polkit action")


@dataclass(frozen=True, slots=True)
class Owned:
    """A method for the user whom its object belongs to; others need polkit's yes.

    `ownership` tells of an object whom it belongs to, and what others need: there is no way to say
    the one without the other.
    """

    kind: type
    interface: str
    member: str
    ownership: Callable[[Any], Ownership]
    prepare: PrepareOwned

    def __post_init__(self) -> None:
        if not callable(self.ownership):
            raise TypeError(f"{self.interface}.{self.member} names no owner and polkit action")


@dataclass(frozen=True, slots=True)
class Open:
    """A method open to all, answered from memory. `kind` object: any object has it."""

    kind: type
    interface: str
    member: str
    answer: Answer


Declared: TypeAlias = Guarded | Owned | Open


def guarded(
    kind: type, interface: str, member: str, action: Action
) -> Callable[[Prepare], Guarded]:
    """Declares the function as the `prepare` of a method that needs `action`."""
    return lambda prepare: Guarded(kind, interface, member, action, prepare)


def owned(
    kind: type, interface: str, member: str, ownership: Callable[[Any], Ownership]
) -> Callable[[PrepareOwned], Owned]:
    """Declares the function as the `prepare` of a method for the owner, or with an action."""
    return lambda prepare: Owned(kind, interface, member, ownership, prepare)


def open_to_all(kind: type, interface: str, member: str) -> Callable[[Answer], Open]:
    """Declares the function as the whole of a method that anybody may call."""
    return lambda answer: Open(kind, interface, member, answer)


def method_table(declared: Sequence[Any]) -> Mapping[tuple[type, str, str], Declared]:
    """The methods by kind, interface and member. Raises TypeError, ValueError for a wrong one."""
    table: dict[tuple[type, str, str], Declared] = {}
    for method in declared:
        if not isinstance(method, Guarded | Owned | Open):
            raise TypeError(f"{method!r} has no polkit action and is not declared open to all")
        key = (method.kind, method.interface, method.member)
        if key in table:
            raise ValueError(f"{method.interface}.{method.member} is declared twice")
        table[key] = method
    return table
