"""Create, and Plan as its first half: choose, prepare, freeze, switch, thaw, read back.

Blocking functions for one worker thread; the engine holds the domain's lock around them. Nothing
here looks at the caller: that is done before.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid as uuids
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from snapd_vm.engine import freeze, select
from snapd_vm.engine.journal import Held, Operation, Step
from snapd_vm.engine.world import World
from snapd_vm.errors import (
    AgentUnavailable,
    Busy,
    HypervisorUnavailable,
    NameInUse,
    QuiesceFailed,
)
from snapd_vm.methods.method import Method, Watch
from snapd_vm.model import (
    Consistency,
    Disk,
    Domain,
    Flags,
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
from snapd_vm.virt.agent import Agent

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a Create will do; nothing has been changed for it."""

    domain: Domain
    disk: Disk
    method: Method
    target: Target
    tag: Tag
    needs: Needs
    floor: Consistency


class Failed(Exception):
    """A Create that had begun failed with `error`; `operation` is to be undone.

    `held`: the guest may be frozen still and is to be thawed first.
    """

    def __init__(self, error: BaseException, operation: Operation, *, held: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.operation = operation
        self.held = held


def choose(world: World, uuid: str, request: Request, names: Collection[str]) -> Choice:
    """Read the domain again from libvirt and check all that can be checked without a change.

    `names` are those in use on any disk of the domain, as "target/label".
    """
    domain = world.hypervisor.read(uuid)
    found = select.find_in(domain, request.disk)
    if found.error is not None or found.disk is None:
        raise found.error or HypervisorUnavailable("The disk is gone.")
    disk = found.disk
    tag = _tag(domain, disk, request.name, names)
    method, target, _ = select.choose_method(world.methods, domain, disk, request, tag)
    job = world.hypervisor.running_job(uuid, disk.target)
    if job or disk.mirror:
        raise Busy(f"{job[:1].upper()}{job[1:]}; wait for its end." if job else "A block job runs.")
    floor = _floor(world, domain)
    needs = method.check([target], tag)
    return Choice(domain, disk, method, target, tag, needs, floor)


def _tag(domain: Domain, disk: Disk, name: str, names: Collection[str]) -> Tag:
    now = time.time()
    label = name
    if not label:
        label = stem = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%S%fZ")
        number = 1
        while f"{disk.target}/{label}" in names:
            number += 1
            label = f"{stem}-{number}"
    elif f"{disk.target}/{label}" in names:
        raise NameInUse(
            f"Disk {disk.target} has a snapshot '{label}' already; choose another name."
        )
    return Tag(str(uuids.uuid4()), label, domain.uuid, domain.name, int(now * 1e6))


def _floor(world: World, domain: Domain) -> Consistency:
    """The consistency that a snapshot has if nothing is frozen."""
    if domain.active:
        return Consistency.PAUSED if domain.state == "paused" else Consistency.CRASH
    off = world.hypervisor.off_state(domain.uuid)
    if off.migrated:
        raise Busy("The domain was migrated and may be running on another host.")
    if off.known_clean:
        return Consistency.OFFLINE
    if off.unknown and not world.journal.stopped_uncleanly(domain.uuid):
        return Consistency.OFFLINE
    return Consistency.CRASH


def plan(world: World, choice: Choice, flags: Flags) -> Plan:
    """What Create would answer; pings the agent, freezes nothing. Raises what Create would."""
    agent = world.hypervisor.agent(choice.domain)
    try:
        quiesce = _survey(world, agent, choice, flags)
    finally:
        agent.close()
    best = Consistency.QUIESCED if quiesce is not None else choice.floor
    draft = _draft(choice, world.methods[choice.target.method].size(choice.target), best)
    warnings = list(choice.needs.warnings)
    if choice.domain.nvram:
        warnings.append("The domain's UEFI variables are not part of the snapshot.")
    if choice.domain.tpm:
        warnings.append("The domain's TPM state is not part of the snapshot.")
    return Plan(
        choice.method.name,
        draft.backup_source,
        best,
        choice.needs.space_needed,
        choice.needs.space_available,
        tuple(warnings),
    )


@dataclass(frozen=True, slots=True)
class _Quiesce:
    """Mount points to freeze; None: all."""

    mountpoints: Sequence[str] | None


def _survey(world: World, agent: Agent, choice: Choice, flags: Flags) -> _Quiesce | None:
    """What to freeze, or None where the guest is not quiesced; raises where that is required."""
    required = Flags.QUIESCE_REQUIRED in flags
    if Flags.NO_QUIESCE in flags:
        return None
    try:
        if not choice.domain.active:
            if required and choice.floor is not Consistency.OFFLINE:
                raise QuiesceFailed(
                    "The domain is off and was not shut down cleanly; its disk is not consistent."
                )
            return None
        if choice.domain.state == "paused":
            raise AgentUnavailable("The domain is paused, so its agent can't answer; resume it.")
        if choice.domain.agent is None:
            raise AgentUnavailable("The domain has no guest agent channel.")
        disks = [choice.disk.target]
        return _Quiesce(freeze.survey(agent, disks, world.config.agent_timeout_s))
    except (AgentUnavailable, QuiesceFailed) as error:
        if required:
            raise
        log.info("not quiescing domain %s: %s", choice.domain.name, error)
        return None


def _draft(choice: Choice, size: int, consistency: Consistency) -> Snapshot:
    source, image_format = choice.method.source(choice.target, choice.disk)
    return Snapshot(
        uuid=choice.tag.uuid,
        name=choice.tag.label,
        domain_uuid=choice.domain.uuid,
        domain_name=choice.domain.name,
        target=choice.target,
        created_us=choice.tag.created_us,
        state=SnapshotState.READY,
        consistency=consistency,
        frozen_filesystems=0,
        frozen_us=0,
        format=image_format,
        size=size,
        backup_source=domainxml.backup_source(
            source,
            format=image_format,
            consistency=consistency,
            snapshot_path=snapshot_path(choice.tag.uuid),
        ),
        modified_disk="",
    )


def take(
    world: World, choice: Choice, flags: Flags, resumed: Callable[[], bool], watch: Watch
) -> tuple[Operation, list[Snapshot], bool]:
    """Do it: from the journal's first entry to the reading back, its last entry not included.

    `resumed` tells whether the domain's vCPUs were started meanwhile. Returns the operation, its
    snapshots, and whether the guest may be frozen still. Raises Failed for what has to be undone,
    and other SnapdErrors where nothing was changed.
    """
    agent = world.hypervisor.agent(choice.domain)
    try:
        quiesce = _survey(world, agent, choice, flags)
        return _take(world, choice, flags, agent, quiesce, resumed, watch)
    finally:
        agent.close()


def _take(
    world: World,
    choice: Choice,
    flags: Flags,
    agent: Agent,
    quiesce: _Quiesce | None,
    resumed: Callable[[], bool],
    watch: Watch,
) -> tuple[Operation, list[Snapshot], bool]:
    method, tag = choice.method, choice.tag
    world.reach(Step.CHECKED)
    draft = _draft(choice, method.size(choice.target), choice.floor)
    operation = Operation(tag, flags, (draft,))
    world.journal.begin(operation)
    held = False
    try:
        world.reach(Step.BEGUN)
        holding = None
        if quiesce is not None:
            former = agent.arm(world.config.freeze_timeout_s)
            holding = Held(choice.domain.uuid, choice.domain.name, former)

        def record(targets: Sequence[Target]) -> None:
            nonlocal operation
            operation = operation.with_targets(targets)
            world.journal.prepared(operation, holding)
            world.reach(Step.PREPARED)

        targets = method.prepare(operation.targets, tag, record)
        world.reach(Step.ARMED)
        watch.past_return()

        def switch() -> None:
            method.create(targets, tag)

        frozen = freeze.Frozen()
        if quiesce is None:
            switch()
            world.reach(Step.SWITCHED)
        else:
            try:
                frozen = freeze.around(
                    switch,
                    agent,
                    world.hypervisor.agent(choice.domain),
                    quiesce.mountpoints,
                    required=Flags.QUIESCE_REQUIRED in flags,
                    freeze_timeout=world.config.freeze_timeout_s,
                    frozen_limit=world.config.frozen_limit_s,
                    reach=world.reach,
                )
            except freeze.SwitchFailed as error:
                held = error.held
                raise error.error from error
            held = frozen.held
        if frozen.error is not None and Flags.QUIESCE_REQUIRED in flags:
            raise frozen.error
        snapshots = [_read_back(world, choice, operation, frozen, resumed)]
        world.reach(Step.READ_BACK)
    except BaseException as error:
        raise Failed(error, operation, held=held) from error
    return operation, snapshots, held


def _read_back(
    world: World,
    choice: Choice,
    operation: Operation,
    frozen: freeze.Frozen,
    resumed: Callable[[], bool],
) -> Snapshot:
    """The snapshot as it is, from what libvirt and the storage say now."""
    draft = operation.drafts[0]
    if not choice.method.taken(draft.target, operation.tag):
        raise HypervisorUnavailable("libvirt took the snapshot and does not show it.")
    domain = world.hypervisor.read(choice.domain.uuid)
    disk = domain.disk(choice.disk.target)
    consistency = choice.floor
    if frozen.quiesced:
        consistency = Consistency.QUIESCED
    same = (domain.id, domain.state) == (choice.domain.id, choice.domain.state)
    if consistency is not Consistency.QUIESCED and (resumed() or not same):
        consistency = Consistency.CRASH  # started, resumed or stopped meanwhile
    return finish(draft, consistency, disk, choice.disk.path, frozen)


def finish(
    draft: Snapshot,
    consistency: Consistency,
    disk: Disk | None,
    former_path: str,
    frozen: freeze.Frozen,
) -> Snapshot:
    """The record of a snapshot that stands, from its draft."""
    changed = disk is not None and disk.path != former_path
    return dataclasses.replace(
        draft,
        consistency=consistency,
        frozen_filesystems=frozen.filesystems,
        frozen_us=frozen.frozen_us,
        backup_source=domainxml.with_attributes(
            draft.backup_source, consistency=consistency, snapshot_path=snapshot_path(draft.uuid)
        ),
        modified_disk=disk.xml if disk is not None and changed else "",
    )
