"""The commands `create` and `plan`: one disk, or several with one freeze; what they print.

What is allowed and possible is the service's to say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from snapd_vm import cli_bus, cli_snapshots, cli_text
from snapd_vm.cli_bus import CallError, Service
from snapd_vm.cli_job import Followed
from snapd_vm.cli_outcome import UsageError, require_text

_SNAPSHOT_ATTRIBUTE = "{https://example.org/xmlns/disk-snapshot/1}snapshot"


def method_xml(method: str | None) -> str:
    """The method_xml that `--method` means, or METHOD. Raises UsageError."""
    if method == "-":
        try:
            method = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UsageError("Standard input is not UTF-8.") from error
        require_text(method)
        if not method.lstrip().startswith("<"):
            raise UsageError("Standard input holds no <diskSnapshot> element.")
    if not method:
        return ""
    if method.lstrip().startswith("<"):
        return method
    return f"<diskSnapshot method={quoteattr(method)}/>"


def disk_xml(disk: str) -> str:
    """The disk_xml that DISK means: XML as it is, anything else a target."""
    if disk.lstrip().startswith("<"):
        return disk
    return f"<disk><target dev={quoteattr(disk)}/></disk>"


async def create(service: Service, options: argparse.Namespace) -> str:
    """Makes a snapshot of each disk that the options name; what to print. Raises CallError."""
    path = await service.find_domain(options.domain)
    if sys.stderr.isatty():
        answers = await _shown(service, path, options)
    else:
        answers = await _take(service, path, options)
    made = [await _made(service, options, *answer) for answer in answers]
    if options.json:
        told = [record | answer for record, answer, _ in made]
        return cli_text.as_json(told if len(options.disk) > 1 else told[0])
    return "\n".join(cli_text.fields(rows) for _, _, rows in made)


async def _take(
    service: Service, path: str, options: argparse.Namespace
) -> Sequence[tuple[str, str]]:
    """The modified_disk and backup_source of each disk."""
    how = (options.name, options.flags)
    disks = [disk_xml(disk) for disk in options.disk]
    if len(disks) > 1:
        pairs = [[disk, options.method] for disk in disks]
        (rows,) = await service.call(path, cli_bus.DOMAIN, "CreateSet", "a(ss)su", pairs, *how)
        return [(modified_disk, backup_source) for _, modified_disk, backup_source in rows]
    words = (disks[0], options.method, *how)
    modified_disk, backup_source = await service.call(
        path, cli_bus.SERVICE, "Create", "sssu", *words
    )
    return [(modified_disk, backup_source)]


async def _made(
    service: Service, options: argparse.Namespace, modified_disk: str, backup_source: str
) -> tuple[dict[str, Any], dict[str, str], Sequence[tuple[str, str]]]:
    """One snapshot: its record, the service's answers, and the lines to show."""
    source = ElementTree.fromstring(backup_source)  # noqa: S314 - the service's own answer
    path = source.get(_SNAPSHOT_ATTRIBUTE, "")
    try:
        snapshot = await service.properties(path, cli_bus.SNAPSHOT)
        domain = (await service.properties(snapshot["Domain"], cli_bus.DOMAIN))["Name"]
    except CallError:
        # Made it is, whatever became of the service since: the answers must not be lost.
        snapshot, domain = {}, options.domain
    about = (
        [
            ("Snapshot", f"{snapshot['Name']} of {domain}'s {snapshot['Target']}"),
            ("Method", snapshot["Method"]),
            ("Consistency", _consistency(snapshot)),
        ]
        if snapshot
        else []
    )
    rows = [
        *about,
        ("Object", path),
        ("Backup source", backup_source),
        ("Disk now", modified_disk or "unchanged"),
    ]
    answers = {"modified_disk": modified_disk, "backup_source": backup_source}
    return cli_snapshots.record(path, snapshot, domain), answers, rows


async def _shown(
    service: Service, path: str, options: argparse.Namespace
) -> Sequence[tuple[str, str]]:
    """The same as `_take`, with the progress of its job on the terminal meanwhile."""
    job = Followed("create", path, f"taking a snapshot of {options.domain}")
    try:
        async with service.listening(job.hear):
            return await _take(service, path, options)
    finally:
        job.bar.clear()


def _consistency(snapshot: Mapping[str, Any]) -> str:
    frozen = snapshot["FrozenFilesystems"]
    if not frozen:
        return str(snapshot["Consistency"])
    systems = "1 file system" if frozen == 1 else f"{frozen} file systems"
    time = cli_text.duration(snapshot["FrozenTime"])
    return f"{snapshot['Consistency']} ({systems} frozen for {time})"


async def plan(service: Service, options: argparse.Namespace) -> str:
    """What create would do with one disk. Raises CallError."""
    path = await service.find_domain(options.domain)
    words = (disk_xml(options.disk), options.method, options.name, options.flags)
    (found,) = await service.call(path, cli_bus.DOMAIN, "Plan", "sssu", *words)
    if options.json:
        return cli_text.as_json(found)
    needed, available = found["space_needed"], found["space_available"]
    return cli_text.fields(
        [
            ("Method", found["method"]),
            ("Consistency", f"{found['consistency']} at best"),
            ("Backup source", found["backup_source"]),
            ("Space", f"{cli_text.size(needed)} of {cli_text.size(available)} available"),
            *(("Warning", warning) for warning in found["warnings"]),
        ]
    )
