"""Whatever is sent to Create and Plan of the whole daemon, the answer is yes or an error of ours.

Where Plan says no, Create must say the same no; where Plan says yes, Create is left alone, so that
the guest's chain does not grow. NUL and bad UTF-8, which never arrive, are in bus/test_hostile.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from snapd_vm import errors
from snapd_vm.bus import wire
from snapd_vm.bus.connection import decode
from snapd_vm.model import ROOT_PATH
from tests.bus.clients import Client, RawPeer, marshalled
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.real.api import DOMAIN, NAME, QUIESCE_REQUIRED, VDA, path_of
from tests.real.test_crash import active_file, files_of
from tests.test_request_properties import ANYTHING

pytestmark = pytest.mark.measures

EXAMPLES = 200
KNOWN = {
    error.dbus_name
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, errors.SnapdError)
} - {errors.Internal.dbus_name}

Answer = tuple[str, list[Any]]
"""The error's name, without our prefix ("" for success), and the values."""


class Caller:
    """A client that reads bytes, and holds every answer to what all answers must be."""

    def __init__(self, address: str) -> None:
        self._peer = RawPeer(address)
        self._serial = 1

    def call(self, path: str, interface: str, member: str, body: Sequence[Any]) -> Answer:
        """Send one, and wait for its answer."""
        self._serial += 1
        message = Client.message(interface, member, "sssu", body, path)
        data = marshalled(message, self._serial)
        begun = time.monotonic()
        self._peer.send(data)
        answer = self._peer.reply_to(self._serial)
        took = time.monotonic() - begun
        assert took < 1, f"{member} took {took:.2f} s"
        if answer.kind == wire.METHOD_RETURN:
            return "", decode(answer, answer.signature)
        values = decode(answer, answer.signature)
        self._check(answer.error_name, values)
        return answer.error_name.removeprefix(errors.PREFIX), values

    def _check(self, name: str, values: list[Any]) -> None:
        assert name in KNOWN, f"{name}: {values}"
        (text,) = values
        assert text.isprintable()
        assert text.endswith(".")
        assert 0 < len(text) < 600
        for told in ("root:", "Traceback", "Error(", "snapd_vm", "lxml"):
            assert told not in text

    def close(self) -> None:
        self._peer.close()


@pytest.fixture(scope="module")
def target(lab: Lab) -> Iterator[Guest]:
    """A running guest, and a new daemon beside it; in the end the guest must be as it was."""
    import shutil

    shutil.rmtree(lab.daemon.state_dir, ignore_errors=True)
    guest = lab.guest()
    guest.writer(True, pause_us=50_000)
    lab.daemon.start({"agent_timeout_s": 30}, argv=None)
    before = active_file(guest), active_file(guest, 2), files_of(guest)
    yield guest
    assert (active_file(guest), active_file(guest, 2), files_of(guest)) == before
    guest.writes_go_on()
    lab.daemon.stop()
    guest.remove()


@pytest.fixture(scope="module")
def caller(lab: Lab, target: Guest) -> Iterator[Caller]:
    caller = Caller(lab.address)
    yield caller
    caller.close()


def resident(lab: Lab) -> int:
    """Bytes of the daemon in memory."""
    statm = Path(f"/proc/{lab.daemon.pid}/statm").read_text().split()
    return int(statm[1]) * os.sysconf("SC_PAGE_SIZE")


def most_resident(lab: Lab) -> int:
    """The most bytes that it ever had there."""
    status = Path(f"/proc/{lab.daemon.pid}/status").read_text()
    return next(int(row.split()[1]) for row in status.splitlines() if "VmHWM" in row) * 1024


def sendable(text: str) -> str:
    """What D-Bus carries of a text."""
    return text.replace("\0", "?").encode("utf-8", "replace").decode()


# FOLDER and IMAGE stand for what is known only when the guest is there.
DISKS = ANYTHING | st.sampled_from(
    [
        VDA,
        "<disk><source file='IMAGE'/></disk>",
        "<disk type='file'><source file='IMAGE'/><target dev='vda'/></disk>",
        "<disk><source file='IMAGE'/><target dev='vdb'/></disk>",
        "<disk><target dev='vda'/><diskSnapshot method='qemu'/></disk>",
        "<disk><target dev='vda'/><diskSnapshot method='zfs'/></disk>",
    ]
)
METHODS = (
    st.just("")
    | ANYTHING
    | st.sampled_from(
        ["/etc/shadow", "FOLDER/new", "IMAGE", "/nowhere/x", "/", "FOLDER/", "x"]
    ).map(lambda path: f"<diskSnapshot method='qemu'><overlay file='{path}'/></diskSnapshot>")
)
NAMES = st.just("") | st.text() | st.from_regex(r"[A-Za-z0-9._-]{0,70}\n?", fullmatch=True)
FLAGS = st.integers(0, 4) | st.integers(0, 2**32 - 1)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    phases=[phase for phase in Phase if phase is not Phase.explain],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(DISKS, METHODS, NAMES, FLAGS)
@example(VDA, "", "", 0)
@example(VDA, "", "", QUIESCE_REQUIRED)
@example(VDA, "<diskSnapshot method='qemu'><overlay file='FOLDER/new'/></diskSnapshot>", "n", 2)
def test_create_says_what_plan_says(
    target: Guest, caller: Caller, disk_xml: str, method_xml: str, name: str, flags: int
) -> None:
    image = active_file(target)

    def real(text: str) -> str:
        folder = os.path.dirname(image)
        return sendable(text).replace("IMAGE", image).replace("FOLDER", folder)

    body = [real(disk_xml), real(method_xml), sendable(name), flags]
    planned, values = caller.call(path_of(target), DOMAIN, "Plan", body)
    if not planned:
        assert values[0]["method"].value == "qemu"
        return
    created, text = caller.call(path_of(target), NAME, "Create", body)
    assert (created, text) == (planned, values)
    assert caller.call(ROOT_PATH, NAME, "Create", body)[0]
    inside = f"<domain><name>{escape(target.name)}</name><devices>{body[0]}</devices></domain>"
    assert caller.call(ROOT_PATH, NAME, "Create", [inside, *body[1:]])[0]


BOMB = (
    "<!DOCTYPE disk [<!ENTITY a0 'aaaaaaaaaa'>"
    + "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 10))
    + "]>{}"
)
EXTERNAL = "<!DOCTYPE disk [<!ENTITY x SYSTEM 'file:///etc/shadow'>]>{}"
PARAMETER = "<!DOCTYPE disk [<!ENTITY % x SYSTEM 'http://127.0.0.1:9/x.dtd'>%x;]>{}"
OUTSIDE = "<!DOCTYPE disk SYSTEM 'file:///etc/shadow'>{}"
DOCTYPES = {"bomb": BOMB, "external": EXTERNAL, "parameter": PARAMETER, "outside": OUTSIDE}
HUGE = "x" * 10_000_000
PADDING = " " * 10_000_000
DEEP = f"{'<a>' * 8000}{'</a>' * 8000}"
SHADOW = "/etc/shadow"


def disk(inside: str) -> str:
    """One that is right but for what is inside."""
    return f"<disk><target dev='vda'/>{inside}</disk>"


def method(inside: str) -> str:
    """One that is right but for what is inside."""
    return f"<diskSnapshot method='qemu'>{inside}</diskSnapshot>"


def listed() -> Iterator[Any]:
    """What a hostile caller may try: the arguments, and the answer."""
    for name, doctype in DOCTYPES.items():
        yield pytest.param(
            (doctype.format(disk("&a9;&x;")), "", "", 0), "InvalidXML", id=f"{name}-disk"
        )
        yield pytest.param(
            (VDA, doctype.format(method("&a9;&x;")), "", 0), "InvalidXML", id=f"{name}-method"
        )
    for name, body, error in (
        ("huge-disk", (disk(PADDING), "", "", 0), "InvalidXML"),
        ("huge-comment", (disk(f"<!--{HUGE}-->"), "", "", 0), "InvalidXML"),
        ("huge-method", (VDA, method(PADDING), "", 0), "InvalidXML"),
        ("huge-name", (VDA, "", HUGE, 0), "InvalidName"),
        ("just-too-long", (disk(" " * 65536), "", "", 0), "InvalidXML"),
        ("deep-disk", (disk(DEEP), "", "", 0), "InvalidXML"),
        ("deep-method", (VDA, method(DEEP), "", 0), "InvalidXML"),
        ("no-xml", ("vda", "", "", 0), "InvalidXML"),
        ("empty", ("", "", "", 0), "InvalidXML"),
        ("snapshot-as-disk", ("<diskSnapshot method='qemu'/>", "", "", 0), "InvalidXML"),
        ("capital", ("<Disk><target dev='vda'/></Disk>", "", "", 0), "InvalidXML"),
        (
            "other-namespace",
            ("<disk xmlns='urn:x'><target dev='vda'/></disk>", "", "", 0),
            "InvalidXML",
        ),
        ("disk-as-method", (VDA, VDA, "", 0), "InvalidXML"),
        ("no-such-method", (VDA, "<diskSnapshot method='nope'/>", "", 0), "MethodUnknown"),
        ("source-shadow", (f"<disk><source file='{SHADOW}'/></disk>", "", "", 0), "NoSuchDisk"),
        ("device-shadow", (f"<disk><source dev='{SHADOW}'/></disk>", "", "", 0), "NoSuchDisk"),
        (
            "overlay-shadow",
            (VDA, method(f"<overlay file='{SHADOW}'/>"), "", 0),
            "MethodNotSupported",
        ),
        (
            "overlay-climbing",
            (VDA, method("<overlay file='/srv/../etc/shadow'/>"), "", 0),
            "InvalidXML",
        ),
        ("overlay-relative", (VDA, method("<overlay file='shadow'/>"), "", 0), "InvalidXML"),
    ):
        yield pytest.param(body, error, id=name)
    names = ("a/b", "../a", "/", ".", "..", ".a", "-a", "--help", "a\n", "a\nb", "\n", "x" * 65)
    for name in (*names, "a b", "ä", "a\u2028", "$(id)"):
        yield pytest.param((VDA, "", name, 0), "InvalidName", id=f"name-{name!a}")
    for flags in (3, 4, 5, 8, 1 << 16, 1 << 31, (1 << 32) - 1):
        invalid = errors.InvalidArgs.dbus_name
        yield pytest.param((VDA, "", "", flags), invalid, id=f"flags-{flags}")


LISTED = list(listed())


@pytest.mark.parametrize(("body", "error"), LISTED)
def test_one_clear_error(target: Guest, caller: Caller, body: Sequence[Any], error: str) -> None:
    assert caller.call(path_of(target), NAME, "Create", body)[0] == error
    assert caller.call(path_of(target), DOMAIN, "Plan", body)[0] == error
    inside = f"<domain><name>{escape(target.name)}</name><devices>{body[0]}</devices></domain>"
    assert caller.call(ROOT_PATH, NAME, "Create", [inside, *body[1:]])[0] == error


@pytest.mark.parametrize(
    ("disk_xml", "error"),
    [
        (f"<disk><source file='{SHADOW}'/></disk>", "NoSuchDisk"),
        ("<domain/>", "InvalidXML"),
        ("<domain><name>x</name><devices/></domain>", "InvalidXML"),
        (f"<domain><name>x</name><devices>{VDA}{VDA}</devices></domain>", "InvalidXML"),
        (f"<domain><name>nobody</name><devices>{VDA}</devices></domain>", "NoSuchDomain"),
        (f"<domain><uuid>x</uuid><devices>{VDA}</devices></domain>", "InvalidXML"),
        (VDA, "NoSuchDomain"),
    ],
)
def test_one_clear_error_at_the_root(caller: Caller, disk_xml: str, error: str) -> None:
    assert caller.call(ROOT_PATH, NAME, "Create", [disk_xml, "", "", 0])[0] == error


def test_another_image_for_the_target_is_a_mismatch(target: Guest, caller: Caller) -> None:
    xml = f"<disk><source file='{SHADOW}'/><target dev='vda'/></disk>"
    assert caller.call(path_of(target), NAME, "Create", [xml, "", "", 0])[0] == "DiskMismatch"


def test_none_of_it_makes_the_daemon_grow(lab: Lab, target: Guest, caller: Caller) -> None:
    """Names of elements that nobody has heard of are the callers' to make up, without end."""
    bodies = [parameters.values[0] for parameters in LISTED]
    large = [body for body in bodies if max(map(len, body[:3])) > 100_000]
    small = [body for body in bodies if body not in large]

    def all_of_it(turn: int) -> None:
        unheard = [
            disk("".join(f"<n{turn}-{number}-{n}/>" for n in range(4000))) for number in range(10)
        ]
        for body in (*small, *((xml, "", "", 4) for xml in unheard)):
            caller.call(path_of(target), NAME, "Create", body)
        for xml in unheard:
            assert caller.call(path_of(target), DOMAIN, "Plan", [xml, "", "", 0])[0] == ""

    all_of_it(0)
    all_of_it(1)
    before = resident(lab)
    for turn in range(2, 8):
        all_of_it(turn)
    after = resident(lab)
    for body in large * 5:
        caller.call(path_of(target), NAME, "Create", body)
    most = most_resident(lab)
    print(f"the daemon: {before / 1e6:.1f}, {after / 1e6:.1f}, at most {most / 1e6:.1f} MB")
    assert after - before < 1_500_000
    assert most - after < 80_000_000, "a few copies of the ten megabytes of one call"
