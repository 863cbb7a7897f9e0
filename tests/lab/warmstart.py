"""Guests that need not boot: others' state, as they were when all was up but for the disks' driver.

A boot under TCG takes over four seconds of a processor, and more than what most tests are about. So
a guest of each shape (how many disks, which agent) is booted once with `lab.wait`, which has guestd
stop before it loads that driver, and what QEMU writes of it is kept beside the image. Others are
restored from that with a name, UUID, and disks of their own, as QEMU looks at none of these; the
guest then finds its disks as if it had booted with them.

What is restored is in libvirt's form for saved domains (src/qemu/qemu_saveimage.h): a header, the
definition, and QEMU's own stream.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from tests.lab import guestxml
from tests.lab.deadline import LabError
from tests.lab.image import cached, locked
from tests.lab.program import run
from tests.lab.tsc import tsc_khz

WAIT = "lab.wait"
WAITS = "guestd: waits"
"""What the guest prints on its console then."""
_HEADER = struct.Struct("16s 5I 56x")  # magic, version, length of the definition, running, …
_MAGIC, _VERSION = b"LibvirtQemudSave", 2
_SAME_CLOCK = 0.01  # of a guest that takes another machine's clock for its own, time is wrong


def kernel_arguments(khz: int) -> str:
    """Those of the guest that is saved. It does not find out the clock's frequency on a machine
    that may be busy, as all others have it from this one.
    """
    return f"{WAIT} tsc_early_khz={khz}"


@functools.cache
def shape(disks: int, agent: guestxml.Agent = "libvirt", arguments: str = "") -> str:
    """The name of a shape: so many disks, and what the kernel is told besides.

    What is saved depends on QEMU's version, and on what else is in the definition.
    """
    version = run("qemu-system-x86_64", "--version")
    said = f"{version} {Path(guestxml.__file__).read_text()} {disks} {agent} {arguments}"
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def state(name: str, save: Callable[[int], Path]) -> Path | None:
    """The state of a guest of the shape of this name; None: there is none, and can't be here.

    `save` is given the clock's frequency, and answers where libvirt has saved a domain.
    """
    folder, writable = cached()
    if (found := find(name)) or not writable:
        return found
    with locked(folder / "lock"):
        if found := find(name):  # another run was faster
            return found
        khz = _clock()
        made, making = folder / f"state-{name}-{khz}", folder / "state"
        _strip(save(khz), making)
        making.rename(made)
    return made


def find(name: str) -> Path | None:
    """That state, if there is one that was made on such a machine."""
    folder, _ = cached()
    for path in sorted(folder.glob(f"state-{name}-*")):
        if abs(_clock() / int(path.name.rpartition("-")[2]) - 1) < _SAME_CLOCK:
            return path
    return None


@functools.cache
def _clock() -> int:
    return tsc_khz()


def write_saved(stream: Path, definition: str, to: Path) -> None:
    """Write what libvirt restores a domain of this definition from."""
    xml = definition.encode() + b"\0"
    with to.open("wb") as file, stream.open("rb") as source:
        file.write(_HEADER.pack(_MAGIC, _VERSION, len(xml), 1, 0, 0) + xml)
        shutil.copyfileobj(source, file, 1 << 20)


def _strip(saved: Path, to: Path) -> None:
    """Only QEMU's stream of it, which is moved."""
    with saved.open("rb") as file, to.open("wb") as stream:
        magic, version, length, *_ = _HEADER.unpack(file.read(_HEADER.size))
        if (magic, version) != (_MAGIC, _VERSION):
            raise LabError(f"libvirt saves domains in another form: {magic!r} {version}")
        file.seek(_HEADER.size + length)
        shutil.copyfileobj(file, stream, 1 << 20)
    saved.unlink()
