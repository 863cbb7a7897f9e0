"""Fixtures of the tests on real parts: one lab for all, a daemon of its own for each test."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.bus.clients import Client
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real.api import Api

PAUSE_US = 200_000 if "SNAPD_VM_INSIDE" in os.environ else 20_000
"""Between a guest's writes. A guest that writes all the time takes a third of a core, and several
run at once; one in a VM takes a whole core and half of all. Who measures to milliseconds, or wants
all the load, sets another (Guest.writer)."""

LAB = pytest.StashKey[Lab]()


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Bus, polkitd and libvirtd; guests and the daemon are started by who needs them."""
    if os.geteuid() != 0:
        pytest.skip("the lab needs root")
    with Lab(pause_us=PAUSE_US) as running:
        request.config.stash[LAB] = running
        yield running


@pytest.fixture
def daemon(lab: Lab) -> Iterator[Lab]:
    """The lab with a new daemon in it, without any memory of earlier ones."""
    shutil.rmtree(lab.daemon.state_dir, ignore_errors=True)
    lab.daemon.start({}, argv=None)
    yield lab
    if lab.daemon.running:
        lab.daemon.stop()


Connect = Callable[[], Awaitable[Api]]


@pytest.fixture
async def connect(lab: Lab) -> AsyncIterator[Connect]:
    """Makes clients of whatever daemon is there; closes them at the end."""
    clients: list[Client] = []

    async def new() -> Api:
        clients.append(await Client.connect(lab.address))
        return Api(clients[-1])

    yield new
    for client in clients:
        client.close()


@pytest.fixture
async def api(daemon: Lab, connect: Connect) -> Api:
    """A client of that daemon, who is root."""
    return await connect()


@pytest.fixture(scope="module")
def guest(lab: Lab) -> Iterator[Guest]:
    """A guest under write load that the tests of a file share, and leave as they found it."""
    running = lab.guest()
    yield running
    running.remove()


@pytest.fixture
def scratch(lab: Lab, tmp_path: Path) -> Path:
    """A folder for copies of images."""
    return tmp_path


class LibvirtdCrashed(Exception):
    """libvirtd ended by a fault of its own in a test, which says nothing about what is tested."""


def _restarted(item: pytest.Item) -> bool:
    """Whether the lab's libvirtd had crashed, and was started again."""
    lab = item.config.stash.get(LAB, None)
    if lab is None or not lab.libvirtd.crashed():
        return False
    lab.libvirtd.start()
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Tell a crash of libvirtd from a failure; see pytest_collection_modifyitems."""
    try:
        yield
    finally:
        if _restarted(item):
            raise LibvirtdCrashed


pytest_runtest_call = pytest_runtest_setup


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the daemon's log where a test failed."""
    report = yield
    lab = getattr(item, "funcargs", {}).get("lab")
    if report.failed and isinstance(lab, Lab):
        report.sections.append(("the daemon's log", lab.daemon.log[-6000:]))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files first that take longest, so that nobody waits for them alone at the end.

    A test in which libvirtd crashed is run once more, and the summary says so.
    """
    first = ("test_model.py",)
    items.sort(key=lambda item: item.path.name not in first)
    for item in items:
        item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=[LibvirtdCrashed]))
