"""Which disk and which method a request means; from what is given, without a change to anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from snapd_vm import safexml
from snapd_vm.errors import (
    AmbiguousDisk,
    DiskMismatch,
    InvalidXML,
    MethodNotSupported,
    MethodUnknown,
    NoSuchDisk,
    NoSuchDomain,
    NotUnderDisk,
)
from snapd_vm.methods.method import Method, OnRequest, Ways
from snapd_vm.model import Disk, DiskRequest, Domain, Found, MethodRequest, Request, Tag, Target
from snapd_vm.request import method_request

_DEVICES = {
    "cdrom": "a CD-ROM drive",
    "floppy": "a floppy drive",
    "lun": "a SCSI device passed through (lun)",
}


def find(domains: Mapping[str, Domain], request: Request) -> Found:
    """The domain and disk that a request means; what is not there is told in Found.error."""
    if not request.domain and not request.uuid:
        return _by_source(domains.values(), request.disk)
    domain = domains.get(request.uuid) if request.uuid else _named(domains, request.domain)
    if domain is None or (request.domain and domain.name != request.domain):
        return Found(error=NoSuchDomain("There is no such domain."))
    return find_in(domain, request.disk)


def find_in(domain: Domain, wanted: DiskRequest) -> Found:
    """The disk of `domain` that is wanted: by target, else by source; both must agree."""
    if wanted.target:
        disk = domain.disk(wanted.target)
        if disk is None:
            if wanted.source and _with_source([domain], wanted.source):
                return Found(domain, error=_mismatch(wanted))
            return Found(domain, error=NoSuchDisk(f"The domain has no disk {wanted.target}."))
        if wanted.source and not _fits(disk, wanted.source):
            return Found(domain, disk, error=_mismatch(wanted))
        return Found(domain, disk)
    found = _with_source([domain], wanted.source)
    if not found:
        return Found(domain, error=NoSuchDisk("The domain has no disk with that source."))
    if len(found) > 1:
        return Found(domain, error=AmbiguousDisk("Several disks have that source; name a target."))
    return Found(*found[0])


def refusal(disk: Disk) -> str:
    """Why no method can take the disk, in words, or ''."""
    if disk.device in _DEVICES:
        return f"Disk {disk.target} is {_DEVICES[disk.device]}."
    if not disk.source_xml:
        return f"Disk {disk.target} is empty."
    if disk.shareable:
        return f"Disk {disk.target} is shareable: other domains may write to it."
    if disk.transient:
        return f"Disk {disk.target} is transient: what is written to it is thrown away."
    if disk.readonly:
        return f"Disk {disk.target} is read-only and can be read as it is."
    return ""


def choose_method(
    methods: Mapping[str, Method], domain: Domain, disk: Disk, request: Request, tag: Tag
) -> tuple[Method, Target, str]:
    """The method, what it would act on, and why this one.

    Raises MethodUnknown, MethodNotSupported and what a method's claim raises.
    """
    problem = refusal(disk)
    if problem:
        raise MethodNotSupported(problem)
    if request.wanted_method is not None:
        return (*_claim(methods, domain, disk, request.wanted_method, tag), "asked for")
    stored = domain.methods.get(disk.target)
    if stored is not None:
        return (*_claim_stored(methods, domain, disk, stored, tag), "stored for the disk")
    for method in _default_order(methods):
        target = method.claim(domain, disk, None, tag)
        if target is not None:
            return method, target, f"the default for {method.suits(disk)}"
    raise MethodNotSupported(f"No method is there for disk {disk.target}.")


def choose_reachable(
    methods: Mapping[str, Method], domain: Domain, disk: Disk, request: Request, tag: Tag
) -> tuple[Method, Target, str]:
    """The same for who does not go on to check it: what Create always refuses is refused."""
    method, target, why = choose_method(methods, domain, disk, request, tag)
    ways: object = method
    if isinstance(ways, Ways):
        ways.check_way(target)
    return method, target, why


def _claim(
    methods: Mapping[str, Method], domain: Domain, disk: Disk, wanted: MethodRequest, tag: Tag
) -> tuple[Method, Target]:
    method = methods.get(wanted.method)
    if method is None:
        raise MethodUnknown(
            f"There is no method '{wanted.method}'; this daemon has {', '.join(methods)}."
        )
    target = method.claim(domain, disk, wanted, tag)
    if target is None:
        raise MethodNotSupported(f"Disk {disk.target} is not one for method {method.name}.")
    return method, target


def _claim_stored(
    methods: Mapping[str, Method], domain: Domain, disk: Disk, stored: str, tag: Tag
) -> tuple[Method, Target]:
    """The same of what the domain's metadata hold: whoever wrote it, it is read as a caller's."""
    try:
        return _claim(methods, domain, disk, method_request(stored), tag)
    except (InvalidXML, MethodUnknown, MethodNotSupported, NotUnderDisk) as error:
        why = str(error)
        raise type(error)(
            f"The method stored for disk {disk.target} can't be used, so name another, or store "
            f"one with SetMethod: {why[:1].lower()}{why[1:]}"
        ) from error


def _default_order(methods: Mapping[str, Method]) -> Sequence[Method]:
    def is_default(method: object) -> bool:
        return not (isinstance(method, OnRequest) and method.on_request)

    return [method for method in methods.values() if is_default(method)]


def _by_source(domains: Iterable[Domain], wanted: DiskRequest) -> Found:
    if not wanted.source:
        return Found(
            error=NoSuchDomain("Name the domain, or give the disk's source, to find the disk by.")
        )
    found = _with_source(domains, wanted.source)
    if not found:
        return Found(error=NoSuchDisk("No domain has a disk with that source."))
    if len({domain.uuid for domain, _ in found}) > 1:
        return Found(
            error=AmbiguousDisk("The source belongs to more than one domain; name the domain.")
        )
    return find_in(found[0][0], wanted)


def _with_source(domains: Iterable[Domain], source: Mapping[str, str]) -> list[tuple[Domain, Disk]]:
    return [(dom, disk) for dom in domains for disk in dom.disks if _fits(disk, source)]


def _fits(disk: Disk, source: Mapping[str, str]) -> bool:
    """Whether all that `source` says is what the domain's XML, or its resolved form, says."""
    declared = dict(disk.declared_source)
    if all(declared.get(key) == value for key, value in source.items()):
        return True
    if not disk.path and disk.type != "network":
        return False
    resolved = {"type": disk.type}
    if disk.path:
        resolved["dev" if disk.type == "block" else "file"] = disk.path
    else:  # a volume of a pool of images over the network
        resolved |= {str(k): str(v) for k, v in safexml.parse(disk.source_xml).attrib.items()}
    return all(resolved.get(key) == value for key, value in source.items())


def _named(domains: Mapping[str, Domain], name: str) -> Domain | None:
    return next((domain for domain in domains.values() if domain.name == name), None)


def _mismatch(wanted: DiskRequest) -> DiskMismatch:
    return DiskMismatch(f"Disk {wanted.target} of the domain has another source than that.")
