"""How a snapshot of the method qemu stands: its record held against files and definitions.

Looks and changes nothing. What each combination is (O: the snapshot's image; V: the overlay that we
made on it; "ours": still that file, by its inode):

    O                            | V                          | State    | Delete
    gone                         | any                        | missing  | drops the record
    runs, live, as a disk        | in no chain of the domain  | failed   | drops the record
    runs, live, as a disk        | in the definition's chain  | failed   | refused
    in a definition, or another  | gone, or not ours          | failed   | drops the record
     domain's                    | ours, written or not       | failed   | refused
    below the disk               | ours, in the chain         | ready    | commits V into O
    below the disk               | named, gone or not ours    | detached | drops the record
    below the disk               | not in the chain           | failed   | drops the record
    not below the disk           | any                        | detached | drops the record
    any, domain or disk gone     | any                        | detached | drops the record
    any, domain migrated away    | any                        | detached | drops the record
    beside the chain, as it was  | -                          | ready    | removes it, if ours

Where a record is dropped no file is touched. "runs, live": somebody committed V (virsh blockcommit
--pivot), or the domain was started from an old definition; what O was is lost in both cases, and
what V holds stays in V. In a definition only, nothing is lost yet, if that is corrected; whether V
was written to makes no difference: nobody can tell, once the domain is off, what the guest wrote
from what somebody has committed. "not in the chain" while O is: V was committed into O in the
middle of the chain, or pulled up; only one of these changes O, and they can't be told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from snapd_vm import storage
from snapd_vm.methods.method import BASE_IN_USE, Standing
from snapd_vm.methods.qemu import beside, commit
from snapd_vm.methods.qemu.layer import Layer
from snapd_vm.model import Disk, Domain
from snapd_vm.storage import FileId


def of(layer: Layer, domains: Mapping[str, Domain]) -> Standing:
    """See the top of the file; `domains` are all that there are, by UUID."""
    origin = storage.file_id(layer.origin)
    if origin is None:
        return Standing("missing", f"its image {layer.origin} is not there")
    user = _user(origin, domains.values())
    own = domains.get(layer.domain)
    if user:
        return _written_to(layer, origin, own, user)
    if own is None:
        return Standing("detached", "libvirt has no such domain: it is undefined or migrated away")
    if own.migrated:
        return Standing("detached", "the domain was migrated away, and its disks are in use there")
    disk = own.disk(layer.disk)
    if disk is None:
        return Standing("detached", f"the domain has no disk {layer.disk} any more")
    if layer.aside is not None:
        if beside.own(layer):
            return Standing("ready")
        return Standing("missing", f"{layer.origin} is not the file that it was")
    return _below(layer, origin, disk)


def _below(layer: Layer, origin: FileId, disk: Disk) -> Standing:
    overlay = commit.own_id(layer)
    told = (disk.path, *disk.chain)
    if overlay is not None and layer.path in told and layer.origin in disk.chain:
        return Standing("ready")  # no header is read of a chain that libvirt has told
    paths = list(_chain(disk))
    images = {storage.file_id(path) for path in paths}
    if origin in images and overlay is not None and overlay in images:
        return Standing("ready")
    if layer.path in paths and commit.own_id(layer) is None:  # it may be gone since the first look
        gone = storage.file_id(layer.path) is None
        how = "is not there" if gone else "is not the overlay that was made, or not on its base"
        return Standing("detached", f"{layer.path}, which the domain names, {how}")
    if origin in images:
        return Standing(
            "failed",
            f"the overlay {layer.path} is not in the chain any more: somebody committed it into "
            f"{layer.origin}, or pulled it up; what is left of it is nobody's",
            "base-changed",
            "The overlay of the snapshot was taken out of the disk's chain by somebody else, so "
            "that the snapshot may have changed; delete it.",
            released=True,
        )
    return Standing("detached", f"the disk is on {disk.path or 'nothing'} now, which is not on it")


def _written_to(layer: Layer, origin: FileId, own: Domain | None, user: str) -> Standing:
    """The image is what somebody's disk writes to."""
    overlay = commit.own_id(layer) if layer.aside is None else None
    chained = own is not None and any(
        overlay in {storage.file_id(path) for path in _chain(disk)}
        for disk in (*own.disks, *own.persistent_disks)
    )
    live = own.disk(layer.disk) if own is not None and own.active else None
    runs = live is not None and storage.file_id(live.path) == origin
    if layer.aside is not None:
        released, left = runs, ""
    elif overlay is None:
        released, left = True, f"; its overlay {layer.path} is gone, or another file"
    else:
        # QEMU may have an image that libvirt does not tell of: see libvirtd dying in a switch.
        released = runs and not chained and not storage.write_locked(layer.path)
        left = f"; its overlay {layer.path} is {'in the chain' if chained else 'in no chain of it'}"
    return Standing(
        "failed",
        f"its image {layer.origin} is that of {user}{left}",
        "base-in-use",
        "A domain writes to the image that the snapshot was, so that it is none any more; delete "
        "it, which drops its record and touches no file."
        if released
        else BASE_IN_USE,
        released,
    )


def _user(origin: FileId, domains: Iterable[Domain]) -> str:
    for domain in domains:
        for where, disks in (("", domain.disks), (" (definition)", domain.persistent_disks)):
            for disk in disks:
                if not disk.readonly and disk.path and storage.file_id(disk.path) == origin:
                    return f"disk {disk.target} of domain {domain.name}{where}"
    return ""


def _chain(disk: Disk) -> Iterator[str]:
    """The paths of a disk's images, as libvirt tells and as read: of one that is off it may not."""
    yield disk.path
    yield from disk.chain
    if disk.format != "raw":
        yield from storage.backing_chain(disk.path)
