"""Makes disk images for guests: small, formatted, as a file, a chain of files or on a block device.

It knows nothing of libvirt but the `<disk>` element that describes what it made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import quoteattr

from tests.lab.program import run

MKFS = {
    # without the lazy part, so that the guest's kernel has nothing of its own to write
    "ext4": ("mkfs.ext4", "-q", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q"),
}


@dataclass(frozen=True)
class DiskSpec:
    """What a disk is to be; the default is a file in the run's own folder."""

    format: Literal["qcow2", "raw"] = "qcow2"
    size_mib: int = 64
    filesystem: Literal["ext4", "xfs"] | None = "ext4"  # xfs wants size_mib=300
    folder: Path | None = None  # where the file goes; must be open to QEMU's user
    device: Path | None = None  # a block device instead of a file
    overlays: int = 0  # so many empty qcow2 overlays on top: a chain
    driver: str = ""  # more attributes of <driver>, e.g. "cache='none'"
    extra: str = ""  # more children of <disk>, e.g. "<shareable/>"
    source: str = ""  # XML of <source> for a disk made by the test itself; with `type`
    type: str = "file"


@dataclass(frozen=True)
class Disk:
    """A disk as it was made. After a snapshot the domain may use another file than `path`."""

    target: str
    path: Path
    format: str
    type: str
    xml: str
    chain: tuple[Path, ...] = field(default=())  # the files, the active one first


def make_disk(spec: DiskSpec, folder: Path, owner: str, target: str) -> Disk:
    """Make a disk for a guest called `owner`."""
    if spec.source:
        return _described(spec, target, spec.format, spec.source, ())
    if spec.device is not None:
        _fill_device(spec.device, spec, folder / f"{owner}-{target}.new")
        source = f"<source dev={quoteattr(str(spec.device))}/>"
        return _described(spec, target, spec.format, source, (spec.device,))
    path = (spec.folder or folder) / f"{owner}-{target}.{spec.format}"
    raw = path if spec.format == "raw" else path.with_suffix(".new")
    format_raw(raw, spec, spec.size_mib << 20)
    if spec.format == "qcow2":
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
        raw.unlink()
    chain: tuple[Path, ...] = (path,)
    image_format: str = spec.format
    for number in range(1, spec.overlays + 1):
        overlay = path.with_name(f"{owner}-{target}.{number}.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", chain[0], "-F", image_format, overlay)
        chain, image_format = (overlay, *chain), "qcow2"
    source = f"<source file={quoteattr(str(chain[0]))}/>"
    return _described(spec, target, image_format, source, chain)


def _described(
    spec: DiskSpec, target: str, image_format: str, source: str, chain: tuple[Path, ...]
) -> Disk:
    kind = "block" if spec.device is not None else spec.type
    xml = (
        f"<disk type='{kind}' device='disk'>"
        f"<driver name='qemu' type='{image_format}' {spec.driver}/>"
        f"{source}<target dev='{target}' bus='virtio'/>{spec.extra}</disk>"
    )
    return Disk(target, chain[0] if chain else Path(), image_format, kind, xml, chain)


def format_raw(path: Path, spec: DiskSpec, size: int) -> None:
    """Make a raw image of so many bytes, with the file system that the disk is to have."""
    with path.open("wb") as file:
        file.truncate(size)
    if spec.filesystem is not None:
        run(*MKFS[spec.filesystem], path)


def _fill_device(device: Path, spec: DiskSpec, raw: Path) -> None:
    """Put the image there, raw as large as the device, or qcow2 which needs some room besides."""
    whole = int(run("blockdev", "--getsize64", device))
    format_raw(raw, spec, whole if spec.format == "raw" else spec.size_mib << 20)
    if spec.format == "qcow2":
        run("qemu-img", "create", "-q", "-f", "qcow2", device, f"{spec.size_mib}M")
    convert = ("qemu-img", "convert", "-n", "-f", "raw", "-O", spec.format)
    run(*convert, raw, device)
    raw.unlink()
