"""The guard: message -> sender -> polkit -> method -> reply, for every call, answered exactly once.

Holds every task until it is done; no other part answers a call. It does not know what a method
does, and a method can't get past it: what a Prepared holds is run here and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from snapd_vm.bus.caller import user_of
from snapd_vm.bus.calls import (
    Action,
    Declared,
    Guarded,
    Open,
    Owned,
    Ownership,
    Prepared,
    PreparedJob,
    method_table,
)
from snapd_vm.bus.connection import Connection, decode
from snapd_vm.bus.contract import PEER, Contract, MethodSignature
from snapd_vm.bus.polkit import Authority
from snapd_vm.bus.refusals import LimitsExceeded, UnknownInterface, UnknownMethod, UnknownObject
from snapd_vm.bus.tree import INTERFACES, Node, Tree
from snapd_vm.bus.wire import Incoming
from snapd_vm.errors import Cancelled, Internal, InvalidArgs, SnapdError

log = logging.getLogger(__name__)

_CUT_OFF = "The service stopped before the call's end; when it is back, look at what came of it."

CALLS_PER_SENDER = 120
"""The bus itself answers what goes beyond 128 (dbus-daemon(1), max_replies_per_connection)."""
CALLS_AT_ONCE = 1024
ARRAYS_LIMIT = 256 * 1024
"""Bytes of arguments with an array in them: it takes the loop 1 µs and more to read each element,
and 32 MiB, which the bus lets through, hold millions."""


Run: TypeAlias = Callable[[], Awaitable[Sequence[object]]]
"""What does a call's work, for who may."""


@dataclass(slots=True)
class Running:
    """A guarded call in progress. `checking`: polkit has not said yes, nothing has been begun."""

    call: Incoming
    checking: bool = True
    sender_left: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What a call is for. `node` is None for Peer at a path where there is no object."""

    node: Node | None
    method: Declared
    signature: MethodSignature


class Guard:
    """Takes the calls of a connection. Raises ValueError if methods and contract differ."""

    def __init__(
        self,
        connection: Connection,
        tree: Tree,
        authority: Authority,
        methods: Sequence[Declared],
        per_sender: int = CALLS_PER_SENDER,
        at_once: int = CALLS_AT_ONCE,
    ) -> None:
        self._connection = connection
        self._tree = tree
        self._authority = authority
        self._methods = method_table(methods)
        self._per_sender = per_sender
        self._at_once = at_once
        self._running: dict[asyncio.Task[Sequence[object]], Running] = {}
        self._senders: Counter[str] = Counter()
        self._checking = 0
        self._closing = False
        compare(self._methods, tree.contract)

    @property
    def in_progress(self) -> int:
        """How many guarded calls are in progress."""
        return len(self._running)

    def take(self, call: Incoming) -> None:
        """Answers a call at once, or starts the task that does. Raises nothing."""
        try:
            found = self._find(call)
            arguments = _arguments(call, found.signature)
            if isinstance(found.method, Open):
                answer = found.method.answer(self._tree, found.node, *arguments)
                self._connection.answer(call, found.signature.gives, answer)
                return
            self._admit(call)
        except Exception as error:
            self._refuse(call, error)
            return
        running = Running(call)
        self._senders[call.sender] += 1
        task = asyncio.get_running_loop().create_task(
            self._serve(running, found.method, found.node, arguments)
        )
        self._running[task] = running
        # The answer is given by the callback, as a task cancelled before its first step runs none
        # of its own code.
        task.add_done_callback(partial(self._done, found.signature.gives))

    def left(self, sender: str) -> None:
        """The sender has left the bus: its open questions to polkit are taken back.

        What polkit has agreed to goes on.
        """
        if sender not in self._senders:
            return
        for task, running in self._running.items():
            if running.call.sender == sender:
                running.sender_left = True
                if running.checking:
                    task.cancel()

    async def close(self, limit: float) -> None:
        """Takes no more calls and waits at most `limit` seconds for those in progress.

        Questions to polkit are taken back at once. What is left after the limit is answered with
        Cancelled.
        """
        self._closing = True
        for task, running in self._running.items():
            if running.checking:
                task.cancel()
        if self._running:
            await asyncio.wait(list(self._running), timeout=limit)
        left = list(self._running)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=1.0)

    def _find(self, call: Incoming) -> Found:
        node = self._tree.resolve(call.path)
        if node is None:
            if call.interface in ("", PEER) and (object, PEER, call.member) in self._methods:
                return self._found(None, object, PEER, call.member)
            raise UnknownObject("There is no object at this path.")
        names = self._tree.interfaces(node)
        if call.interface and call.interface not in names:
            raise UnknownInterface(
                "This object has no such interface; introspect it to see those it has."
            )
        for name in [call.interface] if call.interface else names:
            for kind in (type(node), object):
                if (kind, name, call.member) in self._methods:
                    return self._found(node, kind, name, call.member)
        raise UnknownMethod("This object has no such method; introspect it to see those it has.")

    def _found(self, node: Node | None, kind: type, interface: str, member: str) -> Found:
        signature = self._tree.contract.interface(interface).methods[member]
        return Found(node, self._methods[kind, interface, member], signature)

    def _admit(self, call: Incoming) -> None:
        if self._closing:
            raise Cancelled("The service is stopping; call again when it is back.")
        if self._senders[call.sender] >= self._per_sender or len(self._running) >= self._at_once:
            raise LimitsExceeded("Too many calls are in progress; wait for some to be answered.")

    async def _serve(
        self, running: Running, method: Guarded | Owned, node: Node | None, arguments: Sequence[Any]
    ) -> Sequence[object]:
        # Prepared here and not later: what can't be understood is not worth a question.
        if isinstance(method, Owned):
            prepared = method.prepare(self._tree, node, *arguments)
            allowed = self._owned(running.call, method.ownership(node), prepared)
        else:
            wanted = method.prepare(self._tree, node, *arguments)
            allowed = self._guarded(running.call, method.action, wanted)
        self._watch(+1)
        try:
            run = await allowed
        finally:
            self._watch(-1)
        running.checking = False
        return await run()

    async def _guarded(
        self, call: Incoming, action: Action, prepared: Prepared | PreparedJob
    ) -> Run:
        """What to run, once polkit has said yes."""
        if isinstance(prepared, Prepared):
            await self._check(call, action, prepared)
            return prepared.run
        # The bus is asked who calls while polkit thinks: it costs no time of its own.
        asking = asyncio.create_task(user_of(self._connection, call.sender))
        asking.add_done_callback(_looked_at)
        try:
            await self._check(call, action, prepared)
            return partial(prepared.start, await asking)
        finally:
            asking.cancel()

    async def _owned(self, call: Incoming, ownership: Ownership, prepared: Prepared) -> Run:
        """What to run, for the owner at once, for others once polkit has said yes."""
        if await user_of(self._connection, call.sender) != ownership.uid:
            await self._check(call, ownership.action, prepared)
        return prepared.run

    async def _check(
        self, call: Incoming, action: Action, prepared: Prepared | PreparedJob
    ) -> None:
        await self._authority.check(
            call.sender, (action, *prepared.also), prepared.details, call.interactive
        )

    def _watch(self, change: int) -> None:
        """Has the bus tell who leaves as long as polkit is being asked, and not otherwise."""
        before = self._checking
        self._checking += change
        if bool(before) != bool(self._checking):
            self._connection.watch_leaving(bool(self._checking))

    def _done(self, signature: str, task: asyncio.Task[Sequence[object]]) -> None:
        running = self._running.pop(task)
        sender = running.call.sender
        self._senders[sender] -= 1
        if not self._senders[sender]:
            del self._senders[sender]
        error = Cancelled(_CUT_OFF) if task.cancelled() else task.exception()
        if running.sender_left:
            log.info("the caller %s of %s has left", sender, running.call.member)
            if error is not None and not isinstance(error, SnapdError):
                log.error("%s failed", running.call.member, exc_info=error)
        elif error is not None:
            self._refuse(running.call, error)
        else:
            try:
                self._connection.answer(running.call, signature, task.result())
            except Exception as unfit:
                self._refuse(running.call, unfit)

    def _refuse(self, call: Incoming, error: BaseException) -> None:
        """Answers with an error. One that is not meant for callers stays in the log."""
        if not isinstance(error, SnapdError):
            log.error("%s.%s failed", call.interface, call.member, exc_info=error)
            error = Internal("Something went wrong in the service; see its log.")
        try:
            self._connection.answer_error(call, error.dbus_name, str(error))
        except Exception:
            log.exception("an error could not be answered")


def _looked_at(task: asyncio.Task[int]) -> None:
    """Takes note of an error that nobody waits for any more, as polkit has refused already."""
    if not task.cancelled():
        task.exception()


def _arguments(call: Incoming, signature: MethodSignature) -> Sequence[Any]:
    """The arguments of a call. Raises InvalidArgs.

    A variant is never read: only Properties.Set takes one, as its last argument, and what is in it
    may be anything.
    """
    if call.signature != signature.takes:
        raise InvalidArgs(f"This method takes arguments of the signature {signature.takes!r}.")
    if "a" in signature.takes and len(call.body) > ARRAYS_LIMIT:
        raise LimitsExceeded(f"The arguments must be at most {ARRAYS_LIMIT} bytes long.")
    return decode(call, signature.takes.removesuffix("v"))


def compare(methods: Mapping[tuple[type, str, str], Declared], contract: Contract) -> None:
    """Raises ValueError unless every method of the contract is declared once, and no other."""
    wanted = {
        (kind, name, member)
        for kind, names in INTERFACES.items()
        for name in names
        for member in contract.own[name].methods
    }
    standard = {
        (name, member)
        for name, interface in contract.standard.items()
        for member in interface.methods
    }
    declared = {key for key in methods if (key[1], key[2]) not in standard}
    missing = {str(key) for key in wanted - declared}
    missing |= {str(key) for key in standard - {(key[1], key[2]) for key in methods}}
    surplus = {str(key) for key in declared - wanted}
    if missing or surplus:
        raise ValueError(f"not declared: {sorted(missing)}; not in the contract: {sorted(surplus)}")
