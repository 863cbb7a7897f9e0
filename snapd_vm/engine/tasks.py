"""The tasks of the engine: operations, which nobody's leaving ends, and what runs beside them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from snapd_vm.errors import Cancelled, Internal, SnapdError

log = logging.getLogger(__name__)
T = TypeVar("T")


class Tasks:
    """Holds them until they are done."""

    def __init__(self) -> None:
        self.closing = False
        self._operations: set[asyncio.Task[Any]] = set()
        self._beside: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin an operation. Raises Cancelled if none may begin any more."""
        try:
            self.require_open()
        except Cancelled:
            work.close()
            raise
        return self._held(work, self._operations)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin what is cancelled at the end of the daemon."""
        return self._held(work, self._beside)

    def require_open(self) -> None:
        """Raises Cancelled if nothing may begin any more."""
        if self.closing:
            raise Cancelled("The daemon is stopping; try again when it is back.")

    async def close(self, limit: float) -> None:
        """Begin nothing new, and let operations come to their end, for at most `limit` seconds."""
        self.closing = True
        if self._operations:
            log.info("waiting for %d operations", len(self._operations))
            await asyncio.wait(self._operations, timeout=limit)
        left = [*self._beside, *self._operations]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _held(self, work: Coroutine[Any, Any, T], among: set[asyncio.Task[Any]]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        among.add(task)
        task.add_done_callback(among.discard)
        task.add_done_callback(_consume)
        return task


def _consume(task: asyncio.Task[Any]) -> None:
    """Log what nobody awaits any more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        if isinstance(error, SnapdError) and not isinstance(error, Internal):
            log.debug("an operation ended with: %s", error)
        else:
            log.error("an operation ended with a stray error", exc_info=error)
