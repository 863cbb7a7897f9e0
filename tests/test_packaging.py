"""What `make install` puts where, and that it works from there; and what a wheel carries."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from lxml import etree

from snapd_vm import __version__, daemon
from tests import readme
from tests.fake_service import FakeService
from tests.lab import DiskSpec, Guest, Lab
from tests.real.arrays import NAME as ARRAY
from tests.real.arrays import Array

ROOT = Path(__file__).parent.parent
NAME = "org.example.DiskSnapshot"
SYSTEM_PYTHON = Path("/usr/bin/python3")
SHARE = "usr/share"
UNIT = "usr/lib/systemd/system/snapd-vm.service"
FILES = {
    "usr/bin/snapd-vm": 0o755,
    "usr/lib/snapd-vm/snapd_vm/__init__.py": 0o644,
    "usr/lib/snapd-vm/snapd_vm/__main__.py": 0o644,
    "usr/lib/snapd-vm/snapd_vm/bus/__init__.py": 0o644,
    f"usr/lib/snapd-vm/snapd_vm/data/{NAME}.xml": 0o644,
    "usr/lib/snapd-vm/snapd_vm/data/diskSnapshot.rng": 0o644,
    "usr/lib/systemd/system/snapd-vm.service": 0o644,
    f"{SHARE}/dbus-1/system.d/{NAME}.conf": 0o644,
    f"{SHARE}/dbus-1/system-services/{NAME}.service": 0o644,
    f"{SHARE}/dbus-1/interfaces/{NAME}.xml": 0o644,
    f"{SHARE}/polkit-1/actions/{NAME}.policy": 0o644,
    f"{SHARE}/snapd-vm/diskSnapshot.rng": 0o644,
    "usr/lib/snapd-vm/snapd_vm/data/executable-method.schema.json": 0o644,
    f"{SHARE}/snapd-vm/executable-method.schema.json": 0o644,
    f"{SHARE}/doc/snapd-vm/writing-a-method.md": 0o644,
    f"{SHARE}/doc/snapd-vm/example-array/rbd-array": 0o755,
    f"{SHARE}/doc/snapd-vm/example-method/snapd_vm_copy.py": 0o644,
    f"{SHARE}/bash-completion/completions/snapd-vm": 0o644,
    f"{SHARE}/man/man1/snapd-vm.1": 0o644,
    f"{SHARE}/man/man5/snapd-vm.toml.5": 0o644,
    f"{SHARE}/doc/snapd-vm/README.md": 0o644,
    f"{SHARE}/doc/snapd-vm/CHANGELOG.md": 0o644,
    f"{SHARE}/doc/snapd-vm/LICENSE": 0o644,
    f"{SHARE}/doc/snapd-vm/examples/snapd-vm.toml": 0o644,
    f"{SHARE}/doc/snapd-vm/examples/50-snapd-vm-backup-operators.rules": 0o644,
}


def run(*argv: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [str(word) for word in argv],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def make(target: str, folder: Path, **variables: str | Path) -> None:
    settings = [f"{name}={value}" for name, value in variables.items()]
    run("make", "--silent", target, f"DESTDIR={folder}", *settings)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    old = os.umask(0o077)  # an administrator's; what is installed must be readable all the same
    try:
        make("install", folder)
    finally:
        os.umask(old)
    return folder


def test_every_file_lands_as_a_file_with_its_mode(installed: Path) -> None:
    for name, mode in FILES.items():
        path = installed / name
        assert path.is_file() and not path.is_symlink(), name
        assert path.stat().st_mode & 0o7777 == mode, name
    for folder in (path for path in (installed / "usr").rglob("*") if path.is_dir()):
        assert folder.stat().st_mode & 0o777 == 0o755, folder


def test_the_whole_package_lands_and_nothing_else(installed: Path) -> None:
    def sources(folder: Path) -> set[str]:
        kinds = {".py", ".xml", ".rng", ".json"}
        found = (
            Path(root) / n for root, _, names in os.walk(folder, followlinks=True) for n in names
        )
        return {str(path.relative_to(folder)) for path in found if path.suffix in kinds}

    package = installed / "usr/lib/snapd-vm/snapd_vm"
    assert sources(package) == sources(ROOT / "snapd_vm")
    assert not list(installed.rglob("*test*"))


def test_the_installed_command_starts_from_there(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "snapd_vm.py").write_text("raise SystemExit('not this one')")
    shown = run(
        installed / "usr/bin/snapd-vm",
        "--version",
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert shown == f"snapd-vm {__version__}\n"


def test_the_modules_are_compiled_for_where_they_will_be(installed: Path) -> None:
    (compiled,) = (installed / "usr/lib/snapd-vm/snapd_vm/__pycache__").glob("cli.*.pyc")
    assert b"/usr/lib/snapd-vm/snapd_vm/cli.py" in compiled.read_bytes()
    assert str(installed).encode() not in compiled.read_bytes()


def test_systemd_finds_no_fault_with_the_installed_unit(installed: Path) -> None:
    unit = installed / "usr/lib/systemd/system/snapd-vm.service"
    # What the unit starts, it must find: the installation is the root directory here.
    verified = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            "--man=no",
            "--recursive-errors=no",
            f"--root={installed}",
            unit,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (verified.returncode, verified.stderr) == (0, "")


def test_another_prefix_is_followed_everywhere(tmp_path: Path) -> None:
    make("install", tmp_path, PREFIX="/opt/snapd")
    unit = (tmp_path / "opt/snapd/lib/systemd/system/snapd-vm.service").read_text()
    assert "ExecStart=/opt/snapd/bin/snapd-vm daemon\n" in unit
    assert "ExecStopPost=/opt/snapd/bin/snapd-vm daemon --thaw-held\n" in unit
    assert "/usr/bin/snapd-vm" not in unit
    assert run(tmp_path / "opt/snapd/bin/snapd-vm", "--version") == f"snapd-vm {__version__}\n"
    assert not (tmp_path / "usr").exists()


def test_uninstall_takes_away_all_that_install_put_there(tmp_path: Path) -> None:
    make("install", tmp_path)
    (tmp_path / "etc/snapd-vm/snapd-vm.toml").write_text("")
    make("uninstall", tmp_path)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [tmp_path / "etc/snapd-vm/snapd-vm.toml"]
    assert not (tmp_path / SHARE / "doc/snapd-vm").exists()


def test_a_build_carries_the_data_files(tmp_path: Path) -> None:
    # What a wheel is packed from; the wheel itself would need a package from an index.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("snapd_vm", "data"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    run(
        sys.executable,
        "-c",
        "import setuptools; setuptools.setup()",
        "--quiet",
        "build",
        f"--build-base={tmp_path / 'build'}",
        cwd=source,
    )
    built = tmp_path / "build/lib/snapd_vm"
    for name in (f"{NAME}.xml", "diskSnapshot.rng", "executable-method.schema.json"):
        assert (built / "data" / name).read_bytes() == (ROOT / "data" / name).read_bytes()
    modules = {
        str(path.relative_to(ROOT / "snapd_vm")) for path in (ROOT / "snapd_vm").rglob("*.py")
    }
    assert modules == {str(path.relative_to(built)) for path in built.rglob("*.py")}


@pytest.fixture(scope="module")
def bus() -> Iterator[str]:
    if os.geteuid() != 0:
        pytest.skip("the lab's bus needs root")
    with Lab(libvirt=False, polkit=False) as lab:
        yield lab.address


def test_the_examples_of_the_readme_are_calls_that_a_service_gets(bus: str) -> None:
    with FakeService(bus) as service:
        shown = run("bash", "-euc", readme.examples(), env={"DBUS_SYSTEM_BUS_ADDRESS": bus})
        assert [call.body for call in service.calls if call.member == "Create"] == [
            ["<disk><target dev='vda'/></disk>", "", "nightly", 1],
            [
                "<domain><name>web</name><devices><disk><target dev='vda'/></disk></devices>"
                "</domain>",
                "<diskSnapshot method='qemu'/>",
                "weekly",
                0,
            ],
        ]
        assert [call.body for call in service.calls if call.member == "Delete"] == [[0]]
        assert {"Disks", "Plan", "FindDomain", "GetManagedObjects"} <= {
            str(call.member) for call in service.calls
        }
    assert "ds:consistency" in shown


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Guest, Path]]:
    """A guest, and the installed daemon confined as its unit says; and where it is installed."""
    if os.geteuid() != 0:
        pytest.skip("libvirtd and QEMU need root")
    folder = tmp_path_factory.mktemp("confined")
    make("install", folder, INSTALL_PYTHON=sys.executable)
    unit, command = (folder / path for path in (UNIT, "usr/bin/snapd-vm"))
    with Lab() as lab:
        folders = [lab.block.mounted(filesystem).path for filesystem in ("xfs", "btrfs")]
        below = [DiskSpec(format="raw", size_mib=16, folder=folder) for folder in folders]
        guest = lab.guest([DiskSpec(), *below, lab.ceph.start().disk("confined")], name="web")
        lab.daemon.start(argv=[sys.executable, "-m", "tests.confine", unit, command, "daemon"])
        yield lab, guest, command
        lab.daemon.stop()
        guest.control.close()


def test_systemd_waits_for_as_long_as_the_daemon_may_take_to_end() -> None:
    unit = (ROOT / "systemd/snapd-vm.service").read_text().splitlines()
    (limit,) = [line.partition("=")[2] for line in unit if line.startswith("TimeoutStopSec=")]
    # Calls are answered, then operations are waited for, then threads; and a thaw comes after it.
    assert int(limit) >= 2 * daemon._STOP_LIMIT_S + daemon._LAST_CALLS_S + 20
    assert int(limit) >= daemon._THAW_LIMIT_S + 20


def test_the_sandbox_of_the_unit_holds() -> None:
    # Else the next test would prove nothing.
    tried = (
        "import mmap, os, socket, subprocess\n"
        "def refused(call, *arguments, **options):\n"
        "    try:\n"
        "        call(*arguments, **options)\n"
        "    except OSError:\n"
        "        return True\n"
        "print([refused(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),\n"
        "       refused(mmap.mmap, -1, 4096, prot=7), refused(os.mknod, '/dev/x', 0o060600),\n"
        "       refused(open, '/usr/x', 'w'), refused(open, '/proc/sys/x', 'w'),\n"
        "       refused(os.chmod, '.', 0o4755), refused(os.setuid, 1), refused(os.chroot, '/'),\n"
        "       refused(os.setpriority, os.PRIO_PROCESS, 0, 1)])"
    )
    confined = (sys.executable, "-m", "tests.confine", ROOT / "systemd/snapd-vm.service")
    assert run(*confined, sys.executable, "-c", tried).strip() == str([True] * 9)


def test_confined_as_the_unit_says_the_installed_daemon_makes_a_quiesced_snapshot(
    served: tuple[Lab, Guest, Path],
) -> None:
    lab, guest, command = served
    options = ("--name", "confined", "--quiesce-required", "--json")
    made = lab.as_user(None, [command, "create", guest.name, "vda", *options])
    assert made.returncode == 0, made.stderr + lab.daemon.log
    answer = json.loads(made.stdout)
    assert (answer["consistency"], answer["domain"]) == ("quiesced", guest.name)
    guest.writes_go_on()
    listed = lab.as_user(None, [command, "list", guest.uuid]).stdout
    assert listed.splitlines()[3].split()[0] == f"{guest.name}/vda/confined"
    refused = lab.as_user(None, [command, "create", guest.name, "vda", "--name", "confined"])
    assert refused.returncode == 1
    assert refused.stderr.startswith("snapd-vm: error: ")
    assert "confined" in refused.stderr


@pytest.mark.parametrize("user", ["nobody", "root"])
def test_confined_as_the_unit_says_the_daemon_sees_who_reads_a_snapshot(
    served: tuple[Lab, Guest, Path], user: str
) -> None:
    # Another user's process, and one of root's that has more capabilities than the daemon.
    lab, guest, command = served
    made = lab.as_user(None, [command, "create", guest.name, "vda", "--name", user, "--json"])
    assert made.returncode == 0, made.stderr
    source = etree.fromstring(json.loads(made.stdout)["backup_source"]).get("file") or ""
    delete: list[str | Path] = [command, "delete", f"{guest.name}/vda/{user}"]
    with open(source, "rb") as file:
        reader = subprocess.Popen(["setpriv", f"--reuid={user}", "sleep", "100"], stdin=file)
    try:
        refused = lab.as_user(None, delete)
    finally:
        reader.kill()
        reader.wait()
    assert refused.returncode == 1
    assert f"(process {reader.pid})" in refused.stderr
    done = lab.as_user(None, delete)
    assert done.returncode == 0, done.stderr


def test_confined_it_clones_and_goes_back_too(served: tuple[Lab, Guest, Path]) -> None:
    lab, guest, command = served
    image = guest.disk("vdb").path
    options = ("--name", "clone", "--quiesce-required", "--json")
    made = lab.as_user(None, [command, "create", guest.name, "vdb", *options])
    assert made.returncode == 0, made.stderr + lab.daemon.log
    assert json.loads(made.stdout)["method"] == "reflink"
    (clone,) = image.parent.glob("snapd-vm-*")
    assert "i" in run("lsattr", clone).split()[0]
    assert clone.stat().st_uid == image.stat().st_uid
    guest.write("vdb", "mark", "after")
    guest.poweroff()
    like = image.stat()
    back = lab.as_user(None, [command, "revert", f"{guest.name}/vdb/clone"])
    assert back.returncode == 0, back.stderr + lab.daemon.log
    assert image.read_bytes() == clone.read_bytes()
    assert image.stat().st_ino != like.st_ino
    assert (image.stat().st_uid, image.stat().st_mode) == (like.st_uid, like.st_mode)
    guest.start()
    gone = lab.as_user(None, [command, "delete", f"{guest.name}/vdb/clone"])
    assert gone.returncode == 0, gone.stderr + lab.daemon.log
    assert not clone.exists()


def test_confined_it_snapshots_a_subvolume_too(served: tuple[Lab, Guest, Path]) -> None:
    lab, guest, command = served
    made = lab.as_user(None, [command, "create", guest.name, "vdc", "--name", "held", "--json"])
    assert made.returncode == 0, made.stderr + lab.daemon.log
    assert json.loads(made.stdout)["method"] == "btrfs"
    (folder,) = guest.disk("vdc").path.parent.glob(".snapd-vm/*")
    assert "trusted.snapd-vm" in os.listxattr(folder)
    gone = lab.as_user(None, [command, "delete", f"{guest.name}/vdc/held"])
    assert gone.returncode == 0, gone.stderr + lab.daemon.log
    assert not folder.parent.exists()


def test_confined_it_asks_a_ceph_cluster_too(served: tuple[Lab, Guest, Path]) -> None:
    lab, guest, command = served
    made = lab.as_user(None, [command, "create", guest.name, "vdd", "--name", "far", "--json"])
    assert made.returncode == 0, made.stderr + lab.daemon.log
    answer = json.loads(made.stdout)
    assert (answer["method"], answer["consistency"]) == ("rbd", "quiesced")
    assert "snapd-vm-" in lab.ceph.rbd("snap", "ls", "vm/confined")
    gone = lab.as_user(None, [command, "delete", f"{guest.name}/vdd/far"])
    assert gone.returncode == 0, gone.stderr + lab.daemon.log
    assert not lab.ceph.rbd("snap", "ls", "vm/confined").strip()


def test_confined_it_asks_a_program_with_the_drop_in_of_the_manual(
    served: tuple[Lab, Guest, Path], tmp_path: Path
) -> None:
    lab, guest, command = served
    manual = (ROOT / "docs/writing-a-method.md").read_text().splitlines()
    (line,) = [line.strip() for line in manual if line.startswith("    CapabilityBoundingSet=")]
    unit, dropped = (tmp_path / name for name in ("unit", "dropped"))
    unit.write_text((ROOT / "systemd/snapd-vm.service").read_text())
    dropped.write_text(f"{unit.read_text()}\n[Service]\n{line}\n")
    array = Array.install(lab)
    lab.daemon.stop()
    try:
        words: list[str | Path] = [sys.executable, "-m", "tests.confine", dropped, command]
        lab.daemon.start(array.config, argv=[*words, "daemon"])
        options = ("--method", ARRAY, "--name", "asked", "--json")
        made = lab.as_user(None, [command, "create", guest.name, "vdb", *options])
        assert made.returncode == 0, made.stderr + lab.daemon.log
        assert json.loads(made.stdout)["consistency"] == "quiesced"
        assert len(array.copies) == 1
        gone = lab.as_user(None, [command, "delete", f"{guest.name}/vdb/asked"])
        assert gone.returncode == 0, gone.stderr + lab.daemon.log
        assert array.copies == set()
    finally:
        lab.daemon.stop()
        lab.daemon.start({}, argv=[sys.executable, "-m", "tests.confine", unit, command, "daemon"])


def test_the_examples_of_the_readme_work_on_a_real_guest(served: tuple[Lab, Guest, Path]) -> None:
    lab, guest, command = served

    def names() -> set[str]:
        answer = lab.as_user(None, [command, "list", "--json"])
        return {snapshot["name"] for snapshot in json.loads(answer.stdout)}

    before = names()
    examples = readme.examples().replace("web", guest.name)
    shown = lab.as_user(None, ["bash", "-euc", examples], 120)
    assert shown.returncode == 0, shown.stderr
    made = before | {"nightly", "weekly"}
    assert names() < made
    assert len(names()) == len(made) - 1


def test_the_thaw_after_the_daemons_end_works_confined_too(
    served: tuple[Lab, Guest, Path],
) -> None:
    lab, _, command = served
    lab.daemon.stop()
    confined = (sys.executable, "-m", "tests.confine", ROOT / "systemd/snapd-vm.service")
    run(*confined, command, "daemon", "--thaw-held", "--config", lab.daemon.config_file)


def test_the_demo_keeps_its_promises() -> None:
    if os.geteuid() != 0:
        pytest.skip("libvirtd and QEMU need root")
    assert run(sys.executable, "-m", "tests.lab.demo").endswith("All as promised.\n")
