"""The client's commands: each calls the bus and turns the answer into what is printed.

They decide nothing: what is allowed and possible is the service's to say. Answers in JSON carry
the contract's names in lower case, bytes and microseconds as numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from xml.etree import ElementTree

from snapd_vm import cli_bus, cli_snapshots, cli_text
from snapd_vm.cli_bus import CallError, Service, connect
from snapd_vm.cli_changes import delete, revert
from snapd_vm.cli_create import create, disk_xml, method_xml, plan
from snapd_vm.cli_outcome import require_text
from snapd_vm.errors import NoSuchDomain


async def run(options: argparse.Namespace) -> str:
    """What the command prints at its end. Raises UsageError, CallError, Ended."""
    for said in vars(options).values():
        for value in said if isinstance(said, list) else [said]:
            if isinstance(value, str):
                require_text(value)
    if options.command in ("create", "plan", "set-method"):
        options.method = method_xml(options.method)
    if options.command in ("delete", "revert"):
        for said in options.snapshots:
            cli_snapshots.require_form(said)
    async with connect(background=options.command == "complete") as service:
        return await _COMMANDS[options.command](service, options)


async def _list(service: Service, options: argparse.Namespace) -> str:
    wanted = await _domain_uuid(service, options.domain) if options.domain else ""
    records = [
        record
        for record in cli_snapshots.records(await service.objects())
        if not wanted or record["domain_uuid"] == wanted
    ]
    if options.json:
        return cli_text.as_json(records)
    headings = ("SNAPSHOT", "AGE", "CONSISTENCY", "STATE", "METHOD", "FORMAT", "SIZE")
    return cli_text.table(headings, _tree(records, time.time_ns() // 1000))


def _tree(records: Sequence[cli_snapshots.Record], now_us: int) -> Sequence[Sequence[str]]:
    """Rows of domains, their disks and the snapshots of each, which come in this order."""
    rows: list[Sequence[str]] = []
    domain = disk = None
    for record in records:
        if domain != (domain := cli_snapshots.domain(record)):
            rows.append((domain, *[""] * 6))
            disk = None
        if disk != (disk := record["target"]):
            rows.append((f"  {disk}", *[""] * 6))
        rows.append(
            (
                f"    {cli_snapshots.word(record)}",
                cli_text.age(now_us - record["created"]),
                record["consistency"],
                record["state"],
                record["method"],
                record["format"],
                cli_text.size(record["size"]),
            )
        )
    return rows


async def _domain_uuid(service: Service, domain: str) -> str:
    """The UUID of a domain, also of one that snapshots are all that is left of."""
    try:
        path = await service.find_domain(domain)
        return path.rpartition("/_")[2].replace("_", "-")
    except CallError as error:
        left = {r["domain_uuid"] for r in cli_snapshots.records(await service.objects())}
        if error.name == NoSuchDomain.dbus_name and domain.lower() in left:
            return domain.lower()
        raise


async def _disks(service: Service, options: argparse.Namespace) -> str:
    domain = await service.find_domain(options.domain)
    (disks,) = await service.call(domain, cli_bus.DOMAIN, "Disks")
    if options.json:
        return cli_text.as_json(disks)
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
    return (
        cli_text.as_json(methods)
        if options.json
        else cli_text.table(("METHOD",), [(m,) for m in methods])
    )


async def _get_method(service: Service, options: argparse.Namespace) -> str:
    domain = await service.find_domain(options.domain)
    (method,) = await service.call(domain, cli_bus.DOMAIN, "GetMethod", "s", disk_xml(options.disk))
    if options.json:
        return cli_text.as_json({"method": method})
    return f"{method}\n" if method else ""


async def _set_method(service: Service, options: argparse.Namespace) -> str:
    domain = await service.find_domain(options.domain)
    await service.call(
        domain, cli_bus.DOMAIN, "SetMethod", "ss", disk_xml(options.disk), options.method
    )
    return cli_text.as_json({"method": options.method}) if options.json else ""


async def _complete(service: Service, options: argparse.Namespace) -> str:
    if options.what == "disks":
        domain = await service.find_domain(options.domain)
        (disks,) = await service.call(domain, cli_bus.DOMAIN, "Disks")
        words = [disk["target"] for disk in disks]
    elif options.what == "snapshots":
        words = [cli_snapshots.word(r) for r in cli_snapshots.records(await service.objects())]
    elif options.what == "methods":
        words = (await service.properties(cli_bus.ROOT, cli_bus.MANAGER))["Methods"]
    else:
        words = [
            interfaces[cli_bus.DOMAIN]["Name"]
            for interfaces in (await service.objects()).values()
            if cli_bus.DOMAIN in interfaces
        ]
    return "".join(f"{word}\n" for word in sorted(words) if word.isprintable())


_COMMANDS: Mapping[str, Callable[[Service, argparse.Namespace], Awaitable[str]]] = {
    "create": create,
    "plan": plan,
    "list": _list,
    "delete": delete,
    "revert": revert,
    "disks": _disks,
    "methods": _methods,
    "get-method": _get_method,
    "set-method": _set_method,
    "complete": _complete,
}
