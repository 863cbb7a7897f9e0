"""What a job tells of its progress when there is more and more to do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from snapd_vm.engine import jobs
from snapd_vm.engine.jobs import Jobs
from snapd_vm.model import Job


class Heard:
    """A listener."""

    def __init__(self) -> None:
        self.progress: list[float] = []
        self.completed = asyncio.Event()

    def job_added(self, job: Job) -> None:
        self.progress.append(job.progress)

    def job_changed(self, _: Job, new: Job) -> None:
        self.progress.append(new.progress)

    def job_completed(self, *_: Any) -> None:
        self.completed.set()


async def test_what_is_done_stays_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_MOMENT_S", 0.0)
    monkeypatch.setattr(jobs, "_TELL_EVERY_S", 0.0)
    table, heard = Jobs(), Heard()
    listener: Any = heard
    table.listeners.append(listener)
    running = table.begin(
        "delete", domain_uuid="", disk="vda", name="", objects=(), uid=0, cancelable=True
    )
    for done, total in ((0, 0), (1, 10), (5, 10), (6, 100), (90, 100)):
        await asyncio.to_thread(running.progress, done, total)
        await asyncio.sleep(0)
    running.end(None, {})
    await heard.completed.wait()
    assert heard.progress == sorted(heard.progress)
    assert {0.1, 0.5, 0.9, 1.0} <= set(heard.progress)
