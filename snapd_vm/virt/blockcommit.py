"""A commit inside QEMU, by libvirt: begins it or takes it up, follows it, cancels it or pivots.

Blocking functions for worker threads, on a domain that runs.
"""

from __future__ import annotations

import contextlib
import time
from typing import Protocol

import libvirt

from snapd_vm.errors import Busy, Cancelled, TimedOut
from snapd_vm.virt import domainxml
from snapd_vm.virt.connection import LOST_DOMAINS

_COMMITS = (
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT,
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT,
)

_STALLED_S = 600
_PIVOT_LIMIT_S = 60.0


class Watch(Protocol):
    """Who watches a block job; see methods.method.Watch."""

    @property
    def cancelled(self) -> bool: ...
    def progress(self, done: int, total: int) -> None: ...
    def past_return(self) -> None: ...
    def spoil(self) -> None: ...


def commit(
    domain: libvirt.virDomain, target: str, base: str, top: str, bandwidth: int, watch: Watch
) -> None:
    """Commit `top` of a disk's chain into `base`, its backing file, while the domain runs.

    `top` '' is the active image: the domain pivots back to `base` then. The base is always
    given, as without it the bottom of the chain is written to (virDomainBlockCommit). A job
    that runs already on the disk, as after a restart of ours, is taken up. `bandwidth` is in
    bytes a second, 0 for no limit. Raises Cancelled, StorageFailed, Busy where the job that
    runs is none of ours, and TimedOut where it makes no progress for a long time.
    """
    flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
    if not top:
        flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
        flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_SHALLOW
    running = domain.blockJobInfo(target)
    if running and running["type"] not in _COMMITS:
        raise Busy(f"Another block job is running on disk {target}; wait for its end.")
    if not running:
        try:
            domain.blockCommit(target, base, top or None, bandwidth, flags)
        except libvirt.libvirtError as error:
            if error.get_error_domain() in LOST_DOMAINS:  # it may have begun
                watch.spoil()
            raise
    watch.spoil()  # the base is written to
    _follow(domain, target, watch, active=not top)


def _follow(domain: libvirt.virDomain, target: str, watch: Watch, *, active: bool) -> None:
    """Wait for a block job's end; an active one is pivoted once it is ready.

    A limit of the bandwidth is taken off when what there was to write at first could have been
    written: the job is never ready as long as the guest writes faster.
    """
    began = moved = time.monotonic()
    last, first, pause = (-1, -1), 0, 0.005
    while info := domain.blockJobInfo(target, libvirt.VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES):
        now = (int(info["cur"]), int(info["end"]))
        first = first or now[1]
        watch.progress(*now)
        if active and now[0] == now[1] and domainxml.mirror_ready(domain.XMLDesc(), target):
            with contextlib.suppress(Cancelled):  # see below
                watch.past_return()
                _pivot(domain, target)
                return
        if watch.cancelled:
            domain.blockJobAbort(target)
            raise Cancelled(
                "The commit was cancelled: the disk is as it was, and of the snapshot nothing is "
                "left but to delete it."
            )
        bandwidth = int(info["bandwidth"])
        if active and bandwidth and time.monotonic() > began + first / bandwidth:
            domain.blockJobSetSpeed(target, 0)
        if now != last:
            last, moved = now, time.monotonic()
        elif time.monotonic() > moved + _STALLED_S:
            domain.blockJobAbort(target)
            raise TimedOut(f"The commit of disk {target} made no progress for {_STALLED_S} s.")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def _pivot(domain: libvirt.virDomain, target: str) -> None:
    """Pivot; "not ready" although it was announced happens, and is tried again."""
    deadline = time.monotonic() + _PIVOT_LIMIT_S
    while True:
        try:
            domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
            return
        except libvirt.libvirtError as error:
            not_ready = error.get_error_code() == libvirt.VIR_ERR_BLOCK_COPY_ACTIVE
            if not not_ready or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
