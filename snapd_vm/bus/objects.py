"""The methods of our own interfaces: each parses, looks in memory, and hands over to the Service.

What touches libvirt or a file is in the coroutine of a Prepared, which the guard runs after the yes
of polkit only; so is the error for a domain or disk that is not there. The action of each method
stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from snapd_vm.bus.calls import (
    Action,
    Declared,
    Details,
    Ownership,
    Prepared,
    PreparedJob,
    guarded,
    open_to_all,
    owned,
)
from snapd_vm.bus.contract import DISK_SNAPSHOT, DOMAIN, JOB, MANAGER, SNAPSHOT
from snapd_vm.bus.tree import Root, Tree
from snapd_vm.bus.wire import Typed
from snapd_vm.engine.service import Service
from snapd_vm.errors import NOT_CONNECTED, HypervisorUnavailable, InvalidArgs, NoSuchDomain
from snapd_vm.model import (
    DiskReport,
    Domain,
    Found,
    Job,
    Plan,
    Request,
    Snapshot,
    domain_path,
    snapshot_path,
)
from snapd_vm.request import create_request, root_request, set_requests


@guarded(Root, DISK_SNAPSHOT, "Create", Action.CREATE)
def create_on_root(
    tree: Tree, root: Root, disk_xml: str, method_xml: str, name: str, flags: int
) -> PreparedJob:
    """Create of a disk whose domain the XML names, or whose source belongs to one domain."""
    request = root_request(disk_xml, method_xml, name, flags)
    found = tree.service.find(request)

    async def start(uid: int) -> Sequence[object]:
        [snapshot] = await tree.service.create([_there(found)], [request], uid)
        return (snapshot.modified_disk, snapshot.backup_source)

    return PreparedJob(_request_details(request, found, None), start, _also([request]))


@guarded(Domain, DISK_SNAPSHOT, "Create", Action.CREATE)
def create_on_domain(
    tree: Tree, domain: Domain, disk_xml: str, method_xml: str, name: str, flags: int
) -> PreparedJob:
    """Create of a disk of this domain."""
    request = create_request(disk_xml, method_xml, name, flags)
    found, requests, details = _on_domain(tree.service, domain, [request])

    async def start(uid: int) -> Sequence[object]:
        [snapshot] = await tree.service.create([_there(one) for one in found], requests, uid)
        return (snapshot.modified_disk, snapshot.backup_source)

    return PreparedJob(details, start, _also(requests))


@guarded(Domain, DOMAIN, "CreateSet", Action.CREATE)
def create_set(
    tree: Tree,
    domain: Domain,
    disks_and_methods: Sequence[Sequence[str]],
    name: str,
    flags: int,
) -> PreparedJob:
    """Create of several disks of this domain: one name, one freeze, all or nothing."""
    found, requests, details = _on_domain(
        tree.service, domain, set_requests(disks_and_methods, name, flags)
    )

    async def start(uid: int) -> Sequence[object]:
        snapshots = await tree.service.create([_there(one) for one in found], requests, uid)
        return (
            [(snapshot_path(one.uuid), one.modified_disk, one.backup_source) for one in snapshots],
        )

    return PreparedJob(details, start, _also(requests))


@guarded(Domain, DOMAIN, "Plan", Action.CREATE)
def plan(
    tree: Tree, domain: Domain, disk_xml: str, method_xml: str, name: str, flags: int
) -> Prepared:
    """What Create would do with the same arguments."""
    request = create_request(disk_xml, method_xml, name, flags)
    [found], [request], details = _on_domain(tree.service, domain, [request])

    async def run() -> Sequence[object]:
        return _planned(await tree.service.plan(_there(found), request))

    return Prepared(details, run, _also([request]))


@guarded(Domain, DOMAIN, "Disks", Action.READ)
def disks(tree: Tree, domain: Domain) -> Prepared:
    """The disks of this domain."""

    async def run() -> Sequence[object]:
        return ([_reported(report) for report in await tree.service.disks(domain.uuid)],)

    return Prepared(Details(domain=domain.name, uuid=domain.uuid), run)


@guarded(Domain, DOMAIN, "SetMethod", Action.CONFIGURE)
def set_method(tree: Tree, domain: Domain, disk_xml: str, method_xml: str) -> Prepared:
    """Store a method for a disk of this domain; an empty one is to forget what was stored."""
    [found], [request], details = _on_domain(
        tree.service, domain, [create_request(disk_xml, method_xml, "", 0)]
    )

    async def run() -> Sequence[object]:
        await tree.service.set_method(_there(found), request, method_xml)
        return ()

    return Prepared(details, run)


@guarded(Domain, DOMAIN, "GetMethod", Action.READ)
def get_method(tree: Tree, domain: Domain, disk_xml: str) -> Prepared:
    """The method stored for a disk of this domain."""
    [found], [request], details = _on_domain(
        tree.service, domain, [create_request(disk_xml, "", "", 0)]
    )

    async def run() -> Sequence[object]:
        return (await tree.service.stored_method(_there(found), request),)

    return Prepared(details, run)


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


@guarded(Snapshot, SNAPSHOT, "Delete", Action.DELETE)
def delete(tree: Tree, snapshot: Snapshot, flags: int) -> PreparedJob:
    """Delete of this snapshot. Raises InvalidArgs."""
    if flags:
        raise InvalidArgs("Delete has no flags; call it with 0.")

    async def start(uid: int) -> Sequence[object]:
        return (await tree.service.delete(snapshot.uuid, uid),)

    return PreparedJob(_snapshot_details(tree.service, snapshot), start)


@guarded(Snapshot, SNAPSHOT, "Revert", Action.REVERT)
def revert(tree: Tree, snapshot: Snapshot, flags: int) -> PreparedJob:
    """Revert of the disk to this snapshot. Raises InvalidArgs."""
    if flags:
        raise InvalidArgs("Revert has no flags; call it with 0.")

    async def start(uid: int) -> Sequence[object]:
        return (await tree.service.revert(snapshot.uuid, uid),)

    return PreparedJob(_snapshot_details(tree.service, snapshot), start)


CANCEL_NEEDS: Mapping[str, Action] = {
    "create": Action.CREATE,
    "delete": Action.DELETE,
    "revert": Action.REVERT,
}
"""The action that cancelling a job of each operation needs of who has not started it."""


def started_by(job: Job) -> Ownership:
    """Who has started a job, and what others need. Raises KeyError for an unknown operation."""
    return Ownership(job.uid, CANCEL_NEEDS[job.operation])


@owned(Job, JOB, "Cancel", started_by)
def cancel(tree: Tree, job: Job) -> Prepared:
    """Cancel of this job."""

    async def run() -> Sequence[object]:
        await tree.service.cancel(job.number)
        return ()

    return Prepared(_job_details(tree.service, job), run)


@open_to_all(Root, MANAGER, "FindDomain")
def find_domain(tree: Tree, root: Root, name_or_uuid: str) -> Sequence[object]:
    """The object of a domain, by UUID, else by name. Raises NoSuchDomain, and
    HypervisorUnavailable where nobody knows.
    """
    domains = tree.service.domains
    uuid = name_or_uuid.lower()
    if uuid in domains:
        return (domain_path(uuid),)
    for domain in domains.values():
        if domain.name == name_or_uuid:
            return (domain_path(domain.uuid),)
    if not tree.service.connected:
        raise HypervisorUnavailable(NOT_CONNECTED)
    raise NoSuchDomain("There is no domain of that name or UUID; 'virsh list --all' shows them.")


METHODS: tuple[Declared, ...] = (
    create_on_root,
    create_on_domain,
    create_set,
    plan,
    disks,
    set_method,
    get_method,
    get_backup_source,
    get_modified_disk,
    delete,
    revert,
    cancel,
    find_domain,
)


def _on_domain(
    service: Service, domain: Domain, requests: Sequence[Request]
) -> tuple[Sequence[Found], Sequence[Request], Details]:
    """What requests on a domain's object refer to, and one question to polkit for all of them."""
    own = [replace(request, uuid=domain.uuid) for request in requests]
    found = [service.find(request) for request in own]
    each = [_request_details(*one, domain) for one in zip(own, found, strict=True)]
    return found, own, _together(each)


def _there(found: Found) -> Found:
    """What was found. Raises the error of what was not: after authorisation, not before."""
    if found.error is not None:
        raise found.error
    return found


def _also(requests: Sequence[Request]) -> tuple[Action, ...]:
    """The actions that requests need besides the method's own."""
    wanted = [request.wanted_method for request in requests]
    names_place = any(method is not None and method.names_place for method in wanted)
    return (Action.CONFIGURE,) if names_place else ()


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


def _together(each: Sequence[Details]) -> Details:
    """One question for several disks, listed with commas: a rule for one of them does not match."""
    if len(each) == 1:
        return each[0]
    named = [details.named or details for details in each]
    return replace(
        each[0],
        disk=",".join(details.disk for details in each),
        method=_methods(each),
        named=replace(
            named[0],
            disk=",".join(details.disk for details in named),
            method=_methods(named),
        ),
    )


def _methods(each: Sequence[Details]) -> str:
    """In the disks' order; empty where none was asked for, as for a single disk."""
    asked = [details.method for details in each]
    return ",".join(asked) if any(asked) else ""


def _snapshot_details(service: Service, snapshot: Snapshot) -> Details:
    """The domain's present name; the one on record for a domain that is gone."""
    domain = service.domains.get(snapshot.domain_uuid)
    return Details(
        domain=domain.name if domain else snapshot.domain_name,
        uuid=snapshot.domain_uuid,
        disk=snapshot.target.disk,
        name=snapshot.name,
    )


def _job_details(service: Service, job: Job) -> Details:
    domain = service.domains.get(job.domain_uuid)
    return Details(
        domain=domain.name if domain else "",
        uuid=job.domain_uuid,
        disk=job.disk,
        name=job.name,
    )


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
