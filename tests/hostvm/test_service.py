"""The installed service under a real systemd, system bus, polkitd and libvirtd, in the host VM.

The tests go on from where the one before has left the service: a boot and a start of it cost
seconds under TCG.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from snapd_vm.engine.journal import Step
from tests.hostvm.conftest import CONFIG
from tests.hostvm.inside import define, passes
from tests.lab.deadline import wait_until
from tests.lab.hostvm import LAB, LIMIT_S, HostVm

NAME = "org.example.DiskSnapshot"
UNIT = "snapd-vm.service"
IMAGES = "/var/lib/libvirt/images"
RULES = "/usr/share/doc/snapd-vm/examples/50-snapd-vm-backup-operators.rules"
DROP_INS = f"/run/systemd/system/{UNIT}.d"
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


@pytest.fixture(scope="module", autouse=True)
def web(vm: HostVm) -> Iterator[None]:
    """A domain that is off, and who may make snapshots of it."""
    vm.check("groupadd", "backup-operators")
    vm.check("useradd", "-G", "backup-operators", "maker")
    vm.check("useradd", "somebody")
    vm.check("qemu-img", "create", "-q", "-f", "qcow2", f"{IMAGES}/web.qcow2", "64M")
    vm.check("vgcreate", "-q", "-y", "snapd", "/dev/disk/by-id/virtio-data0")
    vm.check("lvcreate", "-q", "-n", "web", "-L", "64M", "snapd")
    define(vm, WEB)
    yield
    vm.check("systemctl", "disable", "--now", UNIT)
    vm.check("virsh", "undefine", "web")
    vm.check("vgremove", "-q", "-y", "-f", "snapd")


def show(vm: HostVm, name: str) -> str:
    """A property of the unit."""
    return vm.check("systemctl", "show", "--value", "-p", name, UNIT).strip()


def names(vm: HostVm) -> set[str]:
    """The names of all snapshots."""
    return {snapshot["name"] for snapshot in json.loads(client(vm, "list", "--json").stdout)}


def client(vm: HostVm, *words: str, user: str = "root") -> subprocess.CompletedProcess[str]:
    """The command, as this user."""
    return vm.run(
        ["setpriv", "--reuid", user, "--regid", user, "--init-groups", "snapd-vm", *words]
    )


def owned(vm: HostVm) -> bool:
    question = ("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "NameHasOwner", "s", NAME)
    return vm.check("busctl", "call", *question).strip() == "b true"


def drop_in(vm: HostVm, text: str) -> None:
    """Start it again with this added to its unit, until the next boot."""
    vm.check("mkdir", "-p", DROP_INS)
    vm.check("tee", f"{DROP_INS}/test.conf", stdin=text.encode())
    vm.check("systemctl", "daemon-reload")
    vm.check("systemctl", "restart", UNIT)


def storage(vm: HostVm) -> str:
    """The images, volumes and definition that a snapshot would change."""
    volumes = vm.check("lvs", "--noheadings", "-o", "lv_name,lv_attr,origin", "snapd")
    definition = vm.check("virsh", "dumpxml", "--inactive", "web")
    return vm.check("ls", IMAGES) + volumes + definition


def test_the_unit_is_as_systemd_wants_it(vm: HostVm) -> None:
    # There is no man(1) in the VM; that the page is installed is seen elsewhere.
    done = vm.run(["systemd-analyze", "verify", "--man=no", f"/usr/lib/systemd/system/{UNIT}"])
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_call_on_the_bus_starts_it(vm: HostVm) -> None:
    assert show(vm, "ActiveState") == "inactive"
    client(vm, "methods")  # the bus waits 25 s for the service, which a busy machine may need

    def up() -> bool:
        return show(vm, "ActiveState") == "active"

    wait_until("the service is up", up, LIMIT_S, 0.5)
    done = client(vm, "methods", "--json")
    assert done.returncode == 0, done.stderr
    assert "qemu" in done.stdout
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


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_killed_it_comes_back(vm: HostVm) -> None:
    before = show(vm, "MainPID")
    vm.check("systemctl", "kill", "--kill-who=main", "-s", "KILL", UNIT)

    def back() -> bool:
        return show(vm, "ActiveState") == "active" and show(vm, "MainPID") != before

    wait_until("systemd restarts it", back, LIMIT_S, 0.5)
    assert owned(vm)
    assert int(show(vm, "NRestarts")) == 1


@pytest.mark.thorough
def test_hung_the_watchdog_ends_it(vm: HostVm) -> None:
    drop_in(vm, "[Service]\nWatchdogSec=6\n")
    before = show(vm, "MainPID")
    vm.check("kill", "-STOP", before)

    def back() -> bool:
        return show(vm, "ActiveState") == "active" and show(vm, "MainPID") not in {before, "0"}

    wait_until("the watchdog bites", back, LIMIT_S, 0.5)
    assert "Watchdog timeout" in vm.check("journalctl", "-o", "cat", "-u", UNIT, "-n", "50")


def test_sigterm_ends_it_cleanly_and_the_thaw_has_run(vm: HostVm) -> None:
    vm.check("systemctl", "stop", UNIT)
    assert show(vm, "ActiveState") == "inactive"
    assert show(vm, "Result") == "success"
    assert show(vm, "ExecMainStatus") == "0"
    assert "code=exited ; status=0" in show(vm, "ExecStopPost")


@pytest.mark.thorough
def test_snapshots_are_there_after_a_loss_of_power(vm: HostVm) -> None:
    before = client(vm, "list").stdout
    assert "web/vda/nightly" in before
    vm.crash()
    vm.start()
    after = json.loads(client(vm, "list", "--json").stdout)
    assert [snapshot["name"] for snapshot in after] == ["nightly", "by-maker"]


@pytest.mark.parametrize(
    ("target", "step"),
    [
        pytest.param("vda", Step.ARMED, marks=pytest.mark.thorough),
        pytest.param("vda", Step.SWITCHED, marks=pytest.mark.thorough),
        pytest.param("vdb", Step.ARMED, marks=pytest.mark.thorough),
        ("vdb", Step.SWITCHED),
    ],
)
def test_power_is_lost_in_mid_create(vm: HostVm, target: str, step: Step) -> None:
    """The same outcome as of a daemon that was killed: all of a snapshot, or nothing of it."""
    before, known = storage(vm), names(vm)
    command = f"python3 -m tests.real.faulty_daemon --at {step} --do wait:/run/cut --config"
    drop_in(
        vm,
        f"[Service]\nEnvironment=PYTHONPATH={LAB}/checkout:{LAB}/packages\n"
        f"ExecStart=\nExecStart=/usr/bin/{command} {CONFIG}\n",
    )
    vm.check("systemd-run", "--no-block", "snapd-vm", "create", "web", target, "--name", "cut")
    wait_until("the step", lambda: not vm.run(["test", "-e", "/run/cut"]).returncode, LIMIT_S, 0.2)
    vm.crash()
    vm.start()
    if "cut" in names(vm):
        assert names(vm) == {*known, "cut"}
        done = client(vm, "delete", f"web/{target}/cut")
        assert done.returncode == 0, done.stderr
    assert names(vm) == known
    assert storage(vm) == before
    made = client(vm, "create", "web", target, "--name", "cut")
    assert made.returncode == 0, made.stderr
    client(vm, "delete", f"web/{target}/cut")
    assert storage(vm) == before


@pytest.mark.thorough
def test_a_guest_that_runs_and_the_examples_of_the_readme(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_installed.py", timeout=1500)
