"""Wires the daemon together and runs it; also the release of held guests after a crash.

What it says to systemd: READY once recovery is done and the name is held, WATCHDOG from the event
loop while it turns, STOPPING when asked to end (sd_notify(3)).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from snapd_vm import __version__, config, journald
from snapd_vm.bus.remote import CallFailed, ConnectionLost, NameTaken
from snapd_vm.bus.served import DiskSnapshotBus
from snapd_vm.config import Config, ConfigError
from snapd_vm.engine import recovery
from snapd_vm.engine.engine import Engine
from snapd_vm.engine.journal import AnyStep, Held, Journal, claim
from snapd_vm.engine.world import World
from snapd_vm.errors import SnapdError
from snapd_vm.methods.btrfs.btrfs import Btrfs
from snapd_vm.methods.lvm import lvmsnapshot
from snapd_vm.methods.lvm.lvm import Lvm
from snapd_vm.methods.lvm.lvmtarget import LvmTarget
from snapd_vm.methods.method import Method
from snapd_vm.methods.qemu.qemu import Qemu
from snapd_vm.methods.rbd.rbd import Rbd
from snapd_vm.methods.reflink.reflink import Reflink
from snapd_vm.methods.zfs.zfs import Zfs
from snapd_vm.virt.connection import ConnectionPool, start_event_loop
from snapd_vm.virt.hypervisor import Hypervisor
from snapd_vm.virt.inventory import Inventory

log = logging.getLogger(__name__)

_RECOVERY_LIMIT_S = 20.0
_STOP_LIMIT_S = 60.0
_THAW_LIMIT_S = 30.0
_THREADS = 64
_THREAD_NAME = "work"
_LAST_CALLS_S = 2.0

MethodTable = Callable[[Config, Hypervisor], Mapping[str, Method]]


def built_in_methods(settings: Config, hypervisor: Hypervisor) -> Mapping[str, Method]:
    """The methods of this daemon, in the order in which a default is looked for."""
    table = settings.qemu
    in_order: Sequence[Method] = (
        Rbd(hypervisor, settings.low_space_percent),
        Lvm(
            hypervisor,
            str(settings.state_dir / "mounts"),
            settings.lvm,
            settings.low_space_percent,
        ),
        Zfs(hypervisor, settings.low_space_percent),
        Btrfs(hypervisor, settings.btrfs.snapshot_dir, settings.low_space_percent),
        Reflink(hypervisor, settings.low_space_percent),
        Qemu(
            hypervisor, table.overlay_dirs, table.commit_bandwidth << 20, settings.low_space_percent
        ),
    )
    return {method.name: method for method in in_order}


def all_methods(settings: Config, hypervisor: Hypervisor) -> Mapping[str, Method]:
    """Those, and what the configuration brings in: first what is a default, or it would be none.

    Raises ConfigError.
    """
    table = built_in_methods(settings, hypervisor)
    if not settings.plugins.methods and not settings.executable:
        return table
    from snapd_vm import schemas
    from snapd_vm.methods.method import OnRequest
    from snapd_vm.methods.outside import outside

    first, last = dict[str, Method](), dict[str, Method]()
    for method in outside.load(settings, hypervisor, schemas.register):
        asked: object = method
        (last if isinstance(asked, OnRequest) and asked.on_request else first)[method.name] = method
    return {**first, **table, **last}


def run(config_path: str | None) -> int:
    """Run the daemon until SIGTERM or SIGINT; the exit status."""
    journald.set_up()
    try:
        settings = config.load(Path(config_path) if config_path else None)
        alone = claim(settings.state_dir)
        journal = Journal(settings.state_dir)
    except (config.ConfigError, SnapdError) as error:
        log.critical("%s", error)
        return 1
    try:
        status = asyncio.run(serve(settings, journal))
    finally:
        journal.close()
        os.close(alone)
    _leave_hung_threads(status)
    return status


def _leave_hung_threads(status: int) -> None:
    """End the process here if a thread does not come back from a call, as to a hung libvirtd.

    All that was to be finished is; but at its end Python waits for every thread of an executor, and
    libvirt can't be told to give up opening a connection.
    """
    deadline = time.monotonic() + _LAST_CALLS_S
    for thread in threading.enumerate():
        if thread.name.startswith(_THREAD_NAME):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("ended while a call to libvirt had not returned")
                logging.shutdown()
                os._exit(status)


async def serve(
    settings: Config,
    journal: Journal,
    methods: MethodTable = all_methods,
    reach: Callable[[AnyStep], None] = lambda _step: None,
) -> int:
    """Serve until told to end; the exit status. `reach` is told of every step of a Create."""
    pool = ConnectionPool(settings.uri)
    hypervisor = Hypervisor(pool)
    try:
        table = methods(settings, hypervisor)
    except ConfigError as error:
        log.critical("%s", error)
        return 1
    executor = ThreadPoolExecutor(_THREADS, thread_name_prefix=_THREAD_NAME)
    beside = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"{_THREAD_NAME}-beside")
    world = World(settings, hypervisor, table, journal, executor, beside, reach)
    engine = Engine(world, settings.uri)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    bus = DiskSnapshotBus()
    try:
        await bus.connect()
        await engine.start(
            Inventory(settings.uri, pool, executor, engine.hearing), _RECOVERY_LIMIT_S
        )
        bus.serve(engine, __version__)
        await bus.take_name()
    except (CallFailed, ConnectionLost, NameTaken, OSError, SnapdError) as error:
        log.critical("%s", error)
        await engine.close(0)
        for threads in (executor, beside):
            threads.shutdown(wait=False, cancel_futures=True)
        return 1
    _notify("READY=1")
    log.info("serving on the system bus, version %s", __version__)
    engine.look_for_strays()
    feeder = asyncio.create_task(_feed_watchdog())
    lost = asyncio.create_task(bus.lost())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([lost, stopping], return_when=asyncio.FIRST_COMPLETED)
    status = 0
    if lost.done():
        log.critical("the connection to the bus is lost: %s", lost.result())
        status = 1
    _notify("STOPPING=1")
    stopping.cancel()
    engine.stop_taking()
    await bus.close(_STOP_LIMIT_S)
    await engine.close(_STOP_LIMIT_S)
    for task in (feeder, lost, stopping):
        task.cancel()
    await asyncio.gather(feeder, lost, stopping, return_exceptions=True)
    for threads in (executor, beside):
        threads.shutdown(wait=False, cancel_futures=True)
    log.info("stopped")
    return status


def thaw_held(config_path: str | None) -> int:
    """Thaw every guest that the journal says may be frozen; the exit status, 1 if one still is.

    A guest on a volume that an lvcreate left standing still, as systemd kills what the daemon
    leaves, can be thawed when that goes on again; all others come first.

    For ExecStopPost: it runs when the daemon is dead, and tries for a bounded time.
    """
    journald.set_up()
    try:
        settings = config.load(Path(config_path) if config_path else None)
        if not (settings.state_dir / "journal.sqlite3").exists():
            return 0
        journal = Journal(settings.state_dir)
    except (config.ConfigError, SnapdError) as error:
        log.critical("%s", error)
        return 1
    start_event_loop()  # for the keep-alive of connections
    hypervisor = Hypervisor(ConnectionPool(settings.uri))
    status = 0
    try:
        held: Sequence[Held] = journal.held()
    except SnapdError as error:
        log.critical("%s", error)
        held, status = [], 1
    held = _still_held(journal, hypervisor, held, settings.agent_timeout_s)
    _resume_volumes(journal)
    deadline = time.monotonic() + _THAW_LIMIT_S
    while held:
        held = _still_held(journal, hypervisor, held, settings.agent_timeout_s)
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    for one in held:
        log.critical("domain %s may still be frozen", one.domain_name)
    journal.close()
    return 1 if held else status


def _still_held(
    journal: Journal, hypervisor: Hypervisor, held: Sequence[Held], timeout: float
) -> Sequence[Held]:
    """Thaw each once; those of which it is not certain. `timeout` is in seconds, for each."""
    left = []
    for one in held:
        if not recovery.thaw(hypervisor, one, timeout):
            left.append(one)
            continue
        try:
            journal.release(one.domain_uuid)
        except SnapdError as error:  # the others are waiting
            log.error("that domain %s goes on was not written down: %s", one.domain_name, error)
    return left


def _resume_volumes(journal: Journal) -> None:
    try:
        operations = journal.operations()
    except SnapdError as error:
        log.critical("volumes may stand still: %s", error)
        return
    for operation in operations:
        for target in operation.targets:
            if target.method != Lvm.name:
                continue
            try:
                lvmsnapshot.resume(LvmTarget.of(target))
            except (SnapdError, LookupError, TypeError, ValueError) as error:
                log.critical("disk %s may stand still: %s", target.disk, error)


def _notify(state: str) -> None:
    if os.environ.get("NOTIFY_SOCKET"):
        from systemd.daemon import notify

        notify(state)


async def _feed_watchdog() -> None:
    """Tell systemd twice in each period that the loop turns (sd_watchdog_enabled(3))."""
    period = os.environ.get("WATCHDOG_USEC", "")
    if not period.isdigit():
        return
    while True:
        _notify("WATCHDOG=1")
        await asyncio.sleep(int(period) / 2e6)
