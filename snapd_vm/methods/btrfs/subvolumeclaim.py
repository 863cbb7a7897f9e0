"""What the method btrfs would act on: the subvolume of a disk, found and held against what a caller
named; what forbids it; and which snapshots of ours there are. Looks and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from snapd_vm import mounts, storage
from snapd_vm.errors import (
    MethodNotSupported,
    NameInUse,
    NoSpace,
    SnapdError,
    StorageFailed,
)
from snapd_vm.methods import chain, clone, taken
from snapd_vm.methods.btrfs import snapshotfolder, subvolume
from snapd_vm.methods.btrfs.subvolume import Subvolume
from snapd_vm.methods.btrfs.subvolumetarget import SubvolumeTarget
from snapd_vm.methods.folder import Hypervisor, open_folder
from snapd_vm.methods.method import Stored
from snapd_vm.model import Disk, Domain, Needs, Tag, Target
from snapd_vm.storage import FileId

RESERVE = 1 << 20
"""Bytes that must be free: a snapshot takes next to none, but what is overwritten then does."""


def claim(
    domain: Domain, disk: Disk, tag: Tag, *, asked: bool, named: str, snapshot_dir: str
) -> Target:
    """The Target of a disk that lies in a subvolume, see SubvolumeTarget.

    `asked`: the caller named the method, and perhaps the subvolume (`named`), which is compared
    with the disk's and never followed. Raises MethodNotSupported, NotUnderDisk and StorageFailed.
    """
    formats = chain.FORMATS if asked else taken.RAW
    taken.check_fit(disk, "btrfs", {"file": "files"}, formats, named)
    image = os.path.realpath(disk.path)
    fd = taken.open_image(disk, image)
    try:
        found = os.fstat(fd)
        layer = subvolume.holding(fd, image)
    finally:
        os.close(fd)
    if named:
        subvolume.check_named(layer, named, disk.target)
    if layer is None:
        raise MethodNotSupported(
            f"The image of disk {disk.target} is not on btrfs; use another method."
        )
    root = subvolume.open_root(layer.root, layer.uuid)
    taken.check_chain(root, layer.inside, disk, named=bool(named))
    place = _place(layer, snapshot_dir)
    snapshotfolder.check(place)
    operation = tag.operation or tag.uuid
    return Target(
        method="btrfs",
        disk=disk.target,
        data={
            **taken.described(domain, disk, tag),
            **taken.identified(image, FileId(found.st_dev, found.st_ino)),
            "source": layer.uuid,
            "root": layer.root,
            "inside": layer.inside,
            "place": place,
            "folder": f"{operation}.{layer.uuid[:8]}",  # an operation may take several subvolumes
            "name": f"snapd-vm-{operation}",
        },
    )


def check(hypervisor: Hypervisor, disks: Sequence[SubvolumeTarget]) -> Needs:
    """See Method.check. Raises NameInUse, NoSpace, Busy, MethodNotSupported and StorageFailed."""
    subvolume.load()
    available, warnings = list[int](), list[str]()
    for one in disks:
        there = snapshotfolder.check(one.place)
        if os.path.lexists(os.path.join(one.place, one.folder)):
            raise NameInUse(f"There is {one.place}/{one.folder} already; move it away.")
        if storage.read_only(there):
            raise StorageFailed(f"The folder {there} is read-only.")
        available.append(storage.space_available(there))
        if available[-1] < RESERVE * len(disks):
            raise NoSpace(
                f"The file system of {one.root} has {available[-1]} bytes left; what the guest "
                "overwrites after the snapshot needs new room, so make some first."
            )
        if not one.active:
            taken.check_unwritten(one.image)
        warnings += _warnings(hypervisor, one, available[-1])
    warnings += [
        f"The snapshot holds all else that is in the subvolume {root} too; what is removed or "
        "overwritten there takes up its room until the snapshot is deleted."
        for root in dict.fromkeys(one.root for one in disks)
    ]
    return Needs(RESERVE * len(disks), min(available), tuple(warnings))


def _warnings(hypervisor: Hypervisor, one: SubvolumeTarget, available: int) -> Iterator[str]:
    with open_folder(hypervisor, os.path.dirname(one.image)) as folder:
        image = clone.open_image(folder, os.path.basename(one.image), one.identity)
        try:
            used, nocow = os.fstat(image).st_blocks * 512, clone.is_nocow(image)
        finally:
            os.close(image)
    if nocow:
        yield (
            f"The image {one.image} is written in place (chattr +C); after a snapshot each of its "
            "blocks is copied once all the same, when the guest overwrites it."
        )
    if available < used:
        yield (
            f"As the guest overwrites the image {one.image}, up to {used} bytes more are needed, "
            f"and {available} are free; the guest stops when there are none."
        )


def _place(layer: Subvolume, snapshot_dir: str) -> str:
    """The folder of snapshots: the configured one, if it is in that file system."""
    if snapshot_dir:
        path = os.path.realpath(snapshot_dir)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageFailed(
                f"The folder {path} of btrfs.snapshot_dir can't be opened: {error.strerror}."
            ) from error
        try:
            if mounts.mount_of(fd).device == layer.file_system:
                return path
        finally:
            os.close(fd)
    return os.path.join(layer.root, snapshotfolder.DEFAULT)


def stored(domains: Iterable[Domain], snapshot_dir: str) -> Iterator[Stored]:
    """Every snapshot of ours in the places for these domains' disks, whoever knows of it."""
    import shlex

    places = {os.path.realpath(snapshot_dir)} if snapshot_dir else set[str]()
    devices: dict[int, str] = {}
    for domain in domains:
        for disk in (*domain.disks, *domain.persistent_disks):
            found = storage.file_id(disk.path) if disk.path else None
            if found is None or disk.type != "file":
                continue
            devices.setdefault(found.device, f"disk {disk.target} of domain {domain.name}")
            try:
                image = os.path.realpath(disk.path)
                fd = taken.open_image(disk, image)
                try:
                    layer = subvolume.holding(fd, image)
                finally:
                    os.close(fd)
            except SnapdError:  # what can't be looked at now holds nothing that can be told of
                continue
            if layer is not None:
                places |= {os.path.join(root, snapshotfolder.DEFAULT) for root in layer.roots}
    seen = set[tuple[int, int]]()
    for place in sorted(places):
        for path, said in snapshotfolder.listed(place):
            found_at = os.stat(path)
            if (found_at.st_dev, found_at.st_ino) in seen:
                continue
            seen.add((found_at.st_dev, found_at.st_ino))
            user = devices.get(found_at.st_dev) or storage.reader_in(found_at.st_dev)
            words = f"btrfs subvolume delete -- {shlex.quote(path)} && rmdir -- "
            yield Stored(
                path,
                str(said.get("snapshot", "")),
                str(said.get("name", "")),
                str(said.get("domain_name", "")),
                f"it is used by {user}, which has to go first" if user else "nobody uses it",
                "" if user else words + shlex.quote(os.path.dirname(path)),
            )
