"""What lvm says of its volumes, and what it is told to do: the only place that runs its programs.

What it reports is taken as what anybody may have written: names and tags are of those characters
that lvm allows, or the volume is passed over.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from snapd_vm import command
from snapd_vm.errors import Busy, NameInUse, NoSpace, SnapdError, StorageFailed
from snapd_vm.methods.lvm import devicemapper

log = logging.getLogger(__name__)

PROGRAMS = ("lvs", "lvcreate", "lvremove", "lvchange", "lvrename")

_LIMIT_S = 60.0
# Whatever lvm.conf says: the columns as we ask for them, messages without a prefix.
_CONFIG = (
    'report{compact_output=0 compact_output_cols="" binary_values_as_numeric=0 '
    'list_item_separator="," prefixes=0 quoted=1} log{prefix="" command_names=0 verbose=0}'
)
_COLUMNS = (
    "vg_name,vg_uuid,vg_free,vg_extent_size,lv_name,lv_uuid,lv_attr,lv_layout,lv_size,"
    "lv_metadata_size,lv_tags,origin,pool_lv,data_percent,metadata_percent,lv_device_open,"
    "vg_partial"
)
_NAME = re.compile(r"[A-Za-z0-9_+.][A-Za-z0-9_+.-]*")
_TAG = re.compile(r"[A-Za-z0-9_+./=!:#&-]+")
_NOISE = ("WARNING:", "Run `", "File descriptor", "/dev/", "Please ")


@dataclass(frozen=True, slots=True)
class Lv:
    """A logical volume as lvs reports it; sizes in bytes, UUIDs without hyphens.

    The percentages are of what a snapshot or pool has taken of its room; None: not known, as of one
    that is not active. `attr` is lv_attr (lvs(8)).
    """

    vg: str
    vg_uuid: str
    vg_free: int
    extent: int
    name: str
    uuid: str
    attr: str
    layout: frozenset[str]
    size: int
    metadata_size: int
    tags: tuple[str, ...]
    origin: str
    pool: str
    data_percent: float | None
    metadata_percent: float | None
    opened: bool
    vg_partial: bool

    @property
    def active(self) -> bool:
        """Whether there is a device for it."""
        return self.attr[4] in "asISmMdi"

    @property
    def overflowed(self) -> bool:
        """Whether a thick snapshot has had no room any more, and is lost."""
        return self.attr[4] in "IS"

    @property
    def ailing(self) -> str:
        """What is wrong with a thin pool, in words, or ''; the letters are those of lvs(8)."""
        return {"F": "has failed", "M": "is read-only, and needs a repair", "D": "is full"}.get(
            self.attr[8], ""
        )

    @property
    def writable(self) -> bool:
        """Whether anybody may write to it."""
        return self.attr[1] == "w"

    @property
    def is_snapshot(self) -> bool:
        """Whether it is a thick snapshot."""
        return self.attr[0] in "sS"

    @property
    def is_thin(self) -> bool:
        """Whether it lies in a pool."""
        return self.attr[0] == "V"


class GroupAbsent(StorageFailed):
    """A volume group is not there; it may be back, as where its disks come over the network."""

    dbus_name = StorageFailed.dbus_name


def report(vg: str = "") -> Sequence[Lv]:
    """All volumes of a group; of all groups for ''. Raises GroupAbsent and StorageFailed."""
    argv = ["lvs", "--config", _CONFIG, "--reportformat", "json", "--units", "b", "--nosuffix"]
    argv += ["-o", _COLUMNS, *(["--", vg] if vg else [])]
    result = _attempt(argv, _LIMIT_S)
    if result.status != 0:
        if vg and f'Volume group "{vg}" not found' in result.stderr:
            raise GroupAbsent(f"The volume group {vg} is not there.")
        raise StorageFailed(f"lvs failed: {reason(result.stderr)}")
    return parse(result.stdout)


def parse(text: str) -> Sequence[Lv]:
    """The volumes of a report; what is not of the form that lvm gives is passed over.

    Raises StorageFailed where it is no report.
    """
    try:
        rows = json.loads(text)["report"][0]["lv"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise StorageFailed("lvs did not answer in the form that was asked for.") from error
    if not isinstance(rows, list):
        raise StorageFailed("lvs did not answer in the form that was asked for.")
    return [lv for row in rows if (lv := _lv(row)) is not None]


def _lv(row: object) -> Lv | None:
    if not isinstance(row, dict) or not all(isinstance(one, str) for one in row.values()):
        return None
    try:
        names = [row[key] for key in ("vg_name", "lv_name")]
        if not all(_NAME.fullmatch(name) for name in names):
            return None
        if not all(not row[key] or _NAME.fullmatch(row[key]) for key in ("origin", "pool_lv")):
            return None
        if len(row["lv_attr"]) < 10:
            return None
        return Lv(
            vg=row["vg_name"],
            vg_uuid=row["vg_uuid"].replace("-", ""),
            vg_free=int(row["vg_free"]),
            extent=int(row["vg_extent_size"]),
            name=row["lv_name"],
            uuid=row["lv_uuid"].replace("-", ""),
            attr=row["lv_attr"],
            layout=frozenset(row["lv_layout"].split(",")),
            size=int(row["lv_size"]),
            metadata_size=int(row["lv_metadata_size"] or "0"),
            tags=tuple(tag for tag in row["lv_tags"].split(",") if _TAG.fullmatch(tag)),
            origin=row["origin"],
            pool=row["pool_lv"],
            data_percent=_percent(row["data_percent"]),
            metadata_percent=_percent(row["metadata_percent"]),
            opened=row["lv_device_open"] == "open",
            vg_partial=bool(row["vg_partial"]),
        )
    except (KeyError, ValueError):
        return None


def _percent(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,3}(\.\d+)?", text) else None


def snapshot(
    vg: str, origin: str, name: str, *, size: int, tags: Sequence[str], limit: float, mark: str = ""
) -> None:
    """A read-only snapshot; `size` 0: a thin one. It is active, also after the host's next start.

    Raises NameInUse, NoSpace and StorageFailed.
    """
    argv = [*_words("lvcreate"), "-s", "-pr", "-n", name]
    argv += ["-L", f"{size}b"] if size else ["-kn", "-ay"]
    for tag in tags:
        argv += ["--addtag", tag]
    _run([*argv, "--", f"{vg}/{origin}"], limit, mark)
    log.info("created logical volume %s/%s, a snapshot of %s", vg, name, origin)


def writable_thin(vg: str, origin: str, name: str, tags: Sequence[str]) -> None:
    """A thin snapshot that can be written to, and is a volume like any other.

    Raises NameInUse, NoSpace and StorageFailed.
    """
    argv = [*_words("lvcreate"), "-s", "-prw", "-kn", "-ay", "-n", name]
    for tag in tags:
        argv += ["--addtag", tag]
    _run([*argv, "--", f"{vg}/{origin}"], _LIMIT_S, name)
    log.info("created logical volume %s/%s, a copy of %s", vg, name, origin)


def wait(vg: str, name: str) -> None:
    """Until no lvcreate is at work on this volume, of an earlier life of the daemon it may be.

    Raises StorageFailed.
    """
    if not command.wait_for_marked(name, "lvcreate", _LIMIT_S):
        raise StorageFailed(f"An lvcreate for {vg}/{name} does not end.")


def remove(lv: Lv) -> None:
    """Remove a volume, a thin one too that is half made. Raises Busy and StorageFailed."""
    argv = [*_words("lvremove"), "--", f"{lv.vg}/{lv.name}"]
    try:
        _run(argv, _LIMIT_S)
    except StorageFailed as error:
        if not lv.pool or "File exists" not in str(error):
            raise
        _forget(lv.vg, lv.pool, lv.name)
        _run(argv, _LIMIT_S)
    log.info("removed logical volume %s/%s", lv.vg, lv.name)


def _forget(vg: str, pool: str, name: str) -> None:
    """Have the kernel's pool drop what it has made for a thin volume, of which lvm does not know
    that it is made: it asks for it again before all else, and fails, as that exists.

    Raises StorageFailed.
    """
    words = ["lvs", "--config", _CONFIG, "--noheadings", "-o", "thin_id", "--", f"{vg}/{name}"]
    number = _attempt(words, _LIMIT_S).stdout.strip()
    if not number.isdigit():
        raise StorageFailed(f"The number of {vg}/{name} in its pool is not to be found.")
    inner = f"{devicemapper.joined(vg, pool)}-tpool"
    _run(["dmsetup", "message", inner, "0", f"delete {number}"], _LIMIT_S)
    log.warning("the thin pool %s/%s has dropped %s, which was half made", vg, pool, name)


def rename(vg: str, name: str, to: str) -> None:
    """Raises NameInUse and StorageFailed."""
    _run([*_words("lvrename"), "--", vg, name, to], _LIMIT_S)
    log.info("renamed logical volume %s/%s to %s", vg, name, to)


def activate(vg: str, name: str) -> None:
    """Have a device for it. Raises StorageFailed."""
    _run([*_words("lvchange"), "-ay", "-K", "--", f"{vg}/{name}"], _LIMIT_S)
    log.info("activated logical volume %s/%s", vg, name)


def refresh(vg: str, name: str) -> None:
    """Let the kernel have it as the group's metadata say, and go on. Raises StorageFailed."""
    _run([*_words("lvchange"), "--refresh", "--", f"{vg}/{name}"], _LIMIT_S)
    log.warning("logical volume %s/%s stood still, and goes on", vg, name)


def retag(vg: str, name: str, *, add: str = "", remove: str = "") -> None:
    """Add a tag and remove one, at once; that it has the one, or not the other, does not matter.

    Raises StorageFailed.
    """
    words = [*(["--addtag", add] if add else []), *(["--deltag", remove] if remove else [])]
    _run([*_words("lvchange"), *words, "--", f"{vg}/{name}"], _LIMIT_S)


def reason(stderr: str) -> str:
    """The first line that says what is wrong, with a full stop: lvm's last is but a hint."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    found = next((line for line in lines if not line.startswith(_NOISE)), "")
    return (found or (lines[-1] if lines else "it gave no reason")).rstrip(".") + "."


def _words(program: str) -> list[str]:
    return [program, "--config", _CONFIG, "-y"]


def _run(argv: Sequence[str], limit: float, mark: str = "") -> None:
    result = _attempt(argv, limit, mark)
    if result.status == 0:
        return
    log.debug("%s", result.stderr)
    why = reason(result.stderr)
    raise _kind_of(why)(f"{argv[0]} failed: {why}")


def _kind_of(why: str) -> type[SnapdError]:
    said = why.lower()
    if "already exists" in said or "already used" in said:
        return NameInUse
    if "insufficient" in said or "threshold" in said or "not enough" in said:
        return NoSpace
    return Busy if "in use" in said else StorageFailed


def _attempt(argv: Sequence[str], limit: float, mark: str = "") -> command.Result:
    try:
        return command.run(argv, timeout=limit, check=False, mark=mark)
    except command.CommandError as error:
        raise StorageFailed(f"{error}.") from error
