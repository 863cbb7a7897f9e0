"""What a Create is to do, before anything is changed: disks, methods, names, and what forbids it.

Blocking functions for a worker thread; Plan is no more than this. Nothing here looks at the caller:
that is done before.
"""

from __future__ import annotations

import dataclasses
import time
import uuid as uuids
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime

from snapd_vm.engine import limits, select
from snapd_vm.engine.survey import Survey
from snapd_vm.engine.world import World
from snapd_vm.errors import Busy, HypervisorUnavailable, InvalidArgs, NameInUse
from snapd_vm.methods.method import Method
from snapd_vm.model import (
    Consistency,
    Disk,
    Domain,
    Needs,
    Plan,
    Request,
    Snapshot,
    SnapshotState,
    Tag,
    Target,
    snapshot_path,
)
from snapd_vm.virt import domainxml


@dataclass(frozen=True, slots=True)
class Choice:
    """One disk, and what will be done with it; the size of `target` is what `check` finds out.

    `known` are the snapshots that the disk has.
    """

    disk: Disk
    method: Method
    target: Target
    tag: Tag
    known: tuple[Snapshot, ...]


@dataclass(frozen=True, slots=True)
class Choices:
    """What a Create will do with the disks of one domain; nothing has been changed for it.

    The last two are what `check` has found out; `floor` is the consistency if nothing is frozen.
    """

    domain: Domain
    disks: tuple[Choice, ...]
    needs: Needs = field(default_factory=Needs)
    floor: Consistency = Consistency.CRASH

    @property
    def tag(self) -> Tag:
        """The operation's: that of its first snapshot."""
        return self.disks[0].tag

    @property
    def targets(self) -> Sequence[str]:
        """The disks, as `<target dev>` names them."""
        return [choice.disk.target for choice in self.disks]

    @property
    def methods(self) -> Sequence[Method]:
        """Each method that takes part, once."""
        return list({choice.method.name: choice.method for choice in self.disks}.values())

    @property
    def still(self) -> bool:
        """Whether the guest must write nothing meanwhile, frozen or not.

        That is so where disks are not taken at one instant; and where an image that is not raw, of
        which QEMU keeps a part in buffers of its own, is taken from below QEMU.
        """
        at_once = len(self.methods) == 1 and self.methods[0].together(
            [choice.target for choice in self.disks]
        )
        buffered = any(
            choice.disk.format != "raw" and not choice.method.redirects for choice in self.disks
        )
        return buffered or not at_once

    @property
    def stops(self) -> bool:
        """Whether the vCPUs, which run, are stopped for the switch."""
        return self.still and self.domain.active and self.domain.state != "paused"

    @property
    def unfrozen(self) -> Consistency:
        """What comes of it if nothing is frozen."""
        return Consistency.PAUSED if self.stops and self.domain.flushes else self.floor


def choose(
    world: World, uuid: str, requests: Sequence[Request], known: Sequence[Snapshot]
) -> Choices:
    """Read the domain again from libvirt, and find the disks and their methods in that.

    `requests` are for one domain and have one name and the same flags; `known` are the snapshots of
    all its disks. Raises SnapdErrors.
    """
    domain = world.hypervisor.read(uuid)
    disks = []
    for request in requests:
        found = select.find_in(domain, request.disk)
        if found.error is not None or found.disk is None:
            raise found.error or HypervisorUnavailable("The disk is gone; look at Disks.")
        disks.append(found.disk)
    targets = [disk.target for disk in disks]
    twice = next((target for target in targets if targets.count(target) > 1), "")
    if twice:
        raise InvalidArgs(f"Disk {twice} is named more than once; name it once.")
    created_us = int(time.time() * 1e6)
    label = _label(requests[0].name, targets, known, created_us)
    own_uuids = [str(uuids.uuid4()) for _ in disks]
    choices = []
    for disk, request, own_uuid in zip(disks, requests, own_uuids, strict=True):
        tag = Tag(own_uuid, label, domain.uuid, domain.name, created_us, own_uuids[0])
        method, target, _ = select.choose_method(world.methods, domain, disk, request, tag)
        own = tuple(one for one in known if one.target.disk == disk.target)
        choices.append(Choice(disk, method, target, tag, own))
    return Choices(domain, tuple(choices))


def check(world: World, choices: Choices) -> Choices:
    """Check all that can be checked without a change; the choices with what was found out."""
    uuid = choices.domain.uuid
    for choice in choices.disks:
        job = world.hypervisor.running_job(uuid, choice.disk.target)
        if job or choice.disk.mirror:
            problem = f"{job[:1].upper()}{job[1:]}; wait for its end." if job else ""
            raise Busy(problem or "A block job runs on the disk; wait for its end.")
    floor = _floor(world, choices.domain)
    sized = tuple(
        dataclasses.replace(
            choice,
            target=dataclasses.replace(choice.target, size=choice.method.size(choice.target)),
        )
        for choice in choices.disks
    )
    needs = [
        method.check([c.target for c in sized if c.method is method], choices.tag)
        for method in choices.methods
    ]
    chains = {disk: length for need in needs for disk, length in need.chains.items()}
    for choice in sized:
        limits.check(world.config, choice.disk.target, choice.known, chains)
    together = Needs(
        sum(need.space_needed for need in needs),
        min(need.space_available for need in needs),
        tuple(warning for need in needs for warning in need.warnings),
        chains,
    )
    return dataclasses.replace(choices, disks=sized, needs=together, floor=floor)


def _label(name: str, targets: Sequence[str], known: Sequence[Snapshot], created_us: int) -> str:
    """The name asked for, or one made from the time, that none of the disks has yet."""
    used = {(snapshot.target.disk, snapshot.name) for snapshot in known}

    def taken(label: str) -> str:
        return next((target for target in targets if (target, label) in used), "")

    if name:
        target = taken(name)
        if target:
            raise NameInUse(f"Disk {target} has a snapshot '{name}' already; choose another name.")
        return name
    stem = datetime.fromtimestamp(created_us / 1e6, UTC).strftime("%Y%m%dT%H%M%S%fZ")
    label, number = stem, 1
    while taken(label):
        number += 1
        label = f"{stem}-{number}"
    return label


def _floor(world: World, domain: Domain) -> Consistency:
    """The consistency that a snapshot has if nothing is frozen."""
    if domain.active:
        still = domain.state == "paused" and domain.flushes
        return Consistency.PAUSED if still else Consistency.CRASH
    off = world.hypervisor.off_state(domain.uuid)
    if off.migrated:
        raise Busy("The domain was migrated and may be running on another host.")
    if world.journal.unclean(domain.uuid):
        return Consistency.CRASH
    if off.known_clean:
        return Consistency.OFFLINE
    if off.unknown and not world.journal.stopped_uncleanly(domain.uuid):
        return Consistency.OFFLINE
    return Consistency.CRASH


def plan(world: World, uuid: str, request: Request, known: Sequence[Snapshot]) -> Plan:
    """What Create would answer; pings the agent, freezes nothing. Raises what Create would."""
    choices = choose(world, uuid, [request], known)
    with closing(Survey(world, request.flags)) as survey:
        survey.ask(choices.domain, choices.targets)
        choices = check(world, choices)
        quiesce = survey.result(choices.floor)
    best = Consistency.QUIESCED if quiesce is not None else choices.unfrozen
    [draft] = drafts(choices, best)
    warnings = list(choices.needs.warnings)
    if choices.domain.nvram:
        warnings.append("The domain's UEFI variables are not part of the snapshot.")
    if choices.domain.tpm:
        warnings.append("The domain's TPM state is not part of the snapshot.")
    return Plan(
        draft.target.method,
        draft.backup_source,
        best,
        choices.needs.space_needed,
        choices.needs.space_available,
        tuple(warnings),
    )


def drafts(choices: Choices, consistency: Consistency) -> tuple[Snapshot, ...]:
    """The records of the snapshots as they will be, if they come to have this consistency."""
    return tuple(_draft(choices.domain, choice, consistency) for choice in choices.disks)


def _draft(domain: Domain, choice: Choice, consistency: Consistency) -> Snapshot:
    source, image_format = choice.method.source(choice.target, choice.disk)
    return Snapshot(
        uuid=choice.tag.uuid,
        name=choice.tag.label,
        domain_uuid=domain.uuid,
        domain_name=domain.name,
        target=choice.target,
        created_us=choice.tag.created_us,
        state=SnapshotState.READY,
        consistency=consistency,
        frozen_filesystems=0,
        frozen_us=0,
        format=image_format,
        size=choice.target.size,
        backup_source=domainxml.backup_source(
            source,
            format=image_format,
            consistency=consistency,
            snapshot_path=snapshot_path(choice.tag.uuid),
        ),
        modified_disk="",
    )
