"""The domains' locks: who waits, for how long, and what ends it."""

from __future__ import annotations

import asyncio

import pytest

from snapd_vm.engine.jobs import Jobs, Running
from snapd_vm.engine.locks import DomainLocks
from snapd_vm.errors import Busy, Cancelled, SnapdError

LONG = 60


def job() -> Running:
    """An operation that can be cancelled."""
    return Jobs().begin(
        "create", domain_uuid="u", disk="", name="", objects=(), uid=0, cancelable=True
    )


async def attempt(locks: DomainLocks, timeout: float, running: Running | None = None) -> str:
    """Hold the lock for a moment: "held", or what is said instead."""
    try:
        async with locks.hold("u", timeout, running):
            return "held"
    except SnapdError as error:
        return f"{type(error).__name__}: {error}"


async def waiting(locks: DomainLocks, running: Running | None = None) -> asyncio.Task[str]:
    task = asyncio.create_task(attempt(locks, LONG, running))
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_who_waits_is_refused_when_a_delete_begins() -> None:
    locks = DomainLocks()
    async with asyncio.timeout(5), locks.hold("u", 1):
        first, second = await waiting(locks), await waiting(locks)
        locks.block("u", "A delete runs.")
        locks.block("u", "A delete runs.")
        assert [await first, await second] == ["Busy: A delete runs."] * 2
        with pytest.raises(Busy, match="A delete runs"):
            async with locks.hold("u", LONG):
                pass
        locks.unblock("u")
        third = await waiting(locks)
    assert await third == "held"
    assert await attempt(locks, 0) == "held"


async def test_who_waits_can_be_cancelled_and_holds_up_nobody() -> None:
    locks = DomainLocks()
    async with asyncio.timeout(5), locks.hold("u", 1):
        running = job()
        first, second = await waiting(locks, running), await waiting(locks)
        running.cancel()
        running.cancel()
        locks.block("u", "A delete runs.")
        assert (await first).startswith(Cancelled.__name__)
        assert (await second).startswith(Busy.__name__)
        locks.unblock("u")
    assert await attempt(locks, 0) == "held"
    assert running.patience is None


async def test_a_wait_that_was_ended_in_the_moment_of_its_turn_leaves_the_lock_free() -> None:
    locks = DomainLocks()
    async with asyncio.timeout(5):
        async with locks.hold("u", 1):
            running = job()
            first, second = await waiting(locks, running), await waiting(locks)
        running.cancel()  # it has the lock, and has not heard of it
        assert await first in (
            "held",
            "Cancelled: The operation was cancelled; nothing has changed.",
        )
        assert await second == "held"
    assert await attempt(locks, 0) == "held"


async def test_no_longer_than_the_limit() -> None:
    locks = DomainLocks()
    async with locks.hold("u", 1):
        assert "within 0.05 s" in await attempt(locks, 0.05)
    assert await attempt(locks, 0) == "held"
