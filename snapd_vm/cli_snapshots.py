"""Snapshots as the client speaks of them: their record, their name in a word, and finding one.

Works on what GetManagedObjects has said, and asks nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from snapd_vm import cli_bus
from snapd_vm.cli_bus import CallError, Objects
from snapd_vm.cli_outcome import UsageError

Record = dict[str, Any]

_FIELDS = {
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
_FOLDER = cli_bus.ROOT + "/snapshot/"
_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def record(path: str, snapshot: Mapping[str, Any], domain: str) -> Record:
    """A snapshot in JSON; `domain` is the domain's name, empty when the domain is gone."""
    properties = {field: snapshot[name] for field, name in _FIELDS.items() if name in snapshot}
    return {"snapshot": path, "domain": domain, **properties}


def records(objects: Objects) -> Sequence[Record]:
    """All snapshots by domain and disk, and on each disk from the oldest on, as in its chain."""
    names = {
        path: interfaces[cli_bus.DOMAIN]["Name"]
        for path, interfaces in objects.items()
        if cli_bus.DOMAIN in interfaces
    }
    found = (
        record(path, snapshot, names.get(snapshot["Domain"], ""))
        for path, interfaces in objects.items()
        if (snapshot := interfaces.get(cli_bus.SNAPSHOT))
    )
    return sorted(found, key=lambda r: (domain(r), r["target"], r["created"], r["snapshot"]))


def domain(of: Record) -> str:
    """The domain's name; its UUID where the domain is gone, which has no name any more."""
    return str(of["domain"] or of["domain_uuid"])


def word(of: Record) -> str:
    """DOMAIN/DISK/NAME, as `list` shows it and `delete` takes it."""
    return f"{domain(of)}/{of['target']}/{of['name']}"


def require_form(said: str) -> None:
    """Raises UsageError unless it is DOMAIN/DISK/NAME, a UUID or the path of a snapshot object."""
    if said.startswith("/"):
        fits = bool(re.fullmatch(re.escape(_FOLDER) + "[A-Za-z0-9_]+", said))
    else:
        parts = said.rsplit("/", 2)
        fits = (len(parts) == 3 and all(parts)) or bool(_UUID.fullmatch(said.lower()))
    if not fits:
        raise UsageError(
            f"'{said}' is no snapshot: say DOMAIN/DISK/NAME as 'snapd-vm list' shows it, or the"
            " snapshot's UUID or object path."
        )


def find(known: Sequence[Record], said: str) -> str:
    """The path of the snapshot that is meant. Raises CallError if there is none."""
    if said.startswith("/"):
        return said
    if _UUID.fullmatch(said.lower()):
        return f"{_FOLDER}_{said.lower().replace('-', '_')}"
    of, disk, name = said.rsplit("/", 2)
    paths = [
        str(one["snapshot"])
        for one in known
        if (one["target"], one["name"]) == (disk, name)
        and (one["domain"] == of or one["domain_uuid"] == of.lower())
    ]
    if not paths:
        raise CallError("There is no such snapshot; 'snapd-vm list' shows those there are.")
    if len(paths) > 1:
        raise CallError("Several snapshots are called so; say the UUID or object path of one.")
    return paths[0]
