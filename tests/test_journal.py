"""The journal's rows: what was written is read again, by a newer daemon too."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

from snapd_vm.engine.journal import Held, Journal, Kind, Operation
from snapd_vm.model import Consistency, Flags, SnapshotState, Tag
from tests.bus.fakes import make_snapshot


def revert() -> Operation:
    snapshot = make_snapshot()
    tag = Tag(snapshot.uuid, snapshot.name, snapshot.domain_uuid, snapshot.domain_name, 1)
    return Operation(tag, Flags(0), (snapshot,), kind=Kind.REVERT, uid=4242)


def test_an_operation_is_read_as_it_was_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(revert())
    assert journal.operations() == [revert()]
    journal.close()


def test_an_operation_of_a_daemon_that_did_not_know_whose_it_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(revert())
    with sqlite3.connect(tmp_path / "journal.sqlite3") as db:
        row = json.loads(db.execute("SELECT data FROM operation").fetchone()[0])
        del row["uid"]
        db.execute("UPDATE operation SET data = ?", (json.dumps(row),))
    assert journal.operations() == [replace(revert(), uid=0)]
    journal.close()


def test_that_a_revert_is_settled_is_read_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(revert())
    journal.begin(replace(revert(), settled=True))
    assert journal.operations() == [replace(revert(), settled=True)]
    journal.close()


def test_a_guest_that_may_be_frozen_still_is_not_forgotten_by_the_next_create(
    tmp_path: Path,
) -> None:
    journal, operation = Journal(tmp_path), revert()
    domain = operation.tag.domain_uuid
    journal.prepared(operation, Held(domain, "web", 7, frozen=True, stopped=False))
    journal.prepared(operation, Held(domain, "web", None, frozen=False, stopped=True))
    assert journal.held() == [Held(domain, "web", 7, frozen=True, stopped=True)]
    journal.close()


def test_a_snapshot_that_is_gone_is_not_written_down_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    there, gone = make_snapshot(1), make_snapshot(2)
    journal.end(revert(), [there], release=False)
    for snapshot in (there, gone):
        journal.put(replace(snapshot, state=SnapshotState.MISSING))
    assert journal.snapshots() == [replace(there, state=SnapshotState.MISSING)]
    journal.close()


def test_what_a_disk_went_back_to_counts_until_the_domain_runs(tmp_path: Path) -> None:
    journal, one = Journal(tmp_path), revert()
    (draft,) = one.drafts
    crash = replace(one, drafts=(replace(draft, consistency=Consistency.CRASH),))
    clean = replace(one, drafts=(replace(draft, consistency=Consistency.QUIESCED),))
    journal.end(crash, [], release=False)  # undone
    assert not journal.unclean(draft.domain_uuid)
    for operation in (crash, clean, crash, crash):
        journal.end(operation, [draft], release=False)
        assert journal.unclean(draft.domain_uuid) == (operation is crash)
    journal.stopped(draft.domain_uuid, clean=True)
    assert journal.unclean(draft.domain_uuid)
    journal.stopped(draft.domain_uuid, clean=False)
    assert not journal.unclean(draft.domain_uuid)
    journal.close()


def test_a_journal_of_the_first_version(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(revert())
    journal.close()
    with sqlite3.connect(tmp_path / "journal.sqlite3") as db:
        db.execute("DROP TABLE unclean_disk")
        db.execute("PRAGMA user_version=1")
    for _ in range(2):
        journal = Journal(tmp_path)
        assert journal.operations() == [revert()]
        assert not journal.unclean(revert().tag.domain_uuid)
        journal.close()
