"""The jobs: what runs longer than a moment, its progress, and who may ask it to stop.

Runs on the asyncio loop, except for Watch's functions, which worker threads call.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Mapping

from snapd_vm.engine.locks import end
from snapd_vm.engine.service import Listener
from snapd_vm.errors import Cancelled, Internal, InvalidState, SnapdError
from snapd_vm.model import Job, Result

log = logging.getLogger(__name__)

_MOMENT_S = 0.5
_STAYS_S = 60.0
_TELL_EVERY_S = 0.2


class Jobs:
    """All jobs by number; those that are over stay for a minute."""

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}
        self.listeners: list[Listener] = []
        self._numbers = itertools.count(1)
        self._running: dict[int, Running] = {}

    def begin(
        self,
        operation: str,
        *,
        domain_uuid: str,
        disk: str,
        name: str,
        objects: tuple[str, ...],
        uid: int,
        cancelable: bool,
    ) -> Running:
        """A new operation; it is told of as a job once it has run for half a second."""
        job = Job(
            number=next(self._numbers),
            operation=operation,
            domain_uuid=domain_uuid,
            disk=disk,
            name=name,
            start_us=int(time.time() * 1e6),
            objects=objects,
            uid=uid,
            cancelable=cancelable,
        )
        return Running(self, job)

    async def cancel(self, number: int) -> None:
        """Ask a job to stop, and wait for its end. Raises InvalidState if it can't any more."""
        running = self._running.get(number)
        if running is None:
            raise InvalidState("The job has ended; look at its Result.")
        running.cancel()
        await running.over.wait()

    def put(self, running: Running, old: Job | None, new: Job) -> None:
        """Tell of a job, or of a change of it."""
        self.jobs[new.number] = new
        self._running[new.number] = running
        for listener in self.listeners:
            if old is None:
                listener.job_added(new)
            else:
                listener.job_changed(old, new)

    def ended(self, job: Job, success: bool, message: str) -> None:
        """Tell of a job's end, and forget it in a minute."""
        del self._running[job.number]
        for listener in self.listeners:
            listener.job_completed(job, success, message)
        asyncio.get_running_loop().call_later(_STAYS_S, self._forget, job.number)

    def _forget(self, number: int) -> None:
        job = self.jobs.pop(number)
        for listener in self.listeners:
            listener.job_removed(job)


class Running:
    """One running operation; a Watch for the thread that does it."""

    def __init__(self, jobs: Jobs, job: Job) -> None:
        self.over = asyncio.Event()
        self.patience: asyncio.Timeout | None = None
        """While it waits for its turn; see locks.py."""
        self._jobs = jobs
        self._job = job
        self._told = False
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._cancelled = False
        self._spoilt = False
        self._returnable = job.cancelable
        self._last = 0.0
        self._timer = self._loop.call_later(_MOMENT_S, self._tell)

    # -- for the worker thread -------------------------------------------------------------------

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to stop."""
        return self._cancelled

    def progress(self, done: int, total: int) -> None:
        """See methods.method.Watch; the bus is told five times a second at the most."""
        now = time.monotonic()
        if now - self._last < _TELL_EVERY_S:
            return
        self._last = now
        self._loop.call_soon_threadsafe(self._progressed, done, total)

    def spoil(self) -> None:
        """See methods.method.Watch."""
        self._spoilt = True

    @property
    def spoilt(self) -> bool:
        """See methods.method.Watch."""
        return self._spoilt

    def past_return(self) -> None:
        """See methods.method.Watch."""
        with self._lock:
            if self._cancelled:
                raise Cancelled("The operation was cancelled; nothing has changed.")
            self._returnable = False
        self._loop.call_soon_threadsafe(self._change, {"cancelable": False})

    # -- for the loop ----------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ask it to stop. Raises InvalidState if it can't any more."""
        with self._lock:
            if not self._returnable:
                raise InvalidState("The job can't be cancelled any more; wait for its end.")
            self._cancelled = True
        if self.patience is not None:
            end(self.patience)

    def give_up(self, *, past_return: bool = False) -> bool:
        """Its caller is told that it has failed, so it is to be undone; whether it can be.

        `past_return`: also where it can't be cancelled any more, but has not ended.
        """
        with self._lock:
            if self.over.is_set() or not (self._returnable or past_return):
                return False
            self._cancelled = True
            return True

    def end(self, error: BaseException | None, result: Result) -> None:
        """It is over. The message of an error goes to its caller alone, as it may name a path: all
        others are told its name, and what errors.py says of all that have this name."""
        self._timer.cancel()
        self.over.set()
        if not self._told:
            return
        message = ""
        if error is None:
            done: dict[str, object] = {
                "progress": 1.0,
                "result": dict(result),
                "done": True,
                "cancelable": False,
            }
        else:
            kind = type(error) if isinstance(error, SnapdError) else Internal
            message = (kind.__doc__ or "").partition("\n")[0]
            done = {"result": {"error": kind.dbus_name}, "done": True, "cancelable": False}
        self._change(done)
        self._jobs.ended(self._job, error is None, message)

    def _tell(self) -> None:
        self._told = True
        self._jobs.put(self, None, self._job)

    def _progressed(self, done: int, total: int) -> None:
        if total > 0:
            # There may be more to do meanwhile, as the guest writes on; what is done stays done.
            share = max(self._job.progress, min(done / total, 1.0))
            self._change({"progress": share, "progress_valid": True, "bytes": total})

    def _change(self, changed: Mapping[str, object]) -> None:
        old = self._job
        if old.done:
            return
        self._job = dataclasses.replace(old, **changed)  # type: ignore[arg-type]  # by its names
        if self._told and self._job != old:
            self._jobs.put(self, old, self._job)
