"""The access files as installed: D-Bus policy and example rule, with the real bus and polkitd."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_service import DOMAIN, NAME, ROOT, FakeService
from tests.lab import Lab
from tests.lab.program import account_of, groups_of

RULE = Path(__file__).parent.parent / "polkit/50-snapd-vm-backup-operators.rules"
BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
# polkitd asks the system for a user's groups: Debian's user `backup` is in the group `backup`.
GROUP = "backup"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the lab's bus needs root")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(libvirt=False) as lab:
        yield lab


def test_only_root_can_be_the_service(lab: Lab) -> None:
    request = ("call", *BUS, "RequestName", "su", NAME, "4")
    refused = lab.busctl(*request, user="nobody")
    assert refused.returncode != 0
    assert "Access denied" in refused.stderr
    assert lab.busctl(*request).stdout == "u 1\n"


def test_everybody_may_ask_the_service(lab: Lab) -> None:
    with FakeService(lab.address):
        question = ("call", NAME, ROOT, f"{NAME}.Manager", "FindDomain", "s", "web")
        assert lab.busctl(*question, user="nobody").stdout == f'o "{DOMAIN}"\n'


def answer(lab: Lab, action: str, user: str, **details: str) -> str:
    """What polkitd says: yes, no, or that it would ask."""
    account = account_of(user)
    with subprocess.Popen(
        ["sleep", "60"],
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=groups_of(account),
    ) as subject:
        words = [word for name, value in details.items() for word in ("-d", name, value)]
        command = ["pkcheck", "-a", f"{NAME}.{action}", "-p", str(subject.pid), *words]
        status = lab.as_user(None, command).returncode
        subject.kill()
    return {0: "yes", 1: "no", 2: "would ask", 3: "dismissed"}[status]


def test_without_rules_an_administrator_is_asked_for(lab: Lab) -> None:
    lab.polkit.rules("")
    for action in ("create", "delete", "revert", "read", "configure"):
        assert answer(lab, action, "nobody", domain="web") == "would ask"


def test_the_example_rule_lets_the_group_back_up_the_domains_it_names(lab: Lab) -> None:
    lab.polkit.rules(RULE.read_text().replace("backup-operators", GROUP))
    for action in ("create", "read"):
        assert answer(lab, action, "backup", domain="web", disk="vda") == "yes"
        assert answer(lab, action, "backup", domain="db") == "yes"


def test_the_example_rule_gives_nobody_else_and_nothing_else(lab: Lab) -> None:
    lab.polkit.rules(RULE.read_text().replace("backup-operators", GROUP))
    assert answer(lab, "create", "nobody", domain="web") == "would ask"
    assert answer(lab, "create", "backup", domain="mail") == "would ask"
    assert answer(lab, "create", "backup") == "would ask"
    for action in ("configure", "delete", "revert"):
        assert answer(lab, action, "backup", domain="web") == "would ask"
