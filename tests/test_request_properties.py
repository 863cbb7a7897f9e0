"""Whatever a caller sends, the answer is a request or one error of ours, and at once."""

from __future__ import annotations

import time
from xml.sax.saxutils import escape, quoteattr

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapd_vm import request, schemas
from snapd_vm.errors import SnapdError
from snapd_vm.model import Request

NAMES = st.sampled_from(
    [
        *("domain", "name", "uuid", "devices", "disk", "target", "source", "diskSnapshot"),
        *("overlay", "device", "size", "subvolume", "dataset", "image", "backingStore", "ns:disk"),
        *("ns:source", "x"),
    ]
)
KEYS = st.sampled_from(
    [
        *("type", "dev", "file", "protocol", "name", "pool", "volume", "method", "path", "unit"),
        *("xmlns", "xmlns:ns", "ns:file", "xml:base", "index"),
    ]
)
TEXT = st.text(st.characters(exclude_characters="\0"), max_size=20)
VALUES = (
    st.sampled_from(
        [
            *("vda", "/a/b", "/a/../b", "/a/", "qemu", "lvm", "rbd", "file", "GiB", "7", "0", "-1"),
            *("tank/vm", "0f5c7a9e-1b2c-4d3e-8f90-a1b2c3d4e5f6", "urn:x", "", "\n", "&#10;"),
            "9" * 5000,
        ]
    )
    | TEXT
)


def element(name: str, attributes: dict[str, str], inside: list[str]) -> str:
    written = "".join(f" {key}={quoteattr(value)}" for key, value in attributes.items())
    return f"<{name}{written}>{''.join(inside)}</{name}>"


ATTRIBUTES = st.dictionaries(KEYS, VALUES, max_size=4)
LEAVES = st.builds(element, NAMES, ATTRIBUTES, st.just([])) | VALUES.map(escape)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.builds(element, NAMES, ATTRIBUTES, st.lists(inner, max_size=4)),
    max_leaves=12,
)
DISKS = st.builds(element, st.sampled_from(["disk", "domain"]), ATTRIBUTES, st.lists(TREES))
METHODS = st.builds(element, st.just("diskSnapshot"), ATTRIBUTES, st.lists(TREES, max_size=3))
ANYTHING = st.text() | TREES | DISKS | METHODS
GOOD_DISK = "<disk><target dev='vda'/></disk>"


def answer(disk_xml: str, method_xml: str, name: str, flags: int) -> list[Request]:
    """The requests that both entrances make of it; fails on any error but ours."""
    made = []
    for parse in (request.create_request, request.root_request):
        start = time.monotonic()
        try:
            made.append(parse(disk_xml, method_xml, name, flags))
        except SnapdError as error:
            message = str(error)
            assert message.isprintable()
            assert 0 < len(message) < 300
            assert message.endswith(".")
        assert time.monotonic() - start < 1
    return made


EASY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@EASY
@given(ANYTHING)
def test_any_disk_xml(xml: str) -> None:
    for made in answer(xml, "", "", 0):
        assert made.disk.target or made.disk.source
        assert len(made.disk.target) <= 32


@EASY
@given(ANYTHING)
def test_any_method_xml(xml: str) -> None:
    for made in answer(GOOD_DISK, xml, "", 0):
        method = made.method
        assert (method is None) == (xml == "")
        if method is None:
            continue
        assert method.method in schemas.KNOWN_METHODS
        for key in ("overlay", "device", "subvolume"):
            path = method.options.get(key, "/")
            assert path.startswith("/")
            assert not {"..", "."} & set(path.split("/"))
            assert "\n" not in path


@EASY
@given(st.text() | st.from_regex(r"[A-Za-z0-9._-]{0,70}\n?", fullmatch=True))
def test_any_name(name: str) -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    good = set(name) <= allowed and len(name) <= 64 and name[:1] not in tuple("._-")
    assert len(answer(GOOD_DISK, "", name, 0)) == (2 if good else 0)


@EASY
@given(st.integers(0, 2**32 - 1) | st.integers(0, 16))
def test_any_flags(flags: int) -> None:
    assert len(answer(GOOD_DISK, "", "", flags)) == (2 if flags in {0, 1, 2} else 0)
