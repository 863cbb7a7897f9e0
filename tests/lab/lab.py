"""The lab as a test sees it: one object that has everything, and takes all away at its end."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType

from tests.lab.blockdev import BlockDevices
from tests.lab.bus import Bus
from tests.lab.ceph import Ceph
from tests.lab.cleanup import clean, cleanup
from tests.lab.daemon import Daemon
from tests.lab.deadline import LabError
from tests.lab.disks import DiskSpec
from tests.lab.guest import PAUSE_US, Guest, make_guest
from tests.lab.guestxml import Agent
from tests.lab.hypervisor import Hypervisor
from tests.lab.image import GuestImage, guest_image
from tests.lab.libvirtd import Libvirtd
from tests.lab.polkit import Polkit
from tests.lab.program import attempt
from tests.lab.run import Run


class Lab:
    """libvirtd, a private system bus and polkitd, running while the `with` block does.

    Guests and the daemon are started by the test: `lab.guest()`, `lab.daemon.start()`.
    """

    run: Run
    bus: Bus
    polkit: Polkit
    libvirtd: Libvirtd
    hypervisor: Hypervisor
    daemon: Daemon
    block: BlockDevices
    ceph: Ceph

    def __init__(
        self, *, libvirt: bool = True, polkit: bool = True, pause_us: int = PAUSE_US
    ) -> None:
        """`pause_us` is that between two writes of a guest, see Guest.writer."""
        self._pause_us = pause_us
        self._with_libvirt = libvirt
        self._with_polkit = polkit
        self._stack = ExitStack()
        self._guests = 0

    def __enter__(self) -> Lab:
        try:
            cleanup()
        except LabError as error:  # another run's remains must not keep this one from its work
            print(f"lab: {error}", file=sys.stderr)
        with self._stack as stack:
            self.run = Run.begin()
            # The way out is the way that takes away the remains of a run that was killed.
            stack.callback(clean, self.run)
            self.libvirtd = Libvirtd(self.run)
            if self._with_libvirt:
                self.libvirtd.start()
            self.hypervisor = Hypervisor(self.libvirtd.uri)
            stack.callback(self.hypervisor.close)
            self.bus = Bus(self.run)
            self.bus.start()
            self.polkit = Polkit(self.run, self.bus)
            if self._with_polkit:
                self.polkit.start()
            self.daemon = Daemon(self.run, self.bus, self.libvirtd)
            self.block = BlockDevices(self.run)
            self.ceph = Ceph(self.run, self.hypervisor)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    @property
    def address(self) -> str:
        """The bus's address, for DBUS_SYSTEM_BUS_ADDRESS."""
        return self.bus.address

    def guest(
        self,
        disks: Sequence[DiskSpec] = (DiskSpec(),),
        *,
        name: str | None = None,
        agent: Agent = "libvirt",
        start: bool = True,
        kernel_arguments: str = "",
        devices: str = "",
        elements: str = "",
    ) -> Guest:
        """A new guest with these disks (vda, …), up and writing; `start=False` only defines it.

        `devices` is XML to be put in `<devices>`, `elements` XML in `<domain>`.
        """
        self._guests += 1
        return make_guest(
            self.run,
            self.hypervisor,
            self._image,
            name or f"g{self._guests}",
            disks,
            agent=agent,
            start=start,
            kernel_arguments=kernel_arguments,
            devices=devices,
            elements=elements,
            pause_us=self._pause_us,
        )

    @cached_property
    def _image(self) -> GuestImage:
        """A copy of the run's own: libvirtd writes down on the files who uses them.

        One that is killed leaves that there, and guests of other runs may not start for it.
        """
        folder = self.run.path("image")
        found = guest_image()
        return GuestImage(
            *(Path(shutil.copy(path, folder)) for path in (found.kernel, found.initramfs))
        )

    def folder(self, name: str) -> Path:
        """A folder of the run's, which QEMU's user may read, made if it is not there."""
        return self.run.path(name)

    def as_user(
        self, user: str | int | None, argv: Sequence[str | Path], timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as a user (`nobody`, `backup`, a uid; None: root) on the lab's bus."""
        return attempt(argv, user=user, env=self.bus.env, timeout=timeout)

    def busctl(
        self, *arguments: str, user: str | int | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """busctl on the lab's bus, e.g. `lab.busctl("call", …, user="nobody")`."""
        return self.as_user(user, ["busctl", f"--timeout={timeout:g}", *arguments], timeout + 5)
