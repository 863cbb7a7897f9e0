"""Method lvm in a host VM, as the machine that tests run on has no device mapper.

Inside, one guest is booted for the conformance suite; all else is done with domains that are off.
"""

from __future__ import annotations

from tests.hostvm.inside import passes
from tests.lab.hostvm import HostVm


def test_the_method_by_itself(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_lvm_method.py", timeout=900)


def test_what_is_taken_shown_and_refused(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_lvm.py", timeout=900)


def test_killed_at_every_step(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_lvm_faults.py", timeout=1200)


def test_the_conformance_suite(vm: HostVm) -> None:
    passes(vm, "tests/real/test_conformance.py", timeout=1500, SNAPD_VM_STORAGES="lvm")
