"""`python -m tests.lab up|clean|vm|vm-image|vm-run`: the lab by hand, for people and `make lab`."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from tests.lab.cleanup import cleanup
from tests.lab.deadline import LabError
from tests.lab.hostvm import ENVIRONMENT, LAB, HostVm, attached, sync
from tests.lab.hostvmimage import host_vm_image
from tests.lab.lab import Lab

USAGE = """usage: python -m tests.lab up      a guest, libvirt, a bus, polkitd, the daemon, a shell
       python -m tests.lab clean   take away what killed runs have left
       python -m tests.lab vm-image            build what a host VM boots, if it is not there
       python -m tests.lab vm      a host VM, until stdin closes or ^C comes
       python -m tests.lab vm -- COMMAND …     a host VM, and one command in it
       python -m tests.lab vm-run -- COMMAND … brings the checkout in the running one up to date,
                                               and runs a command in it"""
COMMAND_S = 24 * 3600


def up() -> int:
    """Bring everything up, let a person or a script use it, and take it down."""
    with Lab() as lab:
        guest = lab.guest(name="guest")
        lab.daemon.start()
        exports = {**lab.bus.env, "LIBVIRT_DEFAULT_URI": lab.libvirtd.uri}
        for name, value in exports.items():
            print(f"export {name}='{value}'")
        print(f"# guest {guest.name}; files in {lab.run.folder}; ends with this shell", flush=True)
        if os.isatty(0):
            shell = os.environ.get("SHELL", "/bin/sh")
            # Not through the nursery: it belongs to the terminal.
            return subprocess.run([shell], env={**os.environ, **exports}, check=False).returncode
        wait_for_end()
    return 0


def wait_for_end() -> None:
    """Until stdin closes, or SIGTERM or ^C comes."""
    while select.select([0], [], [])[0] and os.read(0, 4096):
        pass


def clean() -> int:
    """Take away the remains of killed runs, and say which."""
    for name in cleanup():
        print(f"took away run {name}")
    return 0


def vm_image() -> int:
    """Build the host VM's image, which takes minutes."""
    host_vm_image()
    return 0


def vm(command: Sequence[str]) -> int:
    """A host VM, and one command in it or as many as `vm-run` runs."""
    begun = time.monotonic()
    with HostVm() as running:
        print(f"# up after {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
        if command:
            return running.run(command, timeout=COMMAND_S, output=show).returncode
        running.publish()
        running.lend()
        print("# python -m tests.lab vm-run -- COMMAND", file=sys.stderr, flush=True)
        wait_for_end()
    return 0


def vm_run(command: Sequence[str]) -> int:
    """One command in the host VM that `vm` keeps running for this checkout."""
    port = attached()
    sync(port)
    where = f"{LAB}/checkout"
    done = port.run(command, env=ENVIRONMENT, cwd=where, timeout=COMMAND_S, output=show)
    return done.returncode


def show(stream: str, part: bytes) -> None:
    """Pass on what a command in the VM prints."""
    target = sys.stdout if stream == "out" else sys.stderr
    target.buffer.write(part)
    target.flush()


def main(arguments: Sequence[str]) -> int:
    """Do what the first argument says."""
    commands: dict[str, Callable[[], int]] = {
        "up": up,
        "clean": clean,
        "vm": lambda: vm([]),
        "vm-image": vm_image,
    }
    match list(arguments):
        case [name] if name in commands:
            do = commands[name]
        case ["vm", "--", *command] if command:
            do = partial(vm, command)
        case ["vm-run", "--", *command] if command:
            do = partial(vm_run, command)
        case _:
            print(USAGE, file=sys.stderr)
            return 2
    if os.geteuid() != 0:
        print("The lab starts guests and services of its own: run it as root.", file=sys.stderr)
        return 1
    # SIGTERM leaves the `with` block as ^C does, so that all is taken down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        return do()
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
