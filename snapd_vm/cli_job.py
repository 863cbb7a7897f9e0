"""A job as the client follows it: which one a call has started, how far it is, and Ctrl-C.

It draws on standard error only, and only on a terminal. What the job does is not its business.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Awaitable
from typing import Any

from snapd_vm import cli_bus, cli_text
from snapd_vm.cli_bus import CallError, Service, Signal
from snapd_vm.cli_outcome import Ended, complain

GOES_ON = "Interrupted; the service goes on with what it began: see 'snapd-vm list'."


class Bar:
    """One line on a terminal that is drawn over again; nothing where there is no terminal."""

    def __init__(self, label: str) -> None:
        self._label = cli_text.printable(label)
        self._shown = ""

    def show(self, job: dict[str, Any]) -> None:
        """Draws the state of a job, if it looks different from what is there."""
        if not sys.stderr.isatty():
            return
        fraction = job["Progress"] if job["ProgressValid"] else None
        line = cli_text.progress(self._label, fraction, job["Bytes"])
        line = line[: shutil.get_terminal_size().columns - 1]
        if line != self._shown:
            # Blanks, and no escape sequence: every terminal knows them.
            sys.stderr.write(f"\r{line.ljust(len(self._shown))}")
            sys.stderr.flush()
            self._shown = line

    def clear(self) -> None:
        """Takes the line away."""
        if self._shown:
            sys.stderr.write(f"\r{' ' * len(self._shown)}\r")
            sys.stderr.flush()
            self._shown = ""


class Followed:
    """The job that a call of ours starts: `hear` is to be given the signals from before the call.

    It is the first new one of this operation on this object that is our own user's.
    """

    def __init__(self, operation: str, subject: str, label: str) -> None:
        self.path = ""
        self.seen = asyncio.Event()
        self.cancel_asked = False
        self.bar = Bar(label)
        self._operation = operation
        self._subject = subject
        self._properties: dict[str, Any] = {}

    def hear(self, signal: Signal) -> None:
        """Takes note of what is told of the job."""
        if signal.member == "InterfacesAdded" and not self.path:
            path, interfaces = signal.body
            job = interfaces.get(cli_bus.JOB)
            if job is not None and self._is_ours(job):
                self.path = path
                self._properties = dict(job)
                self.seen.set()
                self.bar.show(self._properties)
        elif signal.member == "PropertiesChanged" and signal.path == self.path:
            self._properties.update(signal.body[1])
            self.bar.show(self._properties)

    def _is_ours(self, job: dict[str, Any]) -> bool:
        return (
            job["Operation"] == self._operation
            and self._subject in job["Objects"]
            and job["StartedByUID"] == os.geteuid()
        )


async def follow(
    service: Service, job: Followed, call: Awaitable[list[Any]], *, until_seen: bool = False
) -> list[Any] | None:
    """The answer of the call, or None once its job is seen if that is enough.

    The first Ctrl-C asks the job to cancel, and the answer is waited for; a second one, or one
    while there is no job, leaves. Raises CallError, Ended.
    """
    loop = asyncio.get_running_loop()
    leave = asyncio.Event()
    answer = asyncio.ensure_future(call)
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(leave.wait())]
    if until_seen:
        tasks.append(asyncio.create_task(job.seen.wait()))

    def interrupted() -> None:
        job.bar.clear()
        if job.path and not job.cancel_asked:
            job.cancel_asked = True
            tasks.append(asyncio.create_task(_cancel(service, job)))
        else:
            leave.set()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        await asyncio.wait([answer, *tasks], return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if leave.is_set():
            complain(GOES_ON)
            raise Ended(130)
        return None
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        for task in (answer, *tasks):
            task.cancel()
        job.bar.clear()


async def _cancel(service: Service, job: Followed) -> None:
    sys.stderr.write("Asked the service to cancel it; Ctrl-C once more leaves it alone.\n")
    sys.stderr.flush()
    try:
        await service.call(job.path, cli_bus.JOB, "Cancel")
    except CallError as error:
        complain(f"It can't be cancelled: {error}")
