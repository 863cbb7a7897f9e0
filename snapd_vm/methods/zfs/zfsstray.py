"""Finds snapshots of datasets and volumes that are ours by their properties, on record or not."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator

from snapd_vm import mounts, storage
from snapd_vm.errors import SnapdError
from snapd_vm.methods import taken
from snapd_vm.methods.method import Stored
from snapd_vm.methods.zfs import zfsdataset, zfsplace, zfsview
from snapd_vm.methods.zfs.zfstarget import device_of
from snapd_vm.model import Disk, Domain
from snapd_vm.storage import FileId


def stored(domains: Iterable[Domain]) -> Iterator[Stored]:
    """Every snapshot of ours in the datasets of these domains' disks, whoever knows of it."""
    devices: dict[FileId, str] = {}
    datasets = dict[str, None]()
    for domain in domains:
        for disk in (*domain.disks, *domain.persistent_disks):
            found = storage.file_id(disk.path) if disk.path else None
            if found is None:
                continue
            devices.setdefault(found, f"disk {disk.target} of domain {domain.name}")
            try:
                dataset = _dataset(disk)
            except SnapdError:  # what can't be looked at now holds nothing that can be told of
                continue
            if dataset:
                datasets[dataset] = None
    if not datasets:
        return
    table = mounts.table()
    for name, snapshot in zfsdataset.listed(list(datasets)).items():
        dataset, _, own = name.partition("@")
        clone = f"{os.path.dirname(dataset)}/{own}"
        others = [one for one in snapshot.clones if one != clone]
        user = devices.get(storage.file_id(device_of(clone)) or FileId(0, 0), "")
        if clone in snapshot.clones and not user:
            user = storage.reader_of(device_of(clone), "")
        shown = [m for m in table if (m.type, m.source) == ("zfs", name)]
        ours = [mount for mount in shown if zfsview.is_ours(mount)]
        user = user or next(filter(None, (storage.reader_in(mount.device) for mount in shown)), "")
        used = (
            f"it has the clone {others[0]}" if others else f"it is used by {user}" if user else ""
        )
        words = [f"zfs release {zfsdataset.HOLD} {shlex.quote(name)}"]
        if clone in snapshot.clones:
            words.insert(0, f"zfs destroy {shlex.quote(clone)}")
        words[:0] = [f"umount {shlex.quote(mount.point)}" for mount in ours[:1]]
        yield Stored(
            name,
            own.removeprefix("snapd-vm-"),
            snapshot.label,
            snapshot.domain,
            f"{used}, which has to go first" if used else "nobody uses it",
            "" if used else " && ".join((*words, f"zfs destroy {shlex.quote(name)}")),
        )


def _dataset(disk: Disk) -> str:
    """The dataset that a disk is in or is, or ''."""
    if disk.type == "block":
        gone = zfsdataset.suspended()
        return zfsplace.volume_at(disk.path) if not gone and zfsplace.is_volume(disk.path) else ""
    if disk.type != "file":
        return ""
    image = os.path.realpath(disk.path)
    fd = taken.open_image(disk, image)
    try:
        place = zfsplace.of_file(fd, image)
    finally:
        os.close(fd)
    return place.dataset if place is not None else ""
