"""Method lvm in a host VM, as the machine that tests run on has no device mapper.

Inside, one guest is booted for the conformance suite; all else is done with domains that are off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.hostvm import HostVm

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root"),
    pytest.mark.timeout(1500),
]

PYTEST = ("python3", "-m", "pytest", "-q", "--durations=5")


@pytest.fixture(scope="module")
def host() -> Iterator[HostVm]:
    """One for all."""
    with HostVm() as running:
        yield running


def passes(host: HostVm, *words: str, timeout: float, env: dict[str, str] | None = None) -> None:
    """Run tests in it, which all must pass, and some there must be."""
    done = host.run([*PYTEST, *words], timeout=timeout, env=env)
    print(done.stdout)  # shown if it fails
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


def test_what_is_taken_shown_and_refused(host: HostVm) -> None:
    passes(host, "tests/inside_vm/test_lvm.py", timeout=600)


def test_killed_at_every_step(host: HostVm) -> None:
    passes(host, "tests/inside_vm/test_lvm_faults.py", timeout=900)


def test_the_conformance_suite(host: HostVm) -> None:
    env = {"SNAPD_VM_STORAGES": "lvm"}
    passes(host, "tests/real/test_conformance.py", timeout=1200, env=env)
