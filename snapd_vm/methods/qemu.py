"""The method `qemu`: an external qcow2 overlay, made beforehand, that libvirt switches the disk to.

The former image is the snapshot. Rollback is the reverse: the overlay is committed into its base
and the domain pivots back, or, where the switch has not happened, the overlay is unlinked. What the
domain really uses is asked every time, never remembered.
"""

from __future__ import annotations

import contextlib
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
from snapd_vm.methods.method import Kept, Record
from snapd_vm.model import Disk, Domain, Json, MethodRequest, Needs, Tag, Target

log = logging.getLogger(__name__)

_COMMIT_LIMIT_S = 120.0
_RESERVE = 1 << 20
"""Bytes that must be free beyond the overlay's own first size: an overlay that can't grow stops
the guest at its next write."""


class Hypervisor(Protocol):
    """What the method needs of the hypervisor; blocking, raises SnapdErrors."""

    def read(self, uuid: str) -> Domain: ...
    def capacity(self, uuid: str, target: str) -> int: ...
    def managed_save(self, uuid: str) -> bool: ...
    def checkpoints(self, uuid: str) -> bool: ...
    def switch(
        self, uuid: str, overlays: Mapping[str, tuple[str, str]], others: Sequence[str]
    ) -> None: ...
    def commit_active(self, uuid: str, target: str, base: str, timeout: float) -> None: ...
    def redefine_disk(
        self, uuid: str, target: str, path: str, disk_type: str, image_format: str
    ) -> None: ...
    def locked(self, path: str, image_format: str) -> bool: ...
    def commit_behind(self, uuid: str, overlay: str, timeout: float) -> None: ...
    def drop_nodes(self, uuid: str, overlay: str) -> None: ...
    def user_of(self, path: str, uuid: str, target: str) -> str: ...
    def qemu_user(self) -> tuple[int, int]: ...


class Qemu:
    """See the top of the file."""

    name = "qemu"

    def __init__(self, hypervisor: Hypervisor, overlay_dirs: Sequence[str]) -> None:
        self._hypervisor = hypervisor
        self._overlay_dirs = overlay_dirs
        # Operations after which QEMU has no node that libvirt does not know: those of this process
        # in which libvirt has not gone away in the middle of the switch. Only for the others is
        # QEMU's monitor asked, as that marks the domain.
        self._in_order: set[str] = set()

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
        persistent = next((d for d in domain.persistent_disks if d.target == disk.target), None)
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
                "overlay": self._overlay_path(disk, request, tag),
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
            return named
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
        """The virtual size that the overlay will have."""
        found = _Overlay.of(target)
        if found.instance == -1:  # libvirt can't tell of a pool's volume then
            return storage.virtual_size(found.origin, found.origin_format)
        return self._hypervisor.capacity(str(target.data["domain"]), target.disk)

    def check(self, targets: Sequence[Target], tag: Tag) -> Needs:
        """See Method."""
        needed, available, warnings = 0, 0, list[str]()
        for target in targets:
            found = _Overlay.of(target)
            self._check_domain(found, target.disk)
            user = self._hypervisor.user_of(found.origin, found.domain, target.disk)
            if user:
                raise Busy(f"The image of disk {target.disk} is also used by {user}.")
            folder = os.path.dirname(found.path)
            with self._folder(folder) as fd:
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
        return Needs(needed, available, tuple(warnings))

    def _check_domain(self, found: _Overlay, disk: str) -> None:
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
        if self._hypervisor.locked(found.origin, found.origin_format):
            raise Busy(f"The image of disk {disk} is open for writing by another process.")

    def prepare(self, targets: Sequence[Target], tag: Tag, record: Record) -> Sequence[Target]:
        """Make the overlays under names of their own, journal their inodes, then name them."""
        prepared = []
        for target in targets:
            found = _Overlay.of(target)
            with self._folder(os.path.dirname(found.path)) as fd:
                inode = overlay.make(
                    fd, found.draft(tag), found.origin, found.origin_format, target.size
                )
            data: dict[str, Json] = {
                **target.data,
                "device": inode.device,
                "inode": inode.inode,
            }
            prepared.append(dataclasses.replace(target, data=data))
        record(prepared)
        self._in_order.add(tag.uuid)
        for target in prepared:
            found = _Overlay.of(target)
            with self._folder(os.path.dirname(found.path)) as fd:
                overlay.give_name(fd, found.draft(tag), os.path.basename(found.path))
        return prepared

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        """One libvirt snapshot for all."""
        overlays = {t.disk: (str(t.data["overlay"]), "qcow2") for t in targets}
        others = [str(name) for t in targets for name in _names(t.data["others"])]
        self._in_order.discard(tag.uuid)
        try:
            self._hypervisor.switch(
                str(targets[0].data["domain"]),
                overlays,
                [name for name in dict.fromkeys(others) if name not in overlays],
            )
        except HypervisorUnavailable as error:
            if not getattr(error, "lost", True):
                self._in_order.add(tag.uuid)
            raise
        self._in_order.add(tag.uuid)

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        """Whether libvirt says the overlay, live and (where it should) persistent.

        Where the running domain has switched and only the definition was not written, as when
        libvirtd dies in between, the definition is mended here.
        """
        found = _Overlay.of(target)
        try:
            domain = domain or self._hypervisor.read(found.domain)
        except NoSuchDomain:
            return False
        live = domain.disk(target.disk)
        if live is None or live.path != found.path:
            return False
        if domain.active and found.persistent:
            persistent = next((d for d in domain.persistent_disks if d.target == target.disk), None)
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

    def delete(self, target: Target, tag: Tag) -> bool:
        """See Method; the table of what may have happened is in `_undo`."""
        found = _Overlay.of(target)
        removed = self._unlink(found, found.draft(tag))
        if found.inode is None:  # killed before it had a name
            return removed
        current = storage.file_id(found.path)
        if current is None:
            return removed
        if current != found.inode:
            log.warning("%s is not the overlay that we made; left alone", found.path)
            return removed
        self._undo(found, target.disk, in_order=tag.uuid in self._in_order)
        return self._unlink(found, os.path.basename(found.path)) or removed

    def _undo(self, found: _Overlay, disk: str, *, in_order: bool) -> None:
        """Bring the domain back to the origin, whatever it uses now, or raise.

        libvirt says  | locked: origin, overlay | what happened             | so
        overlay, live | -                       | switched                  | commit and pivot
        overlay, off  | -                       | switched, not started     | define the origin
        origin, live  | yes, no or yes          | not switched              | remove nodes, if any
        origin, live  | no, yes                 | switched behind libvirt   | commit by the monitor
        origin, off   | -                       | ended since; data tells   | keep what has data
        """
        try:
            # Waits for the end of a switch that a client, killed meanwhile, has begun.
            with contextlib.suppress(StorageFailed):
                self._hypervisor.capacity(found.domain, disk)
            domain = self._hypervisor.read(found.domain)
        except NoSuchDomain:
            self._keep_if_written(found, "the domain is gone")
            return
        live = domain.disk(disk)
        path = live.path if live is not None else ""
        if path == found.path and domain.active:
            self._hypervisor.commit_active(found.domain, disk, found.origin, _COMMIT_LIMIT_S)
            self._define_origin(found, disk)
        elif path == found.path:
            self._keep_if_written(found, "the domain ended after it had switched")
            self._define_origin(found, disk)
        elif path == found.origin and domain.active:
            if not in_order:
                self._settle_nodes(found, disk)
            self._define_origin(found, disk)
        elif path == found.origin:
            if overlay.written(found.path):
                # QEMU had switched, and ended before libvirt knew: those writes are the guest's.
                log.error(
                    "domain %s wrote to %s unknown to libvirt; its definition now says so",
                    found.domain,
                    found.path,
                )
                self._hypervisor.redefine_disk(found.domain, disk, found.path, "file", "qcow2")
                raise Kept("The domain had switched to the overlay, which is kept.")
        else:
            self._keep_if_written(found, f"disk {disk} has another image now")

    def _settle_nodes(self, found: _Overlay, disk: str) -> None:
        locked = self._hypervisor.locked(found.path, "qcow2")
        if locked and not self._hypervisor.locked(found.origin, found.origin_format):
            log.warning("QEMU writes to the overlay of disk %s unknown to libvirt", disk)
            self._hypervisor.commit_behind(found.domain, found.path, _COMMIT_LIMIT_S)
        else:
            self._refuse_if_written(found, "the domain runs on its base")
            self._hypervisor.drop_nodes(found.domain, found.path)

    def _define_origin(self, found: _Overlay, disk: str) -> None:
        """Let the definition say the origin where it says the overlay."""
        domain = self._hypervisor.read(found.domain)
        disks = domain.persistent_disks if domain.active else domain.disks
        persistent = next((d for d in disks if d.target == disk), None)
        if persistent is not None and persistent.path == found.path:
            self._hypervisor.redefine_disk(
                found.domain, disk, found.origin, found.origin_type, found.origin_format
            )

    def _refuse_if_written(self, found: _Overlay, why: str) -> None:
        if overlay.written(found.path):
            raise StorageFailed(
                f"The overlay {found.path} holds data and {why}; look at both before removing it."
            )

    def _keep_if_written(self, found: _Overlay, why: str) -> None:
        if overlay.written(found.path):
            raise Kept(f"The overlay holds data of the guest and is kept, as {why}.")

    def _unlink(self, found: _Overlay, name: str) -> bool:
        try:
            with self._folder(os.path.dirname(found.path)) as fd:
                os.unlink(name, dir_fd=fd)
                os.fsync(fd)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageFailed(f"{found.path} can't be removed: {error.strerror}.") from error
        log.info("removed %s", name)
        return True

    def _folder(self, folder: str) -> contextlib.AbstractContextManager[int]:
        uid, gid = self._hypervisor.qemu_user()
        return storage.open_folder(folder, {0, uid}, {0, gid})

    def state(self, target: Target, domains: Mapping[str, Domain]) -> str:
        """See Method: the origin is there, below the disk, and no definition's own image."""
        found = _Overlay.of(target)
        origin = storage.file_id(found.origin)
        if origin is None:
            return "missing"
        for domain in domains.values():
            for disk in (*domain.disks, *domain.persistent_disks):
                if not disk.readonly and disk.path and storage.file_id(disk.path) == origin:
                    return "failed"
        own = domains.get(found.domain)
        taken = own.disk(target.disk) if own is not None else None
        if taken is None:
            return "detached"
        if found.origin in taken.chain:  # a live domain's; of one that is off, libvirt tells none
            return "ready"
        below = {storage.file_id(p) for p in (*taken.chain, *storage.backing_chain(taken.path))}
        return "ready" if origin in below else "detached"


def _same_file(path: str, other: str) -> bool:
    """Whether two paths, whatever they are called, are of one image."""
    found = storage.file_id(path)
    return path == other or (found is not None and found == storage.file_id(other))


def _names(value: Json) -> Sequence[Json]:
    return value if isinstance(value, list) else []


@dataclasses.dataclass(frozen=True, slots=True)
class _Overlay:
    """A Target's data with its types."""

    domain: str
    instance: int
    origin: str
    origin_type: str
    origin_format: str
    persistent: bool
    path: str
    inode: storage.FileId | None

    @classmethod
    def of(cls, target: Target) -> _Overlay:
        data = target.data
        device, inode, instance = data.get("device"), data.get("inode"), data["instance"]
        known = isinstance(device, int) and isinstance(inode, int)
        return cls(
            domain=str(data["domain"]),
            instance=instance if isinstance(instance, int) else -1,
            origin=str(data["origin"]),
            origin_type=str(data["origin_type"]),
            origin_format=str(data["origin_format"]),
            persistent=bool(data["persistent"]),
            path=str(data["overlay"]),
            inode=storage.FileId(device, inode) if known else None,  # type: ignore[arg-type]
        )

    def draft(self, tag: Tag) -> str:
        """The name in the overlay's folder that it has until it is complete; ours by its UUID."""
        return f".{tag.storage_name}.new"
