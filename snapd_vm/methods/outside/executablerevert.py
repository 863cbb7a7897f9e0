"""Brings a disk back to a snapshot by a program that knows how, the domain being off.

Nobody can see how far a revert came that was cut off, so it is asked for again until the program
has said yes, or that it can't, which it may say only where the disk is as it was. Its answer may
have been lost, so a revert has an ID by which the program can tell one that it has done.
"""

from __future__ import annotations

import dataclasses
import uuid as uuids
from collections.abc import Sequence
from enum import Enum, auto

from snapd_vm import storage
from snapd_vm.errors import Busy, InvalidState, SnapdError
from snapd_vm.methods import off
from snapd_vm.methods.method import Record, Watch
from snapd_vm.methods.outside.executable import Executable, Hypervisor
from snapd_vm.methods.outside.executabletarget import Asked, as_told
from snapd_vm.methods.outside.program import Refused
from snapd_vm.model import Tag, Target
from snapd_vm.outsideconfig import ExecutableConfig


class _Come(Enum):
    """How far a revert has come in this life of the daemon."""

    NOT_ASKED = auto()
    ASKED = auto()
    REFUSED = auto()
    DONE = auto()


class RevertingExecutable(Executable):
    """An Executable whose program knows the operation revert."""

    def __init__(self, settings: ExecutableConfig, hypervisor: Hypervisor, mark: str) -> None:
        super().__init__(settings, hypervisor, mark)
        self._come: dict[str, _Come] = {}

    def check_revert(self, target: Target, tag: Tag, others: Sequence[Target]) -> Target:
        """See Reverts: the disk must be the one that the snapshot is of, and nobody's else."""
        asked = Asked.of(target)
        domain = self.hypervisor.read(tag.domain_uuid)
        off.check_off(self.hypervisor, domain)
        disk = domain.disk(target.disk)
        if disk is None or as_told(disk) != asked.snapshot["disk"]:
            raise InvalidState(
                f"Disk {target.disk} has another image than when the snapshot was taken; delete "
                "the snapshots that were taken by qemu since, and revert then."
            )
        if disk.path:
            user = self.hypervisor.user_of(disk.path, domain.uuid, disk.target)
            if user:
                raise Busy(f"The image of disk {target.disk} is also used by {user}.")
            if storage.write_locked(disk.path):
                raise Busy(f"The image of disk {target.disk} is open for writing by another.")
        return target

    def prepare_revert(self, target: Target, tag: Tag, record: Record) -> Target:
        """From here on the disk may be another, as far as a daemon that is killed can tell."""
        begun = dataclasses.replace(target, data={**target.data, "reverting": str(uuids.uuid4())})
        self._come[tag.uuid] = _Come.NOT_ASKED
        record([begun])
        return begun

    def revert(self, target: Target, tag: Tag, watch: Watch) -> None:
        """See Reverts."""
        watch.past_return()
        self._ask(target, tag)

    def settle_revert(self, target: Target, tag: Tag) -> bool:
        """See Reverts, and the top of the file. Raises InvalidState where the domain runs again."""
        if not target.data.get("reverting"):
            return False
        come = self._come.pop(tag.uuid, _Come.ASKED)
        if come is _Come.ASKED:
            try:
                self._ask(target, tag)
            except SnapdError:
                if self._come.pop(tag.uuid, None) is _Come.REFUSED:
                    return False
                raise
            come = self._come.pop(tag.uuid)
        return come is _Come.DONE

    def reverted(self, target: Target, other: Target) -> Target | None:
        """All are what they were."""
        return None

    def _ask(self, target: Target, tag: Tag) -> None:
        off.check_off(self.hypervisor, self.hypervisor.read(tag.domain_uuid))
        self._come[tag.uuid] = _Come.ASKED
        try:
            self.alone().ask(
                "revert", [Asked.of(target).snapshot], revert_id=str(target.data["reverting"])
            )
        except Refused as refused:
            self._come[tag.uuid] = _Come.REFUSED
            raise refused.error from None
        self._come[tag.uuid] = _Come.DONE

    def among(self, target: Target, others: Sequence[Target]) -> Target:
        """No snapshot depends on another."""
        return target
