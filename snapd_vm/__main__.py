"""The way in: `snapd-vm daemon` runs the service, everything else is the client. Nothing more."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

from snapd_vm.errors import SnapdError

_SPARED = ("ssl", "gi")
"""What asyncio and dbus-next import where it is there, and do without: TLS, and GLib's bindings.
We use neither; they take a tenth of the time of a start, and 3 MB."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line (`sys.argv` by default) says and returns the exit status.

    0: done; 1: failed, with one line on standard error; 2: usage (raised as SystemExit by
    argparse); 130: interrupted.
    """
    for name in _SPARED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # as the language has it
    from snapd_vm import cli

    options = cli.parser().parse_args(arguments)
    if options.command != "daemon":
        return cli.run(options)
    # Nothing of what is loaded becomes garbage: looking for it takes a tenth of the start.
    gc.disable()
    # Not at the top: the client must start without libvirt, and without the daemon's other parts.
    from snapd_vm import daemon

    gc.freeze()
    gc.enable()
    try:
        if options.thaw_held:
            return daemon.thaw_held(options.config)
        return daemon.run(options.config)
    except SnapdError as error:
        sys.stderr.write(f"snapd-vm: error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
