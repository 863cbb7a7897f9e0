"""What the daemon says to systemd and to the journal."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_vm.journald import MessageId
from tests.lab.deadline import wait_until
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import CHECKOUT, attempt
from tests.real.api import QUIESCE_REQUIRED
from tests.real.conftest import Connect


class Manager:
    """A stand-in for systemd's end of NOTIFY_SOCKET (sd_notify(3)): keeps what it is told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def hears(self, line: str) -> bool:
        """Whether it has been told so by now."""
        while True:
            try:
                self.told += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return line in self.told

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(lab: Lab) -> Iterator[Manager]:
    path = lab.folder("notify") / "socket"
    path.unlink(missing_ok=True)
    listening = Manager(path)
    yield listening
    listening.close()
    lab.daemon.env = {}


async def test_ready_once_the_name_is_held_and_the_watchdog_is_fed(
    daemon: Lab, manager: Manager, connect: Connect
) -> None:
    daemon.daemon.stop()
    env = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "400000"}
    daemon.daemon.start({}, env=env, wait=0)
    await asyncio.to_thread(wait_until, "READY", lambda: manager.hears("READY=1"), 20)
    assert daemon.bus.owned("org.example.DiskSnapshot")
    for _ in range(3):
        manager.told.clear()
        await asyncio.to_thread(wait_until, "it is fed", lambda: manager.hears("WATCHDOG=1"), 2)
    os.kill(daemon.daemon.pid, signal.SIGSTOP)  # a loop that does not turn feeds no watchdog
    manager.hears("")
    manager.told.clear()
    await asyncio.sleep(1)
    assert not manager.hears("WATCHDOG=1")
    os.kill(daemon.daemon.pid, signal.SIGCONT)
    await asyncio.to_thread(daemon.daemon.stop)
    assert manager.hears("STOPPING=1")


LISTEN = """
import socket, sys
end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
end.bind("/run/systemd/journal/socket")
end.settimeout(20)
sys.path.insert(0, {checkout!r})
import logging
from snapd_vm import journald
import os
found = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{{found.st_dev}}:{{found.st_ino}}"
journald.set_up()
logging.getLogger("snapd_vm.x").warning(
    "a line", extra=journald.fields(journald.MessageId.STATE, None, disk="vda", state="missing"))
sys.stdout.write(end.recv(65536).decode())
"""


def test_a_line_reaches_journald_with_its_fields() -> None:
    """The real sd_journal_send, to a socket that lies where journald's is."""
    script = "mkdir -p /run/systemd; mount -t tmpfs none /run/systemd; mkdir /run/systemd/journal"
    code = LISTEN.format(checkout=str(CHECKOUT))
    done = attempt(
        [
            "unshare",
            "--mount",
            "sh",
            "-ec",
            f'{script}; exec "$@"',
            "sh",
            sys.executable,
            "-c",
            code,
        ],
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = set(done.stdout.splitlines())
    expected = {f"MESSAGE_ID={MessageId.STATE}", "DISK=vda", "STATE=missing", "PRIORITY=4"}
    whose = {"LOGGER=snapd_vm.x", "SYSLOG_IDENTIFIER=snapd-vm"}
    assert expected | {"MESSAGE=a line"} | whose <= lines


async def test_a_create_is_logged_with_its_fields(
    daemon: Lab, connect: Connect, guest: Guest
) -> None:
    api = await connect()
    await api.create(guest, name="logged", flags=QUIESCE_REQUIRED)
    line = next(line for line in daemon.daemon.log.splitlines() if "SNAPSHOT=logged" in line)
    for field in (
        f"MESSAGE_ID={MessageId.CREATED}",
        f"DOMAIN={guest.name}",
        "DISK=vda",
        "CONSISTENCY=quiesced",
    ):
        assert field in line
