"""Create: what was chosen is prepared, and taken while the guest stands still; then read back.

Blocking functions for one worker thread; the engine holds the domain's lock around them. Nothing
here looks at the caller: that is done before.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import closing
from dataclasses import dataclass

from snapd_vm.engine import freeze, stop
from snapd_vm.engine.choice import Choices, check, choose, drafts
from snapd_vm.engine.journal import Held, Operation, Step
from snapd_vm.engine.survey import Quiesce, Survey
from snapd_vm.engine.world import World
from snapd_vm.errors import Busy, QuiesceFailed, QuiesceTimedOut, StorageFailed, TimedOut
from snapd_vm.methods.method import Watch
from snapd_vm.model import (
    Consistency,
    Disk,
    Domain,
    Flags,
    Found,
    Request,
    Snapshot,
    Target,
    snapshot_path,
)
from snapd_vm.virt import domainxml

log = logging.getLogger(__name__)


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


def take(
    world: World,
    uuid: str,
    requests: Sequence[Request],
    known: Sequence[Snapshot],
    remembered: Sequence[Found],
    resumed: Callable[[], bool],
    watch: Watch,
) -> Taken:
    """Do it, up to the reading back; the journal's last entry is the caller's to write.

    `resumed` tells whether the domain's vCPUs were started meanwhile; `requests` and `known` as for
    `choose`. What is `remembered` of domain and disks is used to ask the agent early, and for
    nothing else. Raises Failed for what has to be undone, and other SnapdErrors where nothing was
    changed.
    """
    flags = requests[0].flags
    with closing(Survey(world, flags)) as survey:
        targets = [found.disk.target for found in remembered if found.disk is not None]
        if remembered[0].domain is not None and len(targets) == len(requests):
            survey.ask(remembered[0].domain, targets)
        choices = choose(world, uuid, requests, known)
        survey.ask(choices.domain, choices.targets)
        choices = check(world, choices)
        survey.refuse(choices.floor)
        return _take(world, choices, flags, survey, resumed, watch)


def _take(
    world: World,
    choices: Choices,
    flags: Flags,
    survey: Survey,
    resumed: Callable[[], bool],
    watch: Watch,
) -> Taken:
    tag, domain = choices.tag, choices.domain
    world.reach(Step.CHECKED)
    operation = Operation(tag, flags, drafts(choices, choices.floor))
    world.journal.begin(operation)
    stops = choices.stops
    held = False
    holding: Held | None = None
    quiesce: Quiesce | None = None
    try:
        world.reach(Step.BEGUN)

        def record(targets: Sequence[Target]) -> None:
            # The agent's answer is waited for here: what is made by now has no name yet.
            nonlocal operation, quiesce, holding
            quiesce = survey.result(choices.floor)
            if quiesce is not None or stops:
                former = quiesce.former if quiesce is not None else None
                holding = Held(domain.uuid, domain.name, former, quiesce is not None, stops)
            operation = operation.with_targets(targets)
            world.journal.prepared(operation, holding)
            world.reach(Step.PREPARED)

        prepared = [
            (method, method.prepare(_of(method.name, operation), tag, record))
            for method in choices.methods
        ]
        world.reach(Step.ARMED)
        watch.past_return()

        def switch() -> None:
            for method, targets in prepared:
                method.create(targets, tag)

        if stops:
            switch = functools.partial(
                stop.around,
                switch,
                world.hypervisor,
                domain.uuid,
                world.config.frozen_limit_s,
                world.reach,
            )
        held = holding is not None
        frozen = freeze.Frozen()
        required = Flags.QUIESCE_REQUIRED in flags
        if quiesce is None:
            switch()
            held = False
            world.reach(Step.SWITCHED)
        else:
            try:
                frozen = freeze.around(
                    switch,
                    survey.agent,
                    world.hypervisor.agent(domain),
                    quiesce.mountpoints,
                    required=required,
                    freeze_timeout=world.config.freeze_timeout_s,
                    frozen_limit=world.config.frozen_limit_s,
                    reach=world.reach,
                )
            except freeze.SwitchFailed as error:
                # Whatever the agent said, the vCPUs may stand still.
                held = error.held or (stops and error.begun)
                late = error.late or isinstance(error.error, stop.StoodTooLong)
                if required and late and isinstance(error.error, TimedOut):
                    raise QuiesceTimedOut(str(error.error)) from error
                raise error.error from error
            held = frozen.held
        if frozen.error is not None and required:
            raise frozen.error
        # The agent is done with: what was set for it is put back while libvirt is read.
        put_back = world.beside.submit(survey.agent.close)
        try:
            now = world.hypervisor.read(domain.uuid)
            moved = (now.id, now.state) != (domain.id, domain.state)
            moved = moved or (resumed() and not stops)
            if moved and choices.still and not frozen.quiesced:
                raise Busy("The domain was started, stopped or resumed meanwhile; try again.")
            consistency = _achieved(choices, frozen, moved=moved)
            snapshots = _read_back(choices, operation, now, consistency, frozen)
        finally:
            wait([put_back])
        if required and consistency not in (Consistency.QUIESCED, Consistency.OFFLINE):
            raise QuiesceFailed("The domain was started or stopped meanwhile; try again.")
        world.reach(Step.READ_BACK)
    except BaseException as error:
        raise Failed(error, operation, holding if held else None) from error
    return Taken(operation, snapshots, holding, held, now)


def _of(method: str, operation: Operation) -> Sequence[Target]:
    return [target for target in operation.targets if target.method == method]


def _achieved(choices: Choices, frozen: freeze.Frozen, *, moved: bool) -> Consistency:
    """The consistency that came of it; `moved`: the guest's state may have changed meanwhile."""
    if frozen.quiesced:
        return Consistency.QUIESCED
    if moved:
        return Consistency.CRASH
    return choices.unfrozen


def _read_back(
    choices: Choices,
    operation: Operation,
    now: Domain,
    consistency: Consistency,
    frozen: freeze.Frozen,
) -> Sequence[Snapshot]:
    """The snapshots as they are, from what libvirt (`now`) and the storage say."""
    snapshots = []
    for choice, draft in zip(choices.disks, operation.drafts, strict=True):
        if not choice.method.taken(draft.target, operation.tag, now):
            raise StorageFailed("The snapshot was taken and is not there; see the daemon's log.")
        disk = now.disk(choice.disk.target)
        changed = disk if choice.method.redirects else None
        if changed is None and (disk is None or _place(disk) != _place(choice.disk)):
            raise Busy("The disk was given another image by somebody else meanwhile; try again.")
        snapshots.append(finish(draft, consistency, changed, frozen))
    return snapshots


def _place(disk: Disk) -> tuple[str, str]:
    """Where a disk's image is: its path, or of one over the network the source."""
    return disk.path, "" if disk.path else disk.source_xml


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
