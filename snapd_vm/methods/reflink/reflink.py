"""The method `reflink`: a clone of the disk's file by FICLONE, beside it, made immutable.

The domain goes on with its own file and notices nothing; the clone is the snapshot. An image that
is not raw is taken if it is asked for and lies on no other: the engine stops the vCPUs, so that
QEMU has written out what it buffers.

The clone's name, `snapd-vm-` and the snapshot's UUID, is no hidden one: whoever looks for what uses
up the room shall see it. It is given once the clone is whole, so before a kill nothing has a name.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from snapd_vm import storage
from snapd_vm.errors import Busy, MethodNotSupported, NameInUse, NoSpace, StorageFailed
from snapd_vm.methods import chain, clone, cloneback, overlay, taken
from snapd_vm.methods.folder import check_links, low_space, open_folder, refuse_reader
from snapd_vm.methods.method import BASE_IN_USE, Record, Standing, Watch
from snapd_vm.methods.reflink.clonetarget import CloneTarget
from snapd_vm.model import Disk, Domain, Json, MethodRequest, Needs, Tag, Target
from snapd_vm.storage import FileId

log = logging.getLogger(__name__)

_HOLDER = "a clone of it"


@dataclass(slots=True)
class _Draft:
    """Descriptors of the image and of the clone that has no name yet."""

    image: int
    clone: int
    whole: bool = False

    def close(self) -> None:
        os.close(self.image)
        os.close(self.clone)


class Reflink:
    """See the top of the file."""

    name = "reflink"
    redirects = False

    def __init__(self, hypervisor: cloneback.Hypervisor, low_space_percent: int) -> None:
        self._hypervisor = hypervisor
        self._low_space_percent = low_space_percent
        self._drafts: dict[tuple[str, str], _Draft] = {}

    def together(self, targets: Sequence[Target]) -> bool:
        """One file is cloned after the other."""
        return len(targets) == 1

    def suits(self, disk: Disk) -> str:
        """See Method."""
        return f"a {disk.format} file that can be cloned"

    def claim(
        self, domain: Domain, disk: Disk, request: MethodRequest | None, tag: Tag
    ) -> Target | None:
        """See Method. Whether the file system can clone is tried here only if nobody asked."""
        image = os.path.realpath(disk.path)
        try:
            formats = taken.RAW if request is None else chain.FORMATS
            taken.check_fit(disk, self.name, {"file": "files"}, formats)
            if disk.chain:
                raise MethodNotSupported(taken.elsewhere(disk.target, _HOLDER))
            identity = _regular(disk, image)
        except MethodNotSupported:
            if request is not None:
                raise
            return None
        if request is None and not clone.is_possible(os.path.dirname(image)):
            return None
        data = {
            **taken.described(domain, disk, tag),
            **taken.identified(image, identity),
            "clone": os.path.join(os.path.dirname(image), tag.storage_name),
        }
        return Target(method=self.name, disk=disk.target, data=data)

    def source(self, target: Target, disk: Disk) -> tuple[Disk, str]:
        """The clone."""
        copy = CloneTarget.of(target)
        return taken.with_source(disk, copy.path), copy.format

    def size(self, target: Target) -> int:
        """The file's size, as QEMU sees it."""
        copy = CloneTarget.of(target)
        return storage.virtual_size(copy.image, copy.format)

    def check_way(self, target: Target) -> None:
        """See Ways."""
        copy = CloneTarget.of(target)
        check_links(self._hypervisor, copy.declared, copy.image)

    def check(self, targets: Sequence[Target], tag: Tag) -> Needs:
        """See Method. Cloning is tried on a file that never has a name."""
        available, warnings = 0, list[str]()
        for target in targets:
            copy = CloneTarget.of(target)
            self.check_way(target)
            with open_folder(self._hypervisor, copy.folder) as folder:
                if overlay.exists(folder, copy.name):
                    raise NameInUse(f"There is a file {copy.path} already; move it away.")
                if storage.read_only(copy.folder):
                    raise StorageFailed(f"The folder {copy.folder} is read-only.")
                available = storage.space_available(copy.folder)
                if available < clone.RESERVE * len(targets):
                    raise NoSpace(
                        f"The folder {copy.folder} has {available} bytes left; what the guest "
                        "overwrites after the snapshot needs new room, so make some first."
                    )
                if not copy.active:
                    taken.check_unwritten(copy.image)
                image = clone.open_image(folder, os.path.basename(copy.image), copy.identity)
                try:
                    if chain.lies_on_others(image, copy.format):
                        raise MethodNotSupported(taken.elsewhere(target.disk, _HOLDER))
                    clone.try_with(folder, image, tag)
                    used = os.fstat(image).st_blocks * 512
                finally:
                    os.close(image)
            if available < used:
                warnings.append(
                    f"As the guest overwrites disk {target.disk}, up to {used} bytes more are "
                    f"needed, and {available} are free; the guest stops when there are none."
                )
        return Needs(clone.RESERVE * len(targets), available, tuple(warnings))

    def prepare(self, targets: Sequence[Target], tag: Tag, record: Record) -> Sequence[Target]:
        """Open the images and make files without a name, to which the clones then only go.

        What the host has not written yet is written now, as FICLONE would do so in the freeze.
        """
        prepared = []
        for target in targets:
            copy = CloneTarget.of(target)
            with open_folder(self._hypervisor, copy.folder) as folder:
                image = clone.open_image(folder, os.path.basename(copy.image), copy.identity)
                try:
                    os.fdatasync(image)
                    made = clone.make(folder, image, dataclasses.replace(tag, uuid=copy.snapshot))
                except BaseException as error:
                    os.close(image)
                    if isinstance(error, OSError):
                        raise StorageFailed(
                            f"The image {copy.image} can't be written out: {error.strerror}."
                        ) from error
                    raise
            self._drafts[tag.uuid, target.disk] = _Draft(image, made)
            data: dict[str, Json] = {**target.data, "inode": os.fstat(made).st_ino}
            prepared.append(dataclasses.replace(target, data=data))
        record(prepared)
        return prepared

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        """One FICLONE each, and nothing else."""
        for target in targets:
            draft = self._drafts[tag.uuid, target.disk]
            clone.share(draft.image, draft.clone)
            draft.whole = True

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        """Whether the clone is there under its name, which it is given here once it is whole."""
        copy = CloneTarget.of(target)
        draft = self._drafts.get((tag.uuid, target.disk))
        if draft is not None:
            if not draft.whole:
                return False
            with open_folder(self._hypervisor, copy.folder) as folder:
                clone.give_name(folder, draft.clone, copy.name)
            self._close(target, tag)
        own = clone.open_own(copy.path, copy.snapshot, copy.inode)
        if own is None:
            return False
        try:
            if chain.lies_on_others(own, copy.format):
                log.warning("%s has come to lie on others meanwhile", copy.image)
                return False
            if not clone.protect(own):
                log.warning("%s can't be made immutable; it can be read only", copy.path)
        finally:
            os.close(own)
        return True

    def undo(self, target: Target, tag: Tag, *, again: bool) -> bool:
        """See Method. A clone without a name goes with its descriptor."""
        unnamed = self._close(target, tag)
        copy = CloneTarget.of(target)
        if copy.inode == 0:  # nothing of it was made that could have got a name
            return unnamed
        return self._remove(copy) or unnamed

    def check_delete(self, target: Target, tag: Tag) -> None:
        """Refused while anybody reads the clone, or an image or definition names it."""
        copy = CloneTarget.of(target)
        user = self._hypervisor.user_of(copy.path, "", "")
        if user:
            raise Busy(f"The snapshot is used by {user}.")
        refuse_reader(copy.path, "")

    def delete(self, target: Target, tag: Tag, watch: Watch) -> None:
        """Remove the clone."""
        watch.past_return()
        self._remove(CloneTarget.of(target))

    def moved(self, deleted: Target, other: Target) -> Target | None:
        """No clone depends on another."""
        return None

    def check_revert(self, target: Target, tag: Tag, others: Sequence[Target]) -> Target:
        """See Reverts and cloneback.check."""
        return cloneback.check(self._hypervisor, _origin(target), target, tag)

    def prepare_revert(self, target: Target, tag: Tag, record: Record) -> Target:
        """See Reverts and cloneback.prepare."""
        return cloneback.prepare(self._hypervisor, _origin(target), target, tag, record)

    def revert(self, target: Target, tag: Tag, watch: Watch) -> None:
        """See Reverts and cloneback.switch."""
        cloneback.switch(self._hypervisor, _origin(target), target, tag, watch)

    def settle_revert(self, target: Target, tag: Tag) -> bool:
        """See Reverts and cloneback.settle."""
        return cloneback.settle(self._hypervisor, _origin(target), target, tag)

    def reverted(self, target: Target, other: Target) -> Target | None:
        """See Reverts and cloneback.reverted."""
        return cloneback.reverted(target, other)

    def among(self, target: Target, others: Sequence[Target]) -> Target:
        """No clone depends on another."""
        return target

    def state(self, target: Target, domains: Mapping[str, Domain]) -> str:
        """See Method."""
        return self.standing(target, domains).state

    def standing(self, target: Target, domains: Mapping[str, Domain]) -> Standing:
        """See Explains. A clone stands by itself, whatever becomes of its domain."""
        copy = CloneTarget.of(target)
        own = clone.open_own(copy.path, copy.snapshot, copy.inode)
        if own is None:
            there = storage.file_id(copy.path) is not None
            return Standing(
                "missing",
                f"{copy.path} is {'not the clone that was made' if there else 'not there'}",
            )
        os.close(own)
        identity = storage.file_id(copy.path)
        for domain in domains.values():
            for disk in (*domain.disks, *domain.persistent_disks):
                if not disk.readonly and disk.path and storage.file_id(disk.path) == identity:
                    return Standing(
                        "failed",
                        f"{copy.path} is the image of disk {disk.target} of domain {domain.name}",
                        "base-in-use",
                        BASE_IN_USE,
                    )
        return Standing("ready")

    def files(self, target: Target) -> Sequence[str]:
        """The clone."""
        return [CloneTarget.of(target).path]

    def warnings(self, target: Target, domains: Mapping[str, Domain]) -> Mapping[str, str]:
        """See Warns: what the guest overwrites of what it shares with a clone needs new room."""
        copy = CloneTarget.of(target)
        domain = domains.get(copy.domain)
        disk = domain.disk(target.disk) if domain is not None else None
        if disk is None or storage.file_id(disk.path) != copy.identity:
            return {}
        return low_space(target.disk, copy.folder, self._low_space_percent)

    def _remove(self, copy: CloneTarget) -> bool:
        with open_folder(self._hypervisor, copy.folder) as folder:
            removed = clone.remove(folder, copy.name, copy.snapshot, copy.inode)
            if removed:
                log.info("removed %s", copy.path)
            elif overlay.exists(folder, copy.name):
                log.warning("%s is not the clone that we made; left alone", copy.path)
        return removed

    def _close(self, target: Target, tag: Tag) -> bool:
        draft = self._drafts.pop((tag.uuid, target.disk), None)
        if draft is None:
            return False
        draft.close()
        return True


def _origin(target: Target) -> cloneback.Origin:
    """What a revert goes back to."""
    copy = CloneTarget.of(target)
    return cloneback.Origin(
        copy.domain,
        copy.image,
        copy.format,
        lambda folder: clone.open_own(copy.name, copy.snapshot, copy.inode, folder),
    )


def _regular(disk: Disk, path: str) -> FileId:
    """What the image is; it is not opened, as a server of NFS may not let root read it."""
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            return FileId(found.st_dev, found.st_ino)
    except (OSError, ValueError):
        pass
    raise MethodNotSupported(f"The image of disk {disk.target} is not there, or not a file.")
