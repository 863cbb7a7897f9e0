"""What every other part speaks: frozen data about domains, disks, requests and snapshots.

No behaviour beyond what follows from the data itself, and no import of any other part but errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntFlag, StrEnum
from typing import TypeAlias

from snapd_vm.errors import SnapdError

NAMESPACE = "https://example.org/xmlns/disk-snapshot/1"
"""The XML namespace of what we add to `<source>`."""

Result: TypeAlias = Mapping[str, str | Sequence[str]]
"""What a job has come to, by name."""

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"

BUILT_IN_METHODS = frozenset({"qemu", "lvm", "btrfs", "zfs", "reflink", "rbd"})
"""The names of the contract's own methods, whether they are there or not."""

RESERVED_METHODS = BUILT_IN_METHODS | {"backup"}
"""The names that a method from outside can't have."""


class Flags(IntFlag):
    """The flags of Create, Plan and CreateSet."""

    QUIESCE_REQUIRED = 1
    NO_QUIESCE = 2


class Consistency(StrEnum):
    """How consistent a snapshot is, strongest first; what was achieved, never what was asked."""

    OFFLINE = "offline"
    QUIESCED = "quiesced"
    PAUSED = "paused"
    CRASH = "crash"


class SnapshotState(StrEnum):
    """The State of a Snapshot object."""

    READY = "ready"
    DELETING = "deleting"
    REVERTING = "reverting"
    DETACHED = "detached"
    FAILED = "failed"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class AgentChannel:
    """The channel on which a domain's guest agent listens.

    `socket` is empty where libvirt owns the channel (`org.qemu.guest_agent.0`); otherwise it is the
    path of the unix socket that QEMU listens on. `connected` is what the live XML says of the
    guest's end of the channel; it stays true while an agent hangs.
    """

    name: str
    socket: str
    connected: bool


@dataclass(frozen=True, slots=True)
class Disk:
    """One `<disk>` of a domain, as libvirt's own XML describes it.

    `path` is the file or device that holds the active image, with a pool's volume resolved; empty
    where there is none (network source, empty drive). `type` and `source_xml` are resolved the same
    way; `declared_source` holds the attributes of `<source>` as the domain's XML has them, with
    "type", to compare with what a caller says. `chain` are the paths of the `<backingStore>`s that
    the XML names, nearest first. `address` is the guest's PCI address ("0000:01:00.0") or empty.
    """

    target: str
    device: str
    type: str
    format: str
    path: str
    source_xml: str
    xml: str
    declared_source: Mapping[str, str] = field(default_factory=dict)
    chain: tuple[str, ...] = ()
    address: str = ""
    serial: str = ""
    readonly: bool = False
    shareable: bool = False
    transient: bool = False
    encrypted: bool = False
    mirror: bool = False


@dataclass(frozen=True, slots=True)
class Domain:
    """A libvirt domain as the daemon holds it in memory.

    `id` is libvirt's number of the running instance, -1 when it is off. `disks` are those in use
    (the live XML of an active domain); `persistent_disks` those of the definition that the next
    start will use (equal for a domain that is off, empty for a transient one). `driver` is the
    domain's type (kvm, qemu, test ...). `migrated`: it is off here, and runs on another host.
    `methods` are the `<diskSnapshot>`s stored in its metadata, by target, as somebody wrote them.
    """

    uuid: str
    name: str
    id: int
    state: str
    driver: str
    persistent: bool
    disks: tuple[Disk, ...]
    persistent_disks: tuple[Disk, ...] = ()
    agent: AgentChannel | None = None
    nvram: bool = False
    tpm: bool = False
    migrated: bool = False
    methods: Mapping[str, str] = field(default_factory=dict)

    @property
    def flushes(self) -> bool:
        """Whether what runs it writes out what it buffers when it stops the vCPUs, as QEMU does."""
        return self.driver in ("qemu", "kvm", "hvf")

    @property
    def active(self) -> bool:
        """Whether an instance is running or paused."""
        return self.id != -1

    def disk(self, target: str) -> Disk | None:
        """The disk with this `<target dev>`, or None."""
        return next((d for d in self.disks if d.target == target), None)

    def persistent_disk(self, target: str) -> Disk | None:
        """The same in the definition that the next start will use."""
        return next((d for d in self.persistent_disks if d.target == target), None)


@dataclass(frozen=True, slots=True)
class MethodRequest:
    """A `<diskSnapshot>` that passed the schema.

    `options` are its details flattened: `overlay` (file), `device` (path), `size` (bytes, as text),
    `subvolume` (path), `dataset` (name), `image` ("pool/name"). Those of a method from `outside`
    are the attributes of its elements ("volume/@name") and their text ("volume"). `names_place` is
    true where it names an overlay or a layer, which needs the action `configure` besides `create`;
    what an element of a method from outside names nobody here knows, so it counts as a place.
    """

    method: str
    options: Mapping[str, str] = field(default_factory=dict)
    outside: bool = False

    @property
    def names_place(self) -> bool:
        """Whether it names an overlay or a layer, or may do so."""
        return any(self.outside or key != "size" for key in self.options)


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """What a caller's `<disk>` says: target, source attributes (with "type" if given), method."""

    target: str = ""
    source: Mapping[str, str] = field(default_factory=dict)
    method: MethodRequest | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A parsed Create or Plan. `domain` is a name, `uuid` a UUID; both empty: not said."""

    disk: DiskRequest
    method: MethodRequest | None
    name: str
    flags: Flags
    domain: str = ""
    uuid: str = ""

    @property
    def wanted_method(self) -> MethodRequest | None:
        """The method that the caller asked for: the argument before the embedded one."""
        return self.method or self.disk.method


@dataclass(frozen=True, slots=True)
class Found:
    """What a request refers to, from memory alone; `error` is raised after authorisation only.

    Details of the polkit check are taken from here, so that a disk that is not there looks to a
    caller without the right like one that is.
    """

    domain: Domain | None = None
    disk: Disk | None = None
    error: SnapdError | None = None


@dataclass(frozen=True, slots=True)
class Tag:
    """What names a snapshot on its storage and in its metadata.

    `operation` is the UUID of the Create that takes it, which is that of its first snapshot; '' of
    a snapshot that is on record.
    """

    uuid: str
    label: str
    domain_uuid: str
    domain_name: str
    created_us: int
    operation: str = ""

    @property
    def storage_name(self) -> str:
        """The name given to storages that name their snapshots."""
        return f"snapd-vm-{self.uuid}"


@dataclass(frozen=True, slots=True)
class Target:
    """A disk that a method has claimed: what the method needs to act on it, as JSON.

    It goes into the journal, so `data` holds nothing but JSON values. `size` is the disk's virtual
    size in bytes, 0 before it was asked for.
    """

    method: str
    disk: str
    data: Mapping[str, Json]
    size: int = 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method says at check time: room in bytes, warnings for Plan, and the chain.

    `chains` is how many images the chain of each disk will have, if it does not stay as it is.
    """

    space_needed: int = 0
    space_available: int = 0
    warnings: tuple[str, ...] = ()
    chains: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer of Plan."""

    method: str
    backup_source: str
    consistency: Consistency
    space_needed: int
    space_available: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DiskReport:
    """One row of Disks: what Create would do with the disk, and why."""

    disk: Disk
    method: str
    reason: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot on record. Times in µs (`created_us` since the epoch), `size` in bytes.

    `target` is the method's own Target; its `disk` is the `<target dev>` of the disk. `spoilt`: a
    delete was broken off when it had begun to write into what the snapshot is, so that it is none
    any more and can only be deleted.
    """

    uuid: str
    name: str
    domain_uuid: str
    domain_name: str
    target: Target
    created_us: int
    state: SnapshotState
    consistency: Consistency
    frozen_filesystems: int
    frozen_us: int
    format: str
    size: int
    backup_source: str
    modified_disk: str
    spoilt: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """An operation that takes longer than a moment, as its object on the bus tells of it.

    `operation`: create, delete ... `progress` is from 0 to 1 and means something only if
    `progress_valid`; `bytes` is how much there is to do in all, 0 if unknown; `start_us` counts
    from the epoch; `objects` are the paths of what it works on. `domain_uuid`, `disk` and `name`
    are for polkit's details of Cancel. `result` holds the out arguments of the call by their names,
    once `done`.
    """

    number: int
    operation: str
    domain_uuid: str
    disk: str
    name: str
    start_us: int
    objects: tuple[str, ...]
    uid: int
    cancelable: bool = False
    progress: float = 0.0
    progress_valid: bool = False
    bytes: int = 0
    done: bool = False
    result: Result = field(default_factory=dict)


ROOT_PATH = "/org/example/DiskSnapshot"
"""The root object on the bus."""


def domain_path(uuid: str) -> str:
    """The object path of the domain with this UUID."""
    return f"{ROOT_PATH}/domain/_{uuid.replace('-', '_')}"


def snapshot_path(uuid: str) -> str:
    """The object path of the snapshot with this UUID."""
    return f"{ROOT_PATH}/snapshot/_{uuid.replace('-', '_')}"


def job_path(number: int) -> str:
    """The object path of the job with this number."""
    return f"{ROOT_PATH}/job/{number}"
