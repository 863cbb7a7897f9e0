"""What stands in for the rest in tests of the bus: an engine in memory, a polkit on the bus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageType, RequestNameReply
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_vm.bus.polkit import INTERFACE, NAME
from snapd_vm.engine import select
from snapd_vm.engine.service import Listener
from snapd_vm.errors import InvalidState
from snapd_vm.model import (
    AgentChannel,
    Consistency,
    Disk,
    DiskReport,
    Domain,
    Found,
    Job,
    Plan,
    Request,
    Snapshot,
    SnapshotState,
    Target,
    domain_path,
    snapshot_path,
)


def uuid(number: int) -> str:
    """A UUID that one can read."""
    return f"0a0b0c0d-1111-2222-3333-{number:012d}"


def make_disk(target: str = "vda", path: str = "/pool/vm.qcow2") -> Disk:
    """A disk in a qcow2 file."""
    return Disk(
        target=target,
        device="disk",
        type="file",
        format="qcow2",
        path=path,
        source_xml=f"<source file='{path}'/>",
        xml=f"<disk type='file'><source file='{path}'/><target dev='{target}'/></disk>",
        declared_source={"type": "file", "file": path},
    )


def make_domain(number: int = 1, **changes: Any) -> Domain:
    """A running domain with one disk and an agent."""
    domain = Domain(
        uuid=uuid(number),
        name=f"vm{number}",
        id=number,
        state="running",
        driver="kvm",
        persistent=True,
        disks=(make_disk(path=f"/pool/vm{number}.qcow2"),),
        agent=AgentChannel("org.qemu.guest_agent.0", "", True),
    )
    return replace(domain, **changes)


def make_snapshot(number: int = 1, domain: int = 1, **changes: Any) -> Snapshot:
    """A snapshot of that domain's vda."""
    snapshot = Snapshot(
        uuid=uuid(1000 + number),
        name=f"label{number}",
        domain_uuid=uuid(domain),
        domain_name=f"vm{domain}",
        target=Target("qemu", "vda", {"overlay": "/pool/overlay.qcow2"}),
        created_us=1_700_000_000_000_000,
        state=SnapshotState.READY,
        consistency=Consistency.QUIESCED,
        frozen_filesystems=2,
        frozen_us=45_000,
        format="qcow2",
        size=1 << 33,
        backup_source="<source file='/pool/vm1.qcow2'/>",
        modified_disk="<disk type='file'/>",
    )
    return replace(snapshot, **changes)


def make_job(number: int = 1, **changes: Any) -> Job:
    """A job of uid 4242 that deletes the first snapshot."""
    job = Job(
        number=number,
        operation="delete",
        domain_uuid=uuid(1),
        disk="vda",
        name="label1",
        start_us=1_700_000_000_000_000,
        objects=(snapshot_path(uuid(1001)), domain_path(uuid(1))),
        uid=4242,
        cancelable=True,
        bytes=1 << 33,
    )
    return replace(job, **changes)


class FakeEngine:
    """The engine behind the seam, in memory. `work` is awaited in the place of the real work."""

    uri = "test:///default"
    methods: Sequence[str] = ("qemu",)

    def __init__(self, domains: int = 2) -> None:
        self.connected = True
        self.domains: dict[str, Domain] = {uuid(n): make_domain(n) for n in range(1, domains + 1)}
        self.snapshots: dict[str, Snapshot] = {}
        self.jobs: dict[int, Job] = {}
        self.uids: list[int] = []
        self.listeners: list[Listener] = []
        self.calls: list[tuple[str, Any]] = []
        self.work: Callable[[], Any] | None = None

    def subscribe(self, listener: Listener) -> None:
        self.listeners.append(listener)

    def tell(self, event: str, *arguments: Any) -> None:
        for listener in self.listeners:
            getattr(listener, event)(*arguments)

    def find(self, request: Request) -> Found:
        return select.find(self.domains, request)

    async def create(
        self, found: Sequence[Found], requests: Sequence[Request], uid: int
    ) -> Sequence[Snapshot]:
        self.uids.append(uid)
        for request in requests:
            await self._do("create", request)
        return [
            make_snapshot(n, modified_disk="<disk now='overlay'/>", backup_source="<source/>")
            for n, _ in enumerate(requests, 1)
        ]

    async def delete(self, snapshot_uuid: str, uid: int) -> str:
        self.uids.append(uid)
        await self._do("delete", snapshot_uuid)
        return "<disk now='base'/>"

    async def revert(self, snapshot_uuid: str, uid: int) -> str:
        self.uids.append(uid)
        await self._do("revert", snapshot_uuid)
        return "<disk now='overlay'/>"

    async def cancel(self, number: int) -> None:
        await self._do("cancel", number)
        if not self.jobs[number].cancelable:
            raise InvalidState("The job has ended; look at what came of it.")

    async def plan(self, found: Found, request: Request) -> Plan:
        await self._do("plan", request)
        return Plan("qemu", "<source/>", Consistency.QUIESCED, 1 << 40, 1 << 41, ("careful",))

    async def disks(self, domain_uuid: str) -> Sequence[DiskReport]:
        await self._do("disks", domain_uuid)
        return [DiskReport(disk, "qemu", "because") for disk in self.domains[domain_uuid].disks]

    async def set_method(self, found: Found, request: Request, method_xml: str) -> None:
        await self._do("set_method", (request, method_xml))

    async def stored_method(self, found: Found, request: Request) -> str:
        await self._do("stored_method", request)
        return "<diskSnapshot method='qemu'/>"

    async def backup_source(self, snapshot_uuid: str) -> str:
        await self._do("backup_source", snapshot_uuid)
        return self.snapshots[snapshot_uuid].backup_source

    async def modified_disk(self, snapshot_uuid: str) -> str:
        await self._do("modified_disk", snapshot_uuid)
        return self.snapshots[snapshot_uuid].modified_disk

    async def _do(self, what: str, argument: Any) -> None:
        self.calls.append((what, argument))
        if self.work is not None:
            await self.work()


@dataclass
class Question:
    """A CheckAuthorization as the stand-in got it."""

    sender: str
    action: str
    details: Mapping[str, str]
    flags: int
    cancellation_id: str


Verdict: TypeAlias = tuple[bool, bool, dict[str, str]]

YES: Verdict = (True, False, {})
NO: Verdict = (False, False, {})
CHALLENGE: Verdict = (False, True, {})
DISMISSED: Verdict = (False, False, {"polkit.dismissed": "true"})


@dataclass
class StandInPolkit:
    """Owns polkit's name and answers `verdict`, an error name, or (None) never."""

    bus: MessageBus
    verdict: Verdict | str | None = YES
    by_action: dict[str, Any] = field(default_factory=dict)
    delay: float = 0.0
    questions: list[Question] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    async def begin(self) -> None:
        self.bus.add_message_handler(self._handle)
        assert await self.bus.request_name(NAME) == RequestNameReply.PRIMARY_OWNER

    async def end(self) -> None:
        await self.bus.release_name(NAME)

    def _handle(self, message: Message) -> Message | bool | None:
        if message.message_type is not MessageType.METHOD_CALL or message.interface != INTERFACE:
            return None
        if message.member == "CancelCheckAuthorization":
            self.cancelled.append(message.body[0])
            return True
        subject, action, details, flags, cancellation_id = message.body
        assert subject[0] == "system-bus-name"
        name = subject[1]["name"]
        assert isinstance(name, Variant)
        assert name.signature == "s"
        self.questions.append(Question(name.value, action, details, flags, cancellation_id))
        verdict = self.by_action.get(action, self.verdict)
        if verdict is not None:
            asyncio.get_running_loop().call_later(self.delay, self._answer, message, verdict)
        return True

    def _answer(self, message: Message, verdict: Any) -> None:
        if isinstance(verdict, str):
            self.bus.send(Message.new_error(message, verdict, "as the test says"))
        else:
            self.bus.send(Message.new_method_return(message, "(bba{ss})", [list(verdict)]))
