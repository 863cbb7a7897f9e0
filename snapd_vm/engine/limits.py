"""How many snapshots a disk may have, and how long its chain may get; looks at nothing itself.

A chain that nobody shortens makes every read slower, and ends where QEMU and libvirt refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snapd_vm.config import Config
from snapd_vm.errors import NoSpace
from snapd_vm.model import Snapshot, SnapshotState


def check(config: Config, disk: str, known: Sequence[Snapshot], chains: Mapping[str, int]) -> None:
    """Refuse one snapshot more of `disk`, which has `known`, where a limit is reached.

    `chains` is how many images the chains of disks would have, see model.Needs. Raises NoSpace,
    which names the snapshot to delete.
    """
    if len(known) >= config.snapshot_limit:
        raise NoSpace(
            f"Disk {disk} has {len(known)} snapshots, and snapshot_limit is "
            f"{config.snapshot_limit}; delete its oldest one, '{_oldest(known)}', first."
        )
    chain = chains.get(disk, 0)
    if chain > config.chain_limit:
        what = (
            f"delete its oldest snapshot, '{_oldest(known)}', first"
            if known
            else "commit some of them with 'virsh blockcommit' first"
        )
        raise NoSpace(
            f"The chain of disk {disk} would have {chain} images, and chain_limit is "
            f"{config.chain_limit}; {what}."
        )


def _oldest(known: Sequence[Snapshot]) -> str:
    """The name of the oldest one, of those that stand if there are any."""
    ready = [snapshot for snapshot in known if snapshot.state is SnapshotState.READY]
    return min(ready or known, key=lambda snapshot: snapshot.created_us).name
