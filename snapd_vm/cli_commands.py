"""The client's commands: each calls the bus and turns the answer into what is printed.

They decide nothing: what is allowed and possible is the service's to say. Answers in JSON carry
the contract's names in lower case, bytes and microseconds as numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from snapd_vm import cli_bus, cli_text
from snapd_vm.cli_bus import CallError, Service, connect
from snapd_vm.errors import NoSuchDomain

_SNAPSHOT_ATTRIBUTE = "{https://example.org/xmlns/disk-snapshot/1}snapshot"
_SNAPSHOT_FIELDS = {
    "name": "Name",
    "domain_uuid": "DomainUUID",
    "target": "Target",
    "method": "Method",
    "created": "Created",
    "state": "State",
    "consistency": "Consistency",
    "frozen_filesystems": "FrozenFilesystems",
    "frozen_time": "FrozenTime",
    "format": "Format",
    "size": "Size",
}


class UsageError(Exception):
    """What was said can't be meant: exit status 2."""


async def run(options: argparse.Namespace) -> str:
    """What the command prints. Raises UsageError, CallError."""
    for value in vars(options).values():
        if isinstance(value, str):
            _require_text(value)
    if options.command in ("create", "plan"):
        options.method = _method_xml(options.method)
    async with connect(background=options.command == "complete") as service:
        return await _COMMANDS[options.command](service, options)


def _require_text(value: str) -> None:
    """Refuses what no D-Bus string can hold. Raises UsageError."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError("An argument is not UTF-8.") from error
    if "\0" in value:
        raise UsageError("An argument holds a NUL character.")


def _method_xml(method: str) -> str:
    """The method_xml that `--method` means. Raises UsageError."""
    if method == "-":
        try:
            method = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UsageError("Standard input is not UTF-8.") from error
        _require_text(method)
        if not method.lstrip().startswith("<"):
            raise UsageError("Standard input holds no <diskSnapshot> element.")
    if not method or method.lstrip().startswith("<"):
        return method
    return f"<diskSnapshot method={quoteattr(method)}/>"


def _disk_xml(disk: str) -> str:
    """The disk_xml that DISK means: XML as it is, anything else a target."""
    if disk.lstrip().startswith("<"):
        return disk
    return f"<disk><target dev={quoteattr(disk)}/></disk>"


def _json(answer: object) -> str:
    return json.dumps(answer, indent=2, ensure_ascii=False) + "\n"


async def _ask(service: Service, options: argparse.Namespace, interface: str, member: str) -> Any:
    """Calls Create or Plan, which take the same, on the domain that the options name."""
    return await service.call(
        await service.find_domain(options.domain),
        interface,
        member,
        "sssu",
        _disk_xml(options.disk),
        options.method,
        options.name,
        options.flags,
    )


async def _create(service: Service, options: argparse.Namespace) -> str:
    modified_disk, backup_source = await _ask(service, options, cli_bus.SERVICE, "Create")
    source = ElementTree.fromstring(backup_source)  # noqa: S314 - the service's own answer
    path = source.get(_SNAPSHOT_ATTRIBUTE, "")
    try:
        snapshot = await service.properties(path, cli_bus.SNAPSHOT)
        domain = (await service.properties(snapshot["Domain"], cli_bus.DOMAIN))["Name"]
    except CallError:
        # Made it is, whatever became of the service since: the answers must not be lost.
        snapshot, domain = {}, options.domain
    if options.json:
        answers = {"modified_disk": modified_disk, "backup_source": backup_source}
        return _json(_record(path, snapshot, domain) | answers)
    about = (
        [
            ("Snapshot", f"{snapshot['Name']} of {domain}'s {snapshot['Target']}"),
            ("Method", snapshot["Method"]),
            ("Consistency", _consistency(snapshot)),
        ]
        if snapshot
        else []
    )
    return cli_text.fields(
        [
            *about,
            ("Object", path),
            ("Backup source", backup_source),
            ("Disk now", modified_disk or "unchanged"),
        ]
    )


def _consistency(snapshot: Mapping[str, Any]) -> str:
    frozen = snapshot["FrozenFilesystems"]
    if not frozen:
        return str(snapshot["Consistency"])
    systems = "1 file system" if frozen == 1 else f"{frozen} file systems"
    time = cli_text.duration(snapshot["FrozenTime"])
    return f"{snapshot['Consistency']} ({systems} frozen for {time})"


def _record(path: str, snapshot: Mapping[str, Any], domain: str) -> dict[str, Any]:
    """A snapshot in JSON; `domain` is the domain's name, empty when the domain is gone."""
    properties = {
        field: snapshot[name] for field, name in _SNAPSHOT_FIELDS.items() if name in snapshot
    }
    return {"snapshot": path, "domain": domain, **properties}


async def _plan(service: Service, options: argparse.Namespace) -> str:
    (plan,) = await _ask(service, options, cli_bus.DOMAIN, "Plan")
    if options.json:
        return _json(plan)
    needed, available = plan["space_needed"], plan["space_available"]
    return cli_text.fields(
        [
            ("Method", plan["method"]),
            ("Consistency", f"{plan['consistency']} at best"),
            ("Backup source", plan["backup_source"]),
            ("Space", f"{cli_text.size(needed)} of {cli_text.size(available)} available"),
            *(("Warning", warning) for warning in plan["warnings"]),
        ]
    )


async def _list(service: Service, options: argparse.Namespace) -> str:
    wanted = await _domain_or_gone(service, options.domain) if options.domain else ""
    objects = await service.objects()
    names = {
        path: interfaces[cli_bus.DOMAIN]["Name"]
        for path, interfaces in objects.items()
        if cli_bus.DOMAIN in interfaces
    }
    records = sorted(
        (
            _record(path, snapshot, names.get(snapshot["Domain"], ""))
            for path, interfaces in objects.items()
            if (snapshot := interfaces.get(cli_bus.SNAPSHOT))
            and wanted in ("", snapshot["Domain"], snapshot["DomainUUID"])
        ),
        key=lambda record: (record["created"], record["snapshot"]),
    )
    if options.json:
        return _json(records)
    rows = [
        (
            # A domain that is gone has no name any more, only its UUID.
            record["domain"] or record["domain_uuid"],
            record["target"],
            record["name"],
            cli_text.moment(record["created"]),
            record["consistency"],
            record["state"],
            record["method"],
            record["format"],
            cli_text.size(record["size"]),
        )
        for record in records
    ]
    headings = ("DOMAIN", "DISK", "NAME", "CREATED", "CONSISTENCY", "STATE", "METHOD", "FORMAT")
    return cli_text.table((*headings, "SIZE"), rows)


async def _domain_or_gone(service: Service, domain: str) -> str:
    """The domain's path, or its UUID if snapshots are all that is left of it."""
    try:
        return await service.find_domain(domain)
    except CallError as error:
        left = {
            interfaces[cli_bus.SNAPSHOT]["DomainUUID"]
            for interfaces in (await service.objects()).values()
            if cli_bus.SNAPSHOT in interfaces
        }
        if error.name == NoSuchDomain.dbus_name and domain.lower() in left:
            return domain.lower()
        raise


async def _disks(service: Service, options: argparse.Namespace) -> str:
    domain = await service.find_domain(options.domain)
    (disks,) = await service.call(domain, cli_bus.DOMAIN, "Disks")
    if options.json:
        return _json(disks)
    rows = [
        (
            disk["target"],
            disk["device"],
            disk["type"],
            disk["format"] or "-",
            _place(disk["source"]),
            disk["method"] or "none",
            disk["reason"],
        )
        for disk in disks
    ]
    headings = ("TARGET", "DEVICE", "TYPE", "FORMAT", "SOURCE", "METHOD", "REASON")
    return cli_text.table(headings, rows)


def _place(source: str) -> str:
    """Where a `<source>` points to, in a word."""
    if not source:
        return "-"
    element = ElementTree.fromstring(source)  # noqa: S314 - the service's own answer
    place = element.get("file") or element.get("dev") or element.get("dir")
    if place:
        return place
    return f"{element.get('protocol', '')}:{element.get('name', '')}".strip(":") or "-"


async def _methods(service: Service, options: argparse.Namespace) -> str:
    methods = (await service.properties(cli_bus.ROOT, cli_bus.MANAGER))["Methods"]
    return _json(methods) if options.json else cli_text.table(("METHOD",), [(m,) for m in methods])


async def _complete(service: Service, options: argparse.Namespace) -> str:
    if options.what == "disks":
        domain = await service.find_domain(options.domain)
        (disks,) = await service.call(domain, cli_bus.DOMAIN, "Disks")
        words = [disk["target"] for disk in disks]
    else:
        words = [
            interfaces[cli_bus.DOMAIN]["Name"]
            for interfaces in (await service.objects()).values()
            if cli_bus.DOMAIN in interfaces
        ]
    return "".join(f"{word}\n" for word in sorted(words) if word.isprintable())


_COMMANDS: Mapping[str, Callable[[Service, argparse.Namespace], Awaitable[str]]] = {
    "create": _create,
    "plan": _plan,
    "list": _list,
    "disks": _disks,
    "methods": _methods,
    "complete": _complete,
}
