"""A domain's snapshots are looked at once for many events, and again for those that come late."""

from __future__ import annotations

import asyncio
from typing import Any

from snapd_vm.engine.shelf import Shelf
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
