"""libvirtd and virtlogd of a run's own, beside the machine's or another run's.

libvirt cannot be told to keep its files elsewhere, so it runs in a mount name space where the
run's folders lie over its own. Thus a test may kill it, define pools and leave domains defined,
and disturb nobody.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from tests.lab.deadline import LabError, wait_until
from tests.lab.image import cache_dir
from tests.lab.process import Process, end, tail
from tests.lab.run import Run

COVERED = {
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "etc": "/etc/libvirt",
    "log": "/var/log/libvirt",
    # not the run's: what QEMU can do takes libvirt a second to find out
    "cache": "/var/cache/libvirt",
}
SETTINGS = ("libvirtd.conf", "qemu.conf", "virtlogd.conf")
START_S = 30
FAULTS = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT}


class Libvirtd:
    """A libvirtd that answers at `uri`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._folder = run.path("libvirt")
        self._processes: dict[str, Process] = {}
        self.log = run.folder / "libvirtd.log"
        for name in COVERED:
            (self._folder / name).mkdir()
        for setting in SETTINGS:
            source = Path("/etc/libvirt") / setting
            if source.exists():
                shutil.copy(source, self._folder / "etc")
        with (self._folder / "etc/qemu.conf").open("a") as settings:
            settings.write('security_driver = "none"\n')  # the same everywhere: no AppArmor
        cache = cache_dir() / "libvirt"
        cache.mkdir(parents=True, exist_ok=True)
        (self._folder / "cache").rmdir()
        (self._folder / "cache").symlink_to(cache)
        os.mknod(self._folder / "no-kvm", stat.S_IFCHR, os.makedev(1, 3))
        self.uri = f"qemu+unix:///system?socket={self._socket('libvirt')}"

    def _socket(self, name: str) -> Path:
        return self._folder / f"run/{name}-sock"

    @property
    def pid(self) -> int:
        """The pid of libvirtd."""
        return self._libvirtd.pid

    def inside(self, cwd: Path) -> Sequence[str | Path]:
        """What goes before a program's arguments for it to see libvirt's files as libvirtd does.

        virtlogd's mount name space is taken, which is made like libvirtd's and outlives it.
        """
        process = self._processes.get("virtlogd")
        if process is None or not process.alive():
            return ()
        return ("nsenter", f"--mount=/proc/{process.pid}/ns/mnt", "env", "-C", cwd)

    @property
    def _libvirtd(self) -> Process:
        process = self._processes.get("libvirtd")
        if process is None or not process.alive():
            raise LabError("libvirtd does not run")
        return process

    def crashed(self) -> bool:
        """Whether it ended by a fault of its own: libvirt 9.0 has one when a client goes away.

        Seen once in some thousand clients that were killed: a segmentation fault in what libvirtd
        does with the event callbacks of a client that has gone.
        """
        process, nursery = self._processes.get("libvirtd"), self._run.nursery
        if process is None or nursery is None or process.alive():
            return False
        return nursery.status(process) in FAULTS

    def start(self) -> None:
        """Start what does not run, and wait until it answers."""
        for name, path in (
            ("virtlogd", self._socket("virtlogd")),
            ("libvirtd", self._socket("libvirt")),
        ):
            process = self._processes.get(name)
            if process is None or not process.alive():
                process = self._processes[name] = self._start(name)

            def ready(path: Path = path, process: Process = process) -> bool:
                if not process.alive():
                    raise LabError(f"{process.name} ended: {tail(self.log)}")
                return answers(path)

            wait_until(f"{name} answers", ready, START_S)

    def stop(self) -> None:
        """SIGTERM, and wait for the end; guests go on. `start()` brings it back."""
        end(self._libvirtd, 20)

    def kill(self) -> None:
        """SIGKILL, as a crash would; guests go on. `start()` brings it back."""
        process = self._libvirtd
        process.signal(signal.SIGKILL)
        end(process)

    def restart(self) -> None:
        """Stop and start; guests go on."""
        self.stop()
        self.start()

    def suspend(self) -> None:
        """SIGSTOP: it is there and does not answer, until `resume()`."""
        self._libvirtd.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._libvirtd.signal(signal.SIGCONT)

    def _start(self, name: str) -> Process:
        script = [f'mkdir -p {path}; mount --bind "$1/{n}" {path}' for n, path in COVERED.items()]
        # The guests do without KVM. One that root's QEMU can open and libvirt-qemu can't makes
        # libvirt probe QEMU anew at every turn, for 12 s a domain. What lies over it is a character
        # device, as libvirt could not put a plain file back in the /dev that it makes for a guest.
        script.append('[ ! -e /dev/kvm ] || mount --bind "$1/no-kvm" /dev/kvm')
        script.append(f'exec {name} --pid-file "$1/{name}.pid"')
        argv = ["unshare", "--mount", "--propagation", "slave", "sh", "-e", "-c", "\n".join(script)]
        return self._run.start(name, [*argv, "sh", self._folder], self.log)


def answers(path: Path) -> bool:
    """Whether somebody listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
