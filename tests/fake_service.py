"""A service that answers as snapd-vm's contract says, from memory, for tests of the client alone.

It runs in a thread of its own, keeps every call it gets, and can be told to fail, to stay silent,
or to show a job that stands at half.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

NAME = "org.example.DiskSnapshot"
ROOT = "/org/example/DiskSnapshot"
ERROR = NAME + ".Error."
CONTRACT = (Path(__file__).parent.parent / f"data/{NAME}.xml").read_text()

UUID = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
GONE_UUID = "00000000-2fa1-11d2-883f-0016d3cca427"
DOMAIN = f"{ROOT}/domain/_{UUID.replace('-', '_')}"
SNAPSHOT = f"{ROOT}/snapshot/_aaaa"
OLD_SNAPSHOT = f"{ROOT}/snapshot/_bbbb"
JOB = f"{ROOT}/job/1"
CREATED = 1_700_000_000_123_456
SOURCE = (
    '<source xmlns:ds="https://example.org/xmlns/disk-snapshot/1" file="/srv/web.qcow2" '
    f'ds:type="file" ds:format="qcow2" ds:consistency="quiesced" ds:snapshot="{SNAPSHOT}"/>'
)
STORED = "<diskSnapshot method='qemu'/>"
MODIFIED = "<disk type='file'>\n  <source file='/srv/web.nightly'/>\n  <target dev='vda'/>\n</disk>"


def snapshot_properties(**changed: Variant) -> dict[str, Variant]:
    """The properties of the snapshot that Create makes here, with changes."""
    return {
        "Name": Variant("s", "nightly"),
        "Domain": Variant("o", DOMAIN),
        "DomainUUID": Variant("s", UUID),
        "Target": Variant("s", "vda"),
        "Method": Variant("s", "qemu"),
        "Created": Variant("t", CREATED),
        "State": Variant("s", "ready"),
        "Consistency": Variant("s", "quiesced"),
        "FrozenFilesystems": Variant("u", 2),
        "FrozenTime": Variant("t", 61_400),
        "Format": Variant("s", "qcow2"),
        "Size": Variant("t", 1_610_612_736),
    } | changed


def disk(**values: str) -> dict[str, Variant]:
    """One row of Disks."""
    return {key: Variant("s", value) for key, value in values.items()}


@dataclass
class FakeService:
    """The service; use it as a context. `fail` maps a member to (error name, message).

    A call of a member or path in `working` starts a job, which stays as it is until it is cancelled
    or finished.
    """

    address: str
    calls: list[Message] = field(default_factory=list)
    fail: dict[str, tuple[str, str]] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    working: set[str] = field(default_factory=set)
    uncancelable: bool = False
    under_way: list[Message] = field(default_factory=list)
    domain_name: str = "web"
    domain_gone: bool = False
    more: dict[str, dict[str, Any]] = field(default_factory=dict)
    plan_warnings: list[str] = field(default_factory=lambda: ["No UEFI variables are in it."])

    def __enter__(self) -> FakeService:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def leave(self) -> None:
        """Leaves the bus without an answer to the calls under way, as a daemon that dies."""

        async def disconnect() -> None:
            self._bus.disconnect()
            with suppress(EOFError):  # the bus went before us
                await self._bus.wait_for_disconnect()
            self._bus._sock.close()  # which dbus-next leaves to the collector

        asyncio.run_coroutine_threadsafe(disconnect(), self._loop).result(10)

    async def _serve(self) -> None:
        self._bus: Any = await MessageBus(bus_address=self.address).connect()
        self._bus.add_message_handler(self._answer)
        await self._bus.request_name(NAME)

    def _answer(self, message: Message) -> Message | bool:
        if message.message_type is not MessageType.METHOD_CALL:
            return False
        self.calls.append(message)
        if message.member in self.silent:
            return True
        for key in (message.member, message.path):
            if key in self.fail:
                return Message.new_error(message, *self.fail[key])
        if message.member in self.working:
            self._begin(message)
            return True
        answer = self._methods().get(str(message.member))
        if answer is None:
            unknown = "org.freedesktop.DBus.Error.UnknownMethod"
            return Message.new_error(message, unknown, f"No method {message.member}.")
        return answer(message)

    def _begin(self, call: Message) -> None:
        """Keeps the call, and tells of its job; before that, of two that are others'."""
        self.under_way.append(call)
        mine = {
            "Operation": Variant("s", str(call.member).lower()),
            "Objects": Variant("ao", [call.path]),
            "StartedByUID": Variant("u", os.geteuid()),
            "Progress": Variant("d", 0.0),
            "ProgressValid": Variant("b", False),
            "Bytes": Variant("t", 3 << 29),
        }
        somebody_elses = mine | {"StartedByUID": Variant("u", 4242)}
        of_something_else = mine | {"Objects": Variant("ao", [ROOT])}
        for number, job in ((8, somebody_elses), (9, of_something_else), (1, mine)):
            body = [f"{ROOT}/job/{number}", {NAME + ".Job": job}]
            interface = "org.freedesktop.DBus.ObjectManager"
            self._signal(ROOT, interface, "InterfacesAdded", "oa{sa{sv}}", body)
        for number, progress in ((8, 0.75), (1, 0.5)):
            changed = {"Progress": Variant("d", progress), "ProgressValid": Variant("b", True)}
            body = [NAME + ".Job", changed, []]
            interface = "org.freedesktop.DBus.Properties"
            path = f"{ROOT}/job/{number}"
            self._signal(path, interface, "PropertiesChanged", "sa{sv}as", body)

    def _signal(self, path: str, interface: str, member: str, types: str, body: list[Any]) -> None:
        self._bus.send(
            Message(
                message_type=MessageType.SIGNAL,
                path=path,
                interface=interface,
                member=member,
                signature=types,
                body=body,
            )
        )

    def finish(self) -> None:
        """Answers what is under way, as done."""

        def answer() -> None:
            while self.under_way:
                call = self.under_way.pop()
                self._bus.send(self._methods()[str(call.member)](call))

        self._loop.call_soon_threadsafe(answer)

    def _cancel(self, call: Message) -> Message:
        if self.uncancelable:
            text = "The disk is being switched: wait for its end."
            return Message.new_error(call, ERROR + "InvalidState", text)
        while self.under_way:
            text = "The call was cancelled, and what it had done is undone."
            self._bus.send(Message.new_error(self.under_way.pop(), ERROR + "Cancelled", text))
        return Message.new_method_return(call, "", [])

    def _methods(self) -> dict[str, Callable[[Message], Message]]:
        def reply(signature: str, *values: Any) -> Callable[[Message], Message]:
            return lambda call: Message.new_method_return(call, signature, list(values))

        disks = [
            disk(
                target="vda",
                device="disk",
                type="file",
                format="qcow2",
                source="<source file='/srv/web.qcow2'/>",
                method="qemu",
                reason="the image is qcow2",
            ),
            disk(
                target="sda",
                device="cdrom",
                type="file",
                format="",
                source="",
                method="",
                reason="a cdrom has no contents of its own",
            ),
        ]
        plan = {
            "method": Variant("s", "qemu"),
            "backup_source": Variant("s", SOURCE),
            "consistency": Variant("s", "quiesced"),
            "space_needed": Variant("t", 196_608),
            "space_available": Variant("t", 5 * 1024**3),
            "warnings": Variant("as", self.plan_warnings),
        }
        return {
            "CreateSet": reply("a(oss)", [[SNAPSHOT, MODIFIED, SOURCE]] * 2),
            "Create": reply("ss", MODIFIED, SOURCE),
            "Delete": reply("s", MODIFIED),
            "Revert": reply("s", MODIFIED),
            "Cancel": self._cancel,
            "Plan": reply("a{sv}", plan),
            "Disks": reply("aa{sv}", disks),
            "GetMethod": reply("s", STORED),
            "SetMethod": reply(""),
            "FindDomain": self._find_domain,
            "GetAll": self._get_all,
            "GetManagedObjects": reply("a{oa{sa{sv}}}", self._objects()),
            "Introspect": self._introspect,
        }

    def _introspect(self, call: Message) -> Message:
        folder = str(call.path).rstrip("/") + "/"
        below = {path.removeprefix(folder) for path in self._objects()}
        names = sorted({path.partition("/")[0] for path in below if not path.startswith("/")})
        nodes = "".join(f'<node name="{name}"/>' for name in names)
        text = CONTRACT.replace("</node>", nodes + "</node>")
        return Message.new_method_return(call, "s", [text])

    def _find_domain(self, call: Message) -> Message:
        if call.body[0] in (self.domain_name, UUID) and not self.domain_gone:
            return Message.new_method_return(call, "o", [DOMAIN])
        text = f"There is no domain '{call.body[0]}': see 'virsh list --all'."
        return Message.new_error(call, ERROR + "NoSuchDomain", text)

    def _get_all(self, call: Message) -> Message:
        values: dict[str, Any] = {
            NAME + ".Manager": {"Methods": Variant("as", ["qemu", "vendor"])},
            NAME + ".Domain": self._domain(),
            NAME + ".Snapshot": snapshot_properties(),
        }.get(call.body[0], {})
        return Message.new_method_return(call, "a{sv}", [values])

    def _domain(self) -> dict[str, Variant]:
        return {"Name": Variant("s", self.domain_name), "UUID": Variant("s", UUID)}

    def _objects(self) -> dict[str, dict[str, dict[str, Variant]]]:
        domains: dict[str, dict[str, dict[str, Variant]]] = {
            DOMAIN: {NAME: {}, NAME + ".Domain": self._domain()}
        }
        gone = {
            "Name": Variant("s", "old"),
            "Domain": Variant("o", f"{ROOT}/domain/_gone"),
            "DomainUUID": Variant("s", GONE_UUID),
            "Created": Variant("t", CREATED - 86_400_000_000),
            "Consistency": Variant("s", "crash"),
        }
        snapshots = {
            SNAPSHOT: {NAME + ".Snapshot": snapshot_properties()},
            OLD_SNAPSHOT: {NAME + ".Snapshot": snapshot_properties(**gone)},
        }
        for path, changes in self.more.items():
            properties = snapshot_properties()
            changed = {name: Variant(properties[name].signature, changes[name]) for name in changes}
            snapshots[path] = {NAME + ".Snapshot": properties | changed}
        return ({} if self.domain_gone else domains) | snapshots

    def last(self, member: str) -> Message:
        """The last call of this member."""
        return next(call for call in reversed(self.calls) if call.member == member)

    def asked_with(self, member: str) -> MessageFlag:
        """The flags of the last call of this member."""
        return self.last(member).flags
