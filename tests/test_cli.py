"""The command line against a service that answers as the contract says: what a person sees."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dbus_next.constants import MessageFlag

from snapd_vm import cli_text
from tests.fake_service import (
    CREATED,
    DOMAIN,
    ERROR,
    GONE_UUID,
    MODIFIED,
    SNAPSHOT,
    SOURCE,
    STORED,
    UUID,
    FakeService,
)
from tests.fake_service import ROOT as ROOT_PATH
from tests.lab import Lab

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the lab's bus needs root")
Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def bus() -> Iterator[str]:
    with Lab(libvirt=False, polkit=False) as lab:
        yield lab.address


@pytest.fixture
def service(bus: str) -> Iterator[FakeService]:
    with FakeService(bus) as service:
        yield service


def environment(bus: str) -> dict[str, str]:
    return {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": bus, "TZ": "UTC", "PYTHONPATH": str(ROOT)}


def argv(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "snapd_vm", *arguments]


def snapd_vm(bus: str, *arguments: str, stdin: str = "") -> Result:
    return subprocess.run(
        argv(*arguments),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=environment(bus),
    )


def done(result: Result) -> str:
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def failed(result: Result, status: int = 1) -> str:
    """The one line of the error."""
    assert (result.returncode, result.stdout) == (status, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("snapd-vm: error: ")
    return line.removeprefix("snapd-vm: error: ")


def test_create_shows_what_was_made(bus: str, service: FakeService) -> None:
    assert done(snapd_vm(bus, "create", "web", "vda", "--name", "nightly")) == (
        "Snapshot       nightly of web's vda\n"
        "Method         qemu\n"
        "Consistency    quiesced (2 file systems frozen for 61 ms)\n"
        f"Object         {SNAPSHOT}\n"
        f"Backup source  {SOURCE}\n"
        "Disk now       <disk type='file'>\n"
        "                 <source file='/srv/web.nightly'/>\n"
        "                 <target dev='vda'/>\n"
        "               </disk>\n"
    )


def test_create_in_json_has_both_answers_and_plain_numbers(bus: str, service: FakeService) -> None:
    answer = json.loads(done(snapd_vm(bus, "create", UUID, "vda", "--json")))
    assert answer == {
        "snapshot": SNAPSHOT,
        "domain": "web",
        "domain_uuid": UUID,
        "name": "nightly",
        "target": "vda",
        "method": "qemu",
        "created": CREATED,
        "state": "ready",
        "consistency": "quiesced",
        "frozen_filesystems": 2,
        "frozen_time": 61_400,
        "format": "qcow2",
        "size": 1_610_612_736,
        "modified_disk": MODIFIED,
        "backup_source": SOURCE,
    }


@pytest.mark.parametrize(
    ("options", "body"),
    [
        (["vda"], ['<disk><target dev="vda"/></disk>', "", "", 0]),
        (["a'<&"], ['<disk><target dev="a\'&lt;&amp;"/></disk>', "", "", 0]),
        (["<disk/>", "--name", "n", "--quiesce-required"], ["<disk/>", "", "n", 1]),
        (["<disk/>", "--no-quiesce"], ["<disk/>", "", "", 2]),
        (["<disk/>", "--method", "qemu"], ["<disk/>", '<diskSnapshot method="qemu"/>', "", 0]),
        (["<disk/>", "--method", "<x/>"], ["<disk/>", "<x/>", "", 0]),
        (["<disk/>", "--method", "-"], ["<disk/>", "<from-stdin/>", "", 0]),
    ],
)
@pytest.mark.parametrize("member", ["Create", "Plan"])
def test_create_and_plan_say_what_the_options_mean(
    bus: str, service: FakeService, member: str, options: list[str], body: list[object]
) -> None:
    done(snapd_vm(bus, member.lower(), "web", *options, stdin="<from-stdin/>"))
    call = service.last(member)
    assert (call.path, call.body) == (DOMAIN, body)


def test_several_disks_are_one_set(bus: str, service: FakeService) -> None:
    words = ("create", "web", "vda", "<disk/>", "--method", "qemu", "--name", "n", "--no-quiesce")
    shown = done(snapd_vm(bus, *words))
    call = service.last("CreateSet")
    method = '<diskSnapshot method="qemu"/>'
    pairs = [['<disk><target dev="vda"/></disk>', method], ["<disk/>", method]]
    assert (call.path, call.body) == (DOMAIN, [pairs, "n", 2])
    assert shown.count("Snapshot       nightly of web's vda\n") == 2
    assert shown.count("\n\n") == 1
    answers = json.loads(done(snapd_vm(bus, *words, "--json")))
    assert [answer["snapshot"] for answer in answers] == [SNAPSHOT, SNAPSHOT]


def test_calls_allow_polkit_to_ask(bus: str, service: FakeService) -> None:
    done(snapd_vm(bus, "create", "web", "vda"))
    assert service.asked_with("Create") & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION


def test_an_answer_is_shown_even_if_the_service_is_gone_since(
    bus: str, service: FakeService
) -> None:
    service.fail["GetAll"] = (ERROR + "Internal", "No more.")
    assert f"Backup source  {SOURCE}\n" in done(snapd_vm(bus, "create", "web", "vda"))
    answer = json.loads(done(snapd_vm(bus, "create", "web", "vda", "--json")))
    assert (answer["snapshot"], answer["modified_disk"]) == (SNAPSHOT, MODIFIED)


def test_plan_shows_the_checks_made(bus: str, service: FakeService) -> None:
    assert done(snapd_vm(bus, "plan", "web", "vda")) == (
        "Method         qemu\n"
        "Consistency    quiesced at best\n"
        f"Backup source  {SOURCE}\n"
        "Space          192 KiB of 5 GiB available\n"
        "Warning        No UEFI variables are in it.\n"
    )
    plan = json.loads(done(snapd_vm(bus, "plan", "web", "vda", "--json")))
    assert (plan["space_needed"], plan["warnings"]) == (196_608, ["No UEFI variables are in it."])


def test_disks_are_a_table(bus: str, service: FakeService) -> None:
    assert done(snapd_vm(bus, "disks", "web")) == (
        "TARGET  DEVICE  TYPE  FORMAT  SOURCE          METHOD  REASON\n"
        "vda     disk    file  qcow2   /srv/web.qcow2  qemu    the image is qcow2\n"
        "sda     cdrom   file  -       -               none    a cdrom has no contents of its own\n"
    )
    disks = json.loads(done(snapd_vm(bus, "disks", "web", "--json")))
    assert [(disk["target"], disk["method"]) for disk in disks] == [("vda", "qemu"), ("sda", "")]


def test_list_is_a_tree_of_domains_disks_and_snapshots_from_the_oldest_on(
    bus: str, service: FakeService
) -> None:
    service.more = {
        f"{ROOT_PATH}/snapshot/_cccc": {"Name": "first", "Created": CREATED - 1},
        f"{ROOT_PATH}/snapshot/_dddd": {"Name": "other", "Target": "vdb"},
    }
    lines = done(snapd_vm(bus, "list")).splitlines()
    lines = [re.sub(r"\d\d+ days", "AGE", line) for line in lines]
    last = ["AGE", "quiesced", "ready", "qemu", "qcow2", "1.5", "GiB"]
    assert [line.split() for line in lines] == [
        ["SNAPSHOT", "AGE", "CONSISTENCY", "STATE", "METHOD", "FORMAT", "SIZE"],
        [GONE_UUID],
        ["vda"],
        [f"{GONE_UUID}/vda/old", "AGE", "crash", *last[2:]],
        ["web"],
        ["vda"],
        ["web/vda/first", *last],
        ["web/vda/nightly", *last],
        ["vdb"],
        ["web/vdb/other", *last],
    ]
    assert [len(line) - len(line.lstrip()) for line in lines] == [0, 0, 2, 4, 0, 2, 4, 4, 2, 4]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-5, "0 s"), (59, "59 s"), (60, "1 min"), (7199, "1 h"), (90_000, "1 day"), (9**7, "55 days")],
)
def test_ages_for_a_person(seconds: int, shown: str) -> None:
    assert cli_text.age(seconds * 1_000_000) == shown


@pytest.mark.parametrize(
    ("fraction", "total", "shown"),
    [
        (None, 5, "x ..."),
        (0.0, 0, "x [....................]   0 %"),
        (0.999, 1 << 30, "x [###################.]  99 % of 1 GiB"),
        (7.0, 0, "x [####################] 100 %"),
    ],
)
def test_progress_for_a_person(fraction: float | None, total: int, shown: str) -> None:
    assert cli_text.progress("x", fraction, total) == shown


def test_list_of_one_domain_by_name_and_of_a_gone_one_by_uuid(
    bus: str, service: FakeService
) -> None:
    for said, found in (("web", "nightly"), (UUID, "nightly"), (GONE_UUID.upper(), "old")):
        answer = json.loads(done(snapd_vm(bus, "list", said, "--json")))
        assert [snapshot["name"] for snapshot in answer] == [found]
    assert "no domain 'mail'" in failed(snapd_vm(bus, "list", "mail"))


def test_the_stored_method(bus: str, service: FakeService) -> None:
    assert done(snapd_vm(bus, "get-method", "web", "vda")) == f"{STORED}\n"
    assert service.last("GetMethod").body == ['<disk><target dev="vda"/></disk>']
    for given, stored in (
        ("reflink", '<diskSnapshot method="reflink"/>'),
        ("--forget", ""),
        ("<diskSnapshot method='lvm'/>", "<diskSnapshot method='lvm'/>"),
    ):
        assert done(snapd_vm(bus, "set-method", "web", "vda", given)) == ""
        assert service.last("SetMethod").body == ['<disk><target dev="vda"/></disk>', stored]
        told = json.loads(done(snapd_vm(bus, "set-method", "web", "vda", given, "--json")))
        assert told == {"method": stored}
    told = json.loads(done(snapd_vm(bus, "get-method", "web", "vda", "--json")))
    assert told == {"method": STORED}
    for wrong in ([], ["qemu", "--forget"]):
        assert snapd_vm(bus, "set-method", "web", "vda", *wrong).returncode == 2


def test_methods(bus: str, service: FakeService) -> None:
    assert done(snapd_vm(bus, "methods")) == "METHOD\nqemu\nvendor\n"
    assert json.loads(done(snapd_vm(bus, "methods", "--json"))) == ["qemu", "vendor"]


def test_a_failure_is_the_services_own_sentence(bus: str, service: FakeService) -> None:
    service.fail["Create"] = (ERROR + "NameInUse", "The disk has a snapshot 'x': use another name.")
    message = failed(snapd_vm(bus, "create", "web", "vda", "--json"))
    assert message == "The disk has a snapshot 'x': use another name."


def test_a_question_that_nobody_could_be_asked_says_how(bus: str, service: FakeService) -> None:
    service.fail["Disks"] = (ERROR + "NotAuthorizedCanObtain", "Not allowed without a password.")
    message = failed(snapd_vm(bus, "disks", "web"))
    assert message.startswith("Not allowed without a password: run this as root, or with a polkit")
    assert "pkttyagent" in message


def test_no_service(bus: str) -> None:
    assert "systemctl start snapd-vm" in failed(snapd_vm(bus, "list"))


def test_no_bus(tmp_path: Path) -> None:
    assert "can't be reached" in failed(snapd_vm(f"unix:path={tmp_path}/none", "list"))
    assert "can't be reached" in failed(snapd_vm("nonsense", "list"))


def in_call(bus: str, service: FakeService, *arguments: str) -> subprocess.Popen[str]:
    """A command that waits for the answer of Create or Disks."""
    service.silent |= {"Create", "Disks"}
    process = subprocess.Popen(
        argv(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(bus),
    )
    deadline = time.monotonic() + 10
    while not any(call.member in service.silent for call in service.calls):
        assert time.monotonic() < deadline, "the call did not come"
        time.sleep(0.01)
    return process


def ended(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_a_service_that_dies_in_the_call(bus: str, service: FakeService) -> None:
    process = in_call(bus, service, "create", "web", "vda")
    service.leave()
    assert "left the bus before it answered" in failed(ended(process))


def test_a_bus_that_dies_in_the_call() -> None:
    with Lab(libvirt=False, polkit=False) as lab, FakeService(lab.address) as service:
        process = in_call(lab.address, service, "create", "web", "vda")
        lab.bus.stop()
        assert "bus closed the connection" in failed(ended(process))


@pytest.mark.parametrize(("command", "goes_on"), [("create", True), ("disks", False)])
def test_an_interrupt_says_what_goes_on(
    bus: str, service: FakeService, command: str, goes_on: bool
) -> None:
    process = in_call(bus, service, command, "web", *(["vda"] if goes_on else []))
    process.send_signal(signal.SIGINT)
    assert ("goes on" in failed(ended(process), 130)) is goes_on


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["delete"],
        ["revert"],
        ["revert", "web/vda/a", "web/vda/b"],
        ["create", "web"],
        ["create", "web", "vda", "--quiesce-required", "--no-quiesce"],
        ["create", "web", "vda", "--quiesce"],
        ["disks"],
    ],
)
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    result = snapd_vm("unix:path=/nowhere", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: snapd-vm" in result.stderr


def test_what_no_bus_string_can_hold_is_a_usage_error() -> None:
    nowhere = "unix:path=/nowhere"
    assert "not UTF-8" in failed(snapd_vm(nowhere, "disks", "\udcff"), 2)
    assert "no <diskSnapshot>" in failed(snapd_vm(nowhere, "create", "w", "a", "--method", "-"), 2)
    nul = snapd_vm(nowhere, "create", "w", "a", "--method", "-", stdin="<a\0/>")
    assert "NUL" in failed(nul, 2)


def test_a_reader_that_has_enough_is_no_error(bus: str, service: FakeService) -> None:
    service.plan_warnings = ["x" * 1000] * 200
    process = subprocess.Popen(
        argv("plan", "web", "vda"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(bus),
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(10) == 1


def test_the_client_starts_without_libvirt_and_the_daemon() -> None:
    code = (
        "import sys; import snapd_vm.__main__, snapd_vm.cli, snapd_vm.cli_commands\n"
        "print(sorted(m for m in sys.modules if m.startswith(('libvirt', 'lxml', 'snapd_vm.'))))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    client = {f"snapd_vm.{file.stem}" for file in (ROOT / "snapd_vm").glob("cli*.py")}
    assert shown.strip() == str(sorted(client | {"snapd_vm.__main__", "snapd_vm.errors"}))


def complete(bus: str, tmp_path: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    launcher = tmp_path / "snapd-vm"
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -m snapd_vm "$@"\n')
    launcher.chmod(0o755)
    script = (
        f'source {ROOT}/data/snapd-vm.bash; COMP_WORDS=({launcher} "$@"); COMP_CWORD=$#;'
        ' _snapd_vm; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    result = subprocess.run(
        ["bash", "-u", "-c", script, "bash", *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env=environment(bus),
    )
    assert result.stderr == ""
    return result.stdout.split("\n")[:-1]


def test_completion(bus: str, service: FakeService, tmp_path: Path) -> None:
    def offered(*words: str) -> list[str]:
        return complete(bus, tmp_path, *words)

    assert offered("cr") == ["create"]
    commands = {"create", "plan", "list", "delete", "revert", "disks", "methods", "daemon"}
    commands |= {"get-method", "set-method"}
    assert set(offered("")) >= commands
    assert "complete" not in offered("")
    assert offered("create", "--q") == ["--quiesce-required"]
    assert offered("create", "--method", "q") == ["qemu"]
    assert offered("create", "--method", "r") == ["rbd", "reflink"]
    for words in (("create", "--method"), ("set-method", "web", "vda")):
        assert offered(*words, "v") == ["vendor"]
    assert offered("create", "w") == ["web"]
    assert offered("create", "--name", "n", "w") == ["web"]
    assert offered("create", "--json", "web", "v") == ["vda"]
    assert offered("list", "--json", "") == ["web"]
    assert offered("delete", "--no") == ["--no-wait"]
    assert offered("delete", "w") == ["web/vda/nightly"]
    both = [f"{GONE_UUID}/vda/old", "web/vda/nightly"]
    assert offered("delete", "--no-wait", "web/vda/nightly", "") == both
    assert offered("revert", "--") == ["--help", "--json", "--no-wait"]
    assert offered("revert", "w") == ["web/vda/nightly"]
    assert offered("revert", "web/vda/nightly", "") == [""]
    assert offered("create", "web", "vda", "s") == ["sda"]
    assert offered("plan", "web", "vda", "") == [""]


def test_completion_asks_nobody_and_starts_nothing(
    bus: str, service: FakeService, tmp_path: Path
) -> None:
    complete(bus, tmp_path, "create", "web", "v")
    assert service.asked_with("Disks") is MessageFlag.NO_AUTOSTART


def test_completion_of_a_name_runs_nothing(bus: str, tmp_path: Path) -> None:
    with FakeService(bus, domain_name=f"$(touch {tmp_path}/ran) x") as service:
        offered = complete(bus, tmp_path, "create", "")
        assert service.calls
        assert offered == [f"\\$\\(touch\\ {tmp_path}/ran\\)\\ x"]
    assert not (tmp_path / "ran").exists()


def test_completion_without_a_service_is_silent(bus: str, tmp_path: Path) -> None:
    assert complete(bus, tmp_path, "create", "") == [""]


def test_a_domains_name_plays_no_tricks_on_the_terminal() -> None:
    assert cli_text.printable("a\x1b[31m\n\u202eb ü") == "a\\x1b[31m\\n\\u202eb ü"
    assert "\x1b" not in cli_text.table(("A",), [("\x1b",)]) + cli_text.fields([("a", "\x1b")])


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**60, "1024.0 PiB")],
)
def test_sizes_for_a_person(count: int, shown: str) -> None:
    assert cli_text.size(count) == shown
