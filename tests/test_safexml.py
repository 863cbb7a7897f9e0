"""XML from strangers: refused at once, in one sentence, with nothing read, fetched or kept."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from snapd_vm import request, safexml
from snapd_vm.errors import InvalidXML, SnapdError
from snapd_vm.model import DiskRequest

DISK = "<disk><target dev='vda'/></disk>"


def disk(xml: str) -> DiskRequest:
    return request.create_request(xml, "", "", 0).disk


def _bomb() -> str:
    entities = "".join(f"<!ENTITY e{i} '{f'&e{i - 1};' * 10}'>" for i in range(1, 12))
    return f"<!DOCTYPE disk [<!ENTITY e0 'ha'>{entities}]><disk><target dev='&e11;'/></disk>"


HOSTILE = {
    "entity bomb": _bomb(),
    "external entity": "<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><disk>&x;</disk>",
    "external dtd": "<!DOCTYPE disk SYSTEM 'http://127.0.0.1:9/x.dtd'><disk/>",
    "parameter entity": "<!DOCTYPE d [<!ENTITY % p SYSTEM 'file:///etc/passwd'>%p;]><disk/>",
    "undefined entity": "<disk>&nope;</disk>",
    "ten megabytes": f"<disk><target dev='{'a' * 10_000_000}'/></disk>",
    "just too long": f"<disk>{' ' * (65_536 - 12)}</disk>",
    "too long in UTF-8 only": f"<disk>{'é' * 40_000}</disk>",
    "nested 100000 deep": "<a>" * 100_000,
    "nested as deep as fits": "<a>" * 9_000 + "</a>" * 9_000,
    "many attributes": "<disk " + " ".join(f"a{i}=''" for i in range(6_000)) + "/>",
    "many namespaces": "<disk " + " ".join(f"xmlns:a{i}='u'" for i in range(3_500)) + "/>",
    "many elements": f"<disk>{'<target/>' * 7_000}</disk>",
    "NUL": "<disk>\0</disk>",
    "lone surrogate": "<disk>\ud800</disk>",
    "another encoding": "<?xml version='1.0' encoding='UTF-16'?><disk/>",
    "XInclude": "<disk xmlns:x='http://www.w3.org/2001/XInclude'><x:include href='/etc/passwd' "
    "parse='text'/></disk>",
    "nothing": "",
    "spaces": " \n\t",
    "no XML": "vda",
    "two roots": DISK + DISK,
    "unclosed": "<disk><target",
    "long name": f"<{'n' * 60_000}/>",
    "escapes in a name": "<disk><target dev='\x1b[31m'/></disk>",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_xml_is_one_short_error_at_once(case: str) -> None:
    for parse in (request.create_request, request.root_request):
        start = time.monotonic()
        with pytest.raises(InvalidXML) as caught:
            parse(HOSTILE[case], "", "", 0)
        assert time.monotonic() - start < 1
        message = str(caught.value)
        assert len(message) < 250
        assert message.isprintable()
        assert "root:" not in message
    with pytest.raises(InvalidXML):
        request.create_request(DISK, HOSTILE[case] or "<", "", 0)


def test_a_text_of_exactly_64_kib_is_read() -> None:
    padding = safexml.MAX_BYTES - len(DISK)
    assert disk(DISK + " " * padding) == DiskRequest("vda")
    with pytest.raises(InvalidXML, match="longer than 65536 bytes"):
        disk(DISK + " " * (padding + 1))


def test_a_text_longer_than_64_kib_in_utf8_alone_is_not_read() -> None:
    with pytest.raises(InvalidXML, match="longer than 65536 bytes"):
        disk(DISK.replace("</disk>", "é" * 40_000 + "</disk>"))


@pytest.mark.parametrize("doctype", ["<!DOCTYPE disk>", "<!-- a -->\n<!DOCTYPE disk []>"])
def test_a_document_type_is_refused_even_if_it_does_no_harm(doctype: str) -> None:
    line = doctype.count("\n") + 1
    with pytest.raises(InvalidXML, match=rf"document type \(line {line}\)"):
        disk(doctype + DISK)


def test_an_xml_declaration_of_a_str_says_nothing_of_its_encoding() -> None:
    xml = "<?xml version='1.0' encoding='ISO-8859-1'?><disk><source file='/é'/></disk>"
    assert disk(xml).source == {"file": "/é"}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_memory_stays_flat_over_ten_thousand_hostile_documents() -> None:
    def send(i: int) -> None:
        names = "".join(f"<n{i}x{j} a{i}y{j}='{i}'/>" for j in range(300))
        with pytest.raises(SnapdError):
            request.create_request(f"<disk>{names}</disk>", "", "", 0)
        with pytest.raises(SnapdError):
            request.method_request(f"<diskSnapshot method='lvm'><m{i}/></diskSnapshot>")

    for i in range(500):
        send(i)
    before = resident_bytes()
    for i in range(500, 5_500):
        send(i)
    assert resident_bytes() - before < 8 << 20


def test_clean_leaves_out_tail_and_ancestors_namespaces() -> None:
    root = safexml.parse("<r xmlns:q='urn:q' xmlns:u='urn:u'><a q:x='1'><b>é</b></a>tail</r>")
    assert safexml.clean(root[0]) == '<a xmlns:q="urn:q" q:x="1"><b>é</b></a>'


def test_what_is_shown_of_a_text_is_short_and_printable() -> None:
    assert safexml.shown("a\x1b[31m\n\u202eb") == "a?[31m??b"
    assert safexml.shown("x" * 80) == "x" * 80
    assert safexml.shown("x" * 81) == "x" * 79 + "…"
