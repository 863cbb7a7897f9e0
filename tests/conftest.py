"""On CI nothing may skip: there a test, or a file of tests, that would be skipped fails.

And a failure is shown when it comes, as a run that is cut off comes to no summary.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

ON_CI = bool(os.environ.get("CI"))


class Promptly:
    """Shows the end of each failure, and of what was printed before it."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            said = (report.capstdout[-4000:], report.longreprtext[-4000:])
            terminal.write_line(f"\n{report.nodeid}, {report.when}: failed")
            terminal.write_line("\n".join(filter(None, said)))


def pytest_configure(config: pytest.Config) -> None:
    """In the process that tells, which is not where the tests run if several do so at a time."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Promptly(config))


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    # An expected failure counts as skipped too, and is none.
    if ON_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped on CI, where nothing may skip: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid_skip(report)
    return report


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """What is for the inside of a host VM is run there only, by tests/hostvm."""
    inside = "inside_vm" in collection_path.parts and not os.environ.get("SNAPD_VM_INSIDE")
    return True if inside else None
