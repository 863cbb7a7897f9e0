"""The lab's system bus: a dbus-daemon of its own that behaves as the machine's would.

The policy is Debian's default (nobody owns or calls anything that no policy file allows), with the
project's own policy file as the thing under test.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

from tests.lab.deadline import LabError, wait_until
from tests.lab.libvirtd import answers
from tests.lab.process import Process, end, tail
from tests.lab.program import CHECKOUT, attempt
from tests.lab.run import Run

NAME = "org.example.DiskSnapshot"
OUR_POLICY = CHECKOUT / f"data/{NAME}.conf"
POLICIES = Path("/usr/share/dbus-1/system.d")
# Only used while the project has no policy file.
STAND_IN = f"""
  <policy user="root"><allow own="{NAME}"/></policy>
  <policy context="default"><allow send_destination="{NAME}"/></policy>"""
CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
    <allow send_destination="org.freedesktop.DBus"
           send_interface="org.freedesktop.DBus.Introspectable"/>
    <allow send_destination="org.freedesktop.DBus"
           send_interface="org.freedesktop.DBus.Properties"/>
  </policy>
  <policy user="root">
    <allow send_destination="org.freedesktop.DBus"
           send_interface="org.freedesktop.DBus.Monitoring"/>
    <allow own="org.libvirt"/>
  </policy>
  <include ignore_missing="yes">{policies}/org.freedesktop.PolicyKit1.conf</include>
  <include ignore_missing="yes">{policies}/org.libvirt.conf</include>
  <include ignore_missing="yes">{policies}/org.opensuse.Snapper.conf</include>
  <include ignore_missing="yes">{policies}/FirewallD.conf</include>{ours}
</busconfig>
"""


class Bus:
    """A private system bus; `address` is what DBUS_SYSTEM_BUS_ADDRESS is to be."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._socket = run.path("bus") / "socket"
        self._process: Process | None = None
        self.log = run.folder / "dbus-daemon.log"
        self.address = f"unix:path={self._socket}"
        self.env = {"DBUS_SYSTEM_BUS_ADDRESS": self.address}

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        ours = f"\n  <include>{escape(str(OUR_POLICY))}</include>"
        config = self._run.folder / "bus/system.conf"
        config.write_text(
            CONFIG.format(
                socket=self._socket,
                policies=POLICIES,
                ours=ours if OUR_POLICY.exists() else STAND_IN,
            )
        )
        argv = ("dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile")
        process = self._process = self._run.start("dbus-daemon", argv, self.log)

        def ready() -> bool:
            if not process.alive():
                raise LabError(f"dbus-daemon ended: {tail(self.log)}")
            return answers(self._socket)

        wait_until("dbus-daemon answers", ready, 10)

    def stop(self) -> None:
        """Stop it: everyone on it is disconnected."""
        if self._process is not None:
            end(self._process)
            self._socket.unlink(missing_ok=True)
            self._process = None

    def owned(self, name: str) -> bool:
        """Whether somebody owns this name on the bus."""
        question = ("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "NameHasOwner", "s", name)
        answer = attempt(["busctl", "--timeout=5", "call", *question], env=self.env, timeout=10)
        return answer.stdout.strip() == "b true"
