"""Finds who else has an image in its backing chain; reads definitions and headers, changes nothing.

libvirt does not refuse a snapshot or commit that pulls the base out from under another domain's
linked clone; a golden image is gone then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from snapd_vm import mark, storage
from snapd_vm.model import Disk, Domain
from snapd_vm.storage import FileId

_MOST_IMAGES = 4096


def user_of(
    path: str,
    uuid: str,
    target: str,
    domains: Sequence[Domain],
    folders: Sequence[str],
    known: Sequence[str] = (),
    *,
    beside: bool = True,
) -> str:
    """Who has the image at `path` in its chain besides disk `target` of domain `uuid`; '' : nobody.

    Images of `known` that no domain uses don't count.

    Looks at the definitions of all `domains`, live and persistent, and at the images in the same
    folder, unless `beside` is False, and in `folders`. An image in some domain's chain is read as
    what it is declared to be there, and so not at all if that is raw: its content is the guest's,
    and could name any file.
    """
    wanted = storage.file_id(path)
    if wanted is None:
        return ""
    declared: set[FileId] = set()
    for domain in domains:
        for disk in _disks(domain):
            images = _identities([disk.path, *_chain(disk)])
            own = domain.uuid == uuid and disk.target == target
            if wanted in images and not own:
                return f"disk {disk.target} of domain {domain.name}"
            declared.update(images)
    declared |= _identities(known)
    same = [os.path.dirname(path), os.path.dirname(os.path.realpath(path))] if beside else []
    for image in _images([*same, *folders]):
        found = storage.file_id(image)
        if found is None or found == wanted or found in declared:
            continue
        if wanted in _identities(storage.backing_chain(image)):
            return f"the image {image}"
    return ""


def user_of_snapshot(name: str, domains: Sequence[Domain]) -> str:
    """Whose disk has a source with `<snapshot name=…>`, in words; '': nobody's."""
    for domain in domains:
        for disk in _disks(domain):
            if f'<snapshot name="{name}"' in disk.source_xml:
                return f"disk {disk.target} of domain {domain.name}"
    return ""


def _disks(domain: Domain) -> Iterator[Disk]:
    yield from domain.disks
    yield from domain.persistent_disks


def _chain(disk: Disk) -> Iterator[str]:
    yield from disk.chain
    if disk.path and disk.format != "raw":
        yield from storage.backing_chain(disk.path)


def _identities(paths: Iterable[str]) -> set[FileId]:
    return {found for path in paths if path and (found := storage.file_id(path)) is not None}


def _images(folders: Iterable[str]) -> Iterator[str]:
    """The files in the folders that may have a chain.

    Clones of ours are left out: they are whole, and of a raw one the guest wrote the header.
    """
    for path in files_in(folders):
        if not mark.is_clone(path):
            yield path


def files_in(folders: Iterable[str]) -> Iterator[str]:
    """The files in the folders, each folder once, up to 4096 entries of each.

    A folder under /dev holds no images.
    """
    for folder in {os.path.realpath(folder) for folder in folders if folder}:
        if folder == "/dev" or folder.startswith("/dev/"):
            continue
        try:
            with os.scandir(folder) as entries:
                for number, entry in enumerate(entries):
                    if number >= _MOST_IMAGES:
                        break
                    if entry.is_file():
                        yield entry.path
        except OSError:
            continue
