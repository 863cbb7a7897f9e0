"""Mounts the file system in a snapshot of a volume, for the host, so that a file in it can be read.

The daemon may have a mount table of its own, in which nobody else would see it. So systemd is asked
for a transient mount unit, where it runs (systemd-mount(1)). The journal of the file system is not
replayed: lvm had the kernel bring it to rest (FIFREEZE), and the volume is read-only.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from snapd_vm import command, mounts
from snapd_vm.errors import Busy, MethodNotSupported, StorageFailed
from snapd_vm.methods.lvm import devicemapper
from snapd_vm.methods.lvm.lvmtarget import LvmTarget

log = logging.getLogger(__name__)

_SAFE = "ro,nosuid,nodev,noexec"
OPTIONS = {"ext4": f"{_SAFE},noload", "xfs": f"{_SAFE},norecovery,nouuid"}
"""By the file systems whose snapshots can be mounted beside them."""

_SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
_LIMIT_S = 60.0


def check() -> None:
    """Raise MethodNotSupported where nobody would see what is mounted."""
    if not _SYSTEMD.is_dir() and not mounts.in_host():
        raise MethodNotSupported(
            "The daemon has a mount table of its own and the host no systemd, so that nobody would "
            "see the snapshot's files; name no <device>."
        )


def mounted(one: LvmTarget) -> bool:
    """Whether the snapshot's file system is mounted at its place. Raises StorageFailed."""
    number = devicemapper.device_number(one.device)
    there = [mount for mount in mounts.table() if mount.point == one.mount]
    return bool(there) and number is not None and there[-1].device == number


def mount(one: LvmTarget) -> None:
    """Mount it, unless it is. Raises StorageFailed."""
    if mounted(one):
        return
    _release(one.mount)  # of an earlier device, as after it was lost
    try:
        os.makedirs(os.path.dirname(one.mount), 0o700, exist_ok=True)
        os.makedirs(one.mount, 0o700, exist_ok=True)
    except OSError as error:
        raise StorageFailed(f"{one.mount} can't be made: {error.strerror}.") from error
    words = ["-t", one.filesystem, "-o", OPTIONS[one.filesystem], "--", one.device, one.mount]
    if _SYSTEMD.is_dir():
        words = ["systemd-mount", "--no-ask-password", "--quiet", "--fsck=no", "--collect", *words]
    else:
        words = ["mount", *words]
    try:
        command.run(words, timeout=_LIMIT_S)
    except command.CommandError as error:
        raise StorageFailed(f"The snapshot's file system can't be mounted: {error}.") from error
    if not mounted(one):
        raise StorageFailed("The snapshot's file system was mounted where the daemon sees it not.")
    log.info("mounted %s at %s", one.device, one.mount)


def unmount(one: LvmTarget) -> None:
    """Unmount it, if it is, and remove the place. Raises Busy and StorageFailed."""
    _release(one.mount)
    try:
        os.rmdir(one.mount)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageFailed(f"{one.mount} can't be removed: {error.strerror}.") from error


def _release(place: str) -> None:
    if not any(mount.point == place for mount in mounts.table()):
        return
    try:
        if _SYSTEMD.is_dir():
            command.run(["systemd-mount", "--umount", "--quiet", "--", place], timeout=_LIMIT_S)
        if any(mount.point == place for mount in mounts.table()):
            command.run(["umount", "--", place], timeout=_LIMIT_S)
    except command.CommandError as error:
        if "busy" in str(error) or "busy" in error.stderr:
            raise Busy("The snapshot's file system is in use; wait for its end.") from error
        raise StorageFailed(f"The snapshot's file system can't be unmounted: {error}.") from error
    log.info("unmounted %s", place)
