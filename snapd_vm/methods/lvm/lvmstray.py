"""Finds logical volumes that are snapshots of ours by name and tags, on record or not."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from snapd_vm import command, mounts, storage
from snapd_vm.methods.lvm import devicemapper, lvmtags, lvmvolumes
from snapd_vm.methods.lvm.lvmvolumes import Lv
from snapd_vm.methods.method import Stored

_OURS = re.compile(r"snapd-vm-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")


def stored() -> Iterator[Stored]:
    """See Lists. Asks lvm once, for all groups of the host."""
    if not command.installed("lvs"):
        return
    for lv in lvmvolumes.report():
        ours, said = _OURS.fullmatch(lv.name), lvmtags.read(lv.tags)
        if ours is None or said.snapshot != ours[1]:  # anybody can give a volume such a name
            continue
        use, words = _use(lv)
        yield Stored(f"/dev/{lv.vg}/{lv.name}", ours[1], said.name, said.domain, use, words)


def _use(lv: Lv) -> tuple[str, str]:
    """Who uses it, in words, and what would remove it; '' where that is not safe."""
    device = f"/dev/{lv.vg}/{lv.name}"
    number = devicemapper.device_number(device)
    places = [mount.point for mount in mounts.table() if mount.device == number]
    reader = storage.reader_of(device, "")
    if not reader and places and number is not None:
        reader = storage.reader_in(number)
    if reader:
        return f"it is being read by {reader}, which has to end first", ""
    words = shlex.join(["lvremove", "-y", "--", f"{lv.vg}/{lv.name}"])
    if places:
        unmount = " && ".join(shlex.join(["umount", "--", place]) for place in places)
        return f"its file system is mounted at {places[0]}", f"{unmount} && {words}"
    return "nobody uses it", words
