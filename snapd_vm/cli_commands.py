"""The client's commands: each calls the bus and turns the answer into what is printed.

They decide nothing: what is allowed and possible is the service's to say. Answers in JSON carry
the contract's names in lower case, bytes and microseconds as numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from snapd_vm import cli_bus, cli_snapshots, cli_text
from snapd_vm.cli_bus import CallError, Service, connect
from snapd_vm.cli_changes import delete, revert
from snapd_vm.cli_job import Followed
from snapd_vm.cli_outcome import UsageError
from snapd_vm.errors import NoSuchDomain

_SNAPSHOT_ATTRIBUTE = "{https://example.org/xmlns/disk-snapshot/1}snapshot"


async def run(options: argparse.Namespace) -> str:
    """What the command prints at its end. Raises UsageError, CallError, Ended."""
    for said in vars(options).values():
        for value in said if isinstance(said, list) else [said]:
            if isinstance(value, str):
                _require_text(value)
    if options.command in ("create", "plan"):
        options.method = _method_xml(options.method)
    if options.command in ("delete", "revert"):
        for said in options.snapshots:
            cli_snapshots.require_form(said)
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


async def _ask(
    service: Service, domain: str, options: argparse.Namespace, interface: str, member: str
) -> Any:
    """Calls Create or Plan, which take the same, on the object of a domain."""
    return await service.call(
        domain,
        interface,
        member,
        "sssu",
        _disk_xml(options.disk),
        options.method,
        options.name,
        options.flags,
    )


async def _create(service: Service, options: argparse.Namespace) -> str:
    path = await service.find_domain(options.domain)
    create = _ask(service, path, options, cli_bus.SERVICE, "Create")
    if sys.stderr.isatty():
        modified_disk, backup_source = await _shown(service, path, options, create)
    else:
        modified_disk, backup_source = await create
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
        return _json(cli_snapshots.record(path, snapshot, domain) | answers)
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


async def _shown(
    service: Service, path: str, options: argparse.Namespace, create: Coroutine[Any, Any, Any]
) -> Any:
    """The answer of a Create, with the progress of its job on the terminal meanwhile."""
    job = Followed("create", path, f"taking a snapshot of {options.domain}")
    try:
        async with service.listening(job.hear):
            return await create
    finally:
        create.close()
        job.bar.clear()


def _consistency(snapshot: Mapping[str, Any]) -> str:
    frozen = snapshot["FrozenFilesystems"]
    if not frozen:
        return str(snapshot["Consistency"])
    systems = "1 file system" if frozen == 1 else f"{frozen} file systems"
    time = cli_text.duration(snapshot["FrozenTime"])
    return f"{snapshot['Consistency']} ({systems} frozen for {time})"


async def _plan(service: Service, options: argparse.Namespace) -> str:
    path = await service.find_domain(options.domain)
    (plan,) = await _ask(service, path, options, cli_bus.DOMAIN, "Plan")
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
    wanted = await _domain_uuid(service, options.domain) if options.domain else ""
    records = [
        record
        for record in cli_snapshots.records(await service.objects())
        if not wanted or record["domain_uuid"] == wanted
    ]
    if options.json:
        return _json(records)
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
    elif options.what == "snapshots":
        words = [cli_snapshots.word(r) for r in cli_snapshots.records(await service.objects())]
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
    "delete": delete,
    "revert": revert,
    "disks": _disks,
    "methods": _methods,
    "complete": _complete,
}
