"""The parent of every process of a run: a script of its own that outlives the tests' process.

It is a child subreaper. QEMU makes itself a child of init, and libvirt waits for a stopped one
until init has taken its exit status; where process 1 is no real init, that takes seconds. Here it
takes none. And when the tests' process dies, however it does, its end of our stdin closes, and we
end all that was started.

It must import nothing of the lab: `python -I -S nursery.py`, JSON lines in and out.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
ENDING_S = 10

statuses: dict[int, int] = {}


def reap(*_: object) -> None:
    """Take the exit statuses of all who ended: children, and those whose parents have gone."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            statuses[pid] = os.waitstatus_to_exitcode(status)


def start(argv: list[str], env: dict[str, str], cwd: str, log: str) -> dict[str, Any]:
    """Start a process as the leader of a session of its own."""
    with open(log, "ab") as output:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
    child.returncode = 0  # reap() is the one who waits; else Popen would, when it is collected
    return {"pid": child.pid}


def answer(line: bytes) -> dict[str, Any]:
    """Do what one line asks for."""
    request = json.loads(line)
    if "argv" in request:
        try:
            return start(**request)
        except OSError as error:
            return {"error": str(error)}
    return {"status": statuses.get(request["pid"])}


def children() -> list[int]:
    """Those whose parent we are, from /proc: the kernel may be without its list of children."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat") as stat:
                if int(stat.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


def end_all() -> None:
    """Kill children until there are none: those of a killed one become ours."""
    end = time.monotonic() + ENDING_S
    while (living := children()) and time.monotonic() < end:
        for pid in living:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        reap()


def main() -> None:
    """Answer until stdin closes."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # With a wake-up descriptor select() returns on SIGCHLD, and reaping happens here, not in a
    # handler that could take the status of a child which Popen is still about to start.
    waker, wakened = os.pipe()
    os.set_blocking(wakened, False)
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakened, warn_on_full_buffer=False)
    rest = b""
    while True:
        ready, _, _ = select.select([0, waker], [], [])
        if waker in ready:
            os.read(waker, 4096)
            reap()
        if 0 in ready:
            part = os.read(0, 65536)
            if not part:
                break
            rest += part
            while b"\n" in rest:
                line, _, rest = rest.partition(b"\n")
                sys.stdout.write(json.dumps(answer(line)) + "\n")
                sys.stdout.flush()
    end_all()


if __name__ == "__main__":
    main()
