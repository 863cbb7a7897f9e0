"""The installed service under a real systemd, system bus, polkitd and libvirtd, in the host VM.

The tests go on from where the one before has left the service: a boot and a start of it cost
seconds under TCG. No guest runs there: what a running one sees is tested outside, where it boots in
3 s.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.lab.deadline import wait_until
from tests.lab.hostvm import HostVm
from tests.lab.program import CHECKOUT, run

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root"),
    pytest.mark.timeout(1800),
]
NAME = "org.example.DiskSnapshot"
UNIT = "snapd-vm.service"
IMAGES = "/var/lib/libvirt/images"
RULES = "/usr/share/doc/snapd-vm/examples/50-snapd-vm-backup-operators.rules"
WEB = f"""<domain type='qemu'>
  <name>web</name><memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{IMAGES}/web.qcow2'/><target dev='vda'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/><source dev='/dev/snapd/web'/><target dev='vdb'/>
    </disk>
  </devices>
</domain>
"""


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostVm]:
    """The host VM with `make install`'s result in it, and a domain `web` that is off."""
    staging = tmp_path_factory.mktemp("installed")
    run("make", "--silent", "install", f"DESTDIR={staging}", cwd=CHECKOUT)
    (staging / "usr/share/web.xml").write_text(WEB)
    with HostVm() as running:
        running.copy_in(staging, "/")
        running.check("systemctl", "daemon-reload")
        running.check("groupadd", "backup-operators")
        running.check("useradd", "-G", "backup-operators", "maker")
        running.check("useradd", "somebody")
        running.check("qemu-img", "create", "-q", "-f", "qcow2", f"{IMAGES}/web.qcow2", "64M")
        running.check("vgcreate", "-q", "snapd", "/dev/disk/by-id/virtio-data0")
        running.check("lvcreate", "-q", "-n", "web", "-L", "64M", "snapd")
        running.check("virsh", "define", "/usr/share/web.xml")
        yield running


def show(vm: HostVm, name: str) -> str:
    """A property of the unit."""
    return vm.check("systemctl", "show", "--value", "-p", name, UNIT).strip()


def client(vm: HostVm, *words: str, user: str = "root") -> subprocess.CompletedProcess[str]:
    """The command, as this user."""
    return vm.run(
        ["setpriv", "--reuid", user, "--regid", user, "--init-groups", "snapd-vm", *words]
    )


def owned(vm: HostVm) -> bool:
    question = ("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "NameHasOwner", "s", NAME)
    return vm.check("busctl", "call", *question).strip() == "b true"


def test_the_unit_is_as_systemd_wants_it(vm: HostVm) -> None:
    done = vm.run(["systemd-analyze", "verify", f"/usr/lib/systemd/system/{UNIT}"])
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_call_on_the_bus_starts_it(vm: HostVm) -> None:
    assert show(vm, "ActiveState") == "inactive"
    done = client(vm, "methods", "--json")
    assert done.returncode == 0, done.stderr
    assert "qemu" in done.stdout
    assert show(vm, "ActiveState") == "active"
    vm.check("systemctl", "stop", UNIT)


def test_it_is_up_once_systemctl_comes_back(vm: HostVm) -> None:
    vm.check("systemctl", "enable", "--now", UNIT)
    assert owned(vm)
    assert show(vm, "ActiveState") == "active"


def test_a_snapshot_of_an_image_and_what_the_journal_says(vm: HostVm) -> None:
    done = client(vm, "create", "web", "vda", "--name", "nightly", "--json")
    assert done.returncode == 0, done.stderr + vm.check("journalctl", "-u", UNIT, "-n", "50")
    lines = vm.check("journalctl", "-o", "json", "-u", UNIT, "SNAPSHOT=nightly").splitlines()
    entry = json.loads(lines[-1])
    assert (entry["DOMAIN"], entry["DISK"]) == ("web", "vda")
    assert len(entry["MESSAGE_ID"]) == 32
    assert entry["_SYSTEMD_UNIT"] == UNIT
    assert "nightly" in entry["MESSAGE"]


def test_polkit_has_a_say(vm: HostVm) -> None:
    for user in ("maker", "somebody"):
        denied = client(vm, "create", "web", "vda", "--name", "by-user", user=user)
        assert denied.returncode != 0
    vm.check("cp", RULES, "/etc/polkit-1/rules.d/")

    def taken() -> bool:  # polkitd sees the new file by itself
        return not client(vm, "plan", "web", "vda", user="maker").returncode

    wait_until("the rule counts", taken, 20, 0.5)
    done = client(vm, "create", "web", "vda", "--name", "by-maker", user="maker")
    assert done.returncode == 0, done.stderr
    denied = client(vm, "create", "web", "vda", "--name", "by-somebody", user="somebody")
    assert denied.returncode != 0
    assert "by-somebody" not in client(vm, "list").stdout


def test_killed_it_thaws_and_comes_back(vm: HostVm) -> None:
    before = show(vm, "MainPID")
    assert "start_time=[n/a]" in show(vm, "ExecStopPost")
    vm.check("systemctl", "kill", "--kill-who=main", "-s", "KILL", UNIT)

    def back() -> bool:
        return show(vm, "ActiveState") == "active" and show(vm, "MainPID") != before

    wait_until("systemd restarts it", back, 60, 0.5)
    assert owned(vm)
    assert int(show(vm, "NRestarts")) == 1
    thawed = vm.check("journalctl", "-o", "cat", "-u", UNIT, "-n", "100")
    assert "--thaw-held" not in thawed  # it had nothing to say, and did not fail


def test_hung_the_watchdog_ends_it(vm: HostVm) -> None:
    folder = f"/run/systemd/system/{UNIT}.d"
    vm.check("mkdir", "-p", folder)
    vm.run(["tee", f"{folder}/quick.conf"], stdin=b"[Service]\nWatchdogSec=6\n")
    vm.check("systemctl", "daemon-reload")
    vm.check("systemctl", "restart", UNIT)
    before = show(vm, "MainPID")
    vm.check("kill", "-STOP", before)

    def back() -> bool:
        return show(vm, "ActiveState") == "active" and show(vm, "MainPID") not in {before, "0"}

    wait_until("the watchdog bites", back, 90, 0.5)
    assert "Watchdog timeout" in vm.check("journalctl", "-o", "cat", "-u", UNIT, "-n", "50")


def test_sigterm_ends_it_cleanly(vm: HostVm) -> None:
    vm.check("systemctl", "stop", UNIT)
    assert show(vm, "ActiveState") == "inactive"
    assert show(vm, "Result") == "success"
    assert show(vm, "ExecMainStatus") == "0"


def test_snapshots_are_there_after_a_loss_of_power(vm: HostVm) -> None:
    before = client(vm, "list").stdout
    assert "web/vda/nightly" in before
    vm.crash()
    vm.start()
    after = json.loads(client(vm, "list", "--json").stdout)
    assert [snapshot["name"] for snapshot in after] == ["nightly", "by-maker"]
