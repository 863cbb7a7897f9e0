"""Mounts of this host: which one a file lies in, as the kernel tells; looked at, never changed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from snapd_vm.errors import StorageFailed

_HOST_PIDS = 0xEFFFFFFC  # PROC_PID_INIT_INO, linux/proc_ns.h: the first PID namespace
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo (proc(5)).

    `device` is st_dev as the table has it, which for btrfs is not that of its files. `root` is what
    of the file system is mounted at `point`: a folder of it, or a subvolume. `options` are those of
    the mount, then those of the file system. `receives`: what is mounted below it in the namespace
    that this one was copied from appears here too (mount_namespaces(7), slave mounts).
    """

    id: int
    device: int
    root: str
    point: str
    type: str
    source: str
    options: tuple[str, ...]
    receives: bool = False


def table() -> tuple[Mount, ...]:
    """All mounts that the daemon sees. Raises StorageFailed."""
    try:
        data = Path("/proc/self/mountinfo").read_bytes()
    except OSError as error:
        raise StorageFailed(f"The table of mounts can't be read: {error.strerror}.") from error
    # Not splitlines(), which also splits at a carriage return, and at what else Unicode has: those
    # the kernel does not escape, and anybody may mount on a folder of such a name (fusermount3(1)).
    return tuple(_mount(os.fsdecode(line)) for line in data.split(b"\n") if line)


def mount_of(fd: int) -> Mount:
    """The mount by which an open file or folder was reached. Raises StorageFailed.

    It is asked of the descriptor, as a path may lead elsewhere by now (proc(5), /proc/PID/fdinfo).
    """
    try:
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    except OSError as error:
        raise StorageFailed(f"A file's mount can't be found: {error.strerror}.") from error
    number = next(int(line[7:]) for line in info.splitlines() if line.startswith("mnt_id:"))
    found = next((mount for mount in table() if mount.id == number), None)
    if found is None:  # it was unmounted lazily, or is another mount namespace's
        raise StorageFailed("A file's mount is not in the table of mounts any more; try again.")
    return found


def _mount(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    number, _, device, root, point, options, *optional = before.split(" ")
    kind, source, super_options = after.split(" ")[:3]
    major, minor = device.split(":")
    return Mount(
        int(number),
        os.makedev(int(major), int(minor)),
        _plain(root),
        _plain(point),
        kind,
        _plain(source),
        (*options.split(","), *super_options.split(",")),
        any(field.startswith("master:") for field in optional),  # shared may be with nobody
    )


def in_host() -> bool:
    """Whether the mounts that the daemon sees are the very table of the host's, not a copy."""
    try:
        if os.stat("/proc/self/ns/pid").st_ino != _HOST_PIDS:
            return False
        return os.stat("/proc/self/ns/mnt").st_ino == os.stat("/proc/1/ns/mnt").st_ino
    except OSError:
        return False


def _plain(text: str) -> str:
    """Without the octal escapes of space, tab, newline and backslash."""
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), text)
