"""Runs pytest in the host VM: on tests/inside_vm, and on what of tests/real can run there."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from tests.lab.hostvm import HostVm

ALL = bool(os.environ.get("SNAPD_VM_ALL"))
LIMIT_S = 3000.0 if ALL else 900.0
CONFORMANCE = "is_clean or found_again"
"""What `make test` has the time for."""
PYTEST = ("python3", "-m", "pytest", "-q", "--durations=15")


def some(expression: str) -> Sequence[str]:
    """The words by which pytest takes these, or all."""
    return () if ALL else ("-k", expression)


def passes(vm: HostVm, *words: str, timeout: float, **env: str) -> None:
    """All of these tests pass there; some there must be, and none may skip. `timeout` in seconds.

    What pytest said there is shown if it fails.
    """
    done = vm.run([*PYTEST, *words], timeout=timeout, env=env)
    print(done.stdout[-20_000:])
    print(done.stderr[-4000:])
    assert done.returncode == 0, "see what is printed"
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


def conforms(vm: HostVm, storage: str, *more: str) -> None:
    """The conformance suite passes on a storage, some of it; all of it, and on more, if asked."""
    storages = ",".join([storage, *more] if ALL else [storage])
    file = "tests/real/test_conformance.py"
    passes(vm, file, *some(CONFORMANCE), timeout=LIMIT_S, SNAPD_VM_STORAGES=storages)


def stands_anything(vm: HostVm, *storages: str) -> None:
    """What is done in any order is as the model says, ten minutes on each storage."""
    env = {"SNAPD_VM_STORAGES": ",".join(storages), "SNAPD_VM_MODEL_S": str(600 * len(storages))}
    passes(vm, "tests/real/test_model.py", timeout=LIMIT_S, **env)


def define(vm: HostVm, xml: str) -> None:
    """Let the VM's own libvirtd have a domain."""
    vm.check("virsh", "define", "/dev/stdin", stdin=xml.encode(), timeout=120)
