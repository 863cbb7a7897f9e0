"""The only place that starts a program: a list of arguments, a limit, no shell.

Most run to their end (`run`); one that is asked several things is a `Conversation`.
"""

from __future__ import annotations

import logging
import os
import select
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import IO, cast

log = logging.getLogger(__name__)

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LONGEST_LINE = 16 << 20
_MARK = "SNAPD_VM_RUN"
_MOST = 64 << 20
_MOST_STDERR = 1 << 20
_PIECE = 1 << 16
_END_S = 5.0
_REAP_S = 0.3
_ENVIRONMENT = {"PATH": _PATH, "LC_ALL": "C", "HOME": "/"}


class CommandError(Exception):
    """A program could not be started, failed, or took too long; `stderr` is what it had written."""

    def __init__(self, message: str, stderr: str = "") -> None:
        super().__init__(message)
        self.stderr = stderr


class CommandTimedOut(CommandError):
    """A program took too long, and was killed."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a program answered; `status` is its exit status, negative for a signal."""

    status: int
    stdout: str
    stderr: str


def installed(program: str) -> bool:
    """Whether there is a program of this name that `run` would start."""
    return which(program, path=_PATH) is not None


@dataclass(frozen=True, slots=True)
class Rights:
    """What a program that is not ours may do: `user`, or root; never more than `capabilities`.

    It can't gain others (PR_SET_NO_NEW_PRIVS, an empty bounding set but for those), and is killed
    when the daemon dies. As another user than root it has no capabilities at all.
    """

    user: str = ""
    capabilities: tuple[str, ...] = ()

    def applied_to(self, argv: Sequence[str]) -> Sequence[str]:
        """The arguments by way of setpriv(1), which executes the program in its own place."""
        bounds = ",".join(["-all", *(f"+{name}" for name in self.capabilities)])
        words = ["--no-new-privs", "--inh-caps=-all", f"--bounding-set={bounds}"]
        words += ["--pdeathsig=KILL"]
        if self.user:
            import pwd

            gid = pwd.getpwnam(self.user).pw_gid
            words += [f"--reuid={self.user}", f"--regid={gid}", "--init-groups"]
        else:
            words += ["--clear-groups"]
        return ["setpriv", *words, "--", *argv]


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    check: bool = True,
    send: bytes = b"",
    most: int = _MOST,
    rights: Rights | None = None,
    mark: str = "",
) -> Result:
    """Run a program to its end, for at most `timeout` seconds; blocks, so call it in a thread.

    The environment is a fixed one (PATH, LC_ALL=C); standard input is `send`, no descriptor is
    inherited. When the time is over, or the program has written more than `most` bytes to stdout,
    it is killed, with all that it started, and reaped. One that the kernel does not let end, as it
    waits for a storage that is away, is left to end by itself. With `mark`, `end_marked` and
    `wait_for_marked` find it, and what it started, again, in a later process too. Raises
    CommandError, also for a status that is not 0 if `check`; its message is the last line that the
    program wrote to stderr.
    """
    given = argv
    try:
        argv = rights.applied_to(argv) if rights is not None else argv
    except KeyError:
        raise CommandError(f"{given[0]} could not be started: there is no such user") from None
    program = which(argv[0], path=_PATH)
    if program is None:
        raise CommandError(f"the program {argv[0]} is not installed")
    env = dict(_ENVIRONMENT)
    if mark:
        env[_MARK] = mark
    out, err = bytearray(), bytearray()
    try:
        process = subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.PIPE if send else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd="/",
            umask=0o077 if rights is not None else -1,
            start_new_session=True,  # a terminal's Ctrl-C is for the daemon, which then decides
        )
        try:
            _exchange(process, send, most, time.monotonic() + timeout, out, err)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the number is its own
            raise
        finally:
            _let_go(process)
    except subprocess.TimeoutExpired:
        raise CommandTimedOut(
            f"{given[0]} did not end within {timeout:g} s", os.fsdecode(bytes(err))
        ) from None
    except _TooMuch:
        raise CommandError(
            f"{given[0]} wrote more than {most} bytes", os.fsdecode(bytes(err))
        ) from None
    except OSError as error:
        raise CommandError(f"{given[0]} could not be started: {error.strerror}") from error
    result = Result(process.returncode, os.fsdecode(bytes(out)), os.fsdecode(bytes(err)))
    log.debug("ran %s: status %d", given[0], result.status)
    if check and result.status != 0:
        last = result.stderr.strip().splitlines()[-1:] or [f"status {result.status}"]
        raise CommandError(f"{given[0]} failed: {last[0]}", result.stderr)
    return result


def end_marked(mark: str) -> int:
    """Kill what programs that were run with this mark by an earlier process have left; how many.

    Who has the mark is seen in the environment (proc(5)), which children inherit. Raises
    CommandError where one does not go.
    """
    wanted = f"{_MARK}={mark}".encode()
    deadline, ended = time.monotonic() + _END_S, set[int]()
    while True:
        found = [pid for pid in _processes() if wanted in _environment(pid)]
        if not found:
            return len(ended)
        if time.monotonic() > deadline:
            raise CommandError(f"process {found[0]}, of an earlier run, does not end")
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            ended.add(pid)
        time.sleep(0.01)


def wait_for_marked(mark: str, program: str, timeout: float) -> bool:
    """Wait for the end of this program where it was run with this mark; whether it came.

    For one that must not be killed in the midst, of an earlier process too. What it has started in
    turn, such as a service, is not waited for.
    """
    wanted = f"{_MARK}={mark}".encode()
    deadline = time.monotonic() + timeout
    while any(wanted in _environment(pid) and _name(pid) == program for pid in _processes()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return ""


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or it is none of ours to look at
        return []


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Take the status of a process that has ended, or was killed; later, if it does not end."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    try:
        process.wait(_REAP_S)
    except subprocess.TimeoutExpired:
        log.warning("process %d does not end, as it waits for a storage", process.pid)
        threading.Thread(target=process.wait, name="reaper", daemon=True).start()


class _TooMuch(Exception):
    """It wrote more than it may."""


def _exchange(
    process: subprocess.Popen[bytes],
    send: bytes,
    most: int,
    deadline: float,
    out: bytearray,
    err: bytearray,
) -> None:
    """Send, and read until both outputs are closed and the program has ended.

    Raises TimeoutExpired, and _TooMuch for stdout; of stderr what is too much is not kept.
    """
    left = memoryview(send)
    with selectors.DefaultSelector() as selector:
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                events = selectors.EVENT_WRITE if pipe is process.stdin else selectors.EVENT_READ
                selector.register(pipe, events)
        while selector.get_map():
            rest = deadline - time.monotonic()
            if rest <= 0:
                raise subprocess.TimeoutExpired(process.args, 0)
            for key, _ in selector.select(rest):
                if key.fileobj is process.stdin:
                    try:
                        left = left[os.write(key.fd, left[:_PIECE]) :]
                    except BrokenPipeError:  # it does not want to hear the rest
                        left = left[:0]
                    if not left:
                        selector.unregister(key.fileobj)
                        process.stdin.close()
                    continue
                piece = os.read(key.fd, _PIECE)
                if not piece:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    out += piece
                    if len(out) > most:
                        raise _TooMuch
                else:
                    err += piece[: max(0, _MOST_STDERR - len(err))]
    process.wait(max(0.0, deadline - time.monotonic()))


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

        Raises CommandTimedOut, after killing it, and CommandError if it ends without one.
        """
        end = time.monotonic() + timeout
        waiting = select.poll()
        waiting.register(self._from, select.POLLIN)
        while b"\n" not in self._rest:
            if not waiting.poll(max(0.0, end - time.monotonic()) * 1000):
                self.kill()
                raise CommandTimedOut(f"the program did not answer within {timeout:.3g} s")
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
