"""The host VM that all tests here share: for what needs a real systemd, LVM or ZFS."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.hostvm import HANGS, HostVm
from tests.lab.program import CHECKOUT, run

CONFIG = "/etc/snapd-vm/snapd-vm.toml"
# Under TCG an lvcreate, which waits for udev, takes seconds, and so does an agent in a guest there.
SETTINGS = "agent_timeout_s = 60\nfreeze_timeout_s = 60\nfrozen_limit_s = 60\n"


@pytest.fixture(scope="session")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostVm]:
    """The host VM with `make install`'s result in it; a boot and this take most of a minute.

    Each file of tests takes away what it made: domains, volume groups and pools.
    """
    if os.geteuid() != 0:
        pytest.skip("the lab needs root")
    staging = tmp_path_factory.mktemp("installed")
    run("make", "--silent", "install", f"DESTDIR={staging}", cwd=CHECKOUT)
    config = staging / CONFIG[1:]
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(SETTINGS)
    with HostVm() as running:
        running.copy_in(staging, "/")
        running.check("systemctl", "daemon-reload")
        running.check("systemctl", "reload", "dbus")
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow inside is slow outside."""
    for item in items:
        item.add_marker(pytest.mark.timeout(3600))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A host VM that hung as it booted, and then did not, is no failure, and not to be hidden."""
    for said in HANGS:
        terminalreporter.write_line(f"booted a second time: {said}")
