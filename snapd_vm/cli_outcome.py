"""How a command can end otherwise than well, and the line on standard error that says so."""

from __future__ import annotations

import sys

from snapd_vm import cli_text


class UsageError(Exception):
    """What was said can't be meant: exit status 2."""


class Ended(Exception):
    """The command has ended with this status and has said why; `text` is still to be printed."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(status)
        self.status = status
        self.text = text


def require_text(value: str) -> None:
    """Refuses what no D-Bus string can hold. Raises UsageError."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError("An argument is not UTF-8.") from error
    if "\0" in value:
        raise UsageError("An argument holds a NUL character.")


def complain(message: str) -> None:
    """Writes the one line of an error to standard error."""
    sys.stderr.write(f"snapd-vm: error: {cli_text.printable(message)}\n")
    sys.stderr.flush()
