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

# Not in /tmp: QEMU has a user of its own, who must be able to reach the images from the root down.
RUNS = Path("/var/lib/snapd-vm-lab")
DOMAIN_PREFIX = "snapdvm-lab-"


class Run:
    """A run's folder, held locked: `Run.begin()` makes one, `Run.dead()` finds those left over."""

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
        RUNS.mkdir(parents=True, exist_ok=True)
        lock = None
        while lock is None:  # a clean-up may see the file before it is locked, and take it away
            folder = RUNS / secrets.token_hex(3)
            lock = _lock(_lock_file(folder), create=True)
        folder.mkdir()
        for path in (RUNS, folder):
            path.chmod(0o755)  # whatever the umask says: QEMU's user has to pass
        run = cls(folder, lock)
        # libvirtd and polkitd live in mount name spaces of their own. What is mounted below a
        # shared mount point reaches them, and what is unmounted is let go by them.
        run_program("mount", "--bind", folder, folder)
        run_program("mount", "--make-shared", folder)
        run.nursery = Nursery(run.ledger)
        return run

    @classmethod
    def dead(cls) -> Iterator[Run]:
        """The runs whose process is gone, each locked so that nobody else cleans it as well."""
        for file in sorted(RUNS.glob("*.lock")):
            lock = _lock(file)
            if lock is not None:
                yield cls(file.with_suffix(""), lock)

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

    def close(self, *, remove: bool) -> None:
        """Let go of the lock, after removing the folder if all else has been taken away."""
        if remove and self.folder.exists():
            with suppress(OSError):
                shutil.rmtree(self.folder)
            if self.folder.exists():  # the software under test makes files immutable
                attempt(["chattr", "-R", "-f", "-i", "-a", self.folder])
                shutil.rmtree(self.folder)
        if remove:
            _lock_file(self.folder).unlink(missing_ok=True)
        os.close(self._lock)


def _lock_file(folder: Path) -> Path:
    # beside the folder: an open file in it would keep the folder's own mount busy
    return folder.with_suffix(".lock")


def _lock(path: Path, *, create: bool = False) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:  # its run ended in this moment
        return None
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:  # else another clean-up has removed what we have locked
            return descriptor
    os.close(descriptor)
    return None
