"""A host VM for each file of tests here: for what needs a real systemd, LVM or ZFS."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.hostvm import HostVm


@pytest.fixture(scope="module")
def vm() -> Iterator[HostVm]:
    """The host VM, for all tests of a file."""
    if os.geteuid() != 0:
        pytest.skip("the lab needs root")
    with HostVm() as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow inside is slow outside."""
    for item in items:
        item.add_marker(pytest.mark.timeout(3600))
