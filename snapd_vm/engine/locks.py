"""One writing call a domain at a time; domains that recovery could not settle stay closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from snapd_vm.errors import Busy


class DomainLocks:
    """Locks by domain UUID, on the asyncio loop. Waiters are served in their order."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._waiting: dict[str, int] = {}
        self._blocked: dict[str, str] = {}

    @asynccontextmanager
    async def hold(self, uuid: str, timeout: float) -> AsyncIterator[None]:
        """Hold the domain's lock; raises Busy after `timeout` seconds, or at once if blocked."""
        self._refuse_blocked(uuid)
        lock = self._locks.setdefault(uuid, asyncio.Lock())
        self._waiting[uuid] = self._waiting.get(uuid, 0) + 1
        try:
            try:
                await asyncio.wait_for(lock.acquire(), timeout)
            except TimeoutError:
                raise Busy(
                    f"Another operation on the domain has not ended within {timeout:g} s; try "
                    "again later."
                ) from None
            try:
                self._refuse_blocked(uuid)
                yield
            finally:
                lock.release()
        finally:
            self._forget(uuid)

    @asynccontextmanager
    async def attempt(self, uuid: str) -> AsyncIterator[bool]:
        """Hold the lock if it is free now, blocked or not; whether it was."""
        if uuid in self._locks:
            yield False
            return
        lock = self._locks[uuid] = asyncio.Lock()
        self._waiting[uuid] = 1
        await lock.acquire()  # nobody else has it, so that this does not wait
        try:
            yield True
        finally:
            lock.release()
            self._forget(uuid)

    def _forget(self, uuid: str) -> None:
        self._waiting[uuid] -= 1
        if not self._waiting[uuid]:
            del self._waiting[uuid], self._locks[uuid]

    def block(self, uuid: str, reason: str) -> None:
        """Refuse every writing call on the domain, with this sentence, until `unblock`."""
        self._blocked[uuid] = reason

    def unblock(self, uuid: str) -> None:
        """Take the domain's writing calls again."""
        self._blocked.pop(uuid, None)

    def _refuse_blocked(self, uuid: str) -> None:
        if uuid in self._blocked:
            raise Busy(self._blocked[uuid])
