"""How long services take from their start to holding their name, and the memory they use idle.

All on one bus, started in the same way, in turn; a service that can't run here says why. When a
service holds its name it may not be ready yet, so there is the time to a first answer as well.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dbus_next.message import Message

from snapd_vm.bus.connection import decode
from snapd_vm.bus.contract import OBJECT_MANAGER
from snapd_vm.model import ROOT_PATH
from tests.bench.series import Series
from tests.bench.snapshots import SEED
from tests.bench.ways import LIBVIRT, NAME
from tests.bus.clients import Client, RawPeer, marshalled
from tests.lab.deadline import LabError
from tests.lab.lab import Lab
from tests.lab.process import Process, end, tail
from tests.lab.program import CHECKOUT, attempt

IDLE_S = 5.0
START_LIMIT_S = 20.0
BUS = "org.freedesktop.DBus"
SNAPPER = "org.opensuse.Snapper"
FIREWALLD = "org.fedoraproject.FirewallD1"


@dataclass
class Service:
    """A service of the bus, how it is started, and what was seen of it (seconds, MB)."""

    title: str
    name: str
    argv: Sequence[str | Path]
    question: Message
    started: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    rss: float = 0.0
    pss: float = 0.0
    trouble: str = ""

    @property
    def start(self) -> Series | None:
        """From exec to the name."""
        return Series.of_seconds(self.started) if self.started else None

    @property
    def answer(self) -> Series | None:
        """From exec to the answer to a first question."""
        return Series.of_seconds(self.answered) if self.answered else None


def install(lab: Lab) -> Path:
    """The command as `make install` puts it down: compiled, and with no way to the checkout.

    It runs with the system's Python and Debian's packages, as those beside it do, and not with the
    Python of the tests: that may be built in another way, which alone makes up a third.
    """
    place = lab.run.path("installed")
    env = dict.fromkeys(("MAKEFLAGS", "MAKELEVEL", "PYTHONDONTWRITEBYTECODE"), "")
    words = ["make", "-s", "-C", str(CHECKOUT), "install", f"DESTDIR={place}", "PREFIX=/usr"]
    done = attempt(words, env=env)
    if done.returncode:
        raise LabError(f"make install: {done.stderr.strip()}")
    return place / "usr/bin/snapd-vm"


def services(lab: Lab, ours: Path) -> Sequence[Service]:
    """Ours and those beside it. firewalld gets a network of its own to write its rules to."""
    lab.daemon.start(wait=30)  # writes the configuration
    lab.daemon.stop()
    return (
        Service(
            "snapd-vm",
            NAME,
            (ours, "daemon", "--config", lab.daemon.config_file),
            _question(NAME, ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects"),
        ),
        Service(
            "libvirt-dbus",
            LIBVIRT,
            ("/usr/sbin/libvirt-dbus", "--system"),
            _question(LIBVIRT, "/org/libvirt/QEMU", f"{LIBVIRT}.Connect", "ListDomains", 0),
        ),
        Service(
            "snapperd",
            SNAPPER,
            ("/usr/sbin/snapperd", "--stdout"),
            _question(SNAPPER, "/org/opensuse/Snapper", SNAPPER, "ListConfigs"),
        ),
        Service(
            "firewalld",
            FIREWALLD,
            ("unshare", "--net", "/usr/sbin/firewalld", "--nofork", "--nopid"),
            _question(FIREWALLD, "/org/fedoraproject/FirewallD1", FIREWALLD, "getDefaultZone"),
        ),
    )


def _question(to: str, path: str, interface: str, member: str, *flags: int) -> Message:
    """A call that asks for what the service has; libvirt-dbus connects to libvirt for it."""
    return Client.message(interface, member, "u" * len(flags), flags, path, to)


def measure(lab: Lab, found: Sequence[Service], starts: int) -> None:
    """Start each so many times, in an order drawn anew; then all at once, for their idle memory."""
    order = random.Random(SEED)
    for turn in range(starts + 1):  # the first one finds nothing in the page cache
        for service in order.sample(found, len(found)):
            if service.trouble:
                continue
            try:
                process, named, answered = _start(lab, service)
            except LabError as error:
                service.trouble = str(error)
                continue
            if turn:
                service.started.append(named)
                service.answered.append(answered)
            end(process, 20)
    running = [(one, _start(lab, one)[0]) for one in found if not one.trouble]
    time.sleep(IDLE_S)
    for service, process in running:
        service.rss, service.pss = memory(process.pid)
        process.signal(signal.SIGTERM)
    for _, process in running:
        end(process, 20)


def _start(lab: Lab, service: Service) -> tuple[Process, float, float]:
    """Start it; seconds until the bus says that it has its name, and until it has answered.

    Raises LabError.
    """
    program = Path(service.argv[-3] if service.argv[0] == "unshare" else service.argv[0])
    if not program.exists():
        raise LabError(f"{program} is not installed")
    peer = RawPeer(lab.address)
    try:
        rule = f"type='signal',sender='{BUS}',member='NameOwnerChanged',arg0='{service.name}'"
        peer.send(marshalled(Client.message(BUS, "AddMatch", "s", [rule], "/", BUS), 2))
        peer.reply_to(2)
        log = lab.run.folder / f"{service.title}.log"
        argv = [*lab.libvirtd.inside(Path("/")), *service.argv]
        peer.socket.settimeout(START_LIMIT_S)
        began = time.perf_counter()
        process = lab.run.start(service.title, argv, log, env=lab.bus.env)
        try:
            while True:
                message = peer.read()
                if message is None:
                    raise LabError("the bus has gone")
                if message.member == "NameOwnerChanged":
                    name, _, owner = decode(message, "sss")
                    if name == service.name and owner:
                        named = time.perf_counter() - began
                        peer.send(marshalled(service.question, 3))
                        peer.reply_to(3)
                        return process, named, time.perf_counter() - began
        except TimeoutError:
            end(process)
            said = tail(log, 300).replace("\n", " ")
            raise LabError(f"no name after {START_LIMIT_S:g} s: {said}") from None
    finally:
        peer.close()


def memory(pid: int) -> tuple[float, float]:
    """Resident and proportional set size in MB (smaps_rollup, proc(5))."""
    found = _rollup(pid)
    return found["Rss"] / 1000, found["Pss"] / 1000


def _rollup(pid: int) -> Mapping[str, float]:
    """In kB as people count them; the kernel's are of 1024 bytes."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {row.split(":")[0]: int(row.split()[1]) * 1.024 for row in rows}


def load() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]
