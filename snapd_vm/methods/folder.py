"""What methods ask of images' folders, entered only where none but root and QEMU's user can write,
and of the files in them.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Protocol

from snapd_vm import storage
from snapd_vm.errors import Busy, StorageFailed

log = logging.getLogger(__name__)

_MOST_LINKS = 40  # as in the kernel, path_resolution(7)


class Hypervisor(Protocol):
    """What is needed of the hypervisor here."""

    def qemu_user(self) -> tuple[int, int]: ...


def open_folder(hypervisor: Hypervisor, folder: str) -> contextlib.AbstractContextManager[int]:
    """A descriptor of a folder in which only root and QEMU's user can write, or a refusal."""
    uid, gid = hypervisor.qemu_user()
    return storage.open_folder(folder, {0, uid}, {0, gid})


def low_space(disk: str, folder: str, percent: int) -> Mapping[str, str]:
    """The warning of Warns that there is less than this share of room where the disk grows."""
    if not storage.space_below(folder, percent):
        return {}
    return {
        "low-space": f"Disk {disk} is written to a file system with "
        f"{storage.space_available(folder)} bytes left, and the guest stops when there are none; "
        "make room, or delete snapshots."
    }


def links(path: str) -> Iterator[str]:
    """A path, and those by which its last part leads on to what it names; proves nothing."""
    for _ in range(_MOST_LINKS):
        yield path
        try:
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        except OSError:  # EINVAL: no symlink
            return


def check_links(hypervisor: Hypervisor, declared: str, image: str) -> None:
    """Where the image's path is a symlink, only root and QEMU's user may have made it.

    Raises MethodNotSupported, and StorageFailed if it does not lead to `image` any more.
    """
    path = declared
    for _ in range(_MOST_LINKS):
        with open_folder(hypervisor, os.path.dirname(path)) as folder:
            try:
                link = os.readlink(os.path.basename(path), dir_fd=folder)
            except OSError:  # EINVAL: no symlink
                break
        path = os.path.join(os.path.dirname(path), link)
    if os.path.realpath(path) != image:
        raise StorageFailed(f"The image {declared} was replaced meanwhile; try again.")


def refuse_reader(path: str, uuid: str) -> None:
    """Raise Busy where somebody reads a snapshot's file; for `uuid` see storage.reader_of."""
    reader = storage.reader_of(path, uuid)
    if reader:
        raise Busy(f"The snapshot is being read by {reader}; wait for its end.")


def remove(hypervisor: Hypervisor, path: str) -> bool:
    """Unlink a file of ours, durably; False: it is not there. Raises StorageFailed."""
    try:
        with open_folder(hypervisor, os.path.dirname(path)) as fd:
            os.unlink(os.path.basename(path), dir_fd=fd)
            os.fsync(fd)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageFailed(f"{path} can't be removed: {error.strerror}.") from error
    log.info("removed %s", os.path.basename(path))
    return True
