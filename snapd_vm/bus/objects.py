"""The methods of our own interfaces: each parses, looks in memory, and hands over to the Service.

What touches libvirt or a file is in the coroutine of a Prepared, which the guard runs after the yes
of polkit only; so is the error for a domain or disk that is not there. The action of each method
stands beside it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from snapd_vm.bus.calls import Action, Declared, Details, Prepared, guarded, open_to_all
from snapd_vm.bus.contract import DISK_SNAPSHOT, DOMAIN, MANAGER, SNAPSHOT
from snapd_vm.bus.tree import Root, Tree
from snapd_vm.bus.wire import Typed
from snapd_vm.engine.service import Service
from snapd_vm.errors import NoSuchDomain
from snapd_vm.model import DiskReport, Domain, Found, Plan, Request, Snapshot, domain_path
from snapd_vm.request import create_request, root_request

T = TypeVar("T")


@guarded(Root, DISK_SNAPSHOT, "Create", Action.CREATE)
def create_on_root(
    tree: Tree, root: Root, disk_xml: str, method_xml: str, name: str, flags: int
) -> Prepared:
    """Create of a disk whose domain the XML names, or whose source belongs to one domain."""
    request = root_request(disk_xml, method_xml, name, flags)
    return _prepare(tree.service, request, tree.service.create, _created)


@guarded(Domain, DISK_SNAPSHOT, "Create", Action.CREATE)
def create_on_domain(
    tree: Tree, domain: Domain, disk_xml: str, method_xml: str, name: str, flags: int
) -> Prepared:
    """Create of a disk of this domain."""
    request = replace(create_request(disk_xml, method_xml, name, flags), uuid=domain.uuid)
    return _prepare(tree.service, request, tree.service.create, _created, domain)


@guarded(Domain, DOMAIN, "Plan", Action.CREATE)
def plan(
    tree: Tree, domain: Domain, disk_xml: str, method_xml: str, name: str, flags: int
) -> Prepared:
    """What Create would do with the same arguments."""
    request = replace(create_request(disk_xml, method_xml, name, flags), uuid=domain.uuid)
    return _prepare(tree.service, request, tree.service.plan, _planned, domain)


@guarded(Domain, DOMAIN, "Disks", Action.READ)
def disks(tree: Tree, domain: Domain) -> Prepared:
    """The disks of this domain."""

    async def run() -> Sequence[object]:
        return ([_reported(report) for report in await tree.service.disks(domain.uuid)],)

    return Prepared(Details(domain=domain.name, uuid=domain.uuid), run)


@guarded(Snapshot, SNAPSHOT, "GetBackupSource", Action.READ)
def get_backup_source(tree: Tree, snapshot: Snapshot) -> Prepared:
    """The source to read this snapshot from."""

    async def run() -> Sequence[object]:
        return (await tree.service.backup_source(snapshot.uuid),)

    return Prepared(_snapshot_details(tree.service, snapshot), run)


@guarded(Snapshot, SNAPSHOT, "GetModifiedDisk", Action.READ)
def get_modified_disk(tree: Tree, snapshot: Snapshot) -> Prepared:
    """The disk that the domain uses because of this snapshot."""

    async def run() -> Sequence[object]:
        return (await tree.service.modified_disk(snapshot.uuid),)

    return Prepared(_snapshot_details(tree.service, snapshot), run)


@open_to_all(Root, MANAGER, "FindDomain")
def find_domain(tree: Tree, root: Root, name_or_uuid: str) -> Sequence[object]:
    """The object of a domain, by UUID, else by name. Raises NoSuchDomain."""
    domains = tree.service.domains
    uuid = name_or_uuid.lower()
    if uuid in domains:
        return (domain_path(uuid),)
    for domain in domains.values():
        if domain.name == name_or_uuid:
            return (domain_path(domain.uuid),)
    raise NoSuchDomain("There is no domain of that name or UUID; 'virsh list --all' shows them.")


METHODS: tuple[Declared, ...] = (
    create_on_root,
    create_on_domain,
    plan,
    disks,
    get_backup_source,
    get_modified_disk,
    find_domain,
)


def _prepare(
    service: Service,
    request: Request,
    operation: Callable[[Found, Request], Awaitable[T]],
    answer: Callable[[T], Sequence[object]],
    domain: Domain | None = None,
) -> Prepared:
    found = service.find(request)

    async def run() -> Sequence[object]:
        if found.error is not None:
            raise found.error
        return answer(await operation(found, request))

    wanted = request.wanted_method
    also = (Action.CONFIGURE,) if wanted is not None and wanted.names_place else ()
    return Prepared(_request_details(request, found, domain), run, also)


def _request_details(request: Request, found: Found, domain: Domain | None) -> Details:
    """Of what was found; for what was not, as the caller named it."""
    method = request.wanted_method.method if request.wanted_method else ""
    named = Details(
        domain=domain.name if domain else request.domain,
        uuid=domain.uuid if domain else request.uuid,
        disk=request.disk.target,
        method=method,
        name=request.name,
    )
    return replace(
        named,
        domain=found.domain.name if found.domain else named.domain,
        uuid=found.domain.uuid if found.domain else named.uuid,
        disk=found.disk.target if found.disk else named.disk,
        named=named,
    )


def _snapshot_details(service: Service, snapshot: Snapshot) -> Details:
    """The domain's present name; the one on record for a domain that is gone."""
    domain = service.domains.get(snapshot.domain_uuid)
    return Details(
        domain=domain.name if domain else snapshot.domain_name,
        uuid=snapshot.domain_uuid,
        disk=snapshot.target.disk,
        name=snapshot.name,
    )


def _created(snapshot: Snapshot) -> Sequence[object]:
    return (snapshot.modified_disk, snapshot.backup_source)


def _planned(found: Plan) -> Sequence[object]:
    return (
        {
            "method": Typed("s", found.method),
            "backup_source": Typed("s", found.backup_source),
            "consistency": Typed("s", found.consistency),
            "space_needed": Typed("t", found.space_needed),
            "space_available": Typed("t", found.space_available),
            "warnings": Typed("as", found.warnings),
        },
    )


def _reported(report: DiskReport) -> Mapping[str, Typed]:
    disk = report.disk
    texts = {
        "target": disk.target,
        "device": disk.device,
        "type": disk.type,
        "format": disk.format,
        "source": disk.source_xml,
        "method": report.method,
        "reason": report.reason,
    }
    return {key: Typed("s", value) for key, value in texts.items()}
