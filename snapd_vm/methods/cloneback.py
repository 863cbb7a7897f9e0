"""Brings a disk back to a file that shares storage with its image: a clone of that takes its place.

Such a file is a clone by the method reflink, or the image inside a snapshot of its subvolume. It is
cloned into a file without a name, which gets a name of ours once it is whole and is then renamed
over the image: rename(2) is atomic, so the path has always the one or the other. What was there
keeps a second name of ours until the end. The definition names the path, and stays.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Protocol

from snapd_vm import storage
from snapd_vm.errors import (
    Busy,
    InvalidState,
    MethodNotSupported,
    NameInUse,
    NoSpace,
    NoSuchDomain,
    StorageFailed,
)
from snapd_vm.methods import chain, clone, off, overlay
from snapd_vm.methods.folder import check_links, open_folder
from snapd_vm.methods.image import Image, revert_of
from snapd_vm.methods.method import Record, Watch
from snapd_vm.model import Disk, Domain, Json, Tag, Target
from snapd_vm.storage import FileId

log = logging.getLogger(__name__)


class Hypervisor(off.Hypervisor, Protocol):
    """What is needed of the hypervisor; blocking, raises SnapdErrors."""

    def read(self, uuid: str) -> Domain: ...
    def user_of(self, path: str, uuid: str, target: str, *, beside: bool = True) -> str: ...
    def qemu_user(self) -> tuple[int, int]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """What a disk goes back to: the domain, its image's path and format, and the snapshot.

    `open_in` gives a descriptor of the snapshot's file, None where it is gone; it is given one of
    the image's folder. `fill` lets the second file have the contents of the first, for which there
    must be `room`, in bytes; where it does nothing, they are copied before `switch`.
    """

    domain: str
    image: str
    format: str
    open_in: Callable[[int], int | None]
    fill: Callable[[int, int], None] = clone.share
    room: int = clone.RESERVE

    @property
    def folder(self) -> str:
        """The image's folder."""
        return os.path.dirname(self.image)


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """What a revert has written down: what is to be discarded, and what takes its place.

    `made` is known from the moment on at which there is a file for it.
    """

    discarded: Image
    made: Image | None

    @classmethod
    def of(cls, target: Target) -> _Plan:
        data = revert_of(target)
        made = data.get("made")
        return cls(Image.of(data["discarded"]), Image.of(made) if made else None)

    def into(self, target: Target) -> Target:
        """The Target with this in it."""
        data: dict[str, Json] = {
            "discarded": self.discarded.as_json(),
            "made": self.made.as_json() if self.made else None,
        }
        return dataclasses.replace(target, data={**target.data, "revert": data})


def check_whole(held: int, image_format: str) -> None:
    """Refuse a snapshot's image that lies on others; the descriptor is closed.

    Raises MethodNotSupported and StorageFailed.
    """
    try:
        if chain.lies_on_others(held, image_format):
            raise MethodNotSupported(
                "The snapshot's image has a backing file, which may have changed since; copy the "
                "backup source over the disk instead."
            )
    finally:
        os.close(held)


def check(hypervisor: Hypervisor, copy: Origin, target: Target, tag: Tag) -> Target:
    """See Reverts.check_revert."""
    domain = hypervisor.read(copy.domain)
    off.check_off(hypervisor, domain)
    disk = _same_disk(domain, target, copy)
    check_links(hypervisor, disk.path, copy.image)
    present = storage.file_id(copy.image)
    if present is None:
        raise StorageFailed(f"The image of disk {target.disk}, {copy.image}, is not there.")
    user = hypervisor.user_of(copy.image, copy.domain, target.disk)
    if user:
        raise Busy(f"The image of disk {target.disk}, {copy.image}, is also used by {user}.")
    if storage.write_locked(copy.image):
        raise Busy(f"The image of disk {target.disk} is open for writing by another process.")
    reader = storage.reader_of(copy.image, "")
    if reader:
        raise Busy(
            f"The image of disk {target.disk}, {copy.image}, is being read by {reader}; wait for "
            "its end."
        )
    if storage.read_only(copy.folder):
        raise StorageFailed(f"The folder {copy.folder} is read-only.")
    available = storage.space_available(copy.folder)
    if available < copy.room:
        raise NoSpace(
            f"The folder {copy.folder} has {available} bytes left, and the revert, with what the "
            "guest overwrites after it, needs new room; make some first."
        )
    with open_folder(hypervisor, copy.folder) as folder:
        for name in (_draft(tag), _kept(tag)):
            if overlay.exists(folder, name):
                raise NameInUse(f"There is a file {copy.folder}/{name} already; move it away.")
    return _Plan(Image(copy.image, present), None).into(target)


def _same_disk(domain: Domain, target: Target, copy: Origin) -> Disk:
    """The disk, if it still uses the image that was taken. Raises InvalidState."""
    disk = domain.disk(target.disk)
    if disk is None:
        raise InvalidState(
            f"The domain has no disk {target.disk} any more; there is nothing to do."
        )
    if (disk.type, disk.format) == ("file", copy.format) and os.path.realpath(
        disk.path
    ) == copy.image:
        return disk
    raise InvalidState(
        f"Disk {target.disk} is not the image {copy.image} any more, but {disk.path or 'empty'}; "
        "delete the snapshots that another method has made of it since, and revert then."
    )


def prepare(
    hypervisor: Hypervisor, copy: Origin, target: Target, tag: Tag, record: Record
) -> Target:
    """See Reverts.prepare_revert."""
    plan = _Plan.of(target)
    with open_folder(hypervisor, copy.folder) as folder:
        snapshot = copy.open_in(folder)
        if snapshot is None:
            raise StorageFailed("The snapshot's file is gone; there is nothing to go back to.")
        try:
            name = os.path.basename(copy.image)
            image = clone.open_image(folder, name, plan.discarded.file)
            try:
                draft = clone.make_image(folder, snapshot, image)
            finally:
                os.close(image)
            try:
                found = os.fstat(draft)
                made = Image(copy.image, FileId(found.st_dev, found.st_ino))
                target = dataclasses.replace(plan, made=made).into(target)
                record([target])
                copy.fill(snapshot, draft)
                clone.give_name(folder, draft, _draft(tag))
            finally:
                os.close(draft)
        finally:
            os.close(snapshot)
    return target


def open_draft(folder: int, target: Target, tag: Tag) -> int:
    """A descriptor to write to what will take the image's place. Raises StorageFailed."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(_draft(tag), flags, dir_fd=folder)
    except OSError as error:
        raise StorageFailed(f"{_draft(tag)} can't be opened: {error.strerror}.") from error
    made = _Plan.of(target).made
    if made is None or os.fstat(fd).st_ino != made.file.inode:
        os.close(fd)
        raise StorageFailed(f"{_draft(tag)} was replaced meanwhile; try again.")
    return fd


def switch(hypervisor: Hypervisor, copy: Origin, target: Target, tag: Tag, watch: Watch) -> None:
    """See Reverts.revert. The domain can't start on what is discarded meanwhile: it is locked."""
    plan = _Plan.of(target)
    name = os.path.basename(copy.image)
    watch.past_return()
    with (
        open_folder(hypervisor, copy.folder) as folder,
        storage.kept_from_writers(plan.discarded.path),
    ):
        domain = hypervisor.read(copy.domain)
        off.check_off(hypervisor, domain)
        _same_disk(domain, target, copy)
        try:
            os.link(name, _kept(tag), src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            if overlay.identity(folder, _kept(tag)) != plan.discarded.file:
                os.unlink(_kept(tag), dir_fd=folder)
                raise StorageFailed(f"The image {copy.image} was replaced meanwhile; try again.")
            os.rename(_draft(tag), name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        except OSError as error:
            raise StorageFailed(
                f"The image {copy.image} can't be replaced: {error.strerror}."
            ) from error


def settle(hypervisor: Hypervisor, copy: Origin, target: Target, tag: Tag) -> bool:
    """See Reverts.settle_revert. What has the image's name decides.

    Raises StorageFailed where nothing of it is there: its file system may not be mounted.
    """
    plan = _Plan.of(target)
    image, kept = os.path.basename(copy.image), _kept(tag)
    with open_folder(hypervisor, copy.folder) as folder:
        if plan.made is None:  # no file has got a name
            return False
        if not overlay.exists(folder, image):
            if _is(folder, kept, plan.discarded):  # somebody took away what had its name
                _rename(folder, kept, image)
            elif not _is(folder, _draft(tag), plan.made) and _wanted(hypervisor, copy):
                raise StorageFailed(f"The image {copy.image} is not there; mount its file system.")
        done = _is(folder, image, plan.made)
        if (
            done
            and _is(folder, kept, plan.discarded)
            and _runs(hypervisor, copy.domain)
            and storage.reader_of(os.path.join(copy.folder, kept), "")
            and not storage.write_locked(copy.image)
        ):  # a QEMU that had opened it before it was renamed, and locked it only afterwards
            log.warning("domain %s runs on what was to be discarded, and keeps it", copy.domain)
            _rename(folder, kept, image)
            return False
        _remove(folder, _draft(tag), plan.made)
        if done or _is(folder, image, plan.discarded):
            _remove(folder, kept, plan.discarded)
        elif _is(folder, kept, plan.discarded):
            log.error(
                "%s is neither what the disk was nor what it was to be; what it was is %s/%s",
                copy.image,
                copy.folder,
                kept,
            )
    return done


def _is(folder: int, name: str, image: Image) -> bool:
    """Whether the file of that name is the image; its folder's device may have a new number."""
    found = overlay.identity(folder, name)
    return found is not None and found.inode == image.file.inode


def _wanted(hypervisor: Hypervisor, copy: Origin) -> bool:
    """Whether a disk of the domain is that image still."""
    try:
        domain = hypervisor.read(copy.domain)
    except NoSuchDomain:
        return False
    disks = (*domain.disks, *domain.persistent_disks)
    return any(os.path.realpath(disk.path) == copy.image for disk in disks if disk.path)


def _runs(hypervisor: Hypervisor, uuid: str) -> bool:
    try:
        return hypervisor.read(uuid).active
    except NoSuchDomain:
        return False


def _rename(folder: int, name: str, to: str) -> None:
    try:
        os.rename(name, to, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    except OSError as error:
        raise StorageFailed(f"{to} can't be put back: {error.strerror}.") from error


def _remove(folder: int, name: str, image: Image) -> None:
    if not overlay.exists(folder, name):
        return
    if not _is(folder, name, image):
        log.warning("%s is not the file that we made; left alone", name)
        return
    try:
        os.unlink(name, dir_fd=folder)
        os.fsync(folder)
    except OSError as error:
        raise StorageFailed(f"{name} can't be removed: {error.strerror}.") from error
    log.info("removed %s", name)


def reverted(target: Target, other: Target) -> Target | None:
    """See Reverts.reverted: the image of each snapshot of it is another file now.

    That is so of the snapshots by every method that has its image by these names.
    """
    plan = _Plan.of(target)
    if plan.made is None or other.disk != target.disk:
        return None
    if other.data.get("image") != plan.made.path or "image_inode" not in other.data:
        return None
    data = {name: value for name, value in other.data.items() if name != "revert"}
    place: dict[str, Json] = {
        "image_device": plan.made.file.device,
        "image_inode": plan.made.file.inode,
    }
    return dataclasses.replace(other, data={**data, **place})


def _draft(tag: Tag) -> str:
    """The name of what is to take the image's place."""
    return f"{tag.storage_name}.revert"


def _kept(tag: Tag) -> str:
    """The second name of what is to be discarded."""
    return f"{tag.storage_name}.discarded"
