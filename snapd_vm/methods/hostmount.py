"""Mounts for the whole host. The daemon may have a mount table of its own (its unit's sandbox), in
which nobody else would see what it mounts; then systemd runs the program outside of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from snapd_vm import command, mounts
from snapd_vm.errors import Busy, StorageFailed, TimedOut

log = logging.getLogger(__name__)

SAFE = "ro,nosuid,nodev,noexec"
"""The options of whatever is mounted for others to read: its contents are a guest's."""

_LIMIT_S = 60.0
_BUSY = re.compile(r"(?:target is|mount point|[Dd]evice or resource) busy")
"""umount(8) and mount(8) on EBUSY, whatever is mounted is called."""
_SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)


def by_systemd() -> bool:
    """Whether systemd runs this host."""
    return _SYSTEMD.is_dir()


def possible() -> bool:
    """Whether everybody would see what is mounted."""
    return mounts.in_host() or by_systemd()


def run(argv: Sequence[str], what: str) -> None:
    """Run a program of mount(8)'s in the mount namespace of the host.

    Raises Busy, TimedOut and StorageFailed, which begin with `what`, a clause.
    """
    if not mounts.in_host():
        options = (
            "--quiet",
            "--wait",
            "--pipe",
            "--collect",
            "--no-ask-password",
            "--setenv=LC_ALL=C",
        )
        argv = ["systemd-run", *options, "--", *argv]
    attempt(argv, what)


def attempt(argv: Sequence[str], what: str) -> None:
    """The same, where the program itself sees to the namespace."""
    try:
        command.run(argv, timeout=_LIMIT_S)
    except command.CommandTimedOut as error:
        raise TimedOut(f"{what}: {error}.") from error
    except command.CommandError as error:
        if _BUSY.search(error.stderr):
            raise Busy(f"{what}, as somebody uses it; wait for the end of that.") from error
        raise StorageFailed(f"{what}: {error}.") from error


def unmount(place: str, what: str) -> None:
    """Unmount whatever is mounted there, if anything is. Raises as `run` does.

    What systemd-mount(1) has mounted is its unit's, which goes with the mount.
    """
    if any(mount.point == place for mount in mounts.table()):
        run(["umount", "--", place], f"{what} can't be unmounted from {place}")
        log.info("unmounted %s", place)


def remove(place: str) -> None:
    """Remove the folder that something was mounted on. Raises StorageFailed."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(place)
    except OSError as error:
        raise StorageFailed(f"{place} can't be removed: {error.strerror}.") from error
