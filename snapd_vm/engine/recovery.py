"""Settles what was begun and not ended: the one way back for a failed Create and for a start-up.

Blocking functions for a worker thread. Thawing comes first, then each disk in reverse.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from snapd_vm.engine import create, freeze
from snapd_vm.engine.journal import Held, Operation
from snapd_vm.engine.world import Hypervisor, World
from snapd_vm.errors import NameInUse, NoSpace, NoSuchDomain, SnapdError
from snapd_vm.methods.method import Kept
from snapd_vm.model import Consistency, Snapshot, Tag, Target
from snapd_vm.virt.agent import AgentGone, AgentRefused, AgentTimeout

log = logging.getLogger(__name__)


def settle(world: World, operation: Operation, *, keep: bool) -> Sequence[Snapshot]:
    """Bring an operation to its end: all its snapshots stand, or nothing of it is left.

    `keep`: what was wholly taken may stand (a daemon that was killed does not know what the caller
    was told). Raises the SnapdError of what could not be done now; it may be called again.
    """
    tag = operation.tag
    if keep and all(_taken(world, t, tag) for t in operation.targets):
        return [_standing(world, draft) for draft in operation.drafts]
    standing = []
    for draft in reversed(operation.drafts):
        try:
            method = world.method(draft.target.method)
            method.undo(draft.target, tag, again=operation.failed)
        except Kept as error:
            log.error("snapshot %s of domain %s stands: %s", tag.label, tag.domain_name, error)
            standing.append(_standing(world, draft))
    return standing


def _taken(world: World, target: Target, tag: Tag) -> bool:
    """Whether it was wholly taken; not, where there is no room, or no name left, to show it."""
    try:
        return world.method(target.method).taken(target, tag)
    except (NoSpace, NameInUse) as error:
        log.warning("snapshot %s of domain %s is undone: %s", tag.label, tag.domain_name, error)
        return False


def _standing(world: World, draft: Snapshot) -> Snapshot:
    """A snapshot whose Create nobody saw end: it was frozen or not, so it is called crash.

    One of a domain that was off, and is, keeps what its draft says.
    """
    try:
        domain = world.hypervisor.read(draft.domain_uuid)
    except NoSuchDomain:
        return dataclasses.replace(draft, consistency=Consistency.CRASH)
    off = not domain.active and draft.consistency is Consistency.OFFLINE
    consistency = Consistency.OFFLINE if off else Consistency.CRASH
    redirects = world.method(draft.target.method).redirects
    changed = domain.disk(draft.target.disk) if redirects else None
    return create.finish(draft, consistency, changed, freeze.Frozen())


def thaw(hypervisor: Hypervisor, held: Held, timeout: float) -> bool:
    """Try once to let a guest go on that we may hold; whether it does for certain now.

    An answer to the thaw also proves that a freeze which timed out before has been processed, as
    the agent takes its commands in order, which it can once the vCPUs run. A domain that is off or
    gone is not frozen. `timeout` is in seconds.
    """
    try:
        domain = hypervisor.read(held.domain_uuid)
        if held.stopped and domain.state == "paused":
            hypervisor.resume(held.domain_uuid)
            log.info("domain %s runs again", held.domain_name)
    except NoSuchDomain:
        return True
    except SnapdError as error:
        log.debug("domain %s can't be reached to release it: %s", held.domain_name, error)
        return False
    if not held.frozen or not domain.active or domain.agent is None:
        return True
    agent = hypervisor.agent(domain, held.agent_timeout)
    try:
        count = agent.thaw(timeout)
    except (AgentGone, AgentTimeout, AgentRefused, SnapdError) as error:
        log.debug("domain %s is not thawed yet: %s", held.domain_name, error)
        return False
    finally:
        agent.close()
    log.info("thawed %d file systems of domain %s", count, held.domain_name)
    return True
