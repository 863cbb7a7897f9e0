"""How much room a snapshot of a logical volume takes, and whether it is there; pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from snapd_vm.config import LvmConfig
from snapd_vm.errors import NoSpace, StorageFailed
from snapd_vm.methods.lvm.lvmvolumes import Lv

POOL_RESERVE = 16 << 20
"""Bytes that a thin pool must have free: what the guest overwrites afterwards needs room."""
_METADATA_RESERVE = 4 << 20  # as lvcreate itself, which wants a quarter of a small one
_CHUNK = 4096  # of a thick snapshot, by default
_EXCEPTIONS = _CHUNK // 16  # that a chunk of its metadata holds
_MIB = 1 << 20
_MARGIN = 16 << 20


@dataclass(frozen=True, slots=True)
class Room:
    """What a snapshot takes, of how much there is, and what is to be told of that."""

    needed: int
    available: int
    warnings: tuple[str, ...] = ()


def thick_size(origin: Lv, wanted: int, config: LvmConfig) -> int:
    """The bytes of a thick snapshot, in whole extents: as asked for, else as configured.

    Never more than the whole volume needs, as lvcreate does not give it more.
    """
    size = wanted or max(
        origin.size * config.snapshot_percent // 100, config.snapshot_min_mib * _MIB
    )
    return min(_extents(size, origin.extent), whole(origin))


def whole(origin: Lv) -> int:
    """What a thick snapshot takes that can't overflow, in bytes."""
    chunks = -(-origin.size // _CHUNK)
    return _extents((chunks + -(-chunks // _EXCEPTIONS) + 2) * _CHUNK, origin.extent)


def refuse_partial(origin: Lv) -> None:
    """Raise StorageFailed where lvm changes nothing in the group, as some of its disks are away."""
    if origin.vg_partial:
        raise StorageFailed(
            f"The volume group {origin.vg} lacks some of its physical volumes, and lvm makes no "
            "snapshot in it then; see 'pvs'."
        )


def thick(disk: str, origin: Lv, size: int) -> Room:
    """Of one thick snapshot of this size."""
    if size >= whole(origin):
        return Room(size, origin.vg_free)
    return Room(
        size,
        origin.vg_free,
        (
            f"The snapshot of disk {disk} has room for {size} bytes of the {origin.size} that the "
            "guest may overwrite, and is lost when that is used up; delete it before, or ask for "
            "more with <size>.",
        ),
    )


def check_overwriting(origin: Lv, snapshots: Sequence[Lv], most: int) -> None:
    """Raise NoSpace where thick snapshots of a volume could not hold what is to be overwritten on
    it, `most` bytes; they would be lost.
    """
    for one in snapshots:
        room = int(one.size * (100 - (one.data_percent or 0.0)) / 100)
        safe = one.overflowed or one.size >= whole(origin)
        if not safe and room < most + _MARGIN:
            raise NoSpace(
                f"The snapshot {one.vg}/{one.name} of the same volume has room for {room} bytes "
                f"more, and may get up to {most + _MARGIN} by the revert; extend or delete it."
            )


def check_group(vg: str, rooms: Sequence[Room]) -> None:
    """Raise NoSpace where a volume group has not the room for these thick snapshots."""
    needed = sum(room.needed for room in rooms)
    available = min(room.available for room in rooms)
    if available < needed:
        raise NoSpace(
            f"The volume group {vg} has {available} bytes free, and {needed} are needed; extend "
            "it, delete snapshots, or ask for less with <size>."
        )


def thin(disk: str, origin: Lv, pool: Lv) -> Room:
    """Of one thin snapshot. Raises NoSpace, and StorageFailed where the pool can't take one."""
    if pool.ailing:
        raise (NoSpace if pool.attr[8] == "D" else StorageFailed)(
            f"The thin pool {pool.vg}/{pool.name} of disk {disk} {pool.ailing}; see 'lvs -a'."
        )
    free = int(pool.size * (100 - (pool.data_percent or 0.0)) / 100)
    metadata = int(pool.metadata_size * (100 - (pool.metadata_percent or 0.0)) / 100)
    if free < POOL_RESERVE:
        raise NoSpace(
            f"The thin pool of disk {disk} has {free} bytes left; what the guest overwrites after "
            "the snapshot needs new room, so extend the pool or delete snapshots."
        )
    if metadata < min(_METADATA_RESERVE, pool.metadata_size // 4):
        raise NoSpace(
            f"The metadata of the thin pool of disk {disk} has {metadata} bytes left; extend it "
            "(lvextend --poolmetadatasize), or delete snapshots."
        )
    share = 100.0 if origin.data_percent is None else origin.data_percent
    used = int(origin.size * share / 100)
    if free >= used:
        return Room(POOL_RESERVE, free)
    return Room(
        POOL_RESERVE,
        free,
        (
            f"As the guest overwrites disk {disk}, up to {used} bytes more are needed, and its "
            f"thin pool has {free} left; the guest gets errors or stops when there are none.",
        ),
    )


def _extents(size: int, extent: int) -> int:
    return -(-size // extent) * extent
