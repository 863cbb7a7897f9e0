"""The method `btrfs`: a read-only snapshot of the subvolume that holds the disk's file.

The domain goes on with its own file and notices nothing; the same file inside the snapshot is the
backup source. Disks of one subvolume that are taken together share one snapshot, which goes with
the last of them. What else is in the subvolume is held by the snapshot too, and never rolled back.

An image that is not raw is taken if it is asked for: the engine stops the vCPUs, so that QEMU has
written out what it buffers.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence

from snapd_vm import storage
from snapd_vm.errors import Busy, MethodNotSupported, StorageFailed
from snapd_vm.methods import chain, clone, cloneback, taken
from snapd_vm.methods.btrfs import snapshotfolder, subvolume, subvolumeclaim
from snapd_vm.methods.btrfs.subvolumetarget import SubvolumeTarget
from snapd_vm.methods.folder import check_links, low_space, open_folder, refuse_reader
from snapd_vm.methods.method import BASE_IN_USE, Record, Standing, Stored, Watch
from snapd_vm.model import Disk, Domain, Json, MethodRequest, Needs, Tag, Target

log = logging.getLogger(__name__)


class Btrfs:
    """See the top of the file; `snapshot_dir` '' means the default place."""

    name = "btrfs"
    redirects = False

    def __init__(
        self, hypervisor: cloneback.Hypervisor, snapshot_dir: str, low_space_percent: int
    ) -> None:
        self._hypervisor = hypervisor
        self._snapshot_dir = snapshot_dir
        self._low_space_percent = low_space_percent
        self._drafts: dict[str, tuple[int, int]] = {}  # descriptors of subvolume and folder
        self._making = threading.Lock()  # of places, which are removed when they are empty

    def together(self, targets: Sequence[Target]) -> bool:
        """One snapshot is of one instant."""
        return len({SubvolumeTarget.of(target).path for target in targets}) == 1

    def suits(self, disk: Disk) -> str:
        """See Method."""
        return f"a {disk.format} file on btrfs"

    def claim(
        self, domain: Domain, disk: Disk, request: MethodRequest | None, tag: Tag
    ) -> Target | None:
        """See Method. A subvolume that the caller names is only compared with the disk's."""
        named = request.options.get("subvolume", "") if request is not None else ""
        asked = request is not None
        try:
            return subvolumeclaim.claim(
                domain, disk, tag, asked=asked, named=named, snapshot_dir=self._snapshot_dir
            )
        except MethodNotSupported as error:
            if asked:
                raise
            log.debug("disk %s of domain %s: %s", disk.target, domain.name, error)
            return None

    def source(self, target: Target, disk: Disk) -> tuple[Disk, str]:
        """The same file inside the snapshot."""
        one = SubvolumeTarget.of(target)
        return taken.with_source(disk, one.file), one.format

    def size(self, target: Target) -> int:
        """The disk's size, as QEMU sees it."""
        one = SubvolumeTarget.of(target)
        return storage.virtual_size(one.image, one.format)

    def check_way(self, target: Target) -> None:
        """See Ways."""
        one = SubvolumeTarget.of(target)
        check_links(self._hypervisor, one.declared, one.image)

    def check(self, targets: Sequence[Target], tag: Tag) -> Needs:
        """See Method."""
        for target in targets:
            self.check_way(target)
        return subvolumeclaim.check(self._hypervisor, [SubvolumeTarget.of(one) for one in targets])

    def prepare(self, targets: Sequence[Target], tag: Tag, record: Record) -> Sequence[Target]:
        """Make the folders, marked, that the snapshots then only go into.

        What the host has not written yet is written now, as a snapshot would do so in the freeze.
        """
        groups = {one.path: one for one in map(SubvolumeTarget.of, targets)}
        for target in targets:
            one = SubvolumeTarget.of(target)
            with open_folder(self._hypervisor, os.path.dirname(one.image)) as folder:
                os.close(clone.open_image(folder, os.path.basename(one.image), one.identity))
        record(targets)
        for path, one in groups.items():
            root = subvolume.open_root(one.root, one.source)
            try:
                with self._making:
                    folder = snapshotfolder.make(one, tag)
            except BaseException:
                os.close(root)
                raise
            self._drafts[path] = (root, folder)
            subvolume.write_out(root)
        return targets

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        """One snapshot of each subvolume, and nothing else."""
        for path, name in {one.path: one.name for one in map(SubvolumeTarget.of, targets)}.items():
            root, folder = self._drafts[path]
            subvolume.take(root, folder, name)

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        """Whether the snapshot is there and holds the very file that the disk was, with its chain.

        It is read-only, so what is seen once stays.
        """
        one = SubvolumeTarget.of(target)
        self._close(one)
        with snapshotfolder.opened(one) as root:
            if root is None:
                return False
            try:
                held = chain.open_inside(root, one.inside)
            except chain.Outside as error:
                log.warning("%s is not in the snapshot: %s", one.inside, error)
                return False
            try:
                if os.fstat(held).st_ino != one.held:
                    log.warning("%s was replaced before it was taken", one.image)
                    return False
            finally:
                os.close(held)
            chain.check(root, one.inside, one.format)
        snapshotfolder.settle(one)
        return True

    def undo(self, target: Target, tag: Tag, *, again: bool) -> bool:
        """See Method."""
        one = SubvolumeTarget.of(target)
        self._close(one)
        return self._remove(one)

    def check_delete(self, target: Target, tag: Tag) -> None:
        """Refused while anybody reads in the snapshot, or an image or definition names the file."""
        one = SubvolumeTarget.of(target)
        user = self._hypervisor.user_of(one.file, "", "", beside=False)
        if user:
            raise Busy(f"The snapshot is used by {user}.")
        if one.shared:
            refuse_reader(one.file, "")
            return
        with snapshotfolder.opened(one) as root:
            reader = subvolume.user(root) if root is not None else ""
        if reader:
            raise Busy(f"The snapshot is being read by {reader}; wait for its end.")

    def delete(self, target: Target, tag: Tag, watch: Watch) -> None:
        """Remove the snapshot, unless another disk's record is of it too."""
        watch.past_return()
        one = SubvolumeTarget.of(target)
        if not one.shared:
            self._remove(one)

    def moved(self, deleted: Target, other: Target) -> Target | None:
        """No snapshot depends on another."""
        return None

    def check_revert(self, target: Target, tag: Tag, others: Sequence[Target]) -> Target:
        """See Reverts and cloneback.check. The subvolume itself is never rolled back."""
        one = SubvolumeTarget.of(target)
        held = _open_file(one)
        if held is None:
            raise StorageFailed("The snapshot is gone; there is nothing to go back to.")
        cloneback.check_whole(held, one.format)
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
        """The Target with whether another disk's record is of the same snapshot."""
        own = SubvolumeTarget.of(target).path
        alike = [SubvolumeTarget.of(other).path for other in others if other.method == self.name]
        data: dict[str, Json] = {**target.data, "shared": own in alike}
        return dataclasses.replace(target, data=data)

    def state(self, target: Target, domains: Mapping[str, Domain]) -> str:
        """See Method."""
        return self.standing(target, domains).state

    def standing(self, target: Target, domains: Mapping[str, Domain]) -> Standing:
        """See Explains. A snapshot stands by itself, whatever becomes of its domain."""
        one = SubvolumeTarget.of(target)
        with snapshotfolder.opened(one) as root:
            if root is None:
                there = os.path.lexists(one.path)
                return Standing(
                    "missing",
                    f"{one.path} is {'not the snapshot that was made' if there else 'not there'}",
                )
            device = os.fstat(root).st_dev
        for domain in domains.values():
            for disk in (*domain.disks, *domain.persistent_disks):
                found = storage.file_id(disk.path) if disk.path and not disk.readonly else None
                if found is not None and found.device == device:
                    return Standing(
                        "failed",
                        f"disk {disk.target} of domain {domain.name} is in {one.path}",
                        "base-in-use",
                        BASE_IN_USE,
                    )
        return Standing("ready")

    def files(self, target: Target) -> Sequence[str]:
        """The snapshot."""
        return [SubvolumeTarget.of(target).path]

    def stored(self, domains: Mapping[str, Domain]) -> Iterable[Stored]:
        """See Lists."""
        return subvolumeclaim.stored(domains.values(), self._snapshot_dir)

    def warnings(self, target: Target, domains: Mapping[str, Domain]) -> Mapping[str, str]:
        """See Warns: what the guest overwrites of what it shares with a snapshot needs new room."""
        one = SubvolumeTarget.of(target)
        domain = domains.get(one.domain)
        disk = domain.disk(target.disk) if domain is not None else None
        if disk is None or os.path.realpath(disk.path) != one.image:
            return {}
        return low_space(target.disk, one.root, self._low_space_percent)

    def _remove(self, one: SubvolumeTarget) -> bool:
        with self._making:
            return snapshotfolder.remove(one)

    def _close(self, one: SubvolumeTarget) -> None:
        for fd in self._drafts.pop(one.path, ()):
            os.close(fd)


def _origin(target: Target) -> cloneback.Origin:
    """What a revert goes back to."""
    one = SubvolumeTarget.of(target)
    return cloneback.Origin(one.domain, one.image, one.format, lambda _: _open_file(one))


def _open_file(one: SubvolumeTarget) -> int | None:
    """A descriptor of the image in the snapshot; None if that is gone."""
    with snapshotfolder.opened(one) as root:
        return None if root is None else chain.open_inside(root, one.inside)
