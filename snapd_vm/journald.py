"""Where log lines go: to journald with their fields, or to stderr with the fields in the line.

A line about a change made to the world carries them: `extra=fields(...)`. The
MESSAGE_IDs are ours for good (systemd.journal-fields(7), "MESSAGE_ID").
"""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from typing import Any

from snapd_vm.model import Snapshot

Extra = dict[str, dict[str, str]]
"""What logging's `extra` takes; the handlers here find the fields in it."""


class MessageId(StrEnum):
    """What a log line is about, for `journalctl MESSAGE_ID=`."""

    CREATED = "f9a3c6c0b1d44c5e8a0e5a1d2f6b7c31"
    DELETED = "d3f5a7196c2e4b80a1d4c7e9f0b2635c"
    REVERTED = "6e0f4a92b7c84d15a3d26c91f8e5b04a"
    CANCELLED = "c19b7d5e3f6a4820b5e8d1a7f4c02963"
    FAILED = "0b6d1f3e5a284f0f9c7d8e2b4a6c1d52"
    SETTLED = "5c2e8b7a9d1f4e63b0a4c6d8e2f71a93"
    FROZEN_TOO_LONG = "7e1d9c3b5f8a42d6a0c2e4b6d8f01375"
    WARNING = "902c7a013df34415b37e93a5778691a7"
    STATE = "a4c8e2061b3d4f57928e6c0a1d5b3f74"
    STRAY = "37d0b5e84f1c4a6e9b2c8d5f7a1e6093"


def fields(message_id: MessageId, snapshot: Snapshot | None = None, **more: object) -> Extra:
    """The `extra` of a line: MESSAGE_ID, DOMAIN, DISK, SNAPSHOT, CONSISTENCY and `more`."""
    found = {"MESSAGE_ID": str(message_id)}
    if snapshot is not None:
        found |= {
            "DOMAIN": snapshot.domain_name,
            "DOMAIN_UUID": snapshot.domain_uuid,
            "DISK": snapshot.target.disk,
            "SNAPSHOT": snapshot.name,
            "SNAPSHOT_UUID": snapshot.uuid,
            "CONSISTENCY": str(snapshot.consistency),
        }
    for key, value in more.items():
        found[key.upper()] = str(value)
    return {"fields": found}


class _Journal(logging.Handler):
    """Sends records to journald with their fields (sd_journal_send(3))."""

    def emit(self, record: logging.LogRecord) -> None:
        from systemd.journal import send

        try:
            given: dict[str, Any] = dict(getattr(record, "fields", {}))
            text = self.format(record)
            # Else the lines would be the interpreter's: "python3", by the name of the process.
            given["SYSLOG_IDENTIFIER"] = "snapd-vm"
            send(text, PRIORITY=_priority(record.levelno), LOGGER=record.name, **given)
        except Exception:
            self.handleError(record)


class _Line(logging.Formatter):
    """One line: level, text, and the fields as KEY=value."""

    def format(self, record: logging.LogRecord) -> str:
        given = getattr(record, "fields", {})
        tail = "".join(f" {key}={value}" for key, value in given.items())
        return f"{record.levelname.lower()}: {super().format(record)}{tail}"


def set_up() -> None:
    """Send log lines to journald if stderr is its stream (JOURNAL_STREAM), else to stderr."""
    handler: logging.Handler
    if _stderr_is_the_journal():
        handler = _Journal()
        handler.setFormatter(logging.Formatter())  # basicConfig's own repeats level and name
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_Line())
    level = os.environ.get("SNAPD_VM_LOG", "info").upper()
    logging.basicConfig(
        level=level if level in logging.getLevelNamesMapping() else "INFO", handlers=[handler]
    )


def _stderr_is_the_journal() -> bool:
    """Whether stderr is the stream that systemd names in JOURNAL_STREAM (systemd.exec(5))."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _priority(level: int) -> int:
    """The syslog priority for a logging level (syslog(3))."""
    for bound, priority in ((50, 2), (40, 3), (30, 4), (20, 6)):
        if level >= bound:
            return priority
    return 7
