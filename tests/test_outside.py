"""Methods from outside, without any: configuration, forms, the JSON reader, what is run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from snapd_vm import command, config, request, schemas
from snapd_vm.errors import InvalidXML, MethodUnknown
from snapd_vm.methods.outside.jsonform import _KEYWORDS, _NO_MEANING, Form, Unfit, read
from snapd_vm.model import MethodRequest
from tests.lab.program import run

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "data/executable-method.schema.json"
ONE = {"name": "array", "path": "/opt/array"}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"executable": {}}, "list of tables"),
        ({"executable": [{**ONE, "name": "qemu"}]}, "reserved"),
        ({"executable": [{**ONE, "name": "backup"}]}, "reserved"),
        ({"executable": [{**ONE, "name": "a b"}]}, "must be a name"),
        ({"executable": [{**ONE, "path": "array"}]}, "absolute"),
        ({"executable": [{"name": "array"}]}, "'executable.path' is missing"),
        ({"executable": [{"path": "/opt/array"}]}, "'executable.name' is missing"),
        ({"executable": [{**ONE, "paths": []}]}, "unknown key 'executable.paths'"),
        ({"executable": [{**ONE, "timeout_s": 0}]}, "from 1 to 3600"),
        ({"executable": [{**ONE, "user": "a b"}]}, "name of a user"),
        ({"executable": [{**ONE, "source_dirs": "/srv"}]}, "must be a list"),
        ({"executable": [{**ONE, "source_dirs": ["srv"]}]}, "absolute"),
        ({"executable": [{**ONE, "capabilities": ["CAP_X;"]}]}, "like 'sys_admin'"),
        ({"executable": [{**ONE, "user": "a", "capabilities": ["kill"]}]}, "without 'user'"),
        ({"executable": [{**ONE, "reverts": 1}]}, "true or false"),
        ({"executable": [ONE, ONE]}, "there twice"),
        ({"executable": [ONE], "plugins": {"methods": ["array"]}}, "there twice"),
        ({"plugins": {"method": []}}, "unknown key 'plugins.method'"),
        ({"plugins": {"methods": ["a"], "b": {}}}, "does not list it"),
        ({"plugins": {"methods": ["a"], "a": 1}}, "must be a table"),
        ({"plugins": {"methods": ["zfs"]}}, "reserved"),
    ],
)
def test_what_the_configuration_must_not_say(document: dict[str, Any], words: str) -> None:
    with pytest.raises(config.ConfigError) as error:
        config.parse(document)
    assert words in str(error.value)


def test_nothing_of_them_is_imported_unless_they_are_listed() -> None:
    """Start-up is measured."""
    outside = "snapd_vm.methods.outside"
    words = ("importlib.metadata", f"{outside}.outside", f"{outside}.program")
    script = f"import sys, snapd_vm.daemon; print([w for w in {words} if w in sys.modules])"
    assert run(sys.executable, "-c", script, cwd=ROOT) == "[]\n"


def test_what_it_may() -> None:
    found = config.parse(
        {
            "executable": [{**ONE, "user": "backup", "source_dirs": ["/srv"], "reverts": True}],
            "plugins": {"methods": ["copy"], "copy": {"folder": "/srv"}},
        }
    )
    (one,) = found.executable
    assert (one.name, one.user, one.timeout_s, one.reverts) == ("array", "backup", 30, True)
    assert found.plugins.options == {"copy": {"folder": "/srv"}}


RNG = """<element name="diskSnapshot" xmlns="http://relaxng.org/ns/structure/1.0">
  <attribute name="method"><value>outside</value></attribute>
  <zeroOrMore><element><anyName/>
    <zeroOrMore><attribute><anyName/></attribute></zeroOrMore><mixed><zeroOrMore>
    <element name="x"><empty/></element></zeroOrMore></mixed></element></zeroOrMore>
</element>"""


def test_a_form_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "_outside", {})
    with pytest.raises(MethodUnknown):
        request.method_request("<diskSnapshot method='outside'/>")
    schemas.register("outside", RNG)
    asked = "<diskSnapshot method='outside'>{}</diskSnapshot>"
    empty = request.method_request(asked.format(""))
    assert (empty.options, empty.names_place) == ({}, False)
    for inside, options in (
        ("<size/>", {"size": ""}),  # which for a method of our own would be no place
        ("<size>3</size>", {"size": "3"}),
        ("<a b='c' d='e'/>", {"a/@b": "c", "a/@d": "e"}),
        ("<a b='c'> f </a><g/>", {"a/@b": "c", "a": "f", "g": ""}),
    ):
        found = request.method_request(asked.format(inside))
        assert found == MethodRequest("outside", options, outside=True)
        assert found.names_place
    for inside in ("<a/><a/>", "<a><x/></a>", "<a b='&#x85;'/>", f"<a b='{'x' * 5000}'/>", "text"):
        with pytest.raises(InvalidXML):
            request.method_request(asked.format(inside))
    for wrong in ("", "<element", "<element/>", "<html/>"):
        with pytest.raises(ValueError, match="no RELAX NG schema"):
            schemas.register("outside", wrong)


def keywords(schema: Any, *, names: bool = False) -> set[str]:
    """All keywords of a schema; under `properties` and its like are names."""
    if isinstance(schema, list):
        return set().union(*(keywords(one) for one in schema)) if schema else set()
    if not isinstance(schema, dict):
        return set()
    own = set() if names else set(schema)
    for key, value in schema.items():
        if names or key not in ("enum", "required"):
            inside = not names and key in ("properties", "$defs", "answers")
            own |= keywords(value, names=inside)
    return own


def test_the_schema_uses_what_the_reader_knows() -> None:
    document = json.loads(SCHEMA.read_text())
    document["$defs"] |= document["$defs"].pop("answers")
    assert keywords(document) <= _KEYWORDS | _NO_MEANING
    with pytest.raises(AssertionError, match="not known"):
        Form({"$defs": {"a": {"oneOf": []}}}).check(1, "#/$defs/a")


@pytest.mark.parametrize(
    "text",
    [
        *("", "nonsense", "{}{}", "NaN", '{"a": Infinity}', "[" * 100_000, "1" * 5000),
        *('{"a": 1, "a": 2}', "{'a': 1}", '"\ud800'),
    ],
)
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(Unfit):
        read(text)


@pytest.mark.parametrize(
    ("pointer", "value", "fits"),
    [
        ("answers/state", {"state": "ready"}, True),
        ("answers/state", {"state": "gone"}, False),
        ("answers/state", {"state": ["ready"]}, False),
        ("answers/state", {}, False),
        ("answers/delete", {"deleted": 1}, False),
        ("answers/check", {"space_needed": True}, False),
        ("answers/check", {"space_needed": 1.5}, False),
        ("answers/check", {"space_needed": 2**63}, False),
        ("answers/check", {"warnings": ["x"] * 17}, False),
        ("answers/check", {"warnings": ["x"] * 16}, True),
        ("answers/claim", {"mine": True, "data": {"a": "b"}}, True),
        ("answers/claim", {"mine": True, "data": {"a b": "c"}}, False),
        ("answers/claim", {"mine": True, "data": {"a": {"b": "c"}}}, False),
        ("answers/claim", {"mine": True, "data": {str(n): "" for n in range(33)}}, False),
        ("answers/claim", {"mine": True, "source": {"file": "relative"}}, False),
        ("answers/claim", {"mine": True, "source": {"file": "/a\nb"}}, False),
        ("answers/claim", {"mine": True, "source": {"file": "/a//b"}}, False),
        ("answers/claim", {"mine": True, "source": {"snapshot": "a@b"}}, False),
        ("answers/claim", {"mine": True, "source": {"url": "http://a"}}, False),
        ("answers/list", {"snapshots": [{"name": "snapd-vm-x"}]}, False),
        ("failure", {"error": {"name": "Internal", "message": "x"}}, False),
        ("failure", {"error": {"name": "Busy", "message": "x" * 401}}, False),
        ("failure", {"error": {"name": "Busy", "message": "x"}}, True),
    ],
)
def test_the_form_of_answers(pointer: str, value: Any, fits: bool) -> None:
    form = Form(json.loads(SCHEMA.read_text()))
    if fits:
        form.check(value, f"#/$defs/{pointer}")
        return
    with pytest.raises(Unfit) as error:
        form.check(value, f"#/$defs/{pointer}")
    assert len(str(error.value)) < 300


def test_a_program_is_sent_its_input_and_its_output_is_bounded() -> None:
    text = b"x" * 3_000_000
    assert len(command.run(["cat"], timeout=20, send=text).stdout) == len(text)
    assert command.run(["true"], timeout=20, send=text).status == 0  # it does not listen
    with pytest.raises(command.CommandError, match="more than 1000 bytes"):
        command.run(["yes"], timeout=20, most=1000)
    began = time.monotonic()
    with pytest.raises(command.CommandTimedOut) as error:
        command.run(["sh", "-c", "echo why >&2; sleep 60 & wait"], timeout=0.3)
    assert error.value.stderr == "why\n"
    assert time.monotonic() - began < 5


def test_what_an_earlier_process_left_is_found_by_its_mark() -> None:
    left = subprocess.Popen(["sleep", "60"], env={"SNAPD_VM_RUN": "a@/b"})
    other = subprocess.Popen(["sleep", "60"], env={"SNAPD_VM_RUN": "a@/bc"})
    try:
        ended = command.end_marked("a@/b") if left.poll() is None else 0
        assert (ended, left.wait(5), other.poll()) == (1, -9, None)
        assert command.end_marked("a@/b") == 0
    finally:
        other.kill()
        other.wait()
