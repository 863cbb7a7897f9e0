"""Method lvm in a host VM, as the machine that tests run on has no device mapper.

Under TCG each of lvm's commands, which wait for udev, takes seconds. So a selection is run unless
SNAPD_VM_ALL is set: each part of the method once on real volumes, what shows it through the daemon,
and the conformance suite with the one guest that is booted in there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.hostvm import HostVm

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root"),
    pytest.mark.timeout(3600),
]
ALL = bool(os.environ.get("SNAPD_VM_ALL"))
PYTEST = ("python3", "-m", "pytest", "-q", "--durations=5")
WITHOUT_DAEMON = "several or xfs or overflows or was_killed or gone_on or cut_off"
WITH_DAEMON = "by_default and thin or no_other_name"
KILLED = "armed or switched or committed"
CONFORMANCE = "is_clean or found_again or mid_command or no_room or name_on"


@pytest.fixture(scope="module")
def host() -> Iterator[HostVm]:
    """One for all."""
    with HostVm() as running:
        yield running


def passes(host: HostVm, file: str, selected: str, env: dict[str, str] | None = None) -> None:
    """Run tests in it, which all must pass, and some there must be."""
    words = () if ALL else ("-k", selected)
    done = host.run([*PYTEST, file, *words], timeout=3000, env=env)
    print(done.stdout)  # shown if it fails
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


def test_on_volumes_without_a_daemon(host: HostVm) -> None:
    passes(host, "tests/inside_vm/test_lvm_method.py", WITHOUT_DAEMON)


def test_through_the_daemon(host: HostVm) -> None:
    passes(host, "tests/inside_vm/test_lvm.py", WITH_DAEMON)


def test_killed_at_its_steps(host: HostVm) -> None:
    passes(host, "tests/inside_vm/test_lvm_faults.py", KILLED)


def test_the_conformance_suite(host: HostVm) -> None:
    storages = {"SNAPD_VM_STORAGES": "lvm,lvm-thin" if ALL else "lvm"}
    passes(host, "tests/real/test_conformance.py", CONFORMANCE, storages)
