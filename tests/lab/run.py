"""One run of the lab: its name, its folder, its processes, and the lock that says it lives.

What a run leaves behind when it is killed is found by that name; taking it away is cleanup.py's.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.lab.process import Ledger, Nursery, Process
from tests.lab.program import attempt
from tests.lab.program import run as run_program

# Not in /tmp: QEMU runs as a user of its own, and must be able to reach the images from the root down.
RUNS = Path("/var/lib/snapd-vm-lab")
DOMAIN_PREFIX = "snapdvm-lab-"


class Run:
    """A run's folder, held locked: `Run.begin()` for a new one, `Run.dead()` for those left over."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self.name = folder.name
        self.domain_prefix = f"{DOMAIN_PREFIX}{self.name}-"
        self.ledger = Ledger(folder / "processes.json")
        self.nursery: Nursery | None = None
        self._lock = lock

    @classmethod
    def begin(cls) -> Run:
        """A new run in a new folder."""
        folder = RUNS / secrets.token_hex(3)
        folder.mkdir(parents=True)
        for path in (RUNS, folder):
            path.chmod(0o755)  # whatever the umask says: QEMU's user has to pass
        lock = _lock(folder)
        if lock is None:  # a clean-up saw the folder before it was locked, and takes it away
            return cls.begin()
        run = cls(folder, lock)
        # libvirtd and polkitd live in mount name spaces of their own. What is mounted below a shared mount
        # point reaches them, and what is unmounted is let go by them; a root that is not shared does neither.
        run_program("mount", "--bind", folder, folder)
        run_program("mount", "--make-shared", folder)
        run.nursery = Nursery(run.ledger)
        return run

    @classmethod
    def dead(cls) -> Iterator[Run]:
        """The runs whose process is gone, each locked so that nobody else cleans it as well."""
        for folder in sorted(RUNS.glob("*/")):
            lock = _lock(folder)
            if lock is not None:
                yield cls(folder, lock)

    def path(self, name: str) -> Path:
        """A folder of this name in the run's folder, made if need be."""
        path = self.folder / name
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
        return path

    def start(
        self,
        name: str,
        argv: Sequence[str | Path],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = Path("/"),
    ) -> Process:
        """Start a process that does not outlive this run, nor the process we are."""
        assert self.nursery is not None, "a dead run starts nothing"
        return self.nursery.start(name, argv, log, env=env, cwd=cwd)

    def close(self) -> None:
        """Remove the folder with all in it, and let go of the lock."""
        if self._lock < 0:
            return
        with suppress(OSError):
            shutil.rmtree(self.folder)
        if self.folder.exists():  # the software under test makes files immutable
            attempt(["chattr", "-R", "-f", "-i", "-a", self.folder])
            shutil.rmtree(self.folder)
        # Only now: a folder is never seen unlocked before it is empty.
        os.close(self._lock)
        self._lock = -1


def _lock(folder: Path) -> int | None:
    path = folder / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:  # its run ended in this moment
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists():  # else another clean-up has just removed what we have locked
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None
