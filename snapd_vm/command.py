"""The only place that starts a program: a list of arguments, a limit, no shell.

Most run to their end (`run`); one that is asked several things is a `Conversation`.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from shutil import which
from typing import IO, cast

log = logging.getLogger(__name__)

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LONGEST_LINE = 16 << 20


_ENVIRONMENT = {"PATH": _PATH, "LC_ALL": "C", "HOME": "/"}


class CommandError(Exception):
    """A program could not be started, failed, or took too long."""


class NoAnswer(CommandError):
    """A program did not answer in time, and was killed."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a program answered; `status` is its exit status, negative for a signal."""

    status: int
    stdout: str
    stderr: str


def run(argv: Sequence[str], *, timeout: float, check: bool = True) -> Result:
    """Run a program to its end, for at most `timeout` seconds; blocks, so call it in a thread.

    The environment is a fixed one (PATH, LC_ALL=C), standard input is empty. When the time is over
    the program is killed, with all that it started, and reaped. Raises CommandError, also for a
    status that is not 0 if `check`; its message is the last line that the program wrote to stderr.
    """
    program = which(argv[0], path=_PATH)
    if program is None:
        raise CommandError(f"the program {argv[0]} is not installed")
    try:
        with subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,  # a terminal's Ctrl-C is for the daemon, which then decides
        ) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the number is its own
                raise
    except subprocess.TimeoutExpired:
        raise CommandError(f"{argv[0]} did not end within {timeout:g} s") from None
    except OSError as error:
        raise CommandError(f"{argv[0]} could not be started: {error.strerror}") from error
    result = Result(process.returncode, os.fsdecode(out), os.fsdecode(err))
    log.debug("ran %s: status %d", argv[0], result.status)
    if check and result.status != 0:
        last = result.stderr.strip().splitlines()[-1:] or [f"status {result.status}"]
        raise CommandError(f"{argv[0]} failed: {last[0]}")
    return result


class Conversation:
    """A program that reads lines and answers each with one or more, until it is closed.

    What goes to and fro is in no log and on no command line, so it may be secret. One thread at a
    time may use it.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        """Start it, as `run` does, with an absolute path. Raises CommandError."""
        self._rest = b""
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_ENVIRONMENT,
                cwd="/",
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise CommandError(f"{argv[0]} could not be started: {error.strerror}") from error
        self._to = cast(IO[bytes], self._process.stdin)
        self._from = cast(IO[bytes], self._process.stdout)
        # It may end by itself at any time, and somebody has to take its status.
        threading.Thread(target=self._process.wait, name="reaper", daemon=True).start()

    def say(self, line: str) -> None:
        """Send it a line. Raises CommandError if it has ended."""
        try:
            self._to.write(line.encode() + b"\n")
        except (OSError, ValueError) as error:  # the latter where it was killed
            raise CommandError("the program has ended") from error

    def hear(self, timeout: float) -> str:
        """Its next line, waited for at most `timeout` seconds.

        Raises NoAnswer, after killing it, and CommandError if it ends without one.
        """
        end = time.monotonic() + timeout
        waiting = select.poll()
        waiting.register(self._from, select.POLLIN)
        while b"\n" not in self._rest:
            if not waiting.poll(max(0.0, end - time.monotonic()) * 1000):
                self.kill()
                raise NoAnswer(f"the program did not answer within {timeout:.3g} s")
            part = os.read(self._from.fileno(), 65536)
            if not part or len(self._rest) > _LONGEST_LINE:
                self.kill()
                raise CommandError("the program ended without an answer")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return os.fsdecode(line)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """Let it end by itself."""
        self._to.close()
        self._from.close()
