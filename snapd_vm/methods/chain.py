"""Whether an image, with all that it lies on, is inside a layer below it: a subvolume, a dataset,
a file system on a volume. Looks and changes nothing; knows no layer by name.

What is handed out of a layer's snapshot is read by the names that the images' headers hold. So
every file of the chain must be reached from the layer's root without a symlink and without crossing
into another device, by names that are relative: a view of a snapshot then stays inside it, whatever
happens to the images that it was taken of.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence

from snapd_vm import qcow2
from snapd_vm.errors import MethodNotSupported, StorageFailed
from snapd_vm.storage import FileId, file_id

FORMATS = ("raw", "qcow2")
"""Of images whose chain can be told."""

_LONGEST = 200  # as libvirt: QEMU_DOMAIN_STORAGE_SOURCE_CHAIN_MAX_DEPTH
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)


class Outside(MethodNotSupported):
    """A file of the chain is not in the layer."""

    dbus_name = MethodNotSupported.dbus_name


def check(root: int, inside: str, image_format: str, told: Sequence[str] = ()) -> None:
    """Refuse an image unless its whole chain is inside the layer whose root is open at `root`.

    `inside` is the image's path there; `told` are the paths below it as libvirt tells them, if it
    does. Raises Outside, MethodNotSupported and StorageFailed.
    """
    found = list(_chain(root, inside, image_format))
    if told and [file_id(path) for path in told] != found[1:]:
        raise MethodNotSupported(
            "The domain's definition says another backing chain than the images themselves; "
            "use method qemu."
        )


def open_inside(root: int, path: str) -> int:
    """A descriptor of the file at `path` below `root`; see the top of the file.

    Raises Outside and StorageFailed.
    """
    device = os.fstat(root).st_dev
    *folders, name = [part for part in path.split("/") if part not in ("", ".")]
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    stack = [os.dup(root)]
    try:
        for part in folders:
            if part == "..":
                os.close(stack.pop())
                if not stack:
                    raise Outside(f"The image {path} is outside of that layer.")
                continue
            stack.append(os.open(part, flags | os.O_DIRECTORY, dir_fd=stack[-1]))
        fd = os.open(name, flags, dir_fd=stack[-1])
    except OSError as error:
        if error.errno in _NO_FILE:
            raise Outside(f"The image {path} is not in that layer itself.") from error
        raise StorageFailed(f"The image {path} can't be opened: {error.strerror}.") from error
    finally:
        for folder in stack:
            os.close(folder)
    found = os.fstat(fd)
    if found.st_dev != device or not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise Outside(f"The image {path} is in another layer, or not a file.")
    return fd


def lies_on_others(fd: int, image_format: str) -> bool:
    """Whether a part of the image's contents is in other files. Raises StorageFailed."""
    if image_format == "raw":
        return False
    return _header(fd).lies_on_others


def path_lies_on_others(path: str, image_format: str) -> bool:
    """The same of an image of the host, by its path. Raises StorageFailed."""
    if image_format == "raw":
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise StorageFailed(f"{path} can't be opened: {error.strerror}.") from error
    try:
        return lies_on_others(fd, image_format)
    finally:
        os.close(fd)


def _chain(root: int, inside: str, image_format: str) -> Iterator[FileId]:
    """The files of the chain, the image itself first."""
    for _ in range(_LONGEST):
        fd = open_inside(root, inside)
        try:
            found = os.fstat(fd)
            yield FileId(found.st_dev, found.st_ino)
            if image_format == "raw":
                return
            header = _header(fd)
        finally:
            os.close(fd)
        if header.external_data:
            raise MethodNotSupported(
                f"The image {inside} keeps its data in another file; use method qemu."
            )
        if not header.backing_file:
            return
        inside, image_format = _below(inside, header, found.st_dev), header.backing_format
    raise MethodNotSupported(f"The chain has more than {_LONGEST} images; use method qemu.")


def _below(inside: str, header: qcow2.Header, device: int) -> str:
    """The path, below the layer's root, of what the image at `inside` lies on."""
    name = header.backing_file
    protocol, colon, _ = name.partition(":")
    if name.startswith("/") or (colon and "/" not in protocol):
        there = file_id(name) if name.startswith("/") else None
        elsewhere = there is not None and there.device != device
        raise (Outside if elsewhere else MethodNotSupported)(
            f"The image {inside} names its backing file by {name}, which is not in the snapshot; "
            "use method qemu, or a name relative to the image ('qemu-img rebase -u -b')."
        )
    if header.backing_format not in FORMATS:
        raise MethodNotSupported(
            f"The image {inside} lies on one whose format is not said, or neither raw nor qcow2; "
            "use method qemu."
        )
    return os.path.join(os.path.dirname(inside), name)


def _header(fd: int) -> qcow2.Header:
    try:
        return qcow2.read_header(fd)
    except (OSError, qcow2.NotQcow2) as error:
        raise StorageFailed(f"The image can't be read: {error}.") from error
