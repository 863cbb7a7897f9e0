"""Mounts the file system in a snapshot of a volume, so that a file in it can be read.

Where systemd runs it is asked for a transient mount unit (systemd-mount(1)), which shows what is
mounted and by whom; else see hostmount.py. The journal of the file system is not replayed: lvm had
the kernel bring it to rest (FIFREEZE), and the volume is read-only.
"""

from __future__ import annotations

import logging
import os

from snapd_vm import mounts
from snapd_vm.errors import MethodNotSupported, StorageFailed
from snapd_vm.methods import hostmount
from snapd_vm.methods.lvm import devicemapper
from snapd_vm.methods.lvm.lvmtarget import LvmTarget

log = logging.getLogger(__name__)

OPTIONS = {"ext4": f"{hostmount.SAFE},noload", "xfs": f"{hostmount.SAFE},norecovery,nouuid"}
"""By the file systems whose snapshots can be mounted beside them."""

_SUBJECT = "The snapshot's file system"


def check() -> None:
    """Raise MethodNotSupported where nobody would see what is mounted."""
    if not hostmount.possible():
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
    """Mount it, unless it is. Raises Busy, TimedOut and StorageFailed."""
    if mounted(one):
        return
    hostmount.unmount(one.mount, _SUBJECT)  # of an earlier device, as after it was lost
    try:
        os.makedirs(os.path.dirname(one.mount), 0o700, exist_ok=True)
        os.makedirs(one.mount, 0o700, exist_ok=True)
    except OSError as error:
        raise StorageFailed(f"{one.mount} can't be made: {error.strerror}.") from error
    words = ["-t", one.filesystem, "-o", OPTIONS[one.filesystem], "--", one.device, one.mount]
    what = f"{_SUBJECT} can't be mounted"
    if hostmount.by_systemd():
        options = ("--no-ask-password", "--quiet", "--fsck=no", "--collect")
        hostmount.attempt(["systemd-mount", *options, *words], what)
    else:
        hostmount.run(["mount", *words], what)
    if not mounted(one):
        raise StorageFailed(f"{_SUBJECT} was mounted where the daemon does not see it.")
    log.info("mounted %s at %s", one.device, one.mount)


def unmount(one: LvmTarget) -> None:
    """Unmount it, if it is, and remove the place. Raises Busy, TimedOut and StorageFailed."""
    hostmount.unmount(one.mount, _SUBJECT)
    hostmount.remove(one.mount)
