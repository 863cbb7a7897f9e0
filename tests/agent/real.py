"""The real qemu-ga on this host, so bound that it can't freeze the host.

A freeze that reached the host's root file system would stop the machine. So it runs as nobody, who
may not freeze (FIFREEZE wants CAP_SYS_ADMIN), has the freezing commands blocked besides, and is
asked whether it has before a test may have it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.agent.chardev import Chardev

NEVER = (
    *("guest-fsfreeze-freeze", "guest-fsfreeze-freeze-list", "guest-shutdown"),
    *("guest-suspend-disk", "guest-suspend-ram", "guest-suspend-hybrid", "guest-exec"),
    *("guest-file-open", "guest-set-time", "guest-set-user-password", "guest-fstrim"),
)


class RealAgent:
    """A qemu-ga that is reached on `path`, through a Chardev, while it is entered.

    `frozen`: it believes that it froze the guest in an earlier life, as after a crash of its own.
    """

    def __init__(self, *, frozen: bool = False) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="qga."))
        shutil.chown(self._folder, "nobody")
        if frozen:
            state = self._folder / "qga.state.isfrozen"
            state.touch()
            shutil.chown(state, "nobody")
        self._socket = str(self._folder / "agent")
        self.path = str(self._folder / "chardev")
        self._chardev: Chardev | None = None

    def __enter__(self) -> RealAgent:
        try:
            with (self._folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [
                        *("qemu-ga", "-m", "unix-listen", "-p", self._socket),
                        *("-t", str(self._folder), "-b", ",".join(NEVER)),
                    ],
                    user="nobody",
                    group="nogroup",
                    extra_groups=[],
                    stdout=log,
                    stderr=log,
                )
            self._see_that_it_can_do_no_harm()
            self._chardev = Chardev(self.path, self._socket)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._chardev is not None:
            self._chardev.close()
        if hasattr(self, "_process"):
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self._process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _see_that_it_can_do_no_harm(self) -> None:
        deadline = time.monotonic() + 10
        while not os.path.exists(self._socket):
            assert time.monotonic() < deadline, "qemu-ga did not begin to listen"
            time.sleep(0.01)
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines())
        assert fields["CapEff"].strip("0") == ""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(self._socket)
            client.sendall(b'{"execute":"guest-info"}\n')
            answer = b""
            while not answer.endswith(b"\n"):
                answer += client.recv(65536)
        info: dict[str, Any] = json.loads(answer)["return"]
        enabled = {c["name"] for c in info["supported_commands"] if c["enabled"]}
        assert not enabled & set(NEVER)
