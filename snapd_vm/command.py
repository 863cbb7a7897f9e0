"""The only place that starts a program: a list of arguments, a limit, no shell."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from shutil import which

log = logging.getLogger(__name__)

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class CommandError(Exception):
    """A program could not be started, failed, or took too long."""


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
            env={"PATH": _PATH, "LC_ALL": "C", "HOME": "/"},
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
