"""The method that is stored for a disk, in its domain's metadata: read, and written.

Blocking functions for one worker thread; the engine holds the domain's lock around `store`.
"""

from __future__ import annotations

import logging

from snapd_vm.engine import select
from snapd_vm.engine.world import World
from snapd_vm.errors import NoSuchDisk
from snapd_vm.model import Disk, Domain, Request, Tag

log = logging.getLogger(__name__)


def store(world: World, request: Request, method_xml: str) -> None:
    """Let `method_xml`, of which the request's method was read, be stored for the disk; '': none.

    What names a method is refused where a Create would refuse it. Raises SnapdErrors.
    """
    domain, disk = _found(world, request)
    methods = dict(domain.methods)
    methods.pop(disk.target, None)
    if request.method is not None:
        tag = Tag("00000000-0000-0000-0000-000000000000", "NAME", domain.uuid, domain.name, 0)
        select.choose_reachable(world.methods, domain, disk, request, tag)
        methods[disk.target] = method_xml
    if methods == domain.methods and not (domain.active and domain.persistent):
        return  # else the definition may say something else, which the live XML does not tell
    world.hypervisor.store_methods(domain.uuid, methods)
    log.info(
        "disk %s of domain %s is taken by %s from now on",
        disk.target,
        domain.name,
        f"method {request.method.method}" if request.method is not None else "its default method",
    )


def read(world: World, request: Request) -> str:
    """The `<diskSnapshot>` stored for the disk, or ''. Raises SnapdErrors."""
    domain, disk = _found(world, request)
    return domain.methods.get(disk.target, "")


def _found(world: World, request: Request) -> tuple[Domain, Disk]:
    """The domain as libvirt has it now, and the disk in that."""
    domain = world.hypervisor.read(request.uuid)
    found = select.find_in(domain, request.disk)
    if found.error is not None or found.disk is None:
        raise found.error or NoSuchDisk("The disk is gone; look at Disks.")
    return domain, found.disk
