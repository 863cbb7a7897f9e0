"""What is undone where the journal takes nothing any more, which a real one does not on demand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from snapd_vm.config import Config
from snapd_vm.engine import recovery
from snapd_vm.engine.changes import Outcome
from snapd_vm.engine.create import Failed
from snapd_vm.engine.journal import Held, Operation
from snapd_vm.engine.keeper import Keeper
from snapd_vm.engine.locks import DomainLocks
from snapd_vm.errors import NoSpace, StorageFailed
from snapd_vm.model import Flags, Tag
from tests.bus.fakes import make_domain, make_snapshot


class Full:
    """Stands for World with a journal that is full, and a domain that runs."""

    def __init__(self) -> None:
        self.config = Config()
        self.journal = self.hypervisor = self

    def read(self, _: str) -> Any:
        return make_domain(1)

    def _full(self, *_: Any, **__: Any) -> None:
        raise NoSpace("The journal's file system is full.")

    begin = end = release = _full

    async def run(self, function: Any, *args: Any, **more: Any) -> Any:
        return function(*args, **more)


@pytest.mark.parametrize("held", [True, False])
async def test_what_has_failed_is_undone_although_that_can_not_be_written_down(
    monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    undone = []

    def settle(_: Any, __: Operation, *, keep: bool) -> list[Any]:
        undone.append(keep)
        return []

    monkeypatch.setattr(recovery, "thaw", lambda *_: True)
    monkeypatch.setattr(recovery, "settle", settle)
    locks, anything = DomainLocks(), object()
    parts: Any = (Full(), anything, anything, locks, lambda: True, None)
    keeper = Keeper(*parts)
    snapshot = make_snapshot()
    domain = snapshot.domain_uuid
    tag = Tag(snapshot.uuid, snapshot.name, domain, snapshot.domain_name, 1)
    operation = Operation(tag, Flags(0), (snapshot,))
    row = Held(domain, "vm1", None) if held else None
    await keeper.undo(Failed(StorageFailed("It failed."), operation, row))
    assert undone == [False]
    assert keeper.is_open(domain)  # its end is not written down yet
    assert keeper.holds(domain) is held
    with pytest.raises(Exception, match="has not been settled"):
        async with locks.hold(domain, 1):
            pass


async def test_a_thaw_beside_a_delete_ends_before_the_next_create_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it would take away the row that the Create has just written."""
    thawing, go_on = asyncio.Event(), asyncio.Event()
    snapshot = make_snapshot()
    domain = snapshot.domain_uuid

    class Slow(Full):
        def release(self, _: str) -> None:
            ended.append("thaw")

        async def run(self, function: Any, *args: Any, **more: Any) -> Any:
            if function is recovery.thaw:
                thawing.set()
                await go_on.wait()
                return True
            return function(*args, **more)

    ended: list[str] = []
    locks, anything = DomainLocks(), object()
    parts: Any = (Slow(), anything, anything, locks, lambda: True, None)
    keeper = Keeper(*parts)
    keeper.hold(Held(domain, "vm1", None))

    async def attempt(*_: Any) -> Any:
        await thawing.wait()
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        return Outcome()

    monkeypatch.setattr(keeper._changes, "attempt", attempt)
    tag = Tag(snapshot.uuid, snapshot.name, domain, snapshot.domain_name, 1)
    watch: Any = None
    keeping = asyncio.create_task(keeper.keep_thawing())
    async with locks.hold(domain, 1):
        await keeper.change(Operation(tag, Flags(0), (snapshot,)), watch)
        ended.append("delete")
    keeping.cancel()
    assert ended == ["thaw", "delete"]
    assert not keeper.holds(domain)
