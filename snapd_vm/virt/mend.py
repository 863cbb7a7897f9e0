"""Mends what is left when libvirtd dies in the middle of a switch, through QEMU's own monitor.

QEMU may then write to the overlay, or hold it open unused, while libvirt still says the base, and
knows nothing of the nodes; the next start would boot the base and lose those writes. Nothing but
the monitor reaches them (virDomainQemuMonitorCommand; it marks the domain "custom-monitor"), so
this file is used for that case alone. QMP commands and their answers: qemu-qmp-ref(7).
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import libvirt_qemu

from snapd_vm.errors import StorageFailed, TimedOut
from snapd_vm.virt.connection import ConnectionPool

log = logging.getLogger(__name__)


class Monitor:
    """The block nodes of one running QEMU domain."""

    def __init__(self, pool: ConnectionPool, uuid: str) -> None:
        self._pool = pool
        self._uuid = uuid

    def writes_to(self, overlay: str) -> bool:
        """Whether `overlay` is the active image of one of QEMU's devices (query-block)."""
        devices = self._execute("query-block")
        files = [device.get("inserted", {}).get("file", "") for device in devices]
        return overlay in [_local_file(file) for file in files]

    def commit_behind(self, overlay: str, origin: str, timeout: float) -> None:
        """Commit `overlay`, which QEMU writes to unknown to libvirt, into `origin`, and drop it.

        The base is named, as without it the bottom of the chain is written to.

        `timeout` in seconds bounds the commit. Raises StorageFailed and TimedOut.
        """
        node = self._node(overlay, driver=True)
        base = self._node(origin, driver=True)
        if node is None or base is None:
            raise StorageFailed("QEMU does not have the overlay and its base open.")
        job = f"snapd-vm-{node}"[:64]
        deadline = time.monotonic() + timeout
        self._execute("block-commit", {"job-id": job, "device": node, "base-node": base})
        while True:
            state = next((j for j in self._execute("query-jobs") if j["id"] == job), None)
            if state is None or state["status"] in ("aborting", "concluded", "null"):
                raise StorageFailed("The commit of the overlay failed inside QEMU.")
            if state["status"] == "ready":
                break
            if time.monotonic() > deadline:
                self._execute("job-cancel", {"id": job})
                raise TimedOut("The commit of the overlay did not get ready in time.")
            time.sleep(0.02)
        self._execute("job-complete", {"id": job})
        while any(j["id"] == job for j in self._execute("query-jobs")):
            if time.monotonic() > deadline:
                raise TimedOut("The commit of the overlay did not end in time.")
            time.sleep(0.02)
        self.drop_nodes(overlay)

    def drop_nodes(self, overlay: str) -> None:
        """Remove the nodes that have `overlay` open and that nobody uses (blockdev-del).

        There may be both, the file's alone (which takes no lock), or none.
        """
        for driver in (True, False):  # the format node holds the file's node
            node = self._node(overlay, driver=driver)
            if node is not None:
                self._execute("blockdev-del", {"node-name": node})

    def _node(self, overlay: str, *, driver: bool) -> str | None:
        """The name of the format node (`driver`) or of the file's node of `overlay`."""
        for node in self._execute("query-named-block-nodes", {"flat": True}):
            is_file = node["drv"] in ("file", "host_device")
            if is_file != driver and _local_file(node["file"]) == overlay:
                return str(node["node-name"])
        return None

    def _execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        request = json.dumps({"execute": name, "arguments": arguments or {}})
        with self._pool.connection() as connection:
            domain = connection.lookupByUUIDString(self._uuid)
            answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, request, 0))
        if "error" in answer:
            raise StorageFailed(f"QEMU refused {name}: {answer['error'].get('desc', '')}.")
        log.info("asked QEMU's monitor of %s for %s", self._uuid, name)
        return answer["return"]


def _local_file(name: str) -> str:
    """The local file of a node: QEMU calls one that was opened with options "json:{...}"."""
    if not name.startswith("json:"):
        return name
    file = json.loads(name.removeprefix("json:")).get("file")
    return str(file.get("filename", "")) if isinstance(file, dict) else ""
