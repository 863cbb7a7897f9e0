"""Lets a snapshot be read: the folder in which the kernel shows it, or a mount of it where it can't
be shown; of a volume, the device of a read-only clone. Found again, or made again, when asked for.

Why a clone: the snapshot's own device appears only with `snapdev=visible`, a property of the user's
volume, which would show all its other snapshots as well; and what somebody else did to that
property would take our source away. A clone is as immutable (`readonly=on`, which its driver
enforces), is there after a restart, and goes with the snapshot.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time

from snapd_vm import command, mounts, storage
from snapd_vm.errors import Busy, NameInUse, StorageFailed, TimedOut
from snapd_vm.methods import hostmount
from snapd_vm.methods.zfs import zfsdataset, zfsplace
from snapd_vm.methods.zfs.zfstarget import ZfsTarget, device_of
from snapd_vm.mounts import Mount

log = logging.getLogger(__name__)

_DEVICE_S = 15.0
_SETTLE_S = 5
_BUSY_S = 5.0
_mounting = threading.Lock()


def show(one: ZfsTarget) -> None:
    """Let what is read be there. Raises SnapdErrors."""
    if one.is_volume:
        _show_volume(one)
    else:
        os.close(open_root(one))


def open_root(one: ZfsTarget) -> int:
    """A descriptor of the root folder of the snapshot of a dataset. Raises SnapdErrors.

    To open it has the kernel mount it, where it is one of the `.zfs/snapshot`; what it can't (it
    starts a program for it, which can be missing or forbidden) is done here, in the same place.
    """
    if one.mounted:
        _mount(one)
    try:
        return zfsplace.open_root(one.folder, one.full)
    except StorageFailed as error:
        if one.mounted or zfsdataset.look(one.full) is None:
            raise
        log.info("the kernel does not show %s: %s", one.full, error)
    _mount(one)
    return zfsplace.open_root(one.folder, one.full)


def mount_of(one: ZfsTarget) -> Mount | None:
    """The mount of the snapshot where it is read, if it is there; the question mounts nothing."""
    found = [m for m in mounts.table() if (m.type, m.source) == ("zfs", one.full)]
    return next((mount for mount in found if mount.point == one.folder), None)


def is_ours(mount: Mount) -> bool:
    """Whether a mount of a snapshot is one that was made here, and not by the kernel."""
    return set(hostmount.SAFE.split(",")) <= set(mount.options)


def device(one: ZfsTarget) -> int | None:
    """The number of what shows it, if it is there, as it was made; the question mounts nothing.

    Of a file st_dev of the mount; of a volume the clone's device, if it is that, and read-only.
    """
    if not one.is_volume:
        mount = mount_of(one)
        return mount.device if mount is not None else None
    path = device_of(one.clone)
    found = storage.file_id(path)
    if found is None or not zfsplace.is_volume(path) or zfsplace.volume_at(path) != one.clone:
        return None
    return found.device if zfsplace.is_read_only(found.device) else None


def user(one: ZfsTarget) -> str:
    """Who reads what a snapshot shows, in words; '': nobody."""
    if one.is_volume:
        return storage.reader_of(one.path, "")
    if one.shared:
        return storage.reader_of(one.path, "") if device(one) is not None else ""
    shown = f"/.zfs/snapshot/{one.name}"  # the kernel's own, which goes by itself
    for mount in mounts.table():
        if (mount.type, mount.source) != ("zfs", one.full) or mount.point == one.folder:
            continue
        if not mount.point.endswith(shown):
            return f"a mount on {mount.point}"
    root = device(one)
    return storage.reader_in(root) if root is not None else ""


def hide(one: ZfsTarget) -> None:
    """Take away what `show` has made. Raises SnapdErrors; Busy where somebody uses it."""
    if one.is_volume:
        if zfsdataset.is_clone(one.clone, one.full):
            destroy(one.clone)
        return
    mount = mount_of(one)
    if mount is not None and is_ours(mount):  # the kernel's own goes with the snapshot
        hostmount.unmount(one.folder, "The snapshot")
    if one.mounted:
        hostmount.remove(one.folder)


def destroy(name: str) -> bool:
    """Destroy a dataset or snapshot that is ours; False: it is not there. Raises SnapdErrors.

    What has just appeared is looked at by udev, so for a moment it may be busy.
    """
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            there = zfsdataset.destroy(name)
        except Busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
            continue
        if there:
            log.info("destroyed %s", name)
        return there


def _show_volume(one: ZfsTarget) -> None:
    if device(one) is not None:
        return
    try:
        zfsdataset.clone(one.full, one.clone)
        log.info("made the clone %s", one.clone)
    except NameInUse:
        if not zfsdataset.is_clone(one.clone, one.full):
            raise
    deadline = time.monotonic() + _DEVICE_S
    _wait_for_device(one, deadline)
    # What else has happened to the new device, udev is at still, and may take its name away for it,
    # and give it again: zvol_id fails while the kernel is busy with the pool.
    try:
        command.run(["udevadm", "settle", f"--timeout={_SETTLE_S}"], timeout=_SETTLE_S + 1.0)
    except command.CommandError as error:
        log.debug("udev is not waited for: %s", error)
    _wait_for_device(one, deadline)


def _wait_for_device(one: ZfsTarget, deadline: float) -> None:
    while device(one) is None:
        if time.monotonic() > deadline:
            raise TimedOut(
                f"The device {one.path} of the snapshot does not appear, or can be written to; "
                "see 'systemctl status systemd-udevd'."
            )
        time.sleep(0.02)


def _make_folder(path: str) -> None:
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    with storage.open_folder(os.path.dirname(path), {0}, {0}, "make it root's own") as place:
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.basename(path), 0o700, dir_fd=place)


def _mount(one: ZfsTarget) -> None:
    """Mount it where it is read, unless it is."""
    with _mounting:  # those who ask for the sources of disks that were taken together
        if mount_of(one) is not None:
            return
        if one.mounted:
            _make_folder(one.folder)
        # systemd-mount(1) would make a unit of it, if it took for a source what is no path.
        argv = ["mount", "-t", "zfs", "-o", hostmount.SAFE, "--", one.full, one.folder]
        hostmount.run(argv, f"The snapshot can't be mounted on {one.folder}")
        if mount_of(one) is None:
            raise StorageFailed("The snapshot was mounted where the daemon does not see it.")
    log.info("mounted %s", one.full)
