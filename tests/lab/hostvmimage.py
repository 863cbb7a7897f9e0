"""Builds what the host VM boots: Debian with systemd, libvirt, LVM and OpenZFS, and its kernel.

Built once for each set of ingredients and kept in the lab's cache; about five minutes on two
cores, three of them for OpenZFS's modules. What differs from run to run comes on further disks
(hostvm.py).
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from tests.lab.deadline import LabError
from tests.lab.image import BUSYBOX, KERNEL_PACKAGE, cache_dir, install, kernel_package, locked
from tests.lab.program import run

INSIDE = Path(__file__).parent / "hostvm_inside"
SUITE = "bookworm"
PACKAGES = (
    *("systemd", "systemd-sysv", "udev", "dbus", "polkitd", "kmod", KERNEL_PACKAGE),
    *("libvirt-daemon-system", "libvirt-daemon-driver-qemu", "libvirt-clients"),
    *("qemu-system-x86", "qemu-utils", "lvm2", "thin-provisioning-tools", "zfsutils-linux"),
    *("btrfs-progs", "xfsprogs", "e2fsprogs", "iproute2", "procps", "psmisc", "libglib2.0-bin"),
    *("python3", "python3-libvirt", "python3-lxml", "python3-systemd", "python3-dbus-next"),
    *("python3-btrfsutil", "make"),
)
# In the order they are loaded; ext4 is built into this kernel.
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"),
    "virtio_blk",
)
# No one waits for these, and each takes its share of a boot that TCG makes slow.
MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *("e2scrub_reap.service", "fstrim.timer", "getty@tty1.service", "serial-getty@ttyS0.service"),
    *("libvirt-guests.service", "zfs-zed.service", "zfs-share.service", "zfs-volume-wait.service"),
    *("systemd-pstore.service", "systemd-update-utmp.service", "systemd-random-seed.service"),
    *("systemd-update-utmp-runlevel.service", "networking.service", "remote-fs.target"),
    *("rc-local.service", "systemd-binfmt.service", "keyboard-setup.service"),
)
# By its socket, when somebody asks for it; the lab has a libvirtd of its own.
UNWANTED = ("libvirtd.service",)
# What only one who has a pool of ZFS needs at boot. (Its programs load the modules too.)
POOLS_UNITS = ("zfs-load-module.service", "systemd-udev-settle.service")
POOLS_ONLY = "[Unit]\nConditionFileNotEmpty=/etc/zfs/zpool.cache\n"
FSTAB = "/dev/disk/by-id/virtio-payload /lab ext4 noatime,x-systemd.device-timeout=300 0 0\n"
SIZE = "6G"
KEEP_UNUSED_S = 14 * 24 * 3600
AGENT_UNIT = "lab-agent.service"


@dataclass(frozen=True)
class HostVmImage:
    """A kernel, an initramfs to boot it with, and the raw image of the root, not to be written."""

    kernel: Path
    initramfs: Path
    root: Path


@functools.cache
def host_vm_image() -> HostVmImage:
    """The image, built if it is not there yet."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    _, version = kernel_package()
    sources = _sources()
    folder = cache / f"hostvm-{_digest(version, sources, Path(__file__), BUSYBOX, *_inside())}"
    modules = cache / f"hostvm-zfs-{_digest(version, sources, INSIDE / 'zfs.sh')}"
    image = HostVmImage(folder / "vmlinuz", folder / "initramfs", folder / "root.raw")
    if folder.is_dir():  # nobody waits for the build of another one
        os.utime(folder)
        return image
    with locked(cache / "hostvm.lock"):
        if not folder.is_dir():
            building = cache / "hostvm-building"
            shutil.rmtree(building, ignore_errors=True)  # of a build that was killed
            building.mkdir()
            _build(building, sources, modules)
            building.rename(folder)
        os.utime(modules)
        for old in cache.glob("hostvm-*"):
            if old.stat().st_mtime < time.time() - KEEP_UNUSED_S:
                shutil.rmtree(old)
    return image


def _sources() -> str:
    """Lines for sources.list: the places where this machine has Debian from, and contrib there."""
    form = "deb $(REPO_URI) $(RELEASE) main contrib"
    shown = run(
        "apt-get", "indextargets", "--format", form, "Created-By: Packages", "Origin: Debian"
    )
    found = sorted(line for line in set(shown.splitlines()) if f" {SUITE}" in line)
    if not found:
        raise LabError(f"apt knows no place to get Debian {SUITE} from; the host VM is made of it")
    return "\n".join(found) + "\n"


def _inside() -> list[Path]:
    return sorted(path for path in INSIDE.iterdir() if path.is_file())


def _digest(kernel_version: str, sources: str, *files: Path) -> str:
    digest = hashlib.sha256(f"{kernel_version} {sources}".encode())
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(folder: Path, sources: str, modules: Path) -> None:
    root = folder / "root"
    _bootstrap(root, sources)
    if not modules.is_dir():
        _build_modules(root, folder / "zfs")
        (folder / "zfs/modules").rename(modules)
        shutil.rmtree(folder / "zfs")
    kernel = next((root / "lib/modules").iterdir())
    for module in modules.iterdir():
        install(module, kernel / "extra" / module.name, 0o644)
    run("depmod", "-b", root, kernel.name)
    _set_up(root)
    shutil.copyfile(next((root / "boot").glob("vmlinuz-*")), folder / "vmlinuz")
    _initramfs(folder, root)
    for unneeded in ("boot", "var/lib/apt/lists", "var/cache/apt", "usr/share/doc"):
        shutil.rmtree(root / unneeded)
        (root / unneeded).mkdir()
    run("mkfs.ext4", "-q", "-L", "root", "-d", root, folder / "root.raw", SIZE, timeout=300)
    shutil.rmtree(root)


def _bootstrap(root: Path, sources: str) -> None:
    options = (
        *("--variant=minbase", f"--include={','.join(PACKAGES)}", "--format=directory"),
        '--aptopt=Acquire::Check-Valid-Until "false"',  # the places may be of a certain day
        "--dpkgopt=force-unsafe-io",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        # The VM has an initramfs of its own.
        "--dpkgopt=path-exclude=/etc/kernel/postinst.d/initramfs-tools",
    )
    run("mmdebstrap", *options, SUITE, root, "-", stdin=sources, timeout=3000)


def _build_modules(root: Path, folder: Path) -> None:
    apart = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private")
    run(*apart, "sh", "-e", INSIDE / "zfs.sh", root, folder, timeout=3000)


def _set_up(root: Path) -> None:
    units = root / "etc/systemd/system"
    for unit in MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    for unit in UNWANTED:
        for wanted in units.glob(f"*.wants/{unit}"):
            wanted.unlink()
    for unit in POOLS_UNITS:
        (units / f"{unit}.d").mkdir()
        (units / f"{unit}.d/pools.conf").write_text(POOLS_ONLY)
    install(INSIDE / "agent.py", root / "usr/local/lib/lab-agent.py")
    install(INSIDE / "agent.service", units / AGENT_UNIT, 0o644)
    (units / "multi-user.target.wants" / AGENT_UNIT).symlink_to(
        f"/{units.relative_to(root)}/{AGENT_UNIT}"
    )
    (root / "lab").mkdir()
    (root / "etc/fstab").write_text(FSTAB)
    (root / "etc/hostname").write_text("hostvm\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost hostvm\n")
    # An empty one makes every boot the first.
    (root / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
    (root / "etc/resolv.conf").unlink(missing_ok=True)  # it has no network


def _initramfs(folder: Path, root: Path) -> None:
    inside = folder / "initramfs-root"
    for name in ("bin", "dev", "root", "modules"):
        (inside / name).mkdir(parents=True)
    install(BUSYBOX, inside / "bin/busybox")
    install(INSIDE / "init", inside / "init")
    for module in MODULES:
        found = next((root / "lib/modules").rglob(f"{module}.ko"))
        install(found, inside / f"modules/{module}.ko", 0o644)
    (inside / "modules/order").write_text("\n".join(MODULES) + "\n")
    names = "\n".join(str(path.relative_to(inside)) for path in sorted(inside.rglob("*")))
    pack = ("cpio", "-o", "-H", "newc", "-R", "0:0", "--quiet", "-F", str(folder / "initramfs"))
    run(*pack, cwd=inside, stdin=names)
    shutil.rmtree(inside)
