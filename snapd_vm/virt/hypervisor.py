"""What we ask of libvirt about domains and their disks, one blocking function each.

Runs in worker threads. Every function takes a connection of its own from the pool, raises
SnapdErrors only, and holds no state. Waiting is libvirt's: a call to a hung libvirtd ends by
keep-alive within 20 s, a call on a domain with a stuck job after 30 s (qemu driver).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import libvirt
from lxml import etree

from snapd_vm.errors import HypervisorUnavailable, InvalidXML, StorageFailed
from snapd_vm.model import NAMESPACE, Domain
from snapd_vm.virt import blockcommit, domainxml, mend, methodxml, secrets, users
from snapd_vm.virt.agent import Agent
from snapd_vm.virt.agentlibvirt import LibvirtAgent
from snapd_vm.virt.agentsocket import SocketAgent
from snapd_vm.virt.connection import ConnectionPool
from snapd_vm.virt.sourcexml import image_in_pool

T = TypeVar("T")

_STATES = {
    libvirt.VIR_DOMAIN_NOSTATE: "nostate",
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "blocked",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_SHUTOFF: "shutoff",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "pmsuspended",
}

_IN_NETWORK = libvirt.VIR_STORAGE_VOL_NETWORK

_SNAPSHOT_FLAGS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
)


@dataclass(frozen=True, slots=True)
class OffState:
    """Why a domain is off: `reason` is libvirt's virDomainShutoffReason."""

    reason: int
    managed_save: bool

    @property
    def known_clean(self) -> bool:
        """Shut down by its guest or by request, and not saved."""
        return self.reason == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN and not self.managed_save

    @property
    def unknown(self) -> bool:
        """libvirt has forgotten, as it does when it is restarted."""
        return self.reason == libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN and not self.managed_save

    @property
    def migrated(self) -> bool:
        """It runs on another host now."""
        return bool(self.reason == libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED)


class Hypervisor:
    """The functions of one libvirt, by way of its connection pool."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._qemu_user: tuple[int, int] | None = None

    def read(self, uuid: str) -> Domain:
        """The domain as libvirt describes it now. Raises NoSuchDomain."""
        with self._pool.domain(uuid) as domain:
            return read_domain(domain)

    def redefine_disk(
        self, uuid: str, target: str, path: str, disk_type: str, image_format: str
    ) -> None:
        """Let the persistent definition say another image for one disk (virDomainDefineXML).

        An explicit backing chain of that disk is left out of it, as it is no longer true.
        """
        with self._pool.connection() as connection:
            flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
            xml = connection.lookupByUUIDString(uuid).XMLDesc(flags)
            connection.defineXML(
                domainxml.replace_source(xml, target, path, disk_type, image_format)
            )

    def writes_to(self, uuid: str, overlay: str) -> bool:
        """Whether QEMU itself says that a running domain writes to `overlay`."""
        return mend.Monitor(self._pool, uuid).writes_to(overlay)

    def commit_behind(self, uuid: str, overlay: str, origin: str, timeout: float) -> None:
        """Commit an overlay that QEMU writes to unknown to libvirt, and drop it."""
        mend.Monitor(self._pool, uuid).commit_behind(overlay, origin, timeout)

    def drop_nodes(self, uuid: str, overlay: str) -> None:
        """Close an overlay that QEMU has open, unused and unknown to libvirt."""
        mend.Monitor(self._pool, uuid).drop_nodes(overlay)

    def user_of(
        self, path: str, uuid: str, target: str, known: Sequence[str] = (), *, beside: bool = True
    ) -> str:
        """Who else has the image in its chain, in words; '' for nobody (see users.py).

        Every definition is read anew: libvirt sends no event for a change to one that is not live
        (virDomainAttachDeviceFlags with AFFECT_CONFIG).
        """
        with self._pool.connection() as connection:
            domains = _definitions(connection)
        folders = self.pool_folders()
        return users.user_of(path, uuid, target, domains, folders, known, beside=beside)

    def user_of_snapshot(self, name: str) -> str:
        """Whose disk reads the storage's own snapshot of this name, in words; '' for nobody's.

        Every definition is read anew, as for `user_of`.
        """
        with self._pool.connection() as connection:
            domains = _definitions(connection)
        return users.user_of_snapshot(name, domains)

    def secret(self, uuid: str, usage: str) -> str:
        """The key in a libvirt secret for Ceph, by its UUID or else its usage name, as base64.

        It is for nobody but the cluster. Raises StorageFailed.
        """
        with self._pool.connection() as connection:
            return secrets.ceph_key(connection, uuid, usage)

    def agent(self, domain: Domain, former_timeout: int | None = None) -> Agent:
        """The domain's guest agent, for one operation: by way of libvirt, or by its own socket."""
        if domain.agent is not None and domain.agent.socket:
            return SocketAgent(domain.agent.socket, domain.disks)
        return LibvirtAgent(self._pool, domain.uuid, domain.name, former_timeout)

    def off_state(self, uuid: str) -> OffState:
        """Why the domain is off, and whether it has a managed save image."""
        with self._pool.domain(uuid) as domain:
            _, reason = domain.state()
            return OffState(reason, bool(_if_supported(domain.hasManagedSaveImage)))

    def managed_save(self, uuid: str) -> bool:
        """Whether the domain has a managed save image."""
        with self._pool.domain(uuid) as domain:
            return bool(_if_supported(domain.hasManagedSaveImage))

    def checkpoints(self, uuid: str) -> bool:
        """Whether the domain has checkpoints (refuse offline disk-only snapshots)."""
        with self._pool.domain(uuid) as domain:
            return bool(_if_supported(domain.listAllCheckpoints))

    def running_job(self, uuid: str, target: str) -> str:
        """What occupies the domain or the disk: a block job, backup, migration or save; or ''."""
        with self._pool.domain(uuid) as domain:
            try:
                if _if_supported(lambda: domain.blockJobInfo(target)):
                    return "a block job is running on the disk"
                stats = _if_supported(domain.jobStats) or {}
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID:  # it is off
                    return ""
                raise
            if stats.get("type", 0) not in (
                libvirt.VIR_DOMAIN_JOB_BOUNDED,
                libvirt.VIR_DOMAIN_JOB_UNBOUNDED,
            ):
                return ""
            if stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP:
                return "a backup of the domain is running"
            return "a migration, save or other job of the domain is running"

    def suspend(self, uuid: str) -> None:
        """Stop the domain's vCPUs; QEMU flushes its buffers (virDomainSuspend)."""
        with self._pool.domain(uuid) as domain:
            domain.suspend()

    def resume(self, uuid: str) -> bool:
        """Let the domain's vCPUs run (virDomainResume); whether they stood still until now."""
        with self._pool.domain(uuid) as domain:
            stood = bool(domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED)
            if stood:
                domain.resume()
            return stood

    def capacity(self, uuid: str, target: str) -> int:
        """The virtual size of the disk in bytes (virDomainGetBlockInfo).

        It waits for a job that is changing the domain, so it also serves to wait for one to end.
        """
        with self._pool.domain(uuid) as domain:
            try:
                return int(domain.blockInfo(target)[0])
            except libvirt.libvirtError as error:
                raise StorageFailed(
                    f"The size of disk {target} can't be found: {error.get_error_message()}."
                ) from error

    def switch(
        self, uuid: str, overlays: Mapping[str, tuple[str, str]], others: Sequence[str]
    ) -> None:
        """Make the domain write to `overlays` (target -> path, format), which are there already.

        One atomic libvirt snapshot without metadata (virDomainSnapshotCreateXML); `others` are all
        the other disks' targets, and are listed as `snapshot='no'`. They are given, not read, as
        the guest stands still. A disk that was plugged in since, and so is not listed, fails it, as
        with REUSE_EXT libvirt makes no overlay, nor does it look into one.
        """
        xml = domainxml.snapshot_xml([*overlays, *others], overlays)
        with self._pool.domain(uuid) as domain:
            domain.snapshotCreateXML(xml, _SNAPSHOT_FLAGS)

    def commit(
        self, uuid: str, target: str, base: str, top: str, bandwidth: int, watch: blockcommit.Watch
    ) -> None:
        """Commit an image of a running domain's disk into its backing file; see blockcommit.py."""
        with self._pool.domain(uuid) as domain:
            blockcommit.commit(domain, target, base, top, bandwidth, watch)

    def store_methods(self, uuid: str, methods: Mapping[str, str]) -> None:
        """Let the domain's metadata hold these `<diskSnapshot>`s by target, live and persistent.

        They take the place of all that it held; see methodxml.py and virDomainSetMetadata.
        """
        xml = methodxml.write(methods) if methods else None
        with self._pool.domain(uuid) as domain:
            flags = libvirt.VIR_DOMAIN_AFFECT_LIVE if domain.isActive() else 0
            flags |= libvirt.VIR_DOMAIN_AFFECT_CONFIG if domain.isPersistent() else 0
            kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
            domain.setMetadata(kind, xml, methodxml.PREFIX, NAMESPACE, flags)

    def pool_folders(self) -> Sequence[str]:
        """The folders of the active storage pools that are folders (dir, fs, netfs)."""
        folders = []
        with self._pool.connection() as connection:
            active = libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE
            for pool in _if_supported(lambda: connection.listAllStoragePools(active)) or ():
                tree = etree.fromstring(pool.XMLDesc())
                if tree.get("type") in ("dir", "fs", "netfs"):
                    folders.append(tree.findtext("target/path") or "")
        return [folder for folder in folders if folder]

    def qemu_user(self) -> tuple[int, int]:
        """The uid and gid that QEMU runs as: the DAC security model of the capabilities; else 0."""
        if self._qemu_user is None:  # fixed when libvirtd starts, in qemu.conf
            with self._pool.connection() as connection:
                tree = etree.fromstring(connection.getCapabilities())
            label = tree.findtext("host/secmodel[model='dac']/baselabel") or ""
            uid, _, gid = label.replace("+", "").partition(":")
            self._qemu_user = (int(uid), int(gid)) if uid.isdigit() and gid.isdigit() else (0, 0)
        return self._qemu_user


def _if_supported(call: Callable[[], T]) -> T | None:
    """What the call answers; None where the driver has no such call, and so none of what it tells.

    Drivers without disk snapshots (test, lxc ...) lack block jobs, checkpoints and the like.
    """
    try:
        return call()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
            return None
        raise


def _definitions(connection: libvirt.virConnect) -> list[Domain]:
    """The disks of every domain, or an error: one that can't be read may be the one looked for."""
    found = []
    for domain in connection.listAllDomains():
        try:
            # No state is asked for, and a transient one has as its definition what it runs with:
            # there may be hundreds.
            live = domain.XMLDesc()
            found.append(_described(domain, live, state="nostate", persistent=True, stopped=True))
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # gone between the two calls
                raise
    return found


def read_domain(domain: libvirt.virDomain) -> Domain:
    """A Domain from a libvirt domain. Raises libvirt.libvirtError, as when it is gone, and
    HypervisorUnavailable where what libvirt says can't be read.
    """
    state, reason = domain.state()
    persistent = bool(domain.isPersistent())
    live = domain.XMLDesc()
    found = _described(domain, live, state=_STATES.get(state, "nostate"), persistent=persistent)
    migrated = reason == libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED
    if state == libvirt.VIR_DOMAIN_SHUTOFF and migrated and not found.active:
        return dataclasses.replace(found, migrated=True)
    return found


def _in_stopped_pool(pool: libvirt.virStoragePool, volume: str) -> tuple[str, str] | None:
    """The file that a volume is in a folder's pool which is not active (libvirt looks up volumes of
    active pools alone).
    """
    try:
        if pool.isActive():
            return None
        tree = etree.fromstring(pool.XMLDesc())
    except libvirt.libvirtError:
        return None
    folder = tree.findtext("target/path")
    if tree.get("type") not in ("dir", "fs", "netfs") or not folder or "/" in volume:
        return None
    return "file", os.path.join(folder, volume)


def _described(
    domain: libvirt.virDomain, live: str, *, state: str, persistent: bool, stopped: bool = False
) -> Domain:
    """Its ID is taken from the XML: what `domain` itself says is of when it was looked up.

    `stopped`: a volume of a pool that is not active is the file that it is when it is; a domain
    can't be started with it, and has it all the same.
    """
    connection = domain.connect()
    number = domainxml.instance(live)
    inactive = None
    if number != -1 and persistent:
        inactive = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)

    def resolve_volume(pool: str, volume: str) -> tuple[str, str] | None:
        try:
            holds = connection.storagePoolLookupByName(pool)
        except libvirt.libvirtError:
            return None
        try:
            found = holds.storageVolLookupByName(volume)
            kind = found.info()[0]
            path = found.path()
            tree = etree.fromstring(holds.XMLDesc()) if kind == _IN_NETWORK else None
        except libvirt.libvirtError:
            return _in_stopped_pool(holds, volume) if stopped else None
        if tree is not None and tree.get("type") == "rbd":
            return "network", image_in_pool(tree, path)
        kinds = {libvirt.VIR_STORAGE_VOL_FILE: "file", libvirt.VIR_STORAGE_VOL_BLOCK: "block"}
        return (kinds[kind], path) if kind in kinds else None

    try:
        return domainxml.parse_domain(
            live,
            inactive,
            id=number,
            state=state,
            persistent=persistent,
            resolve_volume=resolve_volume,
        )
    except InvalidXML as error:  # it is not the caller's
        raise HypervisorUnavailable(f"A domain's definition can't be read: {error}") from error
