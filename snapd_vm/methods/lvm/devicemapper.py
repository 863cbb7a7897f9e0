"""Logical volumes as the kernel has them (sysfs): which one a device is, by which names it goes,
what it is made of. Starts no program, opens no volume, changes none.

lvm calls a device by the names of its volume group and volume, the hyphens in each doubled, and
gives it the UUID `LVM-` with the UUIDs of both; what it needs inside has a suffix to that.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

SYSFS = Path("/sys/dev/block")
CONTROL = "/dev/mapper/control"
LONGEST_NAME = 127
"""Of a device: DM_NAME_LEN, linux/dm-ioctl.h."""

_UUID = re.compile(r"LVM-([0-9A-Za-z]{32})([0-9A-Za-z]{32})(-[a-z]+)?")
THICK, THIN = "thick", "thin"
# linux/dm-ioctl.h: a request, and of its struct dm_ioctl version, data_size, data_start and name.
_GET_TARGET_VERSION = 0xC138FD11
_DM_IOCTL = struct.Struct("3I I I 28x 128s 136x")
_ANSWER = 512


@dataclass(frozen=True, slots=True)
class Volume:
    """A logical volume that is active; its UUIDs are without hyphens.

    `kind` is THICK (linear or striped) or THIN, or '' for what is neither, such as a mirror, a
    cached volume, or a snapshot.
    """

    number: int
    vg: str
    lv: str
    vg_uuid: str
    lv_uuid: str
    kind: str

    @property
    def path(self) -> str:
        """The name by which people know it."""
        return f"/dev/{self.vg}/{self.lv}"

    @property
    def names(self) -> tuple[str, str]:
        """The names of its device that udev gives it; all others are somebody's symlinks."""
        return names(self.vg, self.lv)


def names(vg: str, lv: str) -> tuple[str, str]:
    """See Volume.names."""
    return f"/dev/{vg}/{lv}", f"/dev/mapper/{joined(vg, lv)}"


def joined(vg: str, lv: str) -> str:
    """The name of a volume's device."""
    return f"{vg.replace('-', '--')}-{lv.replace('-', '--')}"


def parted(name: str) -> list[str]:
    """What such a name is joined from; three parts are of what a volume needs inside."""
    return [part.replace("--", "-") for part in re.findall(r"(?:[^-]|--)+", name)]


def device_number(path: str) -> int | None:
    """The number of the block device behind `path`, symlinks followed; None for what is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else None


def volume_of(number: int) -> Volume | None:
    """The logical volume that the device is itself; None: it is none, or one's inner part."""
    ids = _UUID.fullmatch(_read(number, "dm/uuid"))
    parts = parted(_read(number, "dm/name"))
    if ids is None or ids[3] is not None or len(parts) != 2:
        return None
    vg, lv = parts
    return Volume(number, vg, lv, ids[1], ids[2], _kind(number, ids[1]))


def load_target(name: str) -> None:
    """Have the kernel load the module of one of device mapper's targets, if it is not there.

    lvcreate calls modprobe(8) for it, which takes its time, and which a service that is confined
    can't (ProtectKernelModules=, systemd.exec(5)). The kernel calls it outside of that. Where that
    can't be (a kernel before 5.4), lvcreate says what is wrong.
    """
    request = bytearray(_ANSWER)
    _DM_IOCTL.pack_into(request, 0, 4, 0, 0, _ANSWER, _DM_IOCTL.size, name.encode())
    try:
        fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _GET_TARGET_VERSION, request)
        finally:
            os.close(fd)
    except OSError as error:
        log.debug("the kernel does not load device mapper's target %s: %s", name, error)


def is_suspended(number: int) -> bool:
    """Whether all that is read or written waits, as when an lvm was killed in the midst; be it at
    the volume's own device, or at what it needs inside.
    """
    if _read(number, "dm/suspended") == "1":
        return True
    inner = [one for one in _slaves(number) if _read(one, "dm/uuid").startswith("LVM-")]
    return any(is_suspended(one) for one in inner)


def _kind(number: int, vg_uuid: str) -> str:
    kind = THICK
    for below in _slaves(number):
        ids = _UUID.fullmatch(_read(below, "dm/uuid"))
        if ids is None or ids[1] != vg_uuid:  # the disk, or what else the group lies on
            continue
        if ids[3] == "-tpool":
            return THIN
        if ids[3] != "-real":
            return ""
        kind = _kind(below, vg_uuid)  # the contents of an origin of thick snapshots
    return kind


def _slaves(number: int) -> Iterator[int]:
    try:
        entries = sorted(os.listdir(_place(number) / "slaves"))
    except OSError:
        return
    for entry in entries:
        text = _text(_place(number) / "slaves" / entry / "dev")
        if re.fullmatch(r"\d+:\d+", text):
            major, minor = text.split(":")
            yield os.makedev(int(major), int(minor))


def _read(number: int, name: str) -> str:
    return _text(_place(number) / name)


def _place(number: int) -> Path:
    return SYSFS / f"{os.major(number)}:{os.minor(number)}"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").rstrip("\n")
    except OSError:
        return ""
