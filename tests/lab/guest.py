"""A guest: what it can be asked and told, from inside (guestd) and from outside (libvirt)."""

from __future__ import annotations

import uuid as uuids
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.lab import warmstart
from tests.lab.control import Control
from tests.lab.deadline import LabError, wait_until
from tests.lab.disks import Disk, DiskSpec, make_disk
from tests.lab.guestxml import Agent, Ports, domain_xml, ports_in
from tests.lab.hypervisor import INACTIVE, Hypervisor, agent_answers
from tests.lab.image import GuestImage
from tests.lab.process import tail
from tests.lab.pulse import Pulse
from tests.lab.run import Run
from tests.lab.stall import Stall, stall_of

PAUSE_US = 2000  # between two writes to a disk, where nobody says otherwise
BOOT_S = 90  # it takes 3 s; a machine with two cores and many guests takes its time


class Guest:
    """A guest of the lab, defined (persistent) in libvirt. `Lab.guest()` makes them.

    `warm` is the state that it is started from instead of being booted (warmstart.py), if any.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        name: str,
        uuid: str,
        disks: tuple[Disk, ...],
        ports: Ports,
        agent: Agent,
        pause_us: int = PAUSE_US,
    ) -> None:
        self.name = name
        self.uuid = uuid
        self.disks = disks
        self.ports = ports
        self.agent = agent
        self.pause_us = pause_us
        self.control = Control(ports.control)
        self.warm: Path | None = None
        self._hypervisor = hypervisor

    # From outside

    @property
    def domain(self) -> Any:
        """The virDomain, on a connection that lives now."""
        return self._hypervisor.domain(self.uuid)

    @property
    def state(self) -> str:
        """running, paused, shutoff, …"""
        return self._hypervisor.state(self.uuid)

    def disk(self, target: str = "vda") -> Disk:
        """One of its disks."""
        return next(disk for disk in self.disks if disk.target == target)

    def start(self, timeout: float = BOOT_S) -> None:
        """Boot it, as far as it has to be, and wait until guestd and the agent answer."""
        if self.warm is None:
            self.domain.create()
        else:
            saved = self.ports.console.with_suffix(".saved")
            warmstart.write_saved(self.warm, self.domain.XMLDesc(INACTIVE), saved)
            self._hypervisor.restore(saved)
            saved.unlink()
            self.control.close()  # whoever destroyed the one before may not have
            self.control.send(str(self.pause_us))
        self.wait_up(timeout)

    def save(self, to: Path) -> None:
        """Boot it, and write its state once it waits for its disks."""
        self.domain.create()
        wait_until(
            f"{self.name} waits", lambda: warmstart.WAITS in tail(self.ports.console), BOOT_S
        )
        self._hypervisor.save(self.uuid, to)

    def wait_up(self, timeout: float = BOOT_S) -> None:
        """Wait until guestd and the agent answer."""

        def answers() -> bool:
            if self.state == "shutoff":
                raise LabError(f"{self.name} went off as it booted: {tail(self.ports.console)}")
            with suppress(LabError):
                self.control.ask("ping", timeout=2)
                return True
            return False

        try:
            wait_until(f"{self.name} boots", answers, timeout, 0.05)
            self.wait_agent(timeout)
            self._wait_channels(timeout)
            self.control.ask("pause", str(self.pause_us))
            # What the boot made it stand still for is nothing that a test wants to see.
            self.reset()
        except LabError as error:
            console = tail(self.ports.console)
            raise LabError(f"{error}; its console says: {console}") from error

    def wait_agent(self, timeout: float = 30) -> None:
        """Wait until the agent answers, as far as libvirt is the one to ask it."""
        if self.agent == "libvirt":
            domain = self.domain
            wait_until(f"agent of {self.name}", lambda: agent_answers(domain), timeout, 0.05)

    def _wait_channels(self, timeout: float) -> None:
        """Wait until libvirt knows that all its ports are open, or the domain's XML changes yet:
        QEMU tells it of each at most once a second (monitor/monitor.c, VSERPORT_CHANGE).
        """
        domain = self.domain

        def known() -> bool:
            return "state='disconnected'" not in domain.XMLDesc()

        wait_until(f"channels of {self.name}", known, timeout, 0.05)

    def wait_state(self, state: str, timeout: float = 30) -> None:
        """Wait until libvirt says that it is in this state."""
        wait_until(f"{self.name} is {state}", lambda: self.state == state, timeout, 0.05)

    def destroy(self) -> None:
        """Pull the plug; the definition and the disks stay."""
        self.control.close()
        if self.state != "shutoff":
            self.domain.destroy()

    def remove(self) -> None:
        """Pull the plug, and remove the definition and the images that the lab made."""
        self.control.close()
        self._hypervisor.remove(self.domain)
        for disk in self.disks:
            for path in disk.chain:
                if path.is_file():
                    path.unlink()

    # From inside

    def stalls(self) -> dict[str, Stall]:
        """What each writer has seen since the last reset, by target."""
        return {name: stall_of(seen) for name, seen in self.control.ask("stall").items()}

    def longest_stall(self) -> float:
        """The longest any of its disks stood still since the last reset, in seconds."""
        return max((stall.longest_s for stall in self.stalls().values()), default=0.0)

    def writes_go_on(self, timeout: float = 10) -> None:
        """Wait until each mounted disk has completed a write that began after this call."""
        before = self.stalls()

        def more() -> bool:
            now = self.stalls()
            return all(now[n].sequence > s.sequence + 1 for n, s in before.items() if s.mounted)

        wait_until(f"{self.name} writes", more, timeout)

    def stands_still(self, for_s: float = 0.3, timeout: float = 10) -> None:
        """Wait until a disk has not completed a write for so long: it is frozen (or paused)."""

        def still() -> bool:
            return any(stall.current_s >= for_s for stall in self.stalls().values())

        wait_until(f"{self.name} stands still", still, timeout)

    def agent_says_frozen(self) -> bool:
        """Whether an agent in it believes the guest frozen, by the file it keeps about that."""
        return any(agent["frozen"] for agent in self.agents().values())

    def watch(self) -> Pulse:
        """Watch it from outside while a `with` block runs: sees vCPUs that are stopped too."""
        return Pulse(self.ports.pulse)

    def reset(self) -> None:
        """Forget the stalls seen so far."""
        self.control.ask("reset")

    def writer(self, on: bool, pause_us: int | None = None) -> None:
        """Writing on or off; `pause_us` between writes trades CPU for precision, and stays."""
        if pause_us is not None:
            self.pause_us = pause_us
            self.control.ask("pause", str(pause_us))
        self.control.ask("writer", "on" if on else "off")
        if not on:
            wait_until(
                f"{self.name} ends its last writes",
                lambda: not any(stall.busy for stall in self.stalls().values()),
                10,
            )

    def sync(self, timeout: float = 10) -> None:
        """sync(2)."""
        self.control.ask("sync", timeout=timeout)

    def write(self, disk: str, file: str, text: str, timeout: float = 10) -> None:
        """Write a small file of one line on a disk, down to the disk."""
        self.control.ask("write", disk, file, text, timeout=timeout)

    def read(self, disk: str, file: str, timeout: float = 10) -> str:
        """Read a small file."""
        text: str = self.control.ask("read", disk, file, timeout=timeout)["text"]
        return text

    def fill(self, disk: str, file: str, mebibytes: int, timeout: float = 120) -> None:
        """Write so many MiB of random data, for jobs that are to take a while."""
        self.control.ask("fill", disk, file, str(mebibytes), timeout=timeout)

    def mount(self, disk: str) -> None:
        """Mount it at /mnt/DISK, as it is after boot."""
        self.control.ask("mount", disk)

    def umount(self, disk: str) -> None:
        """Unmount it."""
        self.control.ask("umount", disk)

    def hold_freeze(self, disk: str) -> None:
        """Freeze a file system behind the agent's back; the agent's next thaw undoes it too."""
        self.control.ask("hold-freeze", disk)

    def release_freeze(self, disk: str) -> None:
        """Thaw it behind the agent's back."""
        self.control.ask("release-freeze", disk)

    def bad_mount(self, disk: str) -> None:
        """Add a mount of this disk, /mnt/bad/DISK, that makes the agent's freeze fail."""
        self.control.ask("bad-mount", disk)

    def good_mount(self, disk: str) -> None:
        """Take it away."""
        self.control.ask("good-mount", disk)

    def agents(self) -> dict[str, dict[str, Any]]:
        """The agents in it by port name: pid (0: dead), stopped, frozen."""
        return self.control.ask("agents")

    def stop_agent(self) -> None:
        """SIGSTOP the agents: their channels stay connected, and nobody answers."""
        self.control.ask("stop-agent")

    def cont_agent(self) -> None:
        """SIGCONT them: they take up what they were told meanwhile."""
        self.control.ask("cont-agent")

    def kill_agent(self) -> None:
        """SIGKILL them: libvirt sees the channels close."""
        self.control.ask("kill-agent")

        def dead() -> bool:
            return not any(agent["pid"] for agent in self.agents().values())

        wait_until(f"end of the agents of {self.name}", dead, 10)

    def start_agent(self) -> None:
        """Start those that were killed, and wait until they answer."""
        self.control.ask("start-agent")
        self.wait_agent()

    def poweroff(self, timeout: float = 30) -> None:
        """An orderly power off begun in the guest; libvirt says `shutoff`, reason `shutdown`."""
        self.control.ask("poweroff")
        self.wait_state("shutoff", timeout)
        self.control.close()


def make_guest(
    run: Run,
    hypervisor: Hypervisor,
    image: GuestImage,
    name: str,
    specs: Sequence[DiskSpec] = (DiskSpec(),),
    *,
    agent: Agent = "libvirt",
    start: bool = True,
    kernel_arguments: str = "",
    devices: str = "",
    elements: str = "",
    pause_us: int = PAUSE_US,
) -> Guest:
    """Make the disks, define the domain, and unless told otherwise start it: from the state of one
    of its shape, where `devices` and `elements` don't say what a shape does not. One that is not
    started here is booted by its start.
    """
    if any(spec.filesystem == "xfs" for spec in specs):
        kernel_arguments += " lab.xfs"
    folder = run.path("images")
    disks = tuple(
        make_disk(spec, folder, name, f"vd{letter}")
        for spec, letter in zip(specs, "abcdefgh", strict=False)
    )

    def defined(name: str, arguments: str) -> Guest:
        ports, uuid = ports_in(run.path("guests"), name), str(uuids.uuid4())
        whole_name = f"{run.domain_prefix}{name}"
        xml = domain_xml(
            whole_name,
            uuid,
            disks,
            image,
            ports,
            agent,
            kernel_arguments=arguments,
            devices=devices,
            elements=elements,
        )
        hypervisor.define(xml)
        return Guest(hypervisor, whole_name, uuid, disks, ports, agent, pause_us)

    def save(khz: int) -> Path:
        """The state of another one like it, which needs no disks of its own: it never sees them."""
        another = defined(f"{name}-waits", f"{kernel_arguments} {warmstart.kernel_arguments(khz)}")
        path = another.ports.console.with_suffix(".saved")
        another.save(path)
        hypervisor.remove(another.domain)
        return path

    guest = defined(name, kernel_arguments)
    if start:
        shape = warmstart.shape(len(disks), agent, kernel_arguments)
        if not devices and not elements:
            guest.warm = warmstart.state(shape, save)
        guest.start()
    return guest
