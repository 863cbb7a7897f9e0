"""Asks polkit whether the sender of a call may do something; raises where the answer is not yes.

Where polkitd is absent, root may and nobody else. Where it fails, nobody may. Knows no method.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from snapd_vm.bus.caller import user_of
from snapd_vm.bus.calls import Action, Details
from snapd_vm.bus.connection import Connection
from snapd_vm.bus.remote import CallFailed, ConnectionLost, Remote
from snapd_vm.bus.wire import Typed
from snapd_vm.errors import NotAuthorized, NotAuthorizedCanObtain, NotAuthorizedDismissed

log = logging.getLogger(__name__)

NAME = "org.freedesktop.PolicyKit1"
PATH = "/org/freedesktop/PolicyKit1/Authority"
INTERFACE = NAME + ".Authority"
CHECK = Remote(NAME, PATH, INTERFACE, "CheckAuthorization", "(sa{sv})sa{ss}us", "(bba{ss})")
CANCEL = Remote(NAME, PATH, INTERFACE, "CancelCheckAuthorization", "s", "")
ALLOW_USER_INTERACTION = 1
LIMIT_S = 25.0
INTERACTIVE_LIMIT_S = 300.0
"""A person types a password in this time, or not at all."""

AT_ONCE = {False: 64, True: 48}
"""Questions, and those a person may be asked, that wait for polkit's answer. Of one connection the
bus lets 128 calls wait (dbus-daemon(1), max_replies_per_connection), and refuses what is beyond."""

ABSENT = frozenset(
    {
        "org.freedesktop.DBus.Error.ServiceUnknown",
        "org.freedesktop.DBus.Error.NameHasNoOwner",
        "org.freedesktop.systemd1.NoSuchUnit",
        "org.freedesktop.systemd1.UnitMasked",
        "org.freedesktop.systemd1.LoadFailed",
    }
)
ABSENT_PREFIX = "org.freedesktop.DBus.Error.Spawn."
"""What the bus answers when nothing owns polkit's name and activating it did not help."""


class Authority(Protocol):
    """Who decides whether the sender of a call may do something."""

    async def check(
        self, sender: str, actions: Sequence[Action], details: Details, interactive: bool
    ) -> None:
        """Returns if all the actions are granted.

        Raises NotAuthorized, NotAuthorizedCanObtain, NotAuthorizedDismissed.
        """


class Polkit:
    """polkitd, over the same connection (polkit's D-Bus API, CheckAuthorization)."""

    def __init__(
        self,
        connection: Connection,
        limit: float = LIMIT_S,
        interactive_limit: float = INTERACTIVE_LIMIT_S,
    ) -> None:
        self._connection = connection
        self._limit = limit
        self._interactive_limit = interactive_limit
        self._ids = itertools.count(1)
        self._asking = {
            interactive: asyncio.Semaphore(most) for interactive, most in AT_ONCE.items()
        }

    async def check(
        self, sender: str, actions: Sequence[Action], details: Details, interactive: bool
    ) -> None:
        """As Authority.check. Cancelled, it takes the question back from polkit."""
        for action in actions:
            await self._check_one(sender, action, details, interactive)

    async def _check_one(
        self, sender: str, action: Action, details: Details, interactive: bool
    ) -> None:
        try:
            granted, challenge, answered = await self._ask_all(sender, action, details, interactive)
        except CallFailed as error:
            if error.name in ABSENT or error.name.startswith(ABSENT_PREFIX):
                await self._root_only(sender, error)
                return
            log.error("polkit could not decide on %s for %s: %s", action, sender, error)
            raise NotAuthorized(
                f"polkit could not decide on {action}; see the log of the service."
            ) from error
        except TimeoutError as error:
            log.error("polkit did not decide on %s for %s in time", action, sender)
            raise NotAuthorized(
                f"polkit did not decide on {action} in time; call again."
            ) from error
        except ConnectionLost as error:
            raise NotAuthorized("The connection to the system bus was lost; call again.") from error
        if granted:
            return
        log.info(
            "polkit refused %s to %s (domain %r, disk %r)",
            action,
            sender,
            details.domain,
            details.disk,
        )
        if "polkit.dismissed" in answered:
            raise NotAuthorizedDismissed(
                f"The question for {action} was dismissed; call again to be asked again."
            )
        if challenge:
            raise NotAuthorizedCanObtain(
                f"{action} needs authentication; call again with interactive authorization "
                "allowed and an authentication agent running."
            )
        raise NotAuthorized(f"polkit does not allow {action}; ask the administrator for a rule.")

    async def _ask_all(
        self, sender: str, action: Action, details: Details, interactive: bool
    ) -> Sequence[Any]:
        """One question; two where a person may be asked and we know more than the caller said.

        The first is for the rules, with all that they may match; the second, which the caller's own
        agent is shown, has only what the caller named.
        """
        named = details.named
        if not interactive or named is None or named.for_polkit() == details.for_polkit():
            return await self._ask(sender, action, details, interactive)
        verdict = await self._ask(sender, action, details, interactive=False)
        granted, challenge, _ = verdict
        if granted or not challenge:
            return verdict
        return await self._ask(sender, action, named, interactive=True)

    async def _ask(
        self, sender: str, action: Action, details: Details, interactive: bool
    ) -> Sequence[Any]:
        question = f"snapd-vm-{next(self._ids)}"
        subject = ("system-bus-name", {"name": Typed("s", sender)})
        flags = ALLOW_USER_INTERACTION if interactive else 0
        limit = self._interactive_limit if interactive else self._limit
        try:
            async with asyncio.timeout(limit), self._asking[interactive]:
                (answer,) = await self._connection.call(
                    CHECK, [subject, action, details.for_polkit(), flags, question], limit
                )
        except (asyncio.CancelledError, TimeoutError):
            self._connection.tell(CANCEL, [question])
            raise
        return list(answer)

    async def _root_only(self, sender: str, why: CallFailed) -> None:
        uid = await user_of(self._connection, sender, self._limit)
        if uid != 0:
            log.warning("polkit is not there (%s): refused the call of uid %d", why.name, uid)
            raise NotAuthorized("polkit is not running, so that only root may do this; start it.")
