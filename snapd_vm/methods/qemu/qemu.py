"""The method `qemu`: an external qcow2 overlay, made beforehand, that libvirt switches the disk to.

The former image is the snapshot. Rollback is the reverse: the overlay is committed into its base
and the domain pivots back, or, where the switch has not happened, the overlay is unlinked. What the
domain really uses is asked every time, never remembered.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

from snapd_vm import qcow2, storage
from snapd_vm.errors import (
    Busy,
    HypervisorUnavailable,
    InvalidState,
    MethodNotSupported,
    NameInUse,
    NoSpace,
    NoSuchDomain,
    StorageFailed,
)
from snapd_vm.methods import overlay
from snapd_vm.methods.folder import low_space, open_folder
from snapd_vm.methods.method import Record, Standing, Watch
from snapd_vm.methods.qemu import beside, commit, revert, standing
from snapd_vm.methods.qemu.layer import Layer
from snapd_vm.model import Disk, Domain, Json, MethodRequest, Needs, Tag, Target

log = logging.getLogger(__name__)

_RESERVE = 1 << 20
"""Bytes that must be free beyond the overlay's own first size: an overlay that can't grow stops
the guest at its next write."""


class Hypervisor(revert.Hypervisor, Protocol):
    """What the method needs of the hypervisor; blocking, raises SnapdErrors."""

    def switch(
        self, uuid: str, overlays: Mapping[str, tuple[str, str]], others: Sequence[str]
    ) -> None: ...


class Qemu:
    """See the top of the file."""

    name = "qemu"
    redirects = True

    def __init__(
        self,
        hypervisor: Hypervisor,
        overlay_dirs: Sequence[str],
        commit_bandwidth: int,
        low_space_percent: int,
    ) -> None:
        """See config.QemuConfig, but `commit_bandwidth` is in bytes a second here."""
        self._hypervisor = hypervisor
        self._commit_bandwidth = commit_bandwidth
        self._low_space_percent = low_space_percent
        self._overlay_dirs = overlay_dirs
        # Operations, and their disks, after which QEMU has no node that libvirt does not know:
        # those of this process in which libvirt has not gone away in the middle of the switch. Only
        # for the others is QEMU's monitor asked, as that marks the domain.
        self._in_order: set[tuple[str, str]] = set()

    def together(self, targets: Sequence[Target]) -> bool:
        """One libvirt snapshot is of one instant."""
        return True

    def suits(self, disk: Disk) -> str:
        """See Method."""
        return f"a {disk.format} image on a {disk.type} source"

    def claim(
        self, domain: Domain, disk: Disk, request: MethodRequest | None, tag: Tag
    ) -> Target | None:
        """See Method. Anything that QEMU itself runs can be done, if its image is known."""
        if domain.driver not in ("qemu", "kvm"):
            raise MethodNotSupported(
                f"Domain {domain.name} is not run by QEMU, so method qemu can't take its disks."
            )
        if disk.type not in ("file", "block"):
            raise MethodNotSupported(
                f"Disk {disk.target} has a {disk.type} source; method qemu takes files and "
                "block devices."
            )
        if disk.format not in ("raw", "qcow2"):
            raise MethodNotSupported(
                f"Disk {disk.target} has the format '{disk.format}'; method qemu takes raw "
                "and qcow2."
            )
        if disk.encrypted:
            raise MethodNotSupported(
                f"Disk {disk.target} is encrypted, and an overlay would not be."
            )
        if "<slice" in disk.source_xml:
            raise MethodNotSupported(
                f"Disk {disk.target} is a slice of its image, and an overlay would be of the whole."
            )
        persistent = domain.persistent_disk(disk.target)
        follows = persistent is not None and _same_file(persistent.path, disk.path)
        return Target(
            method=self.name,
            disk=disk.target,
            data={
                "domain": domain.uuid,
                "instance": domain.id,
                "origin": disk.path,
                "origin_type": disk.type,
                "origin_format": disk.format,
                "persistent": follows or not domain.active,
                "overlay": overlay.fit(self._overlay_path(disk, request, tag)),
                "chain": 1 + len(disk.chain),
                "others": [d.target for d in domain.disks if d.target != disk.target],
            },
        )

    def _overlay_path(self, disk: Disk, request: MethodRequest | None, tag: Tag) -> str:
        own = os.path.dirname(disk.path) if disk.type == "file" else ""
        named = request.options.get("overlay", "") if request else ""
        if named:
            folder = os.path.realpath(os.path.dirname(named))
            allowed = [*([own] if own else []), *self._overlay_dirs]
            if folder not in {os.path.realpath(place) for place in allowed}:
                raise MethodNotSupported(
                    "The overlay must be in the disk's own folder or in a folder of "
                    "qemu.overlay_dirs."
                )
            # As it was looked at: what a caller's path leads to may change.
            return os.path.join(folder, os.path.basename(named))
        if not own and not self._overlay_dirs:
            raise MethodNotSupported(
                f"Disk {disk.target} is a block device; say in the method's XML where the overlay "
                "goes, or set qemu.overlay_dirs."
            )
        stem = os.path.splitext(os.path.basename(disk.path))[0]
        return os.path.join(own or self._overlay_dirs[0], f"{stem}.{tag.label}")

    def source(self, target: Target, disk: Disk) -> tuple[Disk, str]:
        """The former source."""
        return disk, str(target.data["origin_format"])

    def size(self, target: Target) -> int:
        """The virtual size that the overlay will have.

        It is in the header of a qcow2 image. A raw one may have grown unseen by the QEMU that runs,
        which is then asked; off, libvirt can't tell of a pool's volume.
        """
        found = Layer.of(target)
        if found.instance == -1 or found.origin_format == "qcow2":
            return storage.virtual_size(found.origin, found.origin_format)
        return self._hypervisor.capacity(str(target.data["domain"]), target.disk)

    def check_way(self, target: Target) -> None:
        """See Ways."""
        with open_folder(self._hypervisor, os.path.dirname(Layer.of(target).path)):
            pass

    def check(self, targets: Sequence[Target], tag: Tag) -> Needs:
        """See Method."""
        overlays = [Layer.of(target).path for target in targets]
        if len(set(overlays)) < len(overlays):
            raise NameInUse(
                "Two of the disks would have the same overlay; name the overlays in their methods."
            )
        needed, available, warnings = 0, 0, list[str]()
        chains = {target.disk: _chain(target) + 1 for target in targets}
        for target in targets:
            found = Layer.of(target)
            self._check_domain(found, target.disk)
            user = self._hypervisor.user_of(found.origin, found.domain, target.disk)
            if user:
                raise Busy(f"The image of disk {target.disk} is also used by {user}.")
            folder = os.path.dirname(found.path)
            with open_folder(self._hypervisor, folder) as fd:
                if overlay.exists(fd, os.path.basename(found.path)):
                    raise NameInUse(
                        f"There is a file {found.path} already; choose another name or overlay."
                    )
            if storage.read_only(folder):
                raise StorageFailed(f"The folder {folder} is read-only.")
            needed += qcow2.new_size(target.size)
            available = storage.space_available(folder)
            if available < needed + _RESERVE:
                raise NoSpace(
                    f"The folder {folder} has {available} bytes left, and the overlay needs "
                    f"{needed + _RESERVE}; make room or name another place."
                )
            if available < target.size:
                warnings.append(
                    f"The overlay of disk {target.disk} may grow to {target.size} bytes, and "
                    f"{available} are free; the guest stops when there are none."
                )
        return Needs(needed, available, tuple(warnings), chains)

    def _check_domain(self, found: Layer, disk: str) -> None:
        if found.instance != -1:
            return
        if self._hypervisor.managed_save(found.domain):
            raise InvalidState(
                "The domain has a managed save image, which would go on with the old disk; start "
                "it or remove the image with 'virsh managedsave-remove'."
            )
        if self._hypervisor.checkpoints(found.domain):
            raise InvalidState(
                "The domain is off and has checkpoints, with which libvirt takes no disk snapshot; "
                "start it or delete them."
            )
        if storage.write_locked(found.origin):
            raise Busy(f"The image of disk {disk} is open for writing by another process.")

    def prepare(self, targets: Sequence[Target], tag: Tag, record: Record) -> Sequence[Target]:
        """Make the overlays under names of their own, journal their inodes, then name them."""
        prepared = []
        for target in targets:
            found = Layer.of(target)
            with open_folder(self._hypervisor, os.path.dirname(found.path)) as fd:
                inode = overlay.make(
                    fd, found.draft(tag), found.origin, found.origin_format, target.size, tag
                )
            data: dict[str, Json] = {
                **target.data,
                "device": inode.device,
                "inode": inode.inode,
            }
            prepared.append(dataclasses.replace(target, data=data))
        record(prepared)
        self._in_order |= {(tag.uuid, target.disk) for target in prepared}
        for target in prepared:
            found = Layer.of(target)
            with open_folder(self._hypervisor, os.path.dirname(found.path)) as fd:
                overlay.give_name(fd, found.draft(tag), os.path.basename(found.path))
        return prepared

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        """One libvirt snapshot for all."""
        overlays = {t.disk: (str(t.data["overlay"]), "qcow2") for t in targets}
        others = [str(name) for t in targets for name in _names(t.data["others"])]
        known = {(tag.uuid, target.disk) for target in targets}
        self._in_order -= known
        try:
            self._hypervisor.switch(
                str(targets[0].data["domain"]),
                overlays,
                [name for name in dict.fromkeys(others) if name not in overlays],
            )
        except HypervisorUnavailable as error:
            if not getattr(error, "lost", True):
                self._in_order |= known
            raise
        self._in_order |= known

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        """Whether the overlay is in the chain, live and (where it should) persistent.

        Where the running domain has switched and only the definition was not written, as when
        libvirtd dies in between, the definition is mended here.
        """
        found = Layer.of(target)
        if found.aside is not None:
            return beside.own(found)
        try:
            domain = domain or self._hypervisor.read(found.domain)
        except NoSuchDomain:
            return False
        live = commit.in_use(domain, found, target.disk)
        if live is None or live.mirror:  # a mirror: it is being committed away
            return False
        self._in_order.discard((tag.uuid, target.disk))
        if domain.active and found.persistent:
            persistent = domain.persistent_disk(target.disk)
            if persistent is not None and _same_file(persistent.path, found.origin):
                # libvirt follows where both say it in the same words, and wants to be alive.
                log.warning(
                    "the definition of domain %s lacked the overlay of disk %s; mended",
                    found.domain,
                    target.disk,
                )
                self._hypervisor.redefine_disk(
                    found.domain, target.disk, found.path, "file", "qcow2"
                )
        return True

    def undo(self, target: Target, tag: Tag, *, again: bool) -> bool:
        """See Method and commit.undo."""
        in_order = (tag.uuid, target.disk) in self._in_order
        self._in_order.discard((tag.uuid, target.disk))
        return commit.undo(
            self._hypervisor, Layer.of(target), target.disk, tag, in_order=in_order, again=again
        )

    def check_delete(self, target: Target, tag: Tag) -> None:
        """See Method and commit.check_delete."""
        commit.check_delete(self._hypervisor, Layer.of(target), target.disk)

    def delete(self, target: Target, tag: Tag, watch: Watch) -> None:
        """See Method and commit.delete."""
        commit.delete(
            self._hypervisor, Layer.of(target), target.disk, watch, self._commit_bandwidth
        )

    def moved(self, deleted: Target, other: Target) -> Target | None:
        """The other's source was the overlay that has gone into the deleted one's source."""
        if (other.method, other.disk) != (deleted.method, deleted.disk):
            return None
        gone = Layer.of(deleted)
        if gone.aside is not None:  # what lay on it lies on what was below
            return None
        if Layer.of(other).origin != gone.path:
            return None
        place: dict[str, Json] = {
            name: deleted.data[name] for name in ("origin", "origin_type", "origin_format")
        }
        place["ours"] = deleted.data.get("ours")
        return dataclasses.replace(other, data={**other.data, **place})

    def check_revert(self, target: Target, tag: Tag, others: Sequence[Target]) -> Target:
        """See Reverts and revert.check."""
        return revert.check(self._hypervisor, target, tag, others)

    def prepare_revert(self, target: Target, tag: Tag, record: Record) -> Target:
        """See Reverts and revert.prepare."""
        return revert.prepare(self._hypervisor, target, tag, record)

    def revert(self, target: Target, tag: Tag, watch: Watch) -> None:
        """See Reverts and revert.switch."""
        revert.switch(self._hypervisor, target, watch)

    def settle_revert(self, target: Target, tag: Tag) -> bool:
        """See Reverts and revert.settle."""
        return revert.settle(self._hypervisor, target, tag)

    def reverted(self, target: Target, other: Target) -> Target | None:
        """See Reverts and revert.reverted."""
        return revert.reverted(target, other)

    def among(self, target: Target, others: Sequence[Target]) -> Target:
        """See Reverts and revert.among."""
        return revert.among(target, others)

    def state(self, target: Target, domains: Mapping[str, Domain]) -> str:
        """See Method and standing.py."""
        return self.standing(target, domains).state

    def standing(self, target: Target, domains: Mapping[str, Domain]) -> Standing:
        """See Explains and standing.py."""
        return standing.of(Layer.of(target), domains)

    def files(self, target: Target) -> Sequence[str]:
        """The overlay, and the former source, which may be an overlay of an earlier snapshot."""
        layer = Layer.of(target)
        return [layer.path, layer.origin, *revert.files(target)]

    def warnings(self, target: Target, domains: Mapping[str, Domain]) -> Mapping[str, str]:
        """See Warns: the overlay that the domain writes to may soon have no room to grow."""
        found = Layer.of(target)
        domain = domains.get(found.domain)
        disk = domain.disk(target.disk) if domain is not None else None
        if disk is None or not _same_file(disk.path, found.path):
            return {}  # it grows no more
        return low_space(target.disk, os.path.dirname(found.path), self._low_space_percent)


def _chain(target: Target) -> int:
    """How many images the disk's chain has: as libvirt tells of a domain that runs, else as read.

    Of a domain that is off libvirt knows what its definition says, which may be nothing.
    """
    found, told = Layer.of(target), target.data["chain"]
    if found.instance != -1 and isinstance(told, int):
        return told
    if found.origin_format == "raw":
        return 1
    return 1 + sum(1 for _ in storage.backing_chain(found.origin))


def _same_file(path: str, other: str) -> bool:
    """Whether two paths, whatever they are called, are of one image."""
    found = storage.file_id(path)
    return path == other or (found is not None and found == storage.file_id(other))


def _names(value: Json) -> Sequence[Json]:
    return value if isinstance(value, list) else []
