"""What the method zfs would act on: a disk's dataset or volume, held against what a caller named;
and what forbids it. Changes nothing; to claim, it starts no program, and to check one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence

from snapd_vm import storage
from snapd_vm.errors import (
    MethodNotSupported,
    NoSpace,
    NotUnderDisk,
    StorageFailed,
)
from snapd_vm.methods import chain, hostmount, taken
from snapd_vm.methods.zfs import zfsdataset, zfsplace
from snapd_vm.methods.zfs.zfstarget import ZfsTarget
from snapd_vm.model import Disk, Domain, Json, Needs, Tag, Target
from snapd_vm.storage import FileId

RESERVE = 1 << 20
"""Bytes that must be free: a snapshot takes next to none, but what is overwritten then does."""

MOUNTS = "/run/snapd-vm/zfs"
"""Where a snapshot is mounted for which the kernel has no folder that all see."""


def claim(domain: Domain, disk: Disk, tag: Tag, *, asked: bool, named: str) -> Target:
    """The Target of a disk that is in a dataset or is a volume, see ZfsTarget.

    `asked`: the caller named the method, and perhaps the dataset (`named`), which is compared with
    the disk's. Raises MethodNotSupported, NotUnderDisk and StorageFailed.
    """
    takes = {"file": "files", "block": "volumes"}
    taken.check_fit(disk, "zfs", takes, chain.FORMATS if asked else taken.RAW, named)
    found = _volume(disk, tag, named) if disk.type == "block" else _file(disk, tag, named)
    dataset = str(found["dataset"])
    if named and named != dataset:
        raise NotUnderDisk(
            f"Disk {disk.target} is not in that dataset but in {dataset}; name that, or none."
        )
    if not zfsdataset.installed():
        raise MethodNotSupported(
            "Method zfs needs the program zfs; install zfsutils-linux, or use another method."
        )
    data = {**taken.described(domain, disk, tag), **found}
    return Target(method="zfs", disk=disk.target, data=data)


def _volume(disk: Disk, tag: Tag, named: str) -> dict[str, Json]:
    """What a Target has of a volume."""
    if not zfsplace.is_volume(disk.path):
        if named:
            raise NotUnderDisk(f"Disk {disk.target} is not a ZFS volume.")
        raise MethodNotSupported(f"Disk {disk.target} is not a ZFS volume; use another method.")
    gone = zfsdataset.suspended()
    if gone:  # to open a device of it would wait for ever
        raise StorageFailed(f"The pool {gone[0]} is suspended; see 'zpool status'.")
    volume = zfsplace.volume_at(disk.path)
    if "@" in volume:
        raise MethodNotSupported(f"Disk {disk.target} is a snapshot already, and never changes.")
    taken.check_alone(disk, "a snapshot of the volume", named=bool(named))
    identity = storage.file_id(disk.path) or FileId(0, 0)
    return {
        **taken.identified(os.path.realpath(disk.path), identity),
        "dataset": volume,
        "name": tag.storage_name,
        "root": "",
        "inside": "",
        "folder": "",
        "mounted": False,
        "clone": f"{os.path.dirname(volume)}/{tag.storage_name}",
    }


def _file(disk: Disk, tag: Tag, named: str) -> dict[str, Json]:
    """What a Target has of a file."""
    image = os.path.realpath(disk.path)
    fd = taken.open_image(disk, image)
    try:
        found = os.fstat(fd)
        place = zfsplace.of_file(fd, image)
    finally:
        os.close(fd)
    if place is None:
        if named:
            raise NotUnderDisk(f"The image of disk {disk.target} is not a file on ZFS.")
        raise MethodNotSupported(
            f"The image of disk {disk.target} is not on ZFS; use another method."
        )
    root = zfsplace.open_root(place.root, place.dataset)
    taken.check_chain(root, place.below, disk, named=bool(named))
    name = f"snapd-vm-{tag.operation or tag.uuid}"
    shown = bool(place.snapshots)
    folder = os.path.join(place.snapshots, name)
    if not shown and not hostmount.possible():
        raise MethodNotSupported(
            f"The dataset of disk {disk.target} is mounted where nobody else would see its "
            "snapshots; mount it in the host's own mount namespace."
        )
    if not shown:  # disks that are taken together may be in several datasets
        digest = hashlib.sha256(os.fsencode(place.dataset)).hexdigest()
        folder = f"{MOUNTS}/{name}.{digest[:8]}"
    return {
        **taken.identified(image, FileId(found.st_dev, found.st_ino)),
        "dataset": place.dataset,
        "name": name,
        "root": place.root,
        "inside": place.inside,
        "folder": folder,
        "mounted": not shown,
        "clone": "",
    }


def same(one: ZfsTarget) -> None:
    """Raise StorageFailed where the image is another one, or elsewhere, than it was."""
    if one.is_volume:
        there = zfsplace.is_volume(one.declared) and storage.file_id(one.declared) == one.identity
        if there and zfsplace.volume_at(one.declared) == one.dataset:
            return
    else:
        try:
            fd = os.open(one.image, taken.IMAGE_FLAGS)
        except OSError as error:
            raise StorageFailed(f"{one.image} can't be opened: {error.strerror}.") from error
        try:
            found, place = os.fstat(fd), zfsplace.of_file(fd, one.image)
        finally:
            os.close(fd)
        where = (place.dataset, place.inside) if place is not None else ("", "")
        if (FileId(found.st_dev, found.st_ino), *where) == (
            one.identity,
            one.dataset,
            one.inside,
        ):
            return
    raise StorageFailed(f"The image {one.image} was replaced meanwhile; try again.")


def check(disks: Sequence[ZfsTarget]) -> Needs:
    """See Method.check. Raises NoSpace, Busy, MethodNotSupported and StorageFailed."""
    datasets = list(dict.fromkeys(one.dataset for one in disks))
    rooms = zfsdataset.rooms(datasets)
    missing = next((name for name in datasets if name not in rooms), "")
    if missing:
        raise StorageFailed(f"The dataset {missing} is not there any more.")
    needed = dict.fromkeys(map(zfsdataset.pool_of, datasets), 0)
    for name in datasets:
        needed[zfsdataset.pool_of(name)] += rooms[name].needed + RESERVE
    for name in datasets:
        if rooms[name].free < needed[zfsdataset.pool_of(name)]:
            raise NoSpace(
                f"The dataset {name} has {rooms[name].free} bytes left, and the snapshot, with "
                f"what is overwritten after it, needs {needed[zfsdataset.pool_of(name)]}; make "
                "some room first."
            )
    for one in disks:
        if not one.active:
            taken.check_unwritten(one.image)
    return Needs(
        sum(needed.values()),
        min(rooms[name].free for name in datasets),
        tuple(_warnings(disks, rooms)),
    )


def _warnings(disks: Sequence[ZfsTarget], rooms: Mapping[str, zfsdataset.Room]) -> Iterator[str]:
    for one in disks:
        used = rooms[one.dataset].referenced if one.is_volume else _allocated(one.image)
        free = rooms[one.dataset].free
        if free < used:
            yield (
                f"As the guest overwrites {one.image}, up to {used} bytes more are needed, and "
                f"{free} are free; the guest stops when there are none."
            )
    for dataset in dict.fromkeys(one.dataset for one in disks if not one.is_volume):
        yield (
            f"The snapshot holds all else that is in the dataset {dataset} too; what is removed or "
            "overwritten there takes up its room until the snapshot is deleted."
        )


def _allocated(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except OSError:
        return 0
