"""A program from outside that is a method: found fit, asked one thing at a time, its answer judged.

What it answers is hostile: bounded, held against data/executable-method.schema.json, and an error
of its own is one of a few, with a printable sentence. It knows no operation but by its name.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from snapd_vm import command, errors, storage
from snapd_vm.errors import MethodNotSupported, SnapdError, StorageFailed, TimedOut
from snapd_vm.methods.outside import jsonform
from snapd_vm.model import Json
from snapd_vm.outsideconfig import ExecutableConfig

log = logging.getLogger(__name__)

PROTOCOL = 1
"""Of what is said in JSON."""

LONGEST_ANSWER = 1 << 20
"""Bytes; ten thousand snapshots, as `list` may tell of, take as many."""

_MOST_LINES = 100
_LONGEST_LINE = 400


class Refused(Exception):
    """The program has answered with an error, which `error` is for callers."""

    def __init__(self, error: SnapdError) -> None:
        super().__init__(str(error))
        self.error = error


class Program:
    """See the top of the file; functions block, and raise SnapdErrors."""

    def __init__(self, settings: ExecutableConfig, mark: str) -> None:
        self.name = settings.name
        self._path = settings.path
        self._timeout = settings.timeout_s
        self._rights = command.Rights(settings.user, settings.capabilities)
        self._mark = mark

    def fit(self) -> str:
        """The real path of the file, if none but root can change it or what leads to it.

        Looked at before each run. Raises StorageFailed.
        """
        return kept_by_root(self._path, f"The program of method {self.name}", stat.S_IXUSR)

    def end_leftovers(self) -> None:
        """Kill what an earlier daemon has started and left running."""
        try:
            count = command.end_marked(self._mark)
        except command.CommandError as error:
            raise StorageFailed(f"Method {self.name} is at work still: {error}.") from error
        if count:
            log.warning("method %s: %d processes of an earlier daemon ended", self.name, count)

    def ask(
        self,
        operation: str,
        snapshots: Sequence[Mapping[str, Json]],
        *,
        said: list[str] | None = None,
        revert_id: str = "",
    ) -> Mapping[str, Any]:
        """Run it for one operation; its answer, of the right form.

        Its stderr goes to the log; with `said`, its lines are left there, to be told later. A
        revert, and no other, has a `revert_id`. Raises Refused where it answers with an error,
        TimedOut, and StorageFailed for all else.
        """
        request = {
            "protocol": PROTOCOL,
            "method": self.name,
            "operation": operation,
            "snapshots": snapshots,
            **({"revert_id": revert_id} if revert_id else {}),
        }
        lines: list[str] = []
        try:
            result = command.run(
                [self.fit()],
                timeout=self._timeout,
                check=False,
                send=json.dumps(request).encode() + b"\n",
                most=LONGEST_ANSWER,
                rights=self._rights,
                mark=self._mark,
            )
            lines = _lines(result.stderr)
        except command.CommandError as error:
            lines = _lines(error.stderr)
            kind = TimedOut if isinstance(error, command.CommandTimedOut) else StorageFailed
            raise kind(f"Method {self.name} failed to {operation}: {error}.") from error
        finally:
            if said is None:
                self.tell(lines)
            else:
                said += lines
        if result.status != 0:
            raise self._failure(operation, result, lines)
        return self._judged(operation, result.stdout)

    def tell(self, lines: Sequence[str]) -> None:
        """What it wrote to stderr, to the log."""
        for line in lines:
            log.info("method %s says: %s", self.name, line)

    def _judged(self, operation: str, text: str) -> Mapping[str, Any]:
        try:
            answer = jsonform.read(text)
            _form().check(answer, f"#/$defs/answers/{operation}")
        except jsonform.Unfit as error:
            raise StorageFailed(
                f"The answer of method {self.name} to {operation} can't be used: {error}."
            ) from None
        assert isinstance(answer, dict)  # noqa: S101  # every answer's form says so
        return answer

    def _failure(self, operation: str, result: command.Result, lines: Sequence[str]) -> Exception:
        try:
            answer: Any = jsonform.read(result.stdout)
            _form().check(answer, "#/$defs/failure")
        except jsonform.Unfit:
            why = lines[-1] if lines else f"status {result.status}"
            return StorageFailed(f"Method {self.name} failed to {operation}: {why}.")
        error = answer["error"]
        kind: type[SnapdError] = getattr(errors, error["name"])
        return Refused(kind(f"Method {self.name}: {sentence(error['message'])}"))


def sentence(text: str) -> str:
    """A stranger's sentence as it may be shown: printable, on one line, with a full stop."""
    printable = "".join(c if c.isprintable() else " " for c in text).strip()
    return printable if printable.endswith((".", "!", "?")) else f"{printable}."


def kept_by_root(path: str, what: str, mode: int = 0) -> str:
    """The real path of a regular file that, as its folders, only root can change.

    `mode`: bits that it must have. A symlink is not followed at its end. Raises StorageFailed.
    """
    folder, name = os.path.split(path)
    try:
        with storage.open_folder(folder, {0}, ()) as fd:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
    except MethodNotSupported:
        raise StorageFailed(f"{what} is in a folder that others than root can change.") from None
    except OSError as error:
        raise StorageFailed(f"{what}, {path}, can't be used: {error.strerror}.") from error
    if not stat.S_ISREG(found.st_mode):
        raise StorageFailed(f"{what}, {path}, is not a regular file.")
    if found.st_uid != 0 or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StorageFailed(f"{what}, {path}, must be root's, and writable by root alone.")
    if found.st_mode & mode != mode:
        raise StorageFailed(f"{what}, {path}, is not executable.")
    return os.path.join(os.path.realpath(folder), name)


def _lines(stderr: str) -> list[str]:
    found = [line for line in stderr.splitlines() if line.strip()]
    lines = [
        "".join(c if c.isprintable() else "?" for c in line[:_LONGEST_LINE])
        for line in found[:_MOST_LINES]
    ]
    if len(found) > _MOST_LINES:
        lines.append(f"(and {len(found) - _MOST_LINES} lines more)")
    return lines


@cache
def _form() -> jsonform.Form:
    path = Path(__file__).parents[2] / "data" / "executable-method.schema.json"
    return jsonform.Form(json.loads(path.read_bytes()))
