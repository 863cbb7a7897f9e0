"""`python -m tests.lab up|clean`: the lab by hand, for people and for `make lab`."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence

from tests.lab.cleanup import cleanup
from tests.lab.deadline import LabError
from tests.lab.lab import Lab

USAGE = """usage: python -m tests.lab up      a guest, libvirt, a bus, polkitd, the daemon, a shell
       python -m tests.lab clean   take away what killed runs have left"""


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


def main(arguments: Sequence[str]) -> int:
    """Do what the one argument says."""
    commands = {"up": up, "clean": clean}
    if len(arguments) != 1 or arguments[0] not in commands:
        print(USAGE, file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("The lab starts guests and services of its own: run it as root.", file=sys.stderr)
        return 1
    # SIGTERM leaves the `with` block as ^C does, so that all is taken down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        return commands[arguments[0]]()
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
