"""Method lvm in a host VM, as the machine that tests run on has no device mapper.

Under TCG each of lvm's commands, which wait for udev, takes seconds. So a selection is run unless
SNAPD_VM_ALL is set: each part of the method once on real volumes, what shows it through the daemon,
and the conformance suite with the one guest that is booted in there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from tests.hostvm.inside import LIMIT_S, passes
from tests.lab.hostvm import HostVm

ALL = bool(os.environ.get("SNAPD_VM_ALL"))
WITHOUT_DAEMON = "several or xfs or overflows or was_killed or gone_on or cut_off"
WITH_DAEMON = "by_default and thin or no_other_name"
KILLED = "armed or switched or committed"
CONFORMANCE = "is_clean or found_again or mid_command or no_room or name_on"


def some(expression: str) -> Sequence[str]:
    """The words by which pytest takes these, or all."""
    return () if ALL else ("-k", expression)


def test_on_volumes_without_a_daemon(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_lvm_method.py", *some(WITHOUT_DAEMON), timeout=LIMIT_S)


def test_through_the_daemon(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_lvm.py", *some(WITH_DAEMON), timeout=LIMIT_S)


def test_killed_at_its_steps(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_lvm_faults.py", *some(KILLED), timeout=LIMIT_S)


def test_the_conformance_suite(vm: HostVm) -> None:
    storages = "lvm,lvm-thin" if ALL else "lvm"
    file = "tests/real/test_conformance.py"
    passes(vm, file, *some(CONFORMANCE), timeout=LIMIT_S, SNAPD_VM_STORAGES=storages)
