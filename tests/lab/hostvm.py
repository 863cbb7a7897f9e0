"""A host VM: Debian with systemd, D-Bus, polkit, libvirt, LVM and ZFS, by QEMU's TCG.

For what cannot run on the machine itself. The checkout, the packages of the tests and the lab's
guest come on a disk of their own, made at each start of a `HostVm`; three more are empty. It dies
with the process that started it. Speaking with it is hostvmport.py's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from tests.lab.cleanup import clean, cleanup
from tests.lab.deadline import LabError, wait_until
from tests.lab.hostvmdisk import checkout_tar, payload_disk
from tests.lab.hostvmimage import host_vm_image
from tests.lab.hostvmport import HungError, Output, Port, quiet
from tests.lab.process import Process, end, tail
from tests.lab.program import CHECKOUT, run
from tests.lab.run import RUNS, Run
from tests.lab.tsc import tsc_khz

LAB = "/lab"
BOOT_S = 200  # it takes 20 s; see BOOT_S in guest.py
HANGS: list[str] = []
"""What the console said at boots that came to nothing, of which one is forgiven, and told of."""
LIMIT_S = 180  # of what takes a second or two, on a machine that others are busy on
DATA_DISKS = 3
MEMORY_MIB = 3072
ENVIRONMENT = {
    "SNAPD_VM_INSIDE": "1",
    "SNAPD_VM_LAB_GUEST": f"{LAB}/guest",
    "SNAPD_VM_LAB_SLOWNESS": "8",  # a guest in it boots in 75 s, and not in 3
    "PYTHONPATH": f"{LAB}/packages",
    "PYTHONSAFEPATH": "",
    "PYTEST_ADDOPTS": "-p no:cacheprovider -o timeout=900",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
}
# The kernel is told the TSC's frequency besides: when the machine is busy it takes it for up to
# twice as slow as it is, and then its clock runs fast.
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet nokaslr tsc=reliable no_timer_check cryptomgr.notests mitigations=off "
    "systemd.default_timeout_start_sec=400 systemd.default_device_timeout_sec=400 "
    "audit=0 apparmor=0 panic=-1 systemd.show_status=0 fsck.mode=skip"
)
FILE = "hostvm.json"


class HostVm:
    """A VM that runs while the `with` block does; `run()` runs programs in it, as root.

    In it: the checkout in /lab/checkout, and the empty disks /dev/disk/by-id/virtio-data0 to data2.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._process: Process | None = None

    def __enter__(self) -> HostVm:
        image = host_vm_image()
        with suppress(LabError):  # another run's remains, which the next clean-up tries again
            cleanup()
        with self._stack as stack:
            self._run = Run.begin()
            stack.callback(clean, self._run)
            self._folder = self._run.path("hostvm")
            self._image = image
            self.console = self._folder / "console.log"
            self._port = Port(self._folder / "port")
            stack.callback(self._port.close)
            self._make_disks()
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float = LIMIT_S,
        env: Mapping[str, str] | None = None,
        cwd: str = f"{LAB}/checkout",
        stdin: bytes = b"",
        output: Output = quiet,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in it to its end; `output` is given each part of what it prints.

        One that takes longer than `timeout` is ended, with a LabError that holds its output. A VM
        that hangs is powered off, so that nobody waits for it a second time.
        """
        env = {**ENVIRONMENT, **(env or {})}
        self._living()
        try:
            return self._port.run(
                argv, env=env, cwd=cwd, timeout=timeout, stdin=stdin, output=output
            )
        except HungError as error:
            self._off()
            raise LabError(f"{' '.join(argv)}: {error}; {self._last_words()}") from error

    def check(self, *argv: str, timeout: float = LIMIT_S, stdin: bytes = b"") -> str:
        """Run a program that has to succeed, and hand back what it printed."""
        done = self.run(argv, timeout=timeout, stdin=stdin)
        if done.returncode:
            said = f"{done.stdout}{done.stderr}".strip()[-4000:]
            raise LabError(f"{' '.join(argv)}: exit status {done.returncode} in the VM: {said}")
        return done.stdout

    def copy_in(self, source: Path, target: str) -> None:
        """Copy a file, or what is in a folder, into a folder of the VM's."""
        # Not the folder itself, whose rights are not for the one inside.
        names = [source.name] if source.is_file() else sorted(os.listdir(source))
        where = source.parent if source.is_file() else source
        packed = subprocess.run(
            ["tar", "-C", where, "-c", *names], stdout=subprocess.PIPE, timeout=60, check=True
        )
        self.check("mkdir", "-p", target)
        self._unpack(packed.stdout, target)

    def start(self) -> None:
        """Boot it, on the disks it has; it must be off."""
        if self._process is not None and self._process.alive():
            raise LabError("the host VM runs already")
        try:
            self._boot()
        except LabError as error:
            HANGS.append(str(error))
            self._boot()
        try:
            # Its units have all been started; that it takes some seconds more shows in no test.
            state = self.run(
                ["systemctl", "is-system-running", "--wait"], cwd="/", timeout=2 * BOOT_S
            )
        except LabError as error:
            raise LabError(f"{error}; {self._units()}") from error
        if state.stdout.strip() != "running":
            raise LabError(f"the host VM is {state.stdout.strip()}: {self._units()}")

    def _boot(self) -> None:
        log = self._folder / "qemu.log"
        self._process = self._run.start("hostvm", self._argv(), log)
        process = self._process

        def ready() -> bool:
            if not process.alive():
                raise LabError(f"the host VM ended: {tail(log)} {tail(self.console)}")
            return self._port.answers()

        try:
            wait_until("the host VM boots", ready, BOOT_S, 0.1)
        except LabError as error:
            self._off()
            raise LabError(f"{error}; {self._last_words()}") from error

    def stop(self) -> None:
        """An orderly power off."""
        self.run(["systemctl", "poweroff", "--no-block"], cwd="/")
        process = self._living()
        wait_until("the host VM goes off", lambda: not process.alive(), 60)
        self._port.close()

    def crash(self) -> None:
        """Loss of power: what its programs had not synced is gone. `start()` boots it again."""
        self._living()
        self._off()

    def signal(self, number: int) -> None:
        """To the QEMU that runs it."""
        self._living().signal(number)

    def publish(self) -> None:
        """Let `attached()` find it."""
        about = {"checkout": str(CHECKOUT), "port": str(self._port.path)}
        (self._run.folder / FILE).write_text(json.dumps(about))

    def lend(self) -> None:
        """Let go of the port, which takes one at a time."""
        self._port.close()

    def _units(self) -> str:
        """What its systemd waits for, and what has failed."""
        asked = (["systemctl", "--no-pager", *words] for words in (["list-jobs"], ["--failed"]))
        return "\n".join(self.run(argv, cwd="/").stdout for argv in asked)

    def _last_words(self) -> str:
        """What it said before it hung."""
        return f"its console says: {tail(self.console)}"

    def _off(self) -> None:
        if self._process is not None:
            self._process.signal(signal.SIGKILL)
            end(self._process)
        self._port.close()

    def _living(self) -> Process:
        if self._process is None or not self._process.alive():
            raise LabError("the host VM does not run")
        return self._process

    def _unpack(self, packed: bytes, target: str) -> None:
        done = self.run(["tar", "-C", target, "-x"], stdin=packed, cwd="/")
        if done.returncode:
            raise LabError(f"unpacking in the VM: {done.stderr}")

    def _make_disks(self) -> None:
        overlay = self._folder / "root.qcow2"
        backing = ("-b", self._image.root, "-F", "raw")
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, overlay)
        payload_disk(self._folder / "payload.raw", self._folder / "payload")
        for number in range(DATA_DISKS):
            with (self._folder / f"data{number}.raw").open("wb") as file:
                file.truncate(2 << 30)

    def _argv(self) -> list[str]:
        drives = [("root", "root.qcow2", "qcow2"), ("payload", "payload.raw", "raw")]
        drives += [(f"data{n}", f"data{n}.raw", "raw") for n in range(DATA_DISKS)]
        argv = [
            *("qemu-system-x86_64", "-machine", "q35", "-cpu", "max", "-smp", "2"),
            *("-accel", "tcg,thread=multi,tb-size=512", "-m", str(MEMORY_MIB)),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-kernel", str(self._image.kernel), "-initrd", str(self._image.initramfs)),
            *("-append", f"{KERNEL_ARGUMENTS} tsc_early_khz={tsc_khz()}"),
            *("-serial", f"file:{self.console}"),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=port,path={self._port.path},server=on,wait=off"),
            *("-device", "virtserialport,chardev=port,name=org.example.lab.hostvm.0"),
        ]
        for name, file, form in drives:
            drive = f"if=none,id={name},file={self._folder / file},format={form}"
            argv += ["-drive", f"{drive},cache=unsafe,discard=unmap"]
            argv += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
        return argv


def attached() -> Port:
    """The port of a VM that `python -m tests.lab vm` keeps running for this checkout."""
    for file in RUNS.glob(f"*/{FILE}"):
        about = json.loads(file.read_text())
        port = Port(Path(about["port"]))
        if about["checkout"] == str(CHECKOUT) and port.answers(5):
            return port
    raise LabError("no host VM runs for this checkout; start one with: python -m tests.lab vm")


def sync(port: Port) -> None:
    """Bring the checkout in the VM up to date with the one outside."""
    # What is gone outside must go inside too. What is compiled stays: it is used if it fits.
    script = 'cd "$1"; find . -type f ! -name "*.pyc" -delete; tar -xz'
    argv = ["sh", "-e", "-c", script, "sh", f"{LAB}/checkout"]
    done = port.run(argv, env=ENVIRONMENT, cwd="/", timeout=120, stdin=checkout_tar(compiled=False))
    if done.returncode:
        raise LabError(f"unpacking the checkout in the VM: {done.stderr}")
