"""Method lvm in a host VM, as the machine that tests run on has no device mapper.

Under TCG each of lvm's commands, which wait for udev, takes seconds. So of what is not marked
`thorough` a selection is run unless SNAPD_VM_ALL is set.
"""

from __future__ import annotations

import pytest

from tests.hostvm.inside import LIMIT_S, conforms, passes, some, stands_anything
from tests.lab.hostvm import HostVm

WITHOUT_DAEMON = "told_what or overflows or gone_on"


def test_on_volumes_without_a_daemon(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_lvm_method.py", *some(WITHOUT_DAEMON), timeout=LIMIT_S)


@pytest.mark.thorough
def test_through_the_daemon(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_lvm.py", timeout=LIMIT_S)


@pytest.mark.thorough
def test_killed_at_its_steps(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_lvm_faults.py", timeout=LIMIT_S)


def test_the_conformance_suite(vm: HostVm) -> None:
    conforms(vm, "lvm", "lvm-thin")


@pytest.mark.thorough
def test_anything_in_any_order(vm: HostVm) -> None:
    stands_anything(vm, "lvm", "lvm-thin")


@pytest.mark.thorough
def test_a_hundred_of_a_hundred_are_whole(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_whole.py", "-k", "lvm", timeout=LIMIT_S)
