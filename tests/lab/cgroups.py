"""Removes the control groups of a run's guests, which nobody else does when libvirtd is killed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def remove_cgroups(domain_prefix: str) -> None:
    """Those whose name holds the prefix of the run's domains; their processes must have ended.

    Without systemd libvirt makes them below `machine`, once for each hierarchy of version 1.
    """
    for machine in (CGROUPS / "machine", *CGROUPS.glob("*/machine")):
        for group in machine.glob(f"*-{domain_prefix}*"):
            for folder, _, _ in os.walk(group, topdown=False):
                with suppress(OSError):  # libvirtd may be about to remove it as well
                    Path(folder).rmdir()
