"""Makes the disk that brings the checkout, the tests' packages and a guest into a host VM."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from tests.lab import warmstart
from tests.lab.disks import DiskSpec
from tests.lab.image import guest_image
from tests.lab.lab import Lab
from tests.lab.program import CHECKOUT, run

# What Debian's packages in the VM do not bring. Compiled for this machine's Python, they still fit:
# psutil is built for the stable ABI.
TESTS_NEED = (
    *("pytest", "pytest-asyncio", "pytest-rerunfailures", "pytest-timeout", "hypothesis"),
    "psutil",
)
# Debian's dbus_next takes GLib along where it is, which takes seconds and warns.
NO_GLIB = 'raise ImportError("the tests do without GLib, in here as outside")\n'
SIZE = "1G"


def payload_disk(disk: Path, staging: Path) -> None:
    """Make a raw image with ext4: checkout/, packages/ and guest/."""
    (staging / "guest").mkdir(parents=True)
    for path in (guest_image().kernel, guest_image().initramfs, *_states()):
        shutil.copyfile(path, staging / "guest" / path.name)
    _copy_packages(staging / "packages")
    (staging / "packages/gi.py").write_text(NO_GLIB)
    with tarfile.open(fileobj=io.BytesIO(checkout_tar(compiled=True))) as packed:
        packed.extractall(staging / "checkout", filter="fully_trusted")
    run("mkfs.ext4", "-q", "-d", staging, disk, SIZE, timeout=120)
    shutil.rmtree(staging)


def _states() -> Iterator[Path]:
    """States of guests with one disk and with two: to boot one inside a VM takes minutes."""
    for disks in (1, 2):
        shape = warmstart.shape(disks)
        if warmstart.find(shape) is None:
            with Lab() as lab:
                lab.guest([DiskSpec()] * disks)
        found = warmstart.find(shape)
        assert found is not None
        yield found


def checkout_tar(*, compiled: bool) -> bytes:
    """The files that git knows, or would if it were asked to, and what Python has compiled."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for path in _files(compiled):
            archive.add(path, str(path.relative_to(CHECKOUT)), recursive=False)
    return packed.getvalue()


def _files(compiled: bool) -> Iterator[Path]:
    listed = run("git", "ls-files", "-z", "-c", "-o", "--exclude-standard", cwd=CHECKOUT)
    folders = set()
    for name in sorted(set(listed.split("\0")) - {""}):
        path = CHECKOUT / name
        if path.is_symlink() or path.exists():  # else it is removed, and git not told yet
            yield path
            folders.add(path.parent)
    for folder in sorted(folders) if compiled else ():
        yield from sorted((folder / "__pycache__").glob("*.pyc"))


def _copy_packages(target: Path) -> None:
    for found in _needed(TESTS_NEED, {}).values():
        for file in found.files or ():
            if ".." not in file.parts:  # scripts in bin
                source = Path(str(found.locate_file(file)))
                to = target / file
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, to)


def _needed(names: tuple[str, ...], known: dict[str, Distribution]) -> dict[str, Distribution]:
    """These distributions and all they need that is installed here."""
    for name in names:
        if name in known:
            continue
        try:
            known[name] = distribution(name)
        except PackageNotFoundError:  # for another Python or another system
            continue
        wants = [word for word in known[name].requires or () if "extra ==" not in word]
        _needed(tuple(re.split(r"[^\w.-]", word)[0].lower() for word in wants), known)
    return known
