"""Create, and Plan as its first half: choose, check, prepare, freeze, switch, thaw, read back.

Blocking functions for one worker thread; the engine holds the domain's lock around them. What the
agent is asked before the freeze is asked in a second thread, beside the checks, as under load it
takes as long as all of them. Nothing here looks at the caller: that is done before.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid as uuids
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
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
    StorageFailed,
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
from snapd_vm.virt.agent import Agent, AgentError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a Create will do; nothing has been changed for it.

    The last two, and the size of `target`, are what `check` has found out.
    """

    domain: Domain
    disk: Disk
    method: Method
    target: Target
    tag: Tag
    needs: Needs = field(default_factory=Needs)
    floor: Consistency = Consistency.CRASH


@dataclass(frozen=True, slots=True)
class Taken:
    """What a Create has done; the journal's last entry is not written yet.

    `holding` is what the journal has of the freeze, if there was one; `held`: the guest may be
    frozen still. `domain` is as libvirt described it afterwards.
    """

    operation: Operation
    snapshots: Sequence[Snapshot]
    holding: Held | None
    held: bool
    domain: Domain


class Failed(Exception):
    """A Create that had begun failed with `error`; `operation` is to be undone.

    `held`: what the journal has of a guest that may be frozen still, and is to be thawed first.
    """

    def __init__(self, error: BaseException, operation: Operation, held: Held | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.operation = operation
        self.held = held


def choose(world: World, uuid: str, request: Request, names: Collection[str]) -> Choice:
    """Read the domain again from libvirt, and find the disk and the method in that.

    `names` are those in use on any disk of the domain, as "target/label".
    """
    domain = world.hypervisor.read(uuid)
    found = select.find_in(domain, request.disk)
    if found.error is not None or found.disk is None:
        raise found.error or HypervisorUnavailable("The disk is gone.")
    disk = found.disk
    tag = _tag(domain, disk, request.name, names)
    method, target, _ = select.choose_method(world.methods, domain, disk, request, tag)
    return Choice(domain, disk, method, target, tag)


def check(world: World, choice: Choice) -> Choice:
    """Check all that can be checked without a change; the choice with what was found out."""
    domain, disk, method = choice.domain, choice.disk, choice.method
    job = world.hypervisor.running_job(domain.uuid, disk.target)
    if job or disk.mirror:
        raise Busy(f"{job[:1].upper()}{job[1:]}; wait for its end." if job else "A block job runs.")
    floor = _floor(world, domain)
    target = dataclasses.replace(choice.target, size=method.size(choice.target))
    needs = method.check([target], choice.tag)
    return dataclasses.replace(choice, target=target, needs=needs, floor=floor)


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


def plan(world: World, uuid: str, request: Request, names: Collection[str]) -> Plan:
    """What Create would answer; pings the agent, freezes nothing. Raises what Create would."""
    choice, quiesce, agent = _checked(world, choose(world, uuid, request, names), request.flags)
    agent.close()
    best = Consistency.QUIESCED if quiesce is not None else choice.floor
    draft = _draft(choice, best)
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
    """Mount points to freeze; None: all. `former` is the agent's response timeout to put back."""

    mountpoints: Sequence[str] | None
    former: int | None


def _checked(world: World, choice: Choice, flags: Flags) -> tuple[Choice, _Quiesce | None, Agent]:
    """All that is known before the first change: the choice checked, and the agent asked.

    The agent is handed back ready for a freeze, to be closed. Raises what either of them finds.
    """
    domain = choice.domain
    agent = world.hypervisor.agent(domain)
    asked: Future[_Quiesce] | None = None
    try:
        try:
            if Flags.NO_QUIESCE not in flags and _can_answer(domain):
                asked = world.beside.submit(_ask, world, agent, choice.disk.target)
            choice = check(world, choice)
        finally:
            if asked is not None:  # the agent is not for two threads at a time
                wait([asked])
        return choice, _quiesce(choice, flags, asked), agent
    except BaseException:
        agent.close()
        raise


def _ask(world: World, agent: Agent, target: str) -> _Quiesce:
    """What the agent says is to be frozen for this disk; it is ready to do so then."""
    mountpoints = freeze.survey(agent, [target], world.config.agent_timeout_s)
    try:
        return _Quiesce(mountpoints, agent.arm(world.config.freeze_timeout_s))
    except AgentError as error:
        raise AgentUnavailable(f"The guest agent can't be made ready: {error}.") from error


def _can_answer(domain: Domain) -> bool:
    return domain.active and domain.state != "paused" and domain.agent is not None


def _quiesce(choice: Choice, flags: Flags, asked: Future[_Quiesce] | None) -> _Quiesce | None:
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
        if asked is None:
            raise AgentUnavailable("The domain has no guest agent channel.")
        return asked.result()
    except (AgentUnavailable, QuiesceFailed) as error:
        if required:
            raise
        log.info("not quiescing domain %s: %s", choice.domain.name, error)
        return None


def _draft(choice: Choice, consistency: Consistency) -> Snapshot:
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
        size=choice.target.size,
        backup_source=domainxml.backup_source(
            source,
            format=image_format,
            consistency=consistency,
            snapshot_path=snapshot_path(choice.tag.uuid),
        ),
        modified_disk="",
    )


def take(
    world: World,
    uuid: str,
    request: Request,
    names: Collection[str],
    resumed: Callable[[], bool],
    watch: Watch,
) -> Taken:
    """Do it, up to the reading back; the journal's last entry is the caller's to write.

    `resumed` tells whether the domain's vCPUs were started meanwhile; `names` as for `choose`.
    Raises Failed for what has to be undone, and other SnapdErrors where nothing was changed.
    """
    choice, quiesce, agent = _checked(world, choose(world, uuid, request, names), request.flags)
    try:
        return _take(world, choice, request.flags, agent, quiesce, resumed, watch)
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
) -> Taken:
    method, tag = choice.method, choice.tag
    world.reach(Step.CHECKED)
    operation = Operation(tag, flags, (_draft(choice, choice.floor),))
    world.journal.begin(operation)
    held, holding = False, None
    if quiesce is not None:
        holding = Held(choice.domain.uuid, choice.domain.name, quiesce.former)
    try:
        world.reach(Step.BEGUN)

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
        required = Flags.QUIESCE_REQUIRED in flags
        if quiesce is None:
            switch()
            world.reach(Step.SWITCHED)
        else:
            held = True
            try:
                frozen = freeze.around(
                    switch,
                    agent,
                    world.hypervisor.agent(choice.domain),
                    quiesce.mountpoints,
                    required=required,
                    freeze_timeout=world.config.freeze_timeout_s,
                    frozen_limit=world.config.frozen_limit_s,
                    reach=world.reach,
                )
            except freeze.SwitchFailed as error:
                held = error.held
                raise error.error from error
            held = frozen.held
        if frozen.error is not None and required:
            raise frozen.error
        # The agent is done with: what was set for it is put back while libvirt is read.
        closing = world.beside.submit(agent.close)
        try:
            domain, snapshot = _read_back(world, choice, operation, frozen, resumed)
        finally:
            wait([closing])
        if required and snapshot.consistency not in (Consistency.QUIESCED, Consistency.OFFLINE):
            raise QuiesceFailed("The domain was started or stopped meanwhile; try again.")
        world.reach(Step.READ_BACK)
    except BaseException as error:
        raise Failed(error, operation, holding if held else None) from error
    return Taken(operation, [snapshot], holding, held, domain)


def _read_back(
    world: World,
    choice: Choice,
    operation: Operation,
    frozen: freeze.Frozen,
    resumed: Callable[[], bool],
) -> tuple[Domain, Snapshot]:
    """The domain and the snapshot as they are, from what libvirt and the storage say now."""
    draft = operation.drafts[0]
    domain = world.hypervisor.read(choice.domain.uuid)
    if not choice.method.taken(draft.target, operation.tag, domain):
        raise StorageFailed("The snapshot was taken and is not there; see the daemon's log.")
    disk = domain.disk(choice.disk.target)
    consistency = choice.floor
    if frozen.quiesced:
        consistency = Consistency.QUIESCED
    same = (domain.id, domain.state) == (choice.domain.id, choice.domain.state)
    if consistency is not Consistency.QUIESCED and (resumed() or not same):
        consistency = Consistency.CRASH  # started, resumed or stopped meanwhile
    changed = disk if choice.method.redirects else None
    if changed is None and (disk is None or disk.path != choice.disk.path):
        raise Busy("The disk was given another image by somebody else meanwhile; try again.")
    return domain, finish(draft, consistency, changed, frozen)


def finish(
    draft: Snapshot,
    consistency: Consistency,
    changed: Disk | None,
    frozen: freeze.Frozen,
) -> Snapshot:
    """The record of a snapshot that stands, from its draft.

    `changed` is the disk as the domain uses it now, if the method has given it another image.
    """
    return dataclasses.replace(
        draft,
        consistency=consistency,
        frozen_filesystems=frozen.filesystems,
        frozen_us=frozen.frozen_us,
        backup_source=domainxml.with_attributes(
            draft.backup_source, consistency=consistency, snapshot_path=snapshot_path(draft.uuid)
        ),
        modified_disk=changed.xml if changed is not None else "",
    )
