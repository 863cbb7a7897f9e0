"""The daemon as its clients see it: calls on the bus, answers as values, errors as ApiError."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dbus_next.constants import MessageType
from dbus_next.signature import Variant
from lxml import etree

from snapd_vm.errors import PREFIX
from snapd_vm.model import NAMESPACE, ROOT_PATH, domain_path
from tests.bus.clients import Client
from tests.lab.guest import Guest

NAME = "org.example.DiskSnapshot"
DOMAIN = f"{NAME}.Domain"
SNAPSHOT = f"{NAME}.Snapshot"
MANAGER = f"{NAME}.Manager"

QUIESCE_REQUIRED = 1
NO_QUIESCE = 2

VDA = "<disk><target dev='vda'/></disk>"


class ApiError(Exception):
    """A D-Bus error; `name` without our prefix, where it has it."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name.removeprefix(PREFIX)
        self.text = text


@dataclass(frozen=True)
class Created:
    """An answer of Create."""

    modified_disk: str
    backup_source: str

    @property
    def source(self) -> etree._Element:
        return etree.fromstring(self.backup_source)

    def ours(self, attribute: str) -> str:
        """An attribute in our namespace."""
        return self.source.get(f"{{{NAMESPACE}}}{attribute}") or ""

    @property
    def file(self) -> str:
        """The file or device to read."""
        return self.source.get("file") or self.source.get("dev") or ""

    @property
    def snapshot(self) -> str:
        """The object path of the snapshot."""
        return self.ours("snapshot")

    @property
    def overlay(self) -> str:
        """The file that the domain writes to now."""
        source = etree.fromstring(self.modified_disk).find("source")
        assert source is not None
        return source.get("file") or ""


def path_of(guest: Guest) -> str:
    """The object path of a guest's domain."""
    return domain_path(guest.uuid)


class Api:
    """One client on the bus."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def call(
        self, path: str, interface: str, member: str, signature: str = "", *args: Any
    ) -> list[Any]:
        """Any call; its answer's values, variants unwrapped."""
        answer = await self.client.call(interface, member, signature, list(args), path, limit=120)
        if answer.message_type is MessageType.ERROR:
            raise ApiError(answer.error_name, str(answer.body[0]) if answer.body else "")
        return [_plain(value) for value in answer.body]

    async def create(
        self,
        guest: Guest,
        disk_xml: str = VDA,
        method_xml: str = "",
        name: str = "",
        flags: int = 0,
    ) -> Created:
        """Create on the guest's domain object."""
        args = (disk_xml, method_xml, name, flags)
        return Created(*await self.call(path_of(guest), NAME, "Create", "sssu", *args))

    async def create_set(
        self, guest: Guest, *disks: str | tuple[str, str], name: str = "", flags: int = 0
    ) -> list[tuple[str, Created]]:
        """CreateSet of these targets, each with a method's XML if it is a pair: path and answer."""
        pairs = [(disk, "") if isinstance(disk, str) else disk for disk in disks]
        given = [[f"<disk><target dev='{target}'/></disk>", method] for target, method in pairs]
        rows = (
            await self.call(path_of(guest), DOMAIN, "CreateSet", "a(ss)su", given, name, flags)
        )[0]
        return [(path, Created(modified, source)) for path, modified, source in rows]

    async def create_on_root(
        self, disk_xml: str, method_xml: str = "", name: str = "", flags: int = 0
    ) -> Created:
        """Create on the root object."""
        args = (disk_xml, method_xml, name, flags)
        return Created(*await self.call(ROOT_PATH, NAME, "Create", "sssu", *args))

    async def plan(
        self,
        guest: Guest,
        disk_xml: str = VDA,
        method_xml: str = "",
        name: str = "",
        flags: int = 0,
    ) -> dict[str, Any]:
        """Plan on the guest's domain object."""
        args = (disk_xml, method_xml, name, flags)
        found: dict[str, Any] = (await self.call(path_of(guest), DOMAIN, "Plan", "sssu", *args))[0]
        return found

    async def disks(self, guest: Guest) -> list[dict[str, str]]:
        """Disks of the guest's domain object."""
        found: list[dict[str, str]] = (await self.call(path_of(guest), DOMAIN, "Disks"))[0]
        return found

    async def properties(self, path: str, interface: str) -> dict[str, Any]:
        """GetAll."""
        found: dict[str, Any] = (
            await self.call(path, "org.freedesktop.DBus.Properties", "GetAll", "s", interface)
        )[0]
        return found

    async def snapshots(self) -> dict[str, dict[str, Any]]:
        """The properties of all snapshots, by object path."""
        objects = (
            await self.call(ROOT_PATH, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        )[0]
        return {path: found[SNAPSHOT] for path, found in objects.items() if SNAPSHOT in found}

    async def snapshots_of(self, guest: Guest) -> dict[str, dict[str, Any]]:
        """The same for one guest."""
        found = await self.snapshots()
        return {path: row for path, row in found.items() if row["DomainUUID"] == guest.uuid}

    async def backup_source(self, path: str) -> str:
        """GetBackupSource."""
        return str((await self.call(path, SNAPSHOT, "GetBackupSource"))[0])


def _plain(value: Any) -> Any:
    if isinstance(value, Variant):
        return _plain(value.value)
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value
