"""The journal: what was begun, what may be frozen, and which snapshots there are, in SQLite.

Every write is durable when its function returns (WAL, synchronous=FULL; sqlite.org/pragma.html).
All functions block and may be called from any thread. One process writes; a second, the release
of what is held after a crash, only reads.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from snapd_vm.errors import Internal, NoSpace
from snapd_vm.model import Consistency, Flags, Snapshot, SnapshotState, Tag, Target

_SCHEMA = """
CREATE TABLE operation (uuid TEXT PRIMARY KEY, domain TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE snapshot (uuid TEXT PRIMARY KEY, domain TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE held (domain TEXT PRIMARY KEY, data TEXT NOT NULL);
CREATE TABLE unclean_stop (domain TEXT PRIMARY KEY);
"""
_SINCE_2 = """
CREATE TABLE unclean_disk (domain TEXT NOT NULL, disk TEXT NOT NULL, PRIMARY KEY (domain, disk));
PRAGMA user_version = 2;
"""
_VERSION = 2
_CLEAN = (Consistency.OFFLINE, Consistency.QUIESCED)
T = TypeVar("T")


class Kind(StrEnum):
    """What an operation does."""

    CREATE = "create"
    DELETE = "delete"
    REVERT = "revert"


_Row = tuple[str, tuple[str, ...]]
"""A statement and its values."""


class Step(StrEnum):
    """The moments of a Create, in order; a daemon that is killed at any of them must recover."""

    CHECKED = "checked"
    BEGUN = "begun"  # journalled: what will be made, under which draft name
    PREPARED = "prepared"  # journalled: what was made, and that the guest may be frozen from now
    ARMED = "armed"  # all that can be made before the freeze is made
    FROZEN = "frozen"
    STOPPED = "stopped"  # the vCPUs stand still, where several methods take part
    SWITCHED = "switched"
    THAWED = "thawed"
    READ_BACK = "read-back"
    ENDED = "ended"  # journalled: the snapshot, and nothing held


class DeleteStep(StrEnum):
    """The moments of a Delete, likewise."""

    CHECKED = "delete-checked"
    BEGUN = "delete-begun"  # journalled: what is being deleted
    COMMITTED = "delete-committed"  # its storage is gone
    ENDED = "delete-ended"  # journalled: its record is gone


class RevertStep(StrEnum):
    """The moments of a Revert, likewise."""

    CHECKED = "revert-checked"
    BEGUN = "revert-begun"  # journalled: what will be made, and what is discarded
    PREPARED = "revert-prepared"  # journalled: what was made
    ARMED = "revert-armed"  # it has its name
    SWITCHED = "revert-switched"  # the disk is the snapshot's
    CLEARED = "revert-cleared"  # what it held is gone
    SETTLED = "revert-settled"  # journalled: that; nothing on the storage need tell it any more
    ENDED = "revert-ended"  # journalled: what the snapshots are now


AnyStep: TypeAlias = Step | DeleteStep | RevertStep


@dataclass(frozen=True, slots=True)
class Operation:
    """A Create, Delete or Revert that was begun.

    The drafts of a Create are the records of its snapshots as they will be if all goes well; a
    draft's consistency is the least that it can be. Those of a Delete are what is being deleted,
    that of a Revert what is gone back to. `failed`: the caller of a Create was told so; it is to be
    undone and not completed. `settled`: the disk of a Revert is reverted. `uid` is who started it.
    """

    tag: Tag
    flags: Flags
    drafts: tuple[Snapshot, ...]
    failed: bool = False
    kind: Kind = Kind.CREATE
    uid: int = 0
    settled: bool = False

    @property
    def targets(self) -> tuple[Target, ...]:
        """What the methods act on."""
        return tuple(draft.target for draft in self.drafts)

    def with_targets(self, targets: Sequence[Target]) -> Operation:
        """The same with what a method knows meanwhile of these disks."""
        known = {target.disk: target for target in targets}
        drafts = [
            dataclasses.replace(draft, target=known.get(draft.target.disk, draft.target))
            for draft in self.drafts
        ]
        return dataclasses.replace(self, drafts=tuple(drafts))


@dataclass(frozen=True, slots=True)
class Held:
    """A domain that we may have made stand still: its file systems `frozen`, its vCPUs `stopped`.

    `agent_timeout` is the response timeout to put back.
    """

    domain_uuid: str
    domain_name: str
    agent_timeout: int | None
    frozen: bool = True
    stopped: bool = False

    def joined(self, later: Held) -> Held:
        """What is to be released of this and a later one of the same domain together."""
        return dataclasses.replace(
            later,
            agent_timeout=later.agent_timeout if self.agent_timeout is None else self.agent_timeout,
            frozen=self.frozen or later.frozen,
            stopped=self.stopped or later.stopped,
        )


def claim(folder: Path) -> int:
    """Take the folder for this process alone; the descriptor to keep open.

    A second daemon's recovery would settle what the first one is at work on. Raises Internal.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Internal(f"The folder {folder} can't be used: {error.strerror}.") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise Internal(f"Another daemon is using the folder {folder}; stop it first.") from error
    return fd


class Journal:
    """An open journal."""

    def __init__(self, folder: Path) -> None:
        """Open the journal in `folder`, which is made if it is missing. Raises Internal."""
        self._lock = threading.RLock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                folder / "journal.sqlite3", check_same_thread=False, isolation_level=None, timeout=5
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self._db.executescript(f"BEGIN;{_SCHEMA}{_SINCE_2}COMMIT;")
            elif version == 1:
                self._db.executescript(f"BEGIN;{_SINCE_2}COMMIT;")
            elif version != _VERSION:
                raise Internal(f"The journal in {folder} is of version {version}, not {_VERSION}.")
        except (OSError, sqlite3.Error) as error:
            raise Internal(f"The journal in {folder} can't be opened: {error}.") from error

    def close(self) -> None:
        """Close it."""
        with self._lock:
            self._db.close()

    def begin(self, operation: Operation) -> None:
        """Write down an operation, or its later form."""
        self._write([_put_operation(operation)])

    def prepared(self, operation: Operation, held: Held | None) -> None:
        """Write down what was made, and that the domain may stand still from now on."""
        rows = [_put_operation(operation)]
        if held is not None:
            known = [one for one in self.held() if one.domain_uuid == held.domain_uuid]
            rows.append(_put_held(known[0].joined(held) if known else held))
        self._write(rows)

    def end(self, operation: Operation, snapshots: Sequence[Snapshot], release: bool) -> None:
        """Close an operation: these snapshots are as they are here; `release` what was held."""
        rows: list[_Row] = [("DELETE FROM operation WHERE uuid = ?", (operation.tag.uuid,))]
        rows += [_put_snapshot(snapshot) for snapshot in snapshots]
        if operation.kind is Kind.REVERT and snapshots:
            rows.append(_put_disk(operation.drafts[0]))
        if release:
            rows.append(("DELETE FROM held WHERE domain = ?", (operation.tag.domain_uuid,)))
        self._write(rows)

    def deleted(self, operation: Operation, moved: Sequence[Snapshot]) -> None:
        """Close a Delete: its snapshots are gone, and others have moved."""
        rows: list[_Row] = [("DELETE FROM operation WHERE uuid = ?", (operation.tag.uuid,))]
        rows += [("DELETE FROM snapshot WHERE uuid = ?", (d.uuid,)) for d in operation.drafts]
        rows += [_put_snapshot(snapshot) for snapshot in moved]
        self._write(rows)

    def release(self, domain_uuid: str) -> None:
        """The domain is thawed for certain."""
        self._write([("DELETE FROM held WHERE domain = ?", (domain_uuid,))])

    def put(self, snapshot: Snapshot) -> None:
        """Replace a snapshot's record, if it has one still."""
        statement = "UPDATE snapshot SET data = ? WHERE uuid = ?"
        self._write([(statement, (json.dumps(dataclasses.asdict(snapshot)), snapshot.uuid))])

    def stopped(self, domain_uuid: str, *, clean: bool, ended: bool = False) -> None:
        """Remember whether the domain's last stop was a clean one; one that runs has had none.

        What its disks were before it ran says no more what they are. `ended`: libvirt calls it a
        clean one, and it was not.
        """
        if clean:
            self._write([("DELETE FROM unclean_stop WHERE domain = ?", (domain_uuid,))])
        else:
            rows: list[_Row] = [
                ("INSERT OR REPLACE INTO unclean_stop VALUES (?)", (domain_uuid,)),
                ("DELETE FROM unclean_disk WHERE domain = ?", (domain_uuid,)),
            ]
            if ended:  # of no disk alone
                rows.append(("INSERT INTO unclean_disk VALUES (?, '')", (domain_uuid,)))
            self._write(rows)

    def unclean(self, domain_uuid: str) -> bool:
        """Whether disks of the domain are not clean, whatever libvirt says of its last stop: one
        has gone back since to a snapshot that is not, or the domain was ended without its guest.
        """
        return bool(self._read("SELECT 1 FROM unclean_disk WHERE domain = ?", domain_uuid))

    def stopped_uncleanly(self, domain_uuid: str) -> bool:
        """Whether the last stop that we saw of the domain was not a clean one."""
        return bool(self._read("SELECT 1 FROM unclean_stop WHERE domain = ?", domain_uuid))

    def operations(self) -> list[Operation]:
        """All that was begun and not ended."""
        return self._entries("SELECT data FROM operation", _operation)

    def snapshots(self) -> list[Snapshot]:
        """All snapshots on record."""
        return self._entries("SELECT data FROM snapshot", _snapshot)

    def held(self) -> list[Held]:
        """All domains that we may have frozen."""
        return self._entries("SELECT data FROM held", lambda row: Held(**row))

    def _write(self, rows: Sequence[_Row]) -> None:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                for statement, values in rows:
                    self._db.execute(statement, values)
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if "full" in str(error):  # SQLITE_FULL: "database or disk is full"
                    raise NoSpace("There is no room for the daemon's journal.") from error
                raise Internal(f"The journal can't be written: {error}.") from error

    def _entries(self, statement: str, parse: Callable[[dict[str, Any]], T]) -> list[T]:
        try:
            return [parse(json.loads(row[0])) for row in self._read(statement)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Internal(f"The journal holds an entry that makes no sense: {error}.") from error

    def _read(self, statement: str, *values: str) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                raise Internal(f"The journal can't be read: {error}.") from error


def _put_operation(operation: Operation) -> _Row:
    tag = operation.tag
    text = json.dumps(dataclasses.asdict(operation))
    return "INSERT OR REPLACE INTO operation VALUES (?, ?, ?)", (tag.uuid, tag.domain_uuid, text)


def _put_disk(snapshot: Snapshot) -> _Row:
    """That the disk is what the snapshot is."""
    statement = (
        "DELETE FROM unclean_disk WHERE domain = ? AND disk = ?"
        if snapshot.consistency in _CLEAN
        else "INSERT OR REPLACE INTO unclean_disk VALUES (?, ?)"
    )
    return (statement, (snapshot.domain_uuid, snapshot.target.disk))


def _put_snapshot(snapshot: Snapshot) -> _Row:
    text = json.dumps(dataclasses.asdict(snapshot))
    return (
        "INSERT OR REPLACE INTO snapshot VALUES (?, ?, ?)",
        (snapshot.uuid, snapshot.domain_uuid, text),
    )


def _put_held(held: Held) -> _Row:
    text = json.dumps(dataclasses.asdict(held))
    return "INSERT OR REPLACE INTO held VALUES (?, ?)", (held.domain_uuid, text)


def _operation(row: dict[str, Any]) -> Operation:
    return Operation(
        tag=Tag(**row["tag"]),
        flags=Flags(row["flags"]),
        drafts=tuple(_snapshot(draft) for draft in row["drafts"]),
        failed=row["failed"],
        kind=Kind(row.get("kind", Kind.CREATE)),
        uid=row.get("uid", 0),
        settled=row.get("settled", False),
    )


def _snapshot(row: dict[str, Any]) -> Snapshot:
    return Snapshot(
        **{
            **row,
            "target": Target(**row["target"]),
            "state": SnapshotState(row["state"]),
            "consistency": Consistency(row["consistency"]),
        }
    )
