"""Builds the guest that the lab boots: Debian's cloud kernel, busybox, a real qemu-ga and guestd.

Built once for each set of ingredients and kept in a cache; the disks are not part of it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab.deadline import LabError
from tests.lab.program import run

INSIDE = Path(__file__).parent / "inside"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX = Path("/bin/busybox")
AGENT = Path("/usr/sbin/qemu-ga")
# In the order they are loaded; ext4 is built into this kernel.
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"),
    *("virtio_blk", "virtio_console", "evdev", "button", "libcrc32c", "xfs"),
)
LZ4_MAGIC = b"\x02\x21\x4c\x18"  # the legacy frame, lz4's doc/lz4_Frame_format.md
COMPILE = ("gcc", "-O2", "-static", "-pthread", "-Wall", "-Wextra")
# qemu-ga runs this for guest-shutdown; guestd, being PID 1, does the work.
SHUTDOWN = "#!/bin/sh\nkill -TERM 1\n"
KEEP_UNUSED_S = 14 * 24 * 3600


@dataclass(frozen=True)
class GuestImage:
    """A kernel and an initramfs to boot it with."""

    kernel: Path
    initramfs: Path


def cache_dir() -> Path:
    """Where built images are kept."""
    return Path(os.environ.get("SNAPD_VM_LAB_CACHE", "/var/cache/snapd-vm-lab"))


@functools.cache
def guest_image() -> GuestImage:
    """The image made from what this machine has installed, built if it is not there yet.

    In a host VM it is the one that the machine outside has.
    """
    if ready := os.environ.get("SNAPD_VM_LAB_GUEST"):
        return GuestImage(Path(ready, "vmlinux"), Path(ready, "initramfs"))
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    package, version = kernel_package()
    folder = cache / f"guest-{_ingredients(package, version)}"
    with locked(cache / "lock"):
        if not folder.is_dir():
            building = cache / "building"
            shutil.rmtree(building, ignore_errors=True)  # of a build that was killed
            building.mkdir()
            _build(building, package)
            building.rename(folder)
        os.utime(folder)
        for old in cache.glob("guest-*"):
            if old.stat().st_mtime < time.time() - KEEP_UNUSED_S:
                shutil.rmtree(old)
    return GuestImage(folder / "vmlinux", folder / "initramfs")


def cached() -> tuple[Path, bool]:
    """Where the guest's image is, and whether more can be kept there."""
    if ready := os.environ.get("SNAPD_VM_LAB_GUEST"):
        return Path(ready), False
    return guest_image().kernel.parent, True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while the `with` block runs."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kernel_package() -> tuple[str, str]:
    """The package with the kernel proper, which the package of the constant name depends on."""
    for update in (False, True):
        if update:  # a fresh machine may have no package lists yet
            run("apt-get", "update", "-q", timeout=300)
        shown = run("apt-cache", "show", "--no-all-versions", KERNEL_PACKAGE)
        found = re.search(r"^Depends: (linux-image-\S+) \(= (\S+)\)", shown, re.MULTILINE)
        if found:
            return found[1], found[2]
    raise LabError(f"apt knows no {KERNEL_PACKAGE} with a kernel behind it")


def _ingredients(package: str, version: str) -> str:
    digest = hashlib.sha256(
        repr((package, version, MODULES, COMPILE, SHUTDOWN, LZ4_MAGIC)).encode()
    )
    for path in [BUSYBOX, AGENT, *_libraries(), *sorted(INSIDE.iterdir())]:
        digest.update(f"{path.name} {_sha256(path)}".encode())
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise LabError(f"not installed: {path}") from error


def _libraries() -> list[Path]:
    """The shared libraries qemu-ga loads, and the loader itself."""
    return [Path(word) for word in re.findall(r"(/\S+) \(0x", run("ldd", AGENT))]


def _build(folder: Path, package: str) -> None:
    unpacked = folder / "kernel"
    _fetch_kernel(package, folder, unpacked)
    _unpack_kernel(next((unpacked / "boot").glob("vmlinuz-*")), folder / "vmlinux")
    root = folder / "root"
    _fill_root(root, unpacked)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    # Not compressed: under TCG the guest would take longer to unpack it than QEMU takes to copy it.
    pack = ("cpio", "-o", "-H", "newc", "-R", "0:0", "--quiet", "-F", str(folder / "initramfs"))
    run(*pack, cwd=root, stdin=names)
    shutil.rmtree(unpacked)
    shutil.rmtree(root)


def _fetch_kernel(package: str, folder: Path, unpacked: Path) -> None:
    download = ("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package)
    try:
        run(*download, cwd=folder, timeout=300)
    except LabError:  # the archive has dropped the version that our lists still name
        run("apt-get", "update", "-q", timeout=300)
        run(*download, cwd=folder, timeout=300)
    deb = next(folder.glob("*.deb"))
    run("dpkg", "-x", deb, unpacked)
    deb.unlink()


def _unpack_kernel(packed: Path, target: Path) -> None:
    """Write the kernel as it is in memory, which QEMU boots too (PVH): to unpack it takes a guest
    under TCG a sixth of its boot.

    Where what it is packed in lies: the kernel's Documentation/arch/x86/boot.rst.
    """
    image = packed.read_bytes()
    setup = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[setup + offset : setup + offset + length - 4]  # its size comes behind it
    if not payload.startswith(LZ4_MAGIC):  # another version may be packed otherwise
        shutil.copyfile(packed, target)
        return
    target.with_suffix(".lz4").write_bytes(payload)
    run("lz4", "-q", "-d", target.with_suffix(".lz4"), target)
    target.with_suffix(".lz4").unlink()


def _fill_root(root: Path, unpacked: Path) -> None:
    for name in ("bin", "sbin", "usr/sbin", "proc", "sys", "dev", "run", "mnt", "tmp", "modules"):
        (root / name).mkdir(parents=True)
    install(BUSYBOX, root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    install(INSIDE / "init", root / "init")
    (root / "sbin/shutdown").write_text(SHUTDOWN)
    (root / "sbin/shutdown").chmod(0o755)
    for path in [AGENT, *_libraries()]:
        install(path, root / path.relative_to("/"))
    for module in MODULES:
        install(next(unpacked.rglob(f"{module}.ko")), root / f"modules/{module}.ko")
    (root / "modules/order").write_text("\n".join(MODULES))
    run(*COMPILE, "-o", root / "sbin/guestd", *sorted(INSIDE.glob("*.c")))


def install(source: Path, target: Path, mode: int = 0o755) -> None:
    """Copy a file to where it is needed, in folders made for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)
