"""Finds what is mounted below a folder and the loop devices with files there; removes both.

The kernel is asked, not a list of our own: a run that was killed had no time to keep one.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.lab.deadline import SLOWNESS, LabError, wait_until
from tests.lab.process import open_files
from tests.lab.program import attempt, run


def mounts_below(folder: Path) -> list[Path]:
    """Mount points in the folder, the last mounted first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [Path(_unescaped(line.split()[4])) for line in lines]
    return [point for point in reversed(points) if point.is_relative_to(folder)]


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def loops_below(folder: Path) -> Iterator[Path]:
    """Loop devices whose file is in the folder, also if the file has been removed."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # detached in this moment
            name = backing.read_text().strip().removesuffix(" (deleted)")
            if Path(name).is_relative_to(folder):
                yield Path("/dev") / backing.parts[3]


def detach_below(folder: Path) -> None:
    """Unmount and detach all of it; whoever uses it must be gone already."""
    for point in mounts_below(folder):
        if point != folder:
            unmount(point)
    for device in loops_below(folder):  # their files keep the folder's own mount busy
        detach(device)
    while folder in mounts_below(folder):
        unmount(folder)


def unmount(point: Path) -> None:
    """Unmount, with some patience: QEMU's last flush may come after its end has been seen."""
    end = time.monotonic() + 10 * SLOWNESS
    while (tried := attempt(["umount", point])).returncode:
        if time.monotonic() > end:
            users = "; ".join(_users(point)) or "no process, nor loop device"
            raise LabError(f"umount {point}: {tried.stderr.strip()}: {users}")
        time.sleep(0.1)


def _users(point: Path) -> Iterator[str]:
    """Who has something below it: processes, by their links in /proc/PID, and loop devices."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone in this moment
            name = (process / "comm").read_text().strip()
            places = [os.readlink(process / link) for link in ("cwd", "root")]
            for place in {*places, *open_files(int(process.name))}:
                if Path(place).is_relative_to(point):
                    yield f"{name} ({process.name}) has {place}"
    yield from map(str, loops_below(point))


def detach(device: Path) -> None:
    """Detach a loop device, and wait until it is: the kernel puts it off while it is open."""
    run("losetup", "-d", device)
    backing = Path("/sys/block") / device.name / "loop/backing_file"
    wait_until(f"detach {device}", lambda: not backing.exists(), 10)
