"""Removes the control groups of a run's guests, which nobody else does when libvirtd is killed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tests.lab.deadline import wait_until

CGROUPS = Path("/sys/fs/cgroup")


def remove_cgroups(domain_prefix: str) -> None:
    """Those whose name holds the prefix of the run's domains; their processes must have ended.

    Without systemd libvirt makes them below `machine`, once for each hierarchy of version 1. A
    zombie keeps its group: where nothing but process 1 is left to reap it, that takes seconds.
    """

    def gone() -> bool:
        groups = _groups(domain_prefix)
        for group in groups:
            for folder, _, _ in os.walk(group, topdown=False):
                with suppress(OSError):
                    Path(folder).rmdir()
        return not any(group.exists() for group in groups)

    wait_until(f"end of the control groups of {domain_prefix}", gone, 20, 0.1)


def _groups(domain_prefix: str) -> list[Path]:
    places = (CGROUPS / "machine", *CGROUPS.glob("*/machine"))
    return [group for place in places for group in place.glob(f"*-{domain_prefix}*")]
