"""A method from outside behind a fence: what it raises and answers is what the protocol allows.

Anything else, from a wrong type to SystemExit, becomes Internal, with the traceback in the log and
none for callers; the engine, which thaws after every error, does not see the difference.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from lxml import etree

from snapd_vm import errors
from snapd_vm.errors import Internal, SnapdError
from snapd_vm.methods.method import (
    Explains,
    Forgets,
    Kept,
    Lists,
    Method,
    Record,
    Reverts,
    Standing,
    Stored,
    Warns,
    Watch,
    Ways,
)
from snapd_vm.model import Disk, Domain, MethodRequest, Needs, Tag, Target

log = logging.getLogger(__name__)

T = TypeVar("T")

_STATES = frozenset({"ready", "missing", "failed", "detached"})
_CHECKED: Mapping[type, Sequence[str]] = {
    Explains: ("standing", "files"),
    Forgets: ("forget_revert",),
    Lists: ("stored",),
    Warns: ("warnings",),
    Ways: ("check_way",),
    Reverts: (*("check_revert", "prepare_revert", "revert", "settle_revert", "reverted", "among"),),
}
"""The members of the optional protocols; the fence has those that the method has."""


class Wrong(Exception):
    """A method has answered what the protocol does not allow."""


class Fenced:
    """The Method `inner`, which the configuration calls `name`. Raises Wrong if it is none."""

    redirects = False

    def __init__(self, name: str, inner: Any) -> None:
        missing = next((m for m in _members() if not hasattr(inner, m)), "")
        if missing:
            raise Wrong(f"it has no {missing}")
        if inner.name != name:
            raise Wrong(f"it calls itself {inner.name!r:.80}")
        if inner.redirects:
            raise Wrong("it redirects the domain, which only a method of the daemon's own can")
        self.name = name
        self.on_request = bool(getattr(inner, "on_request", True))
        self._inner: Method = inner
        for protocol, members in _CHECKED.items():
            if isinstance(inner, protocol):
                for member in members:
                    setattr(self, member, self._fenced(member, getattr(inner, member)))

    def together(self, targets: Sequence[Target]) -> bool:
        """See Method."""
        return self._call("together", bool, targets)

    def suits(self, disk: Disk) -> str:
        """See Method."""
        return self._call("suits", str, disk)

    def claim(
        self, domain: Domain, disk: Disk, request: MethodRequest | None, tag: Tag
    ) -> Target | None:
        """See Method."""
        answer = self._do("claim", domain, disk, request, tag)
        if answer is not None:
            self._require("claim", self._is_target(answer, disk.target))
        return answer  # type: ignore[no-any-return]  # which was just looked at

    def source(self, target: Target, disk: Disk) -> tuple[Disk, str]:
        """See Method."""
        answer = self._do("source", target, disk)
        try:
            told, image_format = answer
            fit = isinstance(told, Disk) and isinstance(image_format, str)
            fit = fit and etree.fromstring(told.source_xml).tag == "source"
        except (TypeError, ValueError, etree.XMLSyntaxError):
            fit = False
        self._require("source", fit)
        return told, image_format

    def size(self, target: Target) -> int:
        """See Method."""
        answer = self._call("size", int, target)
        self._require("size", 0 < answer < 2**63)
        return answer

    def check(self, targets: Sequence[Target], tag: Tag) -> Needs:
        """See Method."""
        answer = self._call("check", Needs, targets, tag)
        numbers = (answer.space_needed, answer.space_available)
        fit = all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers)
        self._require("check", fit and all(isinstance(one, str) for one in answer.warnings))
        return answer

    def prepare(self, targets: Sequence[Target], tag: Tag, record: Record) -> Sequence[Target]:
        """See Method."""
        recorded: list[Sequence[Target]] = []

        def checked(found: Sequence[Target]) -> None:
            self._require("prepare", self._fit(found, targets) and not recorded)
            recorded.append(found)
            record(found)

        answer = self._do("prepare", targets, tag, checked)
        self._require("prepare", self._fit(answer, targets) and bool(recorded))
        return list(answer)

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        """See Method."""
        self._do("create", targets, tag)

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        """See Method."""
        return self._call("taken", bool, target, tag, domain)

    def undo(self, target: Target, tag: Tag, *, again: bool) -> bool:
        """See Method."""
        return self._call("undo", bool, target, tag, again=again)

    def check_delete(self, target: Target, tag: Tag) -> None:
        """See Method."""
        self._do("check_delete", target, tag)

    def delete(self, target: Target, tag: Tag, watch: Watch) -> None:
        """See Method."""
        self._do("delete", target, tag, watch)

    def moved(self, deleted: Target, other: Target) -> Target | None:
        """See Method."""
        answer = self._do("moved", deleted, other)
        self._require("moved", answer is None or self._is_target(answer, other.disk))
        return answer  # type: ignore[no-any-return]  # as above

    def state(self, target: Target, domains: Mapping[str, Domain]) -> str:
        """See Method."""
        answer = self._call("state", str, target, domains)
        self._require("state", answer in _STATES)
        return answer

    def _fenced(self, member: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A member of an optional protocol, fenced."""

        def call(*given: Any, **named: Any) -> Any:
            answer = self._do(member, *given, **named)
            if member in ("files", "stored"):
                answer = self._do_with(member, lambda: list(answer))
            self._require(member, self._allowed(member, answer))
            return answer

        return call

    def _allowed(self, member: str, answer: Any) -> bool:
        """Whether an optional member may answer so."""
        match member:
            case "standing":
                return isinstance(answer, Standing) and answer.state in _STATES
            case "files":
                return all(isinstance(one, str) for one in answer)
            case "stored":
                return all(isinstance(one, Stored) for one in answer)
            case "warnings":
                return isinstance(answer, Mapping) and all(
                    isinstance(word, str) for pair in answer.items() for word in pair
                )
            case "settle_revert":
                return isinstance(answer, bool)
            case "revert" | "forget_revert" | "check_way":
                return True
            case "reverted":
                return answer is None or self._is_target(answer)
            case _:
                return self._is_target(answer)

    def _call(self, member: str, kind: type[T], *given: Any, **named: Any) -> T:
        answer = self._do(member, *given, **named)
        self._require(member, isinstance(answer, kind) and (kind is bool or answer is not True))
        return answer  # type: ignore[no-any-return]  # which was just looked at

    def _do(self, member: str, *given: Any, **named: Any) -> Any:
        return self._do_with(member, lambda: getattr(self._inner, member)(*given, **named))

    def _do_with(self, member: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except SnapdError as error:
            if type(error) is Kept or type(error).__module__ == errors.__name__:
                raise
            raise self._mistake(member, error) from None
        except BaseException as error:  # SystemExit too, which would end the daemon
            raise self._mistake(member, error) from None

    def _mistake(self, member: str, error: BaseException) -> Internal:
        log.error("method %s made a mistake in %s", self.name, member, exc_info=error)
        return Internal(f"Method {self.name} made a mistake; the daemon's log says which.")

    def _require(self, member: str, fit: bool) -> None:
        if not fit:
            raise self._mistake(member, Wrong("it answered what the protocol does not allow"))

    def _fit(self, found: Any, targets: Sequence[Target]) -> bool:
        """Whether these are Targets of the same disks."""
        if not isinstance(found, Sequence) or len(found) != len(targets):
            return False
        return all(self._is_target(a, b.disk) for a, b in zip(found, targets, strict=True))

    def _is_target(self, answer: Any, disk: str | None = None) -> bool:
        if not isinstance(answer, Target) or answer.method != self.name:
            return False
        try:
            same = json.loads(json.dumps(answer.data)) == dict(answer.data)
        except (TypeError, ValueError, RecursionError):
            return False
        return same and (disk is None or answer.disk == disk)


def _members() -> Iterable[str]:
    """The names of all that a Method has."""
    return [name for name in vars(Method) if not name.startswith("_")]
