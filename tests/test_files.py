"""The files that are not Python: well-formed, accepted by the tools that read them, and agreeing.

Quick, as `make check` runs it; what needs an installation is in test_packaging.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from lxml import etree

from snapd_vm import __version__, cli
from snapd_vm import config as configuration

ROOT = Path(__file__).parent.parent
NAME = "org.example.DiskSnapshot"
POLICY = ROOT / f"polkit/{NAME}.policy"
UNIT = ROOT / "systemd/snapd-vm.service"
MANUALS = [ROOT / "docs/snapd-vm.1", ROOT / "docs/snapd-vm.toml.5"]
ACTIONS = {f"{NAME}.{action}" for action in ("create", "delete", "revert", "read", "configure")}

DEFAULTS = ("allow_any", "allow_inactive", "allow_active")

# systemd's own figure, 0 (locked up) to 10 (as root may): what is left is what images, volumes and
# Ceph need, each with its reason in the unit.
EXPOSURE_AT_MOST = 3.3


def tool(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
    )


def xml_files() -> list[Path]:
    patterns = ("data/*.xml", "data/*.rng", "data/*.conf", "polkit/*.policy")
    return [path for pattern in patterns for path in ROOT.glob(pattern)]


@pytest.mark.parametrize("path", xml_files(), ids=lambda path: path.name)
def test_xml_is_well_formed(path: Path) -> None:
    etree.parse(path, etree.XMLParser(load_dtd=False, no_network=True))


def test_the_schema_is_a_relax_ng_schema() -> None:
    etree.RelaxNG(etree.parse(ROOT / "data/diskSnapshot.rng"))


def test_the_policy_has_the_actions_that_are_used_and_says_what_they_mean() -> None:
    actions = etree.parse(POLICY).getroot().findall("action")
    assert {action.get("id") for action in actions} == ACTIONS
    for action in actions:
        assert action.findtext("description")
        assert action.findtext("message", "").startswith("Authentication is required to ")
        answers = {kind: action.findtext(f"defaults/{kind}") for kind in DEFAULTS}
        assert set(answers.values()) <= {"auth_admin", "auth_admin_keep"}
        # Only who sits at the machine keeps it.
        assert answers["allow_any"] == answers["allow_inactive"] == "auth_admin"


def test_the_contract_names_no_action_that_the_policy_lacks() -> None:
    contract = (ROOT / f"data/{NAME}.xml").read_text()
    named = set(re.findall(r"polkit action: ([\w.]+\w)", contract))
    assert named
    assert named <= ACTIONS


@pytest.mark.parametrize("manual", MANUALS, ids=lambda path: path.name)
def test_manuals_are_without_fault(manual: Path) -> None:
    rendered = tool("man", "--warnings=w", "--encoding=UTF-8", "-l", manual)
    assert (rendered.returncode, rendered.stderr) == (0, "")
    assert tool("lexgrog", manual).returncode == 0
    assert f"snapd\\-vm {__version__}" in manual.read_text()


def test_the_manual_has_every_command_and_option() -> None:
    text = (ROOT / "docs/snapd-vm.1").read_text().replace("\\-", "-")
    for words in command_line():
        assert words in text, words


def test_the_completion_has_every_command_and_option() -> None:
    text = (ROOT / "data/snapd-vm.bash").read_text()
    for words in command_line():
        assert words in text, words


def command_line() -> set[str]:
    """Every command and long option that the command line's own help shows."""
    top = cli.parser().format_help()
    commands = set(re.findall(r"^    (\w+) ", top, re.MULTILINE))
    assert {"create", "plan", "list", "delete", "revert", "disks", "methods", "daemon"} == commands
    words = set(commands)
    for command in commands:
        words |= set(re.findall(r"--[\w-]+", subcommand_help(command)))
    return words


def subcommand_help(command: str) -> str:
    (subparsers,) = (a for a in cli.parser()._actions if isinstance(a.choices, dict))
    assert isinstance(subparsers.choices, dict)
    text: str = subparsers.choices[command].format_help()
    return text


def test_the_sample_configuration_shows_every_key_with_its_default() -> None:
    sample = (ROOT / "data/snapd-vm.toml").read_text()
    assert tomllib.loads(sample) == {}
    said = tomllib.loads(re.sub(r"^#(?=[\w\[])", "", sample, flags=re.MULTILINE))
    assert configuration.parse(said) == configuration.Config()
    assert set(said) == set(configuration.Config.__dataclass_fields__)
    assert said["plugins"] == {"methods": []}
    assert set(said["qemu"]) == set(configuration.QemuConfig.__dataclass_fields__)


def test_the_manual_of_the_configuration_has_every_key() -> None:
    text = (ROOT / "docs/snapd-vm.toml.5").read_text()
    for table in (
        configuration.Config,
        configuration.QemuConfig,
        configuration.PluginsConfig,
        configuration.ExecutableConfig,
    ):
        for key in table.__dataclass_fields__:
            if key == "options":  # tables named by the methods
                continue
            assert re.search(rf"^\.(B|SS) \[?{key}\]?$", text, re.MULTILINE), key


def test_the_unit_is_as_locked_up_as_was_said() -> None:
    judged = tool("systemd-analyze", "security", "--offline=true", "--no-pager", UNIT)
    found = re.search(r"Overall exposure level for snapd-vm\.service: ([\d.]+)", judged.stdout)
    assert found, judged.stderr
    assert float(found[1]) <= EXPOSURE_AT_MOST


def test_the_unit_ends_in_a_thaw_and_is_watched() -> None:
    unit = UNIT.read_text()
    for line in (
        "Type=notify",
        f"BusName={NAME}",
        "ExecStopPost=/usr/bin/snapd-vm daemon --thaw-held",
        "WatchdogSec=30",
        "StateDirectory=snapd-vm",
        "StateDirectoryMode=0700",
    ):
        assert line in unit.splitlines()


def test_scripts_are_valid_bash() -> None:
    for script in (".ci/run", "data/snapd-vm.bash"):
        checked = tool("bash", "-n", ROOT / script)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_no_link_in_the_documents_is_dead() -> None:
    documents = ("README.md", "docs/ARCHITECTURE.md", "docs/writing-a-method.md")
    for document in (*documents, "docs/example-method/README.md"):
        path = ROOT / document
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{document}: {link}"


ONE = """
import pytest

def test_skips():
    pytest.skip("no reason")

@pytest.mark.xfail(strict=True)
def test_fails_as_expected():
    assert False
"""
WHOLE = "import pytest; pytest.importorskip('no_such_module')"


@pytest.mark.parametrize(
    ("ci", "tests", "said"),
    [
        ("true", ONE, "1 failed, 1 xfailed in"),
        ("true", WHOLE, "1 error in"),
        ("", ONE, "1 skipped, 1 xfailed in"),
    ],
)
def test_on_ci_what_would_be_skipped_fails(tmp_path: Path, ci: str, tests: str, said: str) -> None:
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_skipping.py").write_text(tests)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "CI": ci},
    )
    assert ran.stdout.splitlines()[-1].startswith(said), ran.stdout
