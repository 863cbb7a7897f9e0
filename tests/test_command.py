"""A program that is asked several things, and what becomes of one that does not answer."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from snapd_vm import command
from snapd_vm.command import (
    CommandError,
    CommandTimedOut,
    Conversation,
    run,
    wait_for_marked,
)
from tests.lab.deadline import wait_until

ECHO = "import sys\nfor line in sys.stdin: print(line.strip() * 2, flush=True)"
SILENT = "import sys, time\nprint('here', flush=True)\ntime.sleep(100)"
MANY = "print('x' * 100_000)\nprint('second', flush=True)"


def talk(program: str) -> Conversation:
    return Conversation([sys.executable, "-I", "-c", program])


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_each_line_is_answered() -> None:
    before = children()
    echo = talk(ECHO)
    for word in ("ab", "ü", "x" * 70_000):
        echo.say(word)
        assert echo.hear(20) == word * 2
    echo.close()
    wait_until("it has ended, and its status was taken", lambda: children() <= before, 10)


def test_several_lines_come_one_by_one() -> None:
    many = talk(MANY)
    assert many.hear(20) == "x" * 100_000
    assert many.hear(20) == "second"
    with pytest.raises(CommandError):
        many.hear(20)


def test_one_that_does_not_answer_is_killed() -> None:
    before = children()
    silent = talk(SILENT)
    assert silent.hear(20) == "here"
    (pid,) = children() - before
    began = time.monotonic()
    with pytest.raises(CommandTimedOut, match=r"within 0\.2 s"):
        silent.hear(0.2)
    assert time.monotonic() - began < 5
    wait_until("it is gone", lambda: pid not in children(), 10)
    with pytest.raises(CommandError):
        silent.say("anything")


def test_one_that_has_ended_says_so() -> None:
    ended = talk("pass")
    with pytest.raises(CommandError):
        ended.hear(20)
    with pytest.raises(CommandError):
        Conversation(["/nowhere/at/all"])


def test_it_knows_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of ours")
    shown = talk("import os; print(sorted(os.environ), os.getcwd(), flush=True)")
    assert shown.hear(20) == "['HOME', 'LC_ALL', 'PATH'] /"
    shown.close()
    assert os.environ["SECRET"]


def test_one_that_must_not_be_killed_is_waited_for() -> None:
    mark = f"test-{os.getpid()}"
    one = threading.Thread(target=run, args=(["sleep", "2"],), kwargs={"timeout": 20, "mark": mark})
    one.start()
    wait_until("it runs", lambda: not wait_for_marked(mark, "sleep", 0), 10)
    assert wait_for_marked(mark, "another", 0)
    began = time.monotonic()
    assert wait_for_marked(mark, "sleep", 20)
    assert 0.3 < time.monotonic() - began < 10
    assert wait_for_marked(mark, "sleep", 0)
    one.join()


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Path]:
    """A storage where whoever writes waits in the kernel, which no signal ends."""
    image, point = tmp_path / "image", tmp_path / "point"
    image.touch()
    os.truncate(image, 16 << 20)
    point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    try:
        subprocess.run(["fsfreeze", "--freeze", point], check=True)
        try:
            yield point
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", point], check=True)
    finally:
        umount = ["umount", str(point)]
        wait_until(
            "it is unmounted", lambda: subprocess.run(umount, check=False).returncode == 0, 20
        )


def test_one_that_no_signal_ends_holds_up_nobody(
    away: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    began = time.monotonic()
    with pytest.raises(CommandTimedOut):
        command.run(["touch", str(away / "file")], timeout=0.5, mark="away")
    assert time.monotonic() - began < 3
    (pid,) = children() - before
    assert psutil.Process(pid).status() == psutil.STATUS_DISK_SLEEP
    monkeypatch.setattr(command, "_END_S", 0.2)
    with pytest.raises(CommandError, match="does not end"):  # it may have its way still
        command.end_marked("away")
    subprocess.run(["fsfreeze", "--unfreeze", away], check=True)
    wait_until("it has ended, and its status was taken", lambda: children() <= before, 10)
    assert command.end_marked("away") == 0
    subprocess.run(["fsfreeze", "--freeze", away], check=True)
