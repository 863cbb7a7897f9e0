"""The lab itself, for real: what the other tests see through it is worth what it is worth."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.geteuid() != 0:
    pytest.skip("the lab needs root", allow_module_level=True)

from tests.lab import DiskSpec, Guest, Lab, LabError, NoAnswerError, allow, cleanup
from tests.lab.mounts import loops_below, mounts_below
from tests.lab.process import Ledger
from tests.lab.program import CHECKOUT, run
from tests.lab.ring import read_ring
from tests.lab.run import RUNS

LAB_ACTION = "org.example.lab.question"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as running:
        yield running


@pytest.fixture(scope="module")
def guest(lab: Lab) -> Iterator[Guest]:
    running = lab.guest([DiskSpec(), DiskSpec(format="raw")])
    yield running
    running.remove()


def test_a_guest_runs_and_its_agent_places_both_disks(guest: Guest) -> None:
    assert guest.state == "running"
    placed = {(mountpoint, tuple(targets)) for mountpoint, _, _, targets in guest.domain.fsInfo()}
    assert placed == {("/mnt/vda", ("vda",)), ("/mnt/vdb", ("vdb",))}


def test_a_guest_feels_a_freeze_as_long_as_it_lasts(guest: Guest) -> None:
    guest.writes_go_on()
    guest.reset()
    assert guest.domain.fsFreeze() == 2
    assert guest.agent_says_frozen()
    time.sleep(0.3)
    assert guest.domain.fsThaw() == 2
    guest.writes_go_on()
    assert 0.3 <= guest.longest_stall() < 2
    assert not guest.agent_says_frozen()


def test_a_freeze_is_seen_while_it_goes_on_and_holds_up_no_question(guest: Guest) -> None:
    guest.hold_freeze("vdb")
    guest.stands_still(0.2)
    with pytest.raises(NoAnswerError):
        guest.write("vdb", "marker", "too early", timeout=0.3)
    assert guest.stalls()["vdb"].current_s >= 0.2
    guest.release_freeze("vdb")
    guest.writes_go_on()
    assert guest.read("vdb", "marker") == "too early", "it was written once that could be done"


def test_a_suspended_guest_is_seen_to_stand_still_only_from_outside(guest: Guest) -> None:
    guest.reset()
    with guest.watch() as pulse:
        guest.writes_go_on()
        assert pulse.longest_s < 0.2
        guest.domain.suspend()
        assert guest.state == "paused"
        time.sleep(0.3)
        guest.domain.resume()
        guest.writes_go_on()
    assert 0.3 <= pulse.longest_s < 2
    assert guest.longest_stall() < 0.3, "its own clock stood still as well"


def test_a_bad_mount_makes_the_freeze_fail_and_leaves_nothing_frozen(guest: Guest) -> None:
    guest.bad_mount("vda")
    with pytest.raises(Exception, match="/mnt/bad/vda"):
        guest.domain.fsFreeze()
    guest.writes_go_on()
    guest.good_mount("vda")
    assert guest.domain.fsFreeze() == 2
    assert guest.domain.fsThaw() == 2


def test_a_stopped_agent_freezes_late(guest: Guest) -> None:
    guest.domain.agentSetResponseTimeout(1)
    guest.stop_agent()
    with pytest.raises(Exception, match="not responding"):
        guest.domain.fsFreeze()
    guest.writes_go_on()
    guest.cont_agent()
    guest.stands_still()
    guest.domain.fsThaw()
    guest.writes_go_on()
    guest.domain.agentSetResponseTimeout(-1)


def test_a_killed_agent_is_gone_and_comes_back(guest: Guest) -> None:
    guest.kill_agent()
    with pytest.raises(Exception, match=r"not connected|not responding"):
        guest.domain.fsInfo()
    guest.start_agent()
    assert guest.domain.fsInfo()


def test_what_was_written_before_a_clean_end_is_in_the_image(lab: Lab) -> None:
    guest = lab.guest([DiskSpec(overlays=1)])
    guest.write("vda", "marker", "here I was")
    guest.writer(False)
    sequence = guest.stalls()["vda"].sequence
    guest.poweroff()
    raw = lab.folder("copies") / "clean.raw"
    run("qemu-img", "convert", "-O", "raw", guest.disk().path, raw)
    assert "here I was" in run("debugfs", "-R", "cat /marker", raw)
    ring = read_ring(raw)
    assert ring.whole
    assert ring.newest == sequence
    run("e2fsck", "-fn", raw)
    guest.remove()
    assert not list(guest.disk().path.parent.glob(f"{guest.disk().path.name}*"))


def test_the_power_button_ends_a_guest_without_an_agent(lab: Lab) -> None:
    guest = lab.guest(agent="none")
    assert guest.agents() == {}
    guest.domain.shutdown()
    guest.wait_state("shutoff")
    guest.remove()


def test_an_agent_behind_a_socket_of_its_own_answers_there(lab: Lab) -> None:
    guest = lab.guest(agent="socket")
    ask = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(10);"
        's.connect(sys.argv[1]); s.sendall(b\'{"execute": "guest-ping"}\\n\');'
        "print(s.recv(100))"
    )
    assert "return" in run(sys.executable, "-c", ask, guest.ports.agent)
    guest.remove()


def test_guests_outlive_libvirtd(lab: Lab, guest: Guest) -> None:
    lab.libvirtd.kill()
    guest.writes_go_on()
    lab.libvirtd.start()
    guest.wait_agent()
    assert guest.state == "running"
    lab.libvirtd.restart()
    guest.wait_agent()


def test_polkit_goes_by_the_rules_of_the_moment(lab: Lab) -> None:
    def answer() -> int:
        ask = ["pkcheck", "-a", "org.example.lab.generation", "-p", str(subject.pid)]
        return lab.as_user(None, ask).returncode

    subject = subprocess.Popen(["sleep", "60"], user="nobody", group="nogroup", extra_groups=[])
    with subject:
        assert answer() != 0
        lab.polkit.rules("polkit.addRule(function(a, s) { polkit.log('asked'); return 'yes'; });")
        assert answer() != 0, "the lab's own rule stands before it"
        lab.polkit.rules(allow("nobody", "org.freedesktop.policykit.exec"))
        ask = ["pkcheck", "-a", "org.freedesktop.policykit.exec", "-p", str(subject.pid)]
        assert lab.as_user(None, ask).returncode == 0
        lab.polkit.rules("")
        assert lab.as_user(None, ask).returncode != 0
        subject.kill()


def test_rules_that_do_not_compile_are_not_taken_for_loaded(lab: Lab) -> None:
    with pytest.raises(LabError, match="polkitd takes the rules"):
        lab.polkit.rules("this is no javascript")
    lab.polkit.rules("")


def test_programs_run_as_another_user_and_only_that(lab: Lab) -> None:
    assert lab.as_user("nobody", ["id", "-un"]).stdout.strip() == "nobody"
    assert lab.as_user("nobody", ["id", "-Gn"]).stdout.strip() == "nogroup"
    names = lab.busctl("list", "--no-legend", user="nobody").stdout
    assert any("busctl" in line and "nobody" in line for line in names.splitlines())


def test_the_daemon_is_stopped_killed_and_started_again(lab: Lab) -> None:
    lab.daemon.start({"lock_timeout_s": 1})
    assert lab.bus.owned("org.example.DiskSnapshot")
    first = lab.daemon.pid
    lab.daemon.kill()
    assert lab.daemon.status == -signal.SIGKILL
    lab.daemon.start()
    assert "lock_timeout_s" in lab.daemon.config_file.read_text(), "it starts as it did before"
    assert lab.daemon.pid != first
    lab.daemon.restart()
    lab.daemon.stop()
    assert lab.daemon.status == 0
    assert not lab.bus.owned("org.example.DiskSnapshot")
    with pytest.raises(LabError, match="no_such_key"):
        lab.daemon.start({"no_such_key": {"deep": [1, "two"]}})


def test_a_disk_on_a_loop_device_and_one_on_a_small_file_system(lab: Lab) -> None:
    loop = lab.block.loop(64)
    mounted = lab.block.mounted("xfs")
    guest = lab.guest(
        [DiskSpec(format="raw", device=loop.device), DiskSpec(format="raw", folder=mounted.path)]
    )
    assert [disk.type for disk in guest.disks] == ["block", "file"]
    assert len(guest.domain.fsInfo()) == 2
    mounted.fill()
    with pytest.raises(OSError, match="No space"), (mounted.path / "more").open("wb") as file:
        file.write(bytes(1 << 20))
    mounted.drain()
    guest.remove()
    mounted.set_read_only(True)
    with pytest.raises(OSError, match="Read-only"):
        (mounted.path / "more").touch()
    mounted.unmount()
    loop.detach()


VICTIM = """
import sys, time
from tests.lab import Lab
with Lab() as lab:
    lab.guest()
    lab.block.mounted("ext4", 16)
    (lab.run.folder / "ready").touch()
    time.sleep(600)
"""


@pytest.mark.parametrize("nursery_too", [False, True], ids=["alone", "with its nursery"])
def test_a_killed_run_leaves_nothing_behind(lab: Lab, nursery_too: bool) -> None:
    before = set(RUNS.glob("*/"))
    victim = subprocess.Popen([sys.executable, "-c", VICTIM], cwd=CHECKOUT)
    folder = _wait_for_run(victim, before)
    processes = Ledger(folder / "processes.json").processes()
    assert {"nursery", "libvirtd", "virtlogd", "dbus-daemon", "polkitd"} == {
        process.name for process in processes
    }
    if nursery_too:
        processes[0].signal(signal.SIGSTOP)  # it would see the other's end before its own
    victim.kill()
    victim.wait()
    if nursery_too:
        processes[0].signal(signal.SIGKILL)
    assert mounts_below(folder)

    assert cleanup() == [folder.name]

    assert not any(process.alive() for process in processes)
    assert not mounts_below(folder)
    assert not list(loops_below(folder))
    assert not list(Path("/sys/fs/cgroup").glob(f"**/*{folder.name}*"))
    assert not folder.exists()
    assert not Path(f"{folder}.lock").exists()
    assert folder.name not in run("ps", "-eo", "args")
    assert lab.run.folder.exists(), "a run that lives is not touched"


def _wait_for_run(victim: subprocess.Popen[bytes], before: set[Path]) -> Path:
    end = time.monotonic() + 90
    while time.monotonic() < end and victim.poll() is None:
        for folder in set(RUNS.glob("*/")) - before:
            if (folder / "ready").exists():
                return folder
        time.sleep(0.1)
    raise AssertionError("the victim's lab did not come up")
