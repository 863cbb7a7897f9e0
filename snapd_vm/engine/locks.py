"""One writing call a domain at a time; domains that recovery could not settle stay closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from snapd_vm.errors import Busy, Cancelled


class Waiter(Protocol):
    """Who may be told to wait no longer: by way of `patience`, whose end comes when it says so."""

    patience: asyncio.Timeout | None

    @property
    def cancelled(self) -> bool: ...


class DomainLocks:
    """Locks by domain UUID, on the asyncio loop. Waiters are served in their order."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._waiting: dict[str, int] = {}
        self._patience: dict[str, set[asyncio.Timeout]] = {}
        self._blocked: dict[str, str] = {}

    @asynccontextmanager
    async def hold(
        self, uuid: str, timeout: float, waiter: Waiter | None = None
    ) -> AsyncIterator[None]:
        """Hold the domain's lock; raises Busy after `timeout` seconds, or once it is blocked.

        Raises Cancelled if the waiter was cancelled before it had the lock.
        """
        self._refuse_blocked(uuid)
        lock = self._locks.setdefault(uuid, asyncio.Lock())
        self._waiting[uuid] = self._waiting.get(uuid, 0) + 1
        try:
            try:
                await self._acquired(uuid, lock, timeout, waiter)
            except TimeoutError:
                if waiter is not None and waiter.cancelled:
                    raise Cancelled("The operation was cancelled; nothing has changed.") from None
                self._refuse_blocked(uuid)
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

    async def _acquired(
        self, uuid: str, lock: asyncio.Lock, timeout: float, waiter: Waiter | None
    ) -> None:
        """Take the lock. Raises TimeoutError when the time is over, or was ended."""
        async with asyncio.timeout(timeout) as patience:
            waiting = self._patience.setdefault(uuid, set())
            waiting.add(patience)
            if waiter is not None:
                waiter.patience = patience
            try:
                await lock.acquire()
            finally:
                if waiter is not None:
                    waiter.patience = None
                waiting.discard(patience)
                if not waiting:
                    self._patience.pop(uuid, None)

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
        """Refuse every writing call on the domain, with this sentence, until `unblock`.

        Those that wait already are refused as well, now.
        """
        self._blocked[uuid] = reason
        for patience in self._patience.get(uuid, ()):
            end(patience)

    def unblock(self, uuid: str) -> None:
        """Take the domain's writing calls again."""
        self._blocked.pop(uuid, None)

    def _refuse_blocked(self, uuid: str) -> None:
        if uuid in self._blocked:
            raise Busy(self._blocked[uuid])


def end(patience: asyncio.Timeout) -> None:
    """Let the wait for a lock end now."""
    if not patience.expired():  # which can't be changed any more
        patience.reschedule(asyncio.get_running_loop().time())
