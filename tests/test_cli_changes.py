"""`snapd-vm delete` and `revert`, and the jobs they show, on a service that answers as told."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from dbus_next.constants import MessageFlag

from tests.fake_service import (
    DOMAIN,
    ERROR,
    GONE_UUID,
    JOB,
    MODIFIED,
    OLD_SNAPSHOT,
    ROOT,
    SNAPSHOT,
    UUID,
    FakeService,
)
from tests.lab import Lab
from tests.test_cli import argv, done, ended, environment, failed, snapd_vm

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the lab's bus needs root")

OLD = f"{GONE_UUID}/vda/old"
NIGHTLY = "web/vda/nightly"
BUSY = (ERROR + "Busy", "The backup is being read: wait for its end.")


@pytest.fixture(scope="module")
def bus() -> Iterator[str]:
    with Lab(libvirt=False, polkit=False) as lab:
        yield lab.address


@pytest.fixture
def service(bus: str) -> Iterator[FakeService]:
    with FakeService(bus) as service:
        yield service


def deleted(service: FakeService) -> list[str]:
    """What Delete was called on."""
    return [str(call.path) for call in service.calls if call.member == "Delete"]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(bus: str, *arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv(*arguments), stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(bus)
    )


@pytest.mark.parametrize(
    ("said", "path"),
    [
        (NIGHTLY, SNAPSHOT),
        (f"{UUID.upper()}/vda/nightly", SNAPSHOT),
        (OLD, OLD_SNAPSHOT),
        (SNAPSHOT, SNAPSHOT),
        (UUID.upper(), f"{ROOT}/snapshot/_{UUID.replace('-', '_')}"),
    ],
)
def test_a_snapshot_is_said_as_listed_or_by_its_uuid_or_path(
    bus: str, service: FakeService, said: str, path: str
) -> None:
    assert done(snapd_vm(bus, "delete", said)) == f"deleted {said}\n"
    assert deleted(service) == [path]
    assert service.last("Delete").body == [0]
    assert service.asked_with("Delete") & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION


def test_one_that_fails_does_not_keep_the_others_from_being_tried(
    bus: str, service: FakeService
) -> None:
    service.fail[OLD_SNAPSHOT] = BUSY
    result = snapd_vm(bus, "delete", "web/vda/none", OLD, NIGHTLY)
    assert (result.returncode, result.stdout) == (1, f"deleted {NIGHTLY}\n")
    assert result.stderr.splitlines() == [
        "snapd-vm: error: web/vda/none: There is no such snapshot; 'snapd-vm list' shows those"
        " there are.",
        f"snapd-vm: error: {OLD}: The backup is being read: wait for its end.",
    ]
    assert deleted(service) == [OLD_SNAPSHOT, SNAPSHOT]


def test_delete_in_json_has_an_answer_for_each(bus: str, service: FakeService) -> None:
    service.fail[OLD_SNAPSHOT] = BUSY
    result = snapd_vm(bus, "delete", "--json", OLD, NIGHTLY)
    assert result.returncode == 1
    assert json.loads(result.stdout) == [
        {"snapshot": OLD_SNAPSHOT, "state": "failed", "error": BUSY[0], "message": BUSY[1]},
        {"snapshot": SNAPSHOT, "state": "deleted", "modified_disk": MODIFIED},
    ]
    assert json.loads(done(snapd_vm(bus, "delete", "--json", NIGHTLY)))[0]["state"] == "deleted"


def test_revert_to_one(bus: str, service: FakeService) -> None:
    assert done(snapd_vm(bus, "revert", NIGHTLY)) == f"reverted to {NIGHTLY}\n"
    assert (service.last("Revert").path, service.last("Revert").body) == (SNAPSHOT, [0])
    assert service.asked_with("Revert") & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
    answer = json.loads(done(snapd_vm(bus, "revert", "--json", NIGHTLY)))
    assert answer == {"snapshot": SNAPSHOT, "state": "reverted", "modified_disk": MODIFIED}
    assert deleted(service) == []


def test_a_revert_that_fails(bus: str, service: FakeService) -> None:
    service.fail["Revert"] = (ERROR + "InvalidState", "The domain is running; shut it down first.")
    assert f"{NIGHTLY}: The domain is running" in failed(snapd_vm(bus, "revert", NIGHTLY))
    result = snapd_vm(bus, "revert", "--json", NIGHTLY)
    assert json.loads(result.stdout)["error"] == ERROR + "InvalidState"
    assert "'web' is no snapshot" in failed(snapd_vm(bus, "revert", "web"), 2)


def test_a_revert_is_not_waited_for_or_cancelled(bus: str, service: FakeService) -> None:
    service.working.add("Revert")
    shown = done(snapd_vm(bus, "revert", "--no-wait", NIGHTLY))
    assert shown == f"reverting to {NIGHTLY}: see {JOB}\n"
    service.under_way.clear()
    process = start(bus, "revert", NIGHTLY)
    until(lambda: service.under_way)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    result = ended(process)
    assert (result.returncode, result.stdout) == (130, "")
    assert service.last("Cancel").path == JOB


@pytest.mark.parametrize("said", ["web", "web/vda", "/web/vda/x", DOMAIN, f"{SNAPSHOT}/x", "a//b"])
def test_what_can_be_no_snapshot_is_a_usage_error(said: str) -> None:
    result = snapd_vm("unix:path=/nowhere", "delete", NIGHTLY, said)
    assert f"'{said}' is no snapshot" in failed(result, 2)


def test_two_of_one_name_are_not_chosen_between(bus: str, service: FakeService) -> None:
    service.more = {f"{ROOT}/snapshot/_cccc": {}}
    assert "Several" in failed(snapd_vm(bus, "delete", NIGHTLY))
    assert deleted(service) == []


def test_without_waiting_it_returns_once_the_service_has_begun(
    bus: str, service: FakeService
) -> None:
    service.working.add("Delete")
    shown = done(snapd_vm(bus, "delete", "--no-wait", NIGHTLY, OLD))
    assert shown == f"deleting {NIGHTLY}: see {JOB}\ndeleting {OLD}: see {JOB}\n"
    assert len(service.under_way) == 2
    (answer,) = json.loads(done(snapd_vm(bus, "delete", "--no-wait", "--json", NIGHTLY)))
    assert answer == {"snapshot": SNAPSHOT, "state": "deleting", "job": JOB}
    service.working.clear()
    service.fail["Delete"] = BUSY
    assert BUSY[1] in failed(snapd_vm(bus, "delete", "--no-wait", NIGHTLY))


def test_an_interrupt_asks_the_job_to_cancel_and_waits_for_its_end(
    bus: str, service: FakeService
) -> None:
    service.working.add("Delete")
    process = start(bus, "delete", NIGHTLY, OLD)
    until(lambda: service.under_way)
    time.sleep(0.3)  # for its signals to come
    process.send_signal(signal.SIGINT)
    result = ended(process)
    assert (result.returncode, result.stdout) == (130, "")
    assert service.last("Cancel").path == JOB
    asked, error = result.stderr.splitlines()
    assert asked.startswith("Asked the service to cancel it")
    assert error.startswith(f"snapd-vm: error: {NIGHTLY}: The call was cancelled")
    assert deleted(service) == [SNAPSHOT], "the next is not begun"


def test_a_job_that_can_not_be_cancelled_is_waited_for(bus: str, service: FakeService) -> None:
    service.working.add("Delete")
    service.uncancelable = True
    process = start(bus, "delete", NIGHTLY)
    until(lambda: service.under_way)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    until(lambda: any(call.member == "Cancel" for call in service.calls))
    time.sleep(0.1)
    assert process.poll() is None
    service.finish()
    result = ended(process)
    assert (result.returncode, result.stdout) == (130, f"deleted {NIGHTLY}\n")
    assert "can't be cancelled: The disk is being switched" in result.stderr


def test_a_second_interrupt_leaves_it_alone(bus: str, service: FakeService) -> None:
    service.working.add("Delete")
    service.silent.add("Cancel")
    process = start(bus, "delete", NIGHTLY)
    until(lambda: service.under_way)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    until(lambda: any(call.member == "Cancel" for call in service.calls))
    process.send_signal(signal.SIGINT)
    result = ended(process)
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1].endswith("see 'snapd-vm list'.")


def test_an_interrupt_before_there_is_a_job_leaves_at_once(bus: str, service: FakeService) -> None:
    service.silent.add("Delete")
    process = start(bus, "delete", NIGHTLY)
    until(lambda: deleted(service))
    process.send_signal(signal.SIGINT)
    assert "goes on with what it began" in failed(ended(process), 130)
    assert not any(call.member == "Cancel" for call in service.calls)


def test_nobody_elses_signals_are_believed(bus: str, service: FakeService) -> None:
    """A job shown by another connection is not ours: no cancelling of what it names."""
    service.silent.add("Delete")
    process = start(bus, "delete", NIGHTLY)
    until(lambda: deleted(service))
    interface, member = "org.freedesktop.DBus.ObjectManager", "InterfacesAdded"
    job = (
        f"2 Operation s delete Objects ao 1 {SNAPSHOT} StartedByUID u {os.geteuid()}"
        " Progress d 0 ProgressValid b false Bytes t 0"
    ).split()
    told = ["oa{sa{sv}}", f"{ROOT}/job/6", "1", "org.example.DiskSnapshot.Job", "6", *job[1:]]
    client = service.last("Delete").sender
    emit = ["busctl", f"--destination={client}", "emit", ROOT, interface, member, *told]
    subprocess.run(emit, check=True, env=environment(bus), timeout=10)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert "goes on" in failed(ended(process), 130)
    assert not any(call.member == "Cancel" for call in service.calls)


@pytest.mark.parametrize(
    ("member", "words", "label"),
    [
        ("Delete", ["delete", NIGHTLY], f"deleting {NIGHTLY}"),
        ("Revert", ["revert", NIGHTLY], f"reverting to {NIGHTLY}"),
        ("Create", ["create", "web", "vda"], "taking a snapshot of web"),
    ],
)
def test_on_a_terminal_the_job_is_a_bar_that_goes_away(
    bus: str, service: FakeService, member: str, words: list[str], label: str
) -> None:
    service.working.add(member)
    ours, its = pty.openpty()
    process = start(bus, *words, stderr=its)
    os.close(its)
    drawn = b""
    while b"%" not in drawn:
        drawn += os.read(ours, 1000)
    service.finish()
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert out
    try:
        while more := os.read(ours, 1000):
            drawn += more
    except OSError:
        pass  # EIO: nobody has the other end any more
    os.close(ours)
    bar = f"{label} [##########..........]  50 % of 1.5 GiB"
    assert drawn.decode().split("\r") == ["", f"{label} ...", bar, " " * len(bar), ""]


def test_without_a_terminal_nothing_is_drawn(bus: str, service: FakeService) -> None:
    service.working |= {"Delete", "Create"}
    for words in (["delete", NIGHTLY], ["create", "web", "vda"]):
        process = start(bus, *words)
        until(lambda: service.under_way)
        service.finish()
        done(ended(process))
