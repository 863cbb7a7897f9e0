"""Which domain and disk a bare `<disk>` means, as it is found in what the daemon remembers."""

from __future__ import annotations

import uuid as uuids

import pytest

from snapd_vm.engine import select
from snapd_vm.errors import AmbiguousDisk, DiskMismatch, NoSuchDisk
from snapd_vm.model import Disk, DiskRequest, Domain, Flags, Request


def disk(target: str, path: str) -> Disk:
    source = f"<source file='{path}'/>"
    declared = {"file": path, "type": "file"}
    return Disk(target, "disk", "file", "raw", path, source, "<disk/>", declared_source=declared)


def domain(name: str, *disks: Disk) -> Domain:
    return Domain(str(uuids.uuid4()), name, -1, "shutoff", "qemu", True, disks)


WEB = domain("web", disk("vda", "/a"), disk("vdb", "/a"), disk("vdc", "/c"))
MAIL = domain("mail", disk("vda", "/c"), disk("vdb", "/d"))
DOMAINS = {one.uuid: one for one in (WEB, MAIL)}


@pytest.mark.parametrize(
    ("target", "path", "found"),
    [
        ("vdb", "/a", "web/vdb"),
        ("", "/a", AmbiguousDisk),
        ("", "/c", AmbiguousDisk),
        ("vda", "/c", AmbiguousDisk),
        ("", "/d", "mail/vdb"),
        ("vda", "/d", DiskMismatch),
        ("", "/nowhere", NoSuchDisk),
    ],
)
def test_a_bare_disk(target: str, path: str, found: str | type[Exception]) -> None:
    request = Request(DiskRequest(target, {"file": path}), None, "", Flags(0))
    answer = select.find(DOMAINS, request)
    if isinstance(found, str):
        assert answer.error is None
        assert answer.domain is not None
        assert answer.disk is not None
        assert f"{answer.domain.name}/{answer.disk.target}" == found
    else:
        assert isinstance(answer.error, found)
