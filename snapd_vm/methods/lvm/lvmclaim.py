"""What the method lvm would act on: the volume that a disk is, or that holds its file, held against
the device that a caller named. Starts no program, and changes nothing.

A device that is named is never opened, nor followed where it leads: it must be one of the two names
that udev gives the very volume that was found from the disk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from snapd_vm import command, mounts
from snapd_vm.errors import MethodNotSupported, NotUnderDisk
from snapd_vm.methods import chain, taken
from snapd_vm.methods.lvm import devicemapper, lvmmount
from snapd_vm.methods.lvm.devicemapper import Volume
from snapd_vm.methods.lvm.lvmvolumes import PROGRAMS
from snapd_vm.model import Disk, Domain, Json, MethodRequest, Tag, Target
from snapd_vm.mounts import Mount
from snapd_vm.storage import FileId

_TAKES = {"block": "logical volumes", "file": "files on them"}
_ELSEWHERE = ("logdev=", "rtdev=")
"""Options by which an XFS has a part of itself on another device."""


def claim(
    domain: Domain, disk: Disk, request: MethodRequest | None, tag: Tag, mount_dir: str
) -> Target:
    """The Target of a disk, see LvmTarget. Raises MethodNotSupported and NotUnderDisk."""
    options = request.options if request is not None else {}
    named = options.get("device", "")
    taken.check_fit(disk, "lvm", _TAKES, taken.RAW if request is None else chain.FORMATS, named)
    file: Mapping[str, Json] = {}
    if disk.type == "block":
        number = devicemapper.device_number(disk.path)
        volume = devicemapper.volume_of(number) if number is not None else None
    elif named:
        volume, file = _holding(disk, tag, mount_dir, named)
    else:
        raise MethodNotSupported(
            f"The image of disk {disk.target} is a file; name the logical volume that holds it "
            "with <device path='/dev/VG/LV'/>, or use another method."
        )
    if named and (volume is None or named not in volume.names):
        raise NotUnderDisk(_not_under(disk, named, volume))
    if volume is None:
        raise MethodNotSupported(f"Disk {disk.target} is not a logical volume.")
    if not file:
        taken.check_alone(disk, "a snapshot of the logical volume", named=bool(named))
    wanted = int(options.get("size", "0"))
    problem = _unfit_volume(disk, volume, tag, wanted) or missing()
    if problem:
        raise MethodNotSupported(problem)
    return Target(
        method="lvm",
        disk=disk.target,
        data={
            **taken.described(domain, disk, tag),
            "kind": volume.kind,
            "vg": volume.vg,
            "vg_uuid": volume.vg_uuid,
            "lv": volume.lv,
            "lv_uuid": volume.lv_uuid,
            "wanted": wanted,
            **file,
        },
    )


def missing() -> str:
    """What has to be installed, or ''."""
    if all(command.installed(program) for program in PROGRAMS):
        return ""
    return "The programs of lvm are not there; install lvm2 (Debian's package)."


def _unfit_volume(disk: Disk, volume: Volume, tag: Tag, wanted: int) -> str:
    if not volume.kind:
        return (
            f"The logical volume {volume.path} of disk {disk.target} is neither linear, striped "
            "nor thin; use method qemu."
        )
    longest = devicemapper.joined(volume.vg, f"{tag.storage_name}-discarded")
    if len(longest) > devicemapper.LONGEST_NAME:
        return (
            f"The volume group {volume.vg} has so long a name that there is no room for that of a "
            "snapshot; use method qemu."
        )
    if wanted and volume.kind == devicemapper.THIN:
        return (
            f"The logical volume {volume.path} is thin, and its snapshots take their room from its "
            "pool; leave out <size>."
        )
    return ""


def _not_under(disk: Disk, named: str, volume: Volume | None) -> str:
    # True of a name that leads to the volume too, and of a disk that an encrypted one holds.
    if volume is None:
        return f"Disk {disk.target} is not directly on {named}, nor on a logical volume."
    return f"Disk {disk.target} is on {volume.path}; name that device, not {named}."


def _holding(
    disk: Disk, tag: Tag, mount_dir: str, named: str
) -> tuple[Volume | None, Mapping[str, Json]]:
    """The volume whose file system holds the disk's file, and what a Target says of the file."""
    image = os.path.realpath(disk.path)
    fd = taken.open_image(disk, image)
    try:
        found = os.fstat(fd)
        mount = mounts.mount_of(fd)
    finally:
        os.close(fd)
    if mount.type not in lvmmount.OPTIONS:
        volume = _source_of(mount)
        if volume is None or named not in volume.names:
            raise NotUnderDisk(_not_under(disk, named, volume))
        raise MethodNotSupported(_unfit_file_system(disk, mount))
    volume = devicemapper.volume_of(found.st_dev) if found.st_dev == mount.device else None
    if volume is None:
        return None, {}
    if any(option.startswith(_ELSEWHERE) for option in mount.options):
        raise MethodNotSupported(
            f"The file system of disk {disk.target} has a part of itself on another device, which "
            "a snapshot does not hold; use method qemu."
        )
    below = os.path.relpath(image, mount.point)  # '.' of a file that is a mount itself
    inside = os.path.normpath(os.path.join(mount.root, below)).lstrip("/")
    taken.check_chain(open_root(found.st_dev), inside, disk, named=True)
    return volume, {
        **taken.identified(image, FileId(found.st_dev, found.st_ino)),
        "filesystem": mount.type,
        "inside": inside,
        "mount": os.path.join(mount_dir, tag.uuid),
    }


def _source_of(mount: Mount) -> Volume | None:
    """The volume that the file system says it is on: that of btrfs has another st_dev."""
    number = devicemapper.device_number(mount.source) if mount.source.startswith("/") else None
    return devicemapper.volume_of(number) if number is not None else None


def _unfit_file_system(disk: Disk, mount: Mount) -> str:
    if mount.type == "btrfs":
        return (
            f"Disk {disk.target} is on btrfs; a snapshot of its volume must not be mounted beside "
            "it, as the kernel takes both for one; use method btrfs."
        )
    return (
        f"Disk {disk.target} is on {mount.type}; of the file systems on logical volumes method lvm "
        "knows ext4 and XFS."
    )


def open_root(device: int) -> int:
    """A descriptor of the root folder of a file system that is mounted.

    Raises MethodNotSupported.
    """
    for mount in mounts.table():
        if mount.device != device or mount.root != "/":
            continue
        try:
            fd = os.open(mount.point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        if os.fstat(fd).st_dev == device:  # and not what is mounted over it
            return fd
        os.close(fd)
    raise MethodNotSupported(
        "The root of the file system is mounted nowhere that the daemon sees; mount it."
    )
