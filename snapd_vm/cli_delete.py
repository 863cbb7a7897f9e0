"""The command `delete`: one snapshot after the other, each told of as it ends.

One that fails does not keep the others from being tried. The deleting is the service's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from snapd_vm import cli_bus, cli_snapshots, cli_text
from snapd_vm.cli_bus import CallError, Service
from snapd_vm.cli_job import Followed, follow
from snapd_vm.cli_outcome import Ended, complain


async def delete(service: Service, options: argparse.Namespace) -> str:
    """Deletes the snapshots that the options name; the answer in JSON, if that is wanted.

    Raises CallError before anything is done; Ended if one failed, or at an interrupt.
    """
    known = cli_snapshots.records(await service.objects())
    answers: list[dict[str, Any]] = []
    status = 0
    for said in options.snapshots:
        job: Followed | None = None
        path = ""
        try:
            path = cli_snapshots.find(known, said)
            job = Followed("delete", path, f"deleting {said}")
            answer = await _delete_one(service, job, path, options)
            answers.append({"snapshot": path, **answer})
            if not options.json:
                _tell(said, answer)
        except CallError as error:
            status = 1
            complain(f"{said}: {error}")
            failure = {"state": "failed", "error": error.name, "message": str(error)}
            answers.append({"snapshot": path, **failure})
        if job is not None and job.cancel_asked:
            status = 130
            break
    text = _json(answers) if options.json else ""
    if status:
        raise Ended(status, text)
    return text


async def _delete_one(
    service: Service, job: Followed, path: str, options: argparse.Namespace
) -> dict[str, Any]:
    async with service.listening(job.hear):
        call = service.call(path, cli_bus.SNAPSHOT, "Delete", "u", 0)
        answer = await follow(service, job, call, until_seen=options.no_wait)
    if answer is None:
        return {"state": "deleting", "job": job.path}
    return {"state": "deleted", "modified_disk": answer[0]}


def _tell(said: str, answer: dict[str, Any]) -> None:
    job = f": see {answer['job']}" if "job" in answer else ""
    sys.stdout.write(cli_text.printable(f"{answer['state']} {said}{job}") + "\n")
    sys.stdout.flush()


def _json(answers: Sequence[dict[str, Any]]) -> str:
    return json.dumps(answers, indent=2, ensure_ascii=False) + "\n"
