"""The commands `delete` and `revert`: one snapshot after the other, each told of as it ends.

One that fails does not keep the others from being tried. The deleting and reverting is the
service's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from snapd_vm import cli_bus, cli_snapshots, cli_text
from snapd_vm.cli_bus import CallError, Service
from snapd_vm.cli_job import Followed, follow
from snapd_vm.cli_outcome import Ended, complain


@dataclass(frozen=True)
class Change:
    """What is done to a snapshot: the bus's word for the job and the call, and ours for a person.

    `state` is the snapshot's meanwhile and `done` afterwards; `doing` and `told` are what is said
    before the snapshot's name.
    """

    operation: str
    member: str
    state: str
    done: str
    doing: str
    told: str


DELETE = Change("delete", "Delete", "deleting", "deleted", "deleting", "deleted")
REVERT = Change("revert", "Revert", "reverting", "reverted", "reverting to", "reverted to")


async def delete(service: Service, options: argparse.Namespace) -> str:
    """Deletes the snapshots that the options name; the answers in JSON, if that is wanted.

    Raises CallError before anything is done; Ended if one failed, or at an interrupt.
    """
    return await _each(service, options, DELETE)


async def revert(service: Service, options: argparse.Namespace) -> str:
    """Brings a disk back to the snapshot that the options name; likewise, with one answer."""
    return await _each(service, options, REVERT)


async def _each(service: Service, options: argparse.Namespace, change: Change) -> str:
    known = cli_snapshots.records(await service.objects())
    answers: list[dict[str, Any]] = []
    status = 0
    for said in options.snapshots:
        job: Followed | None = None
        path = ""
        try:
            path = cli_snapshots.find(known, said)
            job = Followed(change.operation, path, f"{change.doing} {said}")
            answer = await _one(service, job, path, options, change)
            answers.append({"snapshot": path, **answer})
            if not options.json:
                _tell(said, answer, change)
        except CallError as error:
            status = 1
            complain(f"{said}: {error}")
            failure = {"state": "failed", "error": error.name, "message": str(error)}
            answers.append({"snapshot": path, **failure})
        if job is not None and job.cancel_asked:
            status = 130
            break
    several = change is DELETE
    text = cli_text.as_json(answers if several else answers[0]) if options.json else ""
    if status:
        raise Ended(status, text)
    return text


async def _one(
    service: Service, job: Followed, path: str, options: argparse.Namespace, change: Change
) -> dict[str, Any]:
    async with service.listening(job.hear):
        call = service.call(path, cli_bus.SNAPSHOT, change.member, "u", 0)
        answer = await follow(service, job, call, until_seen=options.no_wait)
    if answer is None:
        return {"state": change.state, "job": job.path}
    return {"state": change.done, "modified_disk": answer[0]}


def _tell(said: str, answer: dict[str, Any], change: Change) -> None:
    job = f": see {answer['job']}" if "job" in answer else ""
    words = change.doing if job else change.told
    sys.stdout.write(cli_text.printable(f"{words} {said}{job}") + "\n")
    sys.stdout.flush()
