"""Answers that may be a moment old: who asks, how often, and what those are told who wait."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from snapd_vm.errors import StorageFailed
from snapd_vm.methods.recent import Recent


def test_an_answer_is_taken_again_for_as_long_as_was_said_and_for_its_name_alone() -> None:
    asked: list[str] = []

    def ask(name: str) -> int:
        asked.append(name)
        return len(asked)

    recent = Recent(ask)
    assert [recent.get(name, 60) for name in ("a", "b", "a")] == [1, 2, 1]
    time.sleep(0.02)
    assert recent.get("a", 0.01) == 3
    assert recent.get("a", 60) == 3


def test_those_who_ask_while_it_is_found_out_wait_for_that() -> None:
    asked, go_on = [], threading.Event()

    def ask(name: str) -> str:
        asked.append(name)
        assert go_on.wait(20)
        return name

    recent = Recent(ask)
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(recent.get, "a", 60) for _ in range(5)]
        go_on.set()
        assert [one.result(20) for one in answers] == ["a"] * 5
    assert asked == ["a"]


def test_a_failure_is_told_to_all_who_waited_and_to_nobody_after_that() -> None:
    asked, begun, go_on = [], threading.Event(), threading.Event()

    def ask(name: str) -> int:
        asked.append(name)
        if len(asked) == 1:
            begun.set()
            assert go_on.wait(20)
            raise StorageFailed("It is away.")
        return len(asked)

    recent = Recent(ask)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(recent.get, "a", 60)
        assert begun.wait(20)
        others = [pool.submit(recent.get, "a", 60) for _ in range(2)]
        time.sleep(0.5)  # until they wait
        go_on.set()
        for one in (first, *others):
            with pytest.raises(StorageFailed):
                one.result(20)
    assert recent.get("a", 60) == 2
