"""ZFS datasets, volumes and their snapshots, by the programs of zfsutils-linux; knows no domain.

Every program has a limit. On a pool that is suspended it would wait in the kernel, where nothing
ends it, so such a pool is asked for nothing (/proc/spl/kstat/zfs/POOL/state tells).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapd_vm import command
from snapd_vm.errors import (
    Busy,
    MethodNotSupported,
    NameInUse,
    NoSpace,
    SnapdError,
    StorageFailed,
    TimedOut,
)
from snapd_vm.methods.zfs import zfstags
from snapd_vm.model import Tag

HOLD = "snapd-vm"
"""The tag of our hold, zfs-hold(8)."""

_LIMIT_S = 20.0
_KSTAT = Path("/proc/spl/kstat/zfs")

_REFUSALS: Sequence[tuple[str, type[SnapdError], str]] = (
    ("suspended", StorageFailed, "The pool is suspended; see 'zpool status' and 'zpool clear'."),
    ("already exists", NameInUse, "There is something of the snapshot's name already; remove it."),
    ("out of space", NoSpace, "There is no room for the snapshot in the pool."),
    ("quota exceeded", NoSpace, "There is no room for the snapshot in the dataset's quota."),
    ("No space left", NoSpace, "There is no room for the snapshot in the pool."),
    ("is busy", Busy, "The snapshot is in use, as by 'zfs send'; wait for its end."),
    ("dependent clones", Busy, "The snapshot has clones; destroy them first."),
    ("has children", Busy, "The snapshot's clone has snapshots of its own; destroy them first."),
)


class NotThere(StorageFailed):
    """There is no such dataset or snapshot."""

    dbus_name = StorageFailed.dbus_name


@dataclass(frozen=True, slots=True)
class Room:
    """What a dataset says of its room, in bytes.

    `available` is what it can still take, `reserved` what of that is kept for it alone
    (refreservation), `referenced` what it holds.
    """

    available: int
    reserved: int
    referenced: int

    @property
    def needed(self) -> int:
        """What a snapshot takes at once: all that it will keep is reserved anew (zfsprops(7))."""
        return self.referenced if self.reserved else 0

    @property
    def free(self) -> int:
        """What is there for it, as what is reserved stays so."""
        return max(0, self.available - self.reserved)


def installed() -> bool:
    """Whether there is the program zfs."""
    return command.installed("zfs")


def suspended() -> Sequence[str]:
    """The pools that are suspended, as after their disks have gone."""
    found = []
    for state in _KSTAT.glob("*/state"):
        try:
            if state.read_text().strip() == "SUSPENDED":
                found.append(state.parent.name)
        except OSError:  # exported meanwhile
            continue
    return found


def pool_of(dataset: str) -> str:
    """The pool that a dataset is in."""
    return re.split("[/@]", dataset, maxsplit=1)[0]


def refuse_suspended(names: Iterable[str]) -> None:
    """Raise StorageFailed where the pool of one of these is suspended."""
    gone = {pool_of(name) for name in names} & set(suspended())
    if gone:
        raise StorageFailed(
            f"The pool {min(gone)} is suspended; see 'zpool status' and 'zpool clear'."
        )


def refuse_absent(dataset: str) -> None:
    """Raise StorageFailed where its pool is not imported, so that nobody can say what is there."""
    if not (_KSTAT / pool_of(dataset)).is_dir():
        raise StorageFailed(f"The pool {pool_of(dataset)} is not there; import it.")


def rooms(datasets: Sequence[str]) -> Mapping[str, Room]:
    """The room of each of them. Raises SnapdErrors."""
    columns = "name,available,usedbyrefreservation,referenced"
    text = _run(["zfs", "list", "-H", "-p", "-o", columns, *datasets], datasets)
    return {
        name: Room(*(int(number) if number.isdigit() else 0 for number in numbers))
        for name, *numbers in _rows(text)
    }


def write_out(pools: Sequence[str]) -> None:
    """Write what the pools have not written yet, which a snapshot would do. Raises SnapdErrors."""
    _run(["zpool", "sync", *pools], pools)


def take(names: Sequence[str], tag: Tag, disks: Mapping[str, str], mark: str) -> None:
    """Snapshots of these names, all in one pool, at one instant, with our properties.

    `disks` are the UUIDs of what they are taken for, by disk. It is durable when this returns.
    Raises NameInUse, NoSpace, TimedOut and StorageFailed.
    """
    options = [word for one in zfstags.said(tag, disks) for word in ("-o", one)]
    _run(["zfs", "snapshot", *options, *names], names, mark=mark)


def look(name: str) -> zfstags.Found | None:
    """The snapshot of this name, or None. Raises SnapdErrors."""
    columns, keys = "property,value,source", ",".join(zfstags.PROPERTIES)
    argv = ["zfs", "get", "-H", "-p", "-o", columns, keys, name]
    try:
        text = _run(argv, [name])
    except NotThere:
        return None
    return zfstags.found(_rows(text))


def listed(datasets: Sequence[str]) -> Mapping[str, zfstags.Found]:
    """Every snapshot of these that bears our properties, by its name. Raises SnapdErrors."""
    argv = ["zfs", "get", "-H", "-p", "-t", "snapshot", "-d", "1"]
    argv += ["-o", "name,property,value,source", ",".join(zfstags.PROPERTIES), *datasets]
    rows: dict[str, list[Sequence[str]]] = {}
    for name, *row in _rows(_run(argv, datasets)):
        rows.setdefault(name, []).append(row)
    found = {name: zfstags.found(some) for name, some in rows.items()}
    return {name: one for name, one in found.items() if one.snapshots}


def newer(name: str) -> Sequence[str]:
    """Snapshots and bookmarks of its dataset that are newer than this. Raises SnapdErrors."""
    dataset = name.partition("@")[0]
    argv = ["zfs", "list", "-H", "-p", "-t", "snapshot,bookmark", "-d", "1"]
    argv += ["-s", "createtxg", "-o", "name,createtxg", dataset]
    ages = {found: int(age) for found, age in _rows(_run(argv, [name]))}
    return [found for found, age in ages.items() if age > ages.get(name, 0)]


def written_since(name: str) -> int:
    """The bytes that were written to its dataset since this snapshot. Raises SnapdErrors."""
    dataset, _, snapshot = name.partition("@")
    write_out([pool_of(dataset)])  # what is not on disk yet is not counted
    text = _run(["zfs", "get", "-H", "-p", "-o", "value", f"written@{snapshot}", dataset], [name])
    return int(text) if text.strip().isdigit() else 0


def roll_back(name: str) -> None:
    """Let the dataset be what this snapshot is; refused where there are newer ones. Raises
    SnapdErrors.
    """
    _run(["zfs", "rollback", name], [name])


def hold(name: str) -> None:
    """Keep the snapshot from being destroyed by others; once. Raises SnapdErrors."""
    try:
        _run(["zfs", "hold", HOLD, name], [name])
    except NameInUse:  # the tag exists already
        return


def release(name: str) -> None:
    """Take our hold away, if it is there. Raises SnapdErrors."""
    try:
        _run(["zfs", "release", HOLD, name], [name])
    except NotThere:
        return


def other_holds(name: str) -> Sequence[str]:
    """The tags by which others hold the snapshot. Raises SnapdErrors."""
    rows = _rows(_run(["zfs", "holds", "-H", name], [name]))
    return [row[1] for row in rows if len(row) > 1 and row[1] != HOLD]


def destroy(name: str) -> bool:
    """Remove a snapshot, or a dataset without children; False: there is none. Raises SnapdErrors.

    Nothing that depends on it goes with it: neither -r nor -R is ever given.
    """
    try:
        _run(["zfs", "destroy", name], [name])
    except NotThere:
        return False
    return True


def clone(name: str, to: str) -> None:
    """A read-only clone of a volume's snapshot, whose partitions nobody looks for.

    Raises NameInUse and other SnapdErrors.
    """
    said = [
        "readonly=on",
        "volmode=dev",
        "com.sun:auto-snapshot=false",
        f"{zfstags.CLONE_OF}={name}",
    ]
    options = [word for one in said for word in ("-o", one)]
    _run(["zfs", "clone", *options, name, to], [name, to])


def is_clone(name: str, of: str) -> bool:
    """Whether there is a dataset of this name that we have made as a clone of `of`."""
    argv = ["zfs", "get", "-H", "-p", "-o", "value,source", f"origin,{zfstags.CLONE_OF}", name]
    try:
        rows = _rows(_run(argv, [name]))
    except NotThere:
        return False
    return rows == [[of, "-"], [of, "local"]]


def _run(argv: Sequence[str], names: Iterable[str], *, mark: str = "") -> str:
    """What the program writes. Raises SnapdErrors."""
    if not command.installed(argv[0]):
        raise MethodNotSupported(
            f"Method zfs needs the program {argv[0]}; install zfsutils-linux, or use another "
            "method."
        )
    refuse_suspended(names)
    try:
        return command.run(argv, timeout=_LIMIT_S, mark=mark).stdout
    except command.CommandTimedOut as error:
        raise TimedOut(f"ZFS does not answer: {error}; see 'zpool status'.") from error
    except command.CommandError as error:
        raise _refusal(argv[1], error, names) from error


def _rows(text: str) -> list[list[str]]:
    """The lines of `zfs … -H`, parted at the tabs."""
    return [line.split("\t") for line in text.splitlines() if line]


def _refusal(verb: str, error: command.CommandError, names: Iterable[str]) -> SnapdError:
    said = error.stderr
    told = {part for name in names for part in (name, name.partition("@")[0])}
    for name in sorted(told, key=len, reverse=True):  # which may hold any of the words, too
        said = said.replace(f"'{name}'", "it")
        if "/" in name or "@" in name:
            said = said.replace(name, "it")
    if re.search(r"does not exist|could not find any snapshots|no such tag|no such pool", said):
        return NotThere(f"The storage is not there: {error}.")
    for words, kind, sentence in _REFUSALS:
        if words in said:
            return kind(sentence)
    return StorageFailed(f"ZFS refuses '{verb}': {error}.")
