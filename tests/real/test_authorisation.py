"""The whole daemon before real polkitd and real other users; verdicts themselves: tests/bus."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.lab import allow
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real.api import DOMAIN, NAME, VDA, Api, path_of
from tests.real.test_crash import active_file

ROOT = "/org/example/DiskSnapshot"
ACTION = f"{NAME}.create"


@pytest.fixture
def rules(lab: Lab) -> Iterator[None]:
    yield
    lab.polkit.rules("")


def create(lab: Lab, user: str, path: str, disk: str, method: str = "") -> tuple[int, str]:
    """Create by busctl as a user: exit status and what it says."""
    done = lab.busctl("call", NAME, path, NAME, "Create", "sssu", disk, method, "", "2", user=user)
    return done.returncode, (done.stdout + done.stderr).strip()


async def test_a_rule_on_the_domain_lets_a_user_create_there_and_nowhere_else(
    daemon: Lab, api: Api, lab: Lab, guest: Guest, rules: None
) -> None:
    other = lab.guest(start=False)
    lab.polkit.rules(
        "polkit.addRule(function(action, subject) {\n"
        f'  if (subject.user == "backup" && action.id == "{ACTION}" &&\n'
        f'      action.lookup("domain") == "{guest.name}") return polkit.Result.YES;\n'
        "});\n"
    )
    status, said = create(daemon, "backup", path_of(guest), VDA)
    assert status == 0, said
    for user, victim in (("backup", other), ("nobody", guest), ("nobody", other)):
        before = active_file(victim)
        status, said = create(daemon, user, path_of(victim), VDA)
        assert (status != 0, active_file(victim)) == (True, before)
    overlay = f"<diskSnapshot method='qemu'><overlay file='{guest.disk().path}.x'/></diskSnapshot>"
    status, said = create(daemon, "backup", path_of(guest), VDA, overlay)
    assert status != 0  # naming a place takes .configure as well
    other.remove()


async def test_who_may_not_cannot_tell_what_is_there(
    daemon: Lab, api: Api, lab: Lab, guest: Guest, rules: None
) -> None:
    live = active_file(guest)
    there = [VDA, f"<disk><source file='{live}'/></disk>"]
    not_there = [
        "<disk><target dev='vdq'/></disk>",
        "<disk><source file='/etc/shadow'/></disk>",
        f"<disk><target dev='vdq'/><source file='{live}'/></disk>",
        f"<disk><target dev='vda'/><source file='{live}.no'/></disk>",
    ]
    for verdict in ("NO", "AUTH_ADMIN"):
        lab.polkit.rules(allow("nobody", ACTION, result=verdict))
        for path in (path_of(guest), ROOT):
            said = {create(daemon, "nobody", path, disk)[1] for disk in there + not_there}
            if path == ROOT:  # a bare disk without a source says what is missing, before all
                said = {create(daemon, "nobody", path, d)[1] for d in there[1:] + not_there[1:2]}
            assert len(said) == 1, said
    unknown = f"<domain><name>no-such</name><devices>{VDA}</devices></domain>"
    known = f"<domain><name>{guest.name}</name><devices>{VDA}</devices></domain>"
    answers = {create(daemon, "nobody", ROOT, xml)[1] for xml in (unknown, known)}
    assert len(answers) == 1, answers


@pytest.mark.measures
async def test_nothing_is_asked_of_libvirt_before_the_yes(
    daemon: Lab, api: Api, lab: Lab, guest: Guest, rules: None
) -> None:
    """libvirtd is stopped: whoever is refused is refused at once all the same."""
    lab.polkit.rules(allow("nobody", ACTION, f"{NAME}.read", result="NO"))
    daemon.libvirtd.suspend()
    try:
        started = time.monotonic()
        status, said = create(daemon, "nobody", path_of(guest), VDA)
        assert status != 0
        assert "polkit does not allow" in said
        disks = daemon.busctl("call", NAME, path_of(guest), DOMAIN, "Disks", user="nobody")
        assert disks.returncode != 0
        assert time.monotonic() - started < 3
    finally:
        daemon.libvirtd.resume()


async def test_properties_are_open_and_name_no_path(
    daemon: Lab, api: Api, lab: Lab, guest: Guest
) -> None:
    created = await api.create(guest)
    listed = daemon.busctl(
        "call", NAME, ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects", user="nobody"
    )
    assert listed.returncode == 0
    assert created.snapshot in listed.stdout
    assert str(guest.disk().path.parent) not in listed.stdout
    read = daemon.busctl(
        "call", NAME, created.snapshot, f"{NAME}.Snapshot", "GetBackupSource", user="nobody"
    )
    assert read.returncode != 0
    assert str(guest.disk().path.parent) not in read.stderr
