"""A domain's snapshots are looked at once for many events, and again for those that come late."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from snapd_vm.engine.shelf import Shelf
from snapd_vm.methods.method import Standing
from snapd_vm.model import SnapshotState, Target
from tests.bus.fakes import make_domain, make_snapshot

SNAPSHOTS = 5


class CountedLooks:
    """Stands for World: counts the looks, which take a turn of the loop each."""

    def __init__(self) -> None:
        self.looks = 0
        self.methods = {"qemu": self}

    def state(self, *_: Any) -> str:
        self.looks += 1
        return "ready"

    async def run(self, function: Any, *args: Any) -> Any:
        await asyncio.sleep(0.001)
        return function(*args)


async def test_many_events_are_one_look_and_one_more() -> None:
    world: Any = CountedLooks()
    domain = make_domain(1)
    shelf = Shelf(world, lambda: {domain.uuid: domain}, lambda: True)
    for number in range(SNAPSHOTS):
        snapshot = make_snapshot(number)
        shelf.snapshots[snapshot.uuid] = snapshot
    await asyncio.gather(*(shelf.look_at_domain(domain.uuid) for _ in range(10)))
    assert world.looks == 2 * SNAPSHOTS
    await shelf.look_at_domain(domain.uuid)
    assert world.looks == 3 * SNAPSHOTS


class Warner(CountedLooks):
    """Stands for World and for a method that warns of what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, str] = {}

    def warnings(self, *_: Any) -> dict[str, str]:
        return self.said


class Heard:
    """A listener."""

    def __init__(self) -> None:
        self.warnings: list[tuple[str, str]] = []

    def warning(self, _: Any, code: str, message: str) -> None:
        self.warnings.append((code, message))


async def test_a_warning_is_told_once_and_again_when_all_was_well_in_between() -> None:
    world: Any = Warner()
    heard: Any = Heard()
    domain, snapshot = make_domain(1), make_snapshot()
    shelf = Shelf(world, lambda: {domain.uuid: domain}, lambda: True)
    shelf.listeners.append(heard)
    shelf.snapshots[snapshot.uuid] = snapshot

    async def told(**said: str) -> list[tuple[str, str]]:
        world.said = said
        heard.warnings.clear()
        await shelf.look_at_domain(snapshot.domain_uuid)
        return list(heard.warnings)

    assert await told() == []
    assert await told(space="little") == [("space", "little")]
    assert await told(space="less") == []
    assert await told(space="less", thin="too") == [("thin", "too")]
    assert await told(thin="too") == []
    assert await told(space="little") == [("space", "little")]
    assert await told() == []
    assert await told(space="little") == [("space", "little")]


class Explainer(CountedLooks):
    """Stands for World, for a journal, and for a method that says why."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Standing("ready")
        self.journal = self

    def standing(self, *_: Any) -> Standing:
        return self.found

    def files(self, *_: Any) -> list[str]:
        return []

    def put(self, *_: Any) -> None:
        """Written down."""


class Changed(Heard):
    """A listener that is told of records, too."""

    def snapshot_changed(self, *_: Any) -> None:
        """Told."""


async def test_why_is_told_once_and_again_when_it_is_something_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world: Any = Explainer()
    heard: Any = Changed()
    domain, snapshot = make_domain(1), make_snapshot()
    shelf = Shelf(world, lambda: {domain.uuid: domain}, lambda: True)
    shelf.listeners.append(heard)
    shelf.snapshots[snapshot.uuid] = snapshot

    async def told(state: str, why: str, code: str = "") -> list[str]:
        world.found = Standing(state, why, code, "Mind it.")
        caplog.clear()
        heard.warnings.clear()
        for _ in range(2):
            await asyncio.gather(*(shelf.look(snapshot) for _ in range(3)))
        assert shelf.snapshots[snapshot.uuid].state == state
        return [record.getMessage().partition(" is ")[2] for record in caplog.records]

    assert await told("ready", "") == []
    assert await told("detached", "no disk") == ["detached: no disk"]
    assert await told("detached", "no domain") == ["detached: no domain"]
    assert await told("failed", "written to", "base-in-use") == ["failed: written to"]
    assert heard.warnings == [("base-in-use", "Mind it.")]
    assert await told("ready", "") == ["ready"]


class Failing(Explainer):
    """Stands for a World in which one snapshot can't be looked at by a mistake."""

    def standing(self, target: Any, *_: Any) -> Standing:
        if target.disk == "bad":
            raise KeyError("a mistake")
        self.looks += 1
        return self.found


async def test_what_is_wrong_with_one_keeps_nobody_from_looking_at_the_others() -> None:
    world: Any = Failing()
    domain = make_domain(1)
    shelf = Shelf(world, lambda: {domain.uuid: domain}, lambda: True)
    for number, disk in enumerate(("bad", "vda")):
        snapshot = make_snapshot(number, target=Target("qemu", disk, {}))
        shelf.snapshots[snapshot.uuid] = snapshot
    await shelf.look_at_domain(domain.uuid)
    assert world.looks == 1


class Overflowing(Explainer):
    """Stands for World and for a method that warns of what its State says, too."""

    def warnings(self, *_: Any) -> dict[str, str]:
        return {self.found.code: self.found.message} if self.found.code else {}


async def test_what_a_warning_tells_is_looked_at_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world: Any = Overflowing()
    heard: Any = Changed()
    domain, snapshot = make_domain(1), make_snapshot()
    shelf = Shelf(world, lambda: {domain.uuid: domain}, lambda: True)
    shelf.listeners.append(heard)
    shelf.snapshots[snapshot.uuid] = snapshot
    world.found = Standing("failed", "it has overflowed", "overflowed", "It is lost.")
    for _ in range(3):
        await shelf._look_ahead(shelf.snapshots[snapshot.uuid])
    assert heard.warnings == [("overflowed", "It is lost.")]
    assert shelf.snapshots[snapshot.uuid].state is SnapshotState.FAILED
    assert "no more overflowed" not in caplog.text
