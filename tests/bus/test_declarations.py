"""A method without a polkit action, or an explicit word that it is open, can't be written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from snapd_vm.bus import objects
from snapd_vm.bus.calls import (
    Action,
    Guarded,
    Open,
    Owned,
    Ownership,
    guarded,
    method_table,
    open_to_all,
    owned,
)
from snapd_vm.bus.contract import (
    DISK_SNAPSHOT,
    DOMAIN,
    JOB,
    MANAGER,
    Contract,
    Property,
    load_contract,
)
from snapd_vm.bus.guard import compare
from snapd_vm.bus.objects import METHODS
from snapd_vm.bus.standard import STANDARD_METHODS
from snapd_vm.bus.tree import Root, Tree
from snapd_vm.model import Domain, Job
from tests.bus.fakes import FakeEngine, make_job

ALL = (*METHODS, *STANDARD_METHODS)


def nothing(*arguments: Any) -> Any:
    raise AssertionError


def test_a_guarded_method_needs_an_action() -> None:
    with pytest.raises(TypeError):
        guarded(Root, MANAGER, "Forget")  # type: ignore[call-arg]
    for action in (None, "", "org.example.DiskSnapshot.create"):
        with pytest.raises(TypeError, match="polkit action"):
            guarded(Root, MANAGER, "Forget", action)(nothing)  # type: ignore[arg-type]


def test_an_owned_method_needs_an_owner_and_an_action() -> None:
    with pytest.raises(TypeError):
        owned(Job, JOB, "Forget")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="polkit action"):
        owned(Job, JOB, "Forget", None)(nothing)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Ownership(0)  # type: ignore[call-arg]
    for action in (None, "", "org.example.DiskSnapshot.create"):
        with pytest.raises(TypeError, match="polkit action"):
            Ownership(0, action)  # type: ignore[arg-type]


def test_a_plain_function_is_no_method() -> None:
    with pytest.raises(TypeError, match="polkit action"):
        method_table([*ALL, nothing])


def test_the_contract_and_its_methods_fit() -> None:
    compare(method_table(ALL), load_contract())


def test_a_method_of_the_contract_that_nobody_has_written_is_found() -> None:
    for left_out in ALL:
        rest = [method for method in ALL if method is not left_out]
        with pytest.raises(ValueError, match=left_out.member):
            compare(method_table(rest), load_contract())


def test_a_method_that_is_not_in_the_contract_is_found() -> None:
    for extra in (
        guarded(Root, DISK_SNAPSHOT, "Erase", Action.CREATE)(nothing),
        open_to_all(Domain, DOMAIN, "Peek")(nothing),
        open_to_all(Root, DOMAIN, "Disks")(nothing),
    ):
        with pytest.raises(ValueError, match="not in the contract"):
            compare(method_table([*ALL, extra]), load_contract())


def test_a_method_is_declared_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        method_table([*ALL, METHODS[0]])


def test_a_property_of_the_contract_that_nobody_reads_is_found() -> None:
    contract = load_contract()
    Tree(contract, FakeEngine(), "")
    manager = contract.own[MANAGER]
    more = {**manager.properties, "Mood": Property("s", True)}
    wrong = Contract({**contract.own, MANAGER: replace(manager, properties=more)}, {})
    with pytest.raises(ValueError, match="properties"):
        Tree(wrong, FakeEngine(), "")


def test_the_actions_are_those_of_the_design() -> None:
    actions = {
        (method.kind.__name__, method.member): method.action
        for method in METHODS
        if isinstance(method, Guarded)
    }
    assert actions == {
        ("Root", "Create"): Action.CREATE,
        ("Domain", "Create"): Action.CREATE,
        ("Domain", "CreateSet"): Action.CREATE,
        ("Domain", "Plan"): Action.CREATE,
        ("Domain", "Disks"): Action.READ,
        ("Domain", "SetMethod"): Action.CONFIGURE,
        ("Domain", "GetMethod"): Action.READ,
        ("Snapshot", "GetBackupSource"): Action.READ,
        ("Snapshot", "GetModifiedDisk"): Action.READ,
        ("Snapshot", "Delete"): Action.DELETE,
        ("Snapshot", "Revert"): Action.REVERT,
    }
    assert [m for m in METHODS if isinstance(m, Owned)] == [objects.cancel]
    for operation, action in (
        ("create", Action.CREATE),
        ("delete", Action.DELETE),
        ("revert", Action.REVERT),
    ):
        job = make_job(operation=operation, uid=7)
        assert objects.cancel.ownership(job) == Ownership(7, action)
    assert [m for m in METHODS if isinstance(m, Open)] == [objects.find_domain]
