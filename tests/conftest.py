"""On CI nothing may skip: there a test, or a file of tests, that would be skipped fails."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

ON_CI = bool(os.environ.get("CI"))


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
