"""Reads XML from strangers: bounded, with no DTD, entity, network or file, and leaking nothing.

It knows no element by name. Whatever is wrong with the text is an InvalidXML of one sentence.

lxml puts every element and attribute name that it parses into a dictionary of the thread, and a
thread's dictionary only grows: a caller that makes up names would make the daemon grow for ever (by
80 to 140 kB for a document of 64 KiB, lxml 6.1 and 4.9). So `read` parses in a thread of its own,
whose dictionary goes with it, and hands back what a reader took out of the tree, not the tree.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from typing import TypeVar

from lxml import etree

from snapd_vm.errors import InvalidXML

MAX_BYTES = 64 * 1024
"""Longest XML that a caller may send, in bytes of UTF-8."""

SHOWN_CHARACTERS = 80
"""Most of a caller's text that an error message repeats."""

_PLACE = re.compile(r", line \d+, column \d+\Z")  # which lxml adds to libxml2's message

_T = TypeVar("_T")


def shown(text: str) -> str:
    """The text as an error message may repeat it: printable, and 80 characters at most."""
    start = text[:SHOWN_CHARACTERS]
    printable = "".join(c if c.isprintable() else "?" for c in start)
    return printable if len(text) <= SHOWN_CHARACTERS else printable[:-1] + "…"


def place(element: etree._Element) -> str:
    """Where an element stands, for an error message: "line 3, element <overlay>"."""
    name = etree.QName(element).localname
    return f"line {element.sourceline}, element <{shown(name)}>"


def parse(
    text: str, limit: int = MAX_BYTES, *, whole: bool = False, doctype: bool = False
) -> etree._Element:
    """The root element of `text`, which may have at most `limit` bytes of UTF-8.

    For XML of a trusted origin; a stranger's goes through `read`. Comments and processing
    instructions are dropped unless the `whole` is wanted, to be written again. `doctype`: the
    letters that begin a document type may be in it, where whoever wrote it writes none: somebody's
    comment or CDATA. Raises InvalidXML.
    """
    if len(text) > limit:  # before it is encoded: ten megabytes cost nothing
        raise InvalidXML(f"The XML is longer than {limit} bytes; send a shorter one.")
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise InvalidXML("The XML holds characters that UTF-8 can't encode.") from None
    if len(data) > limit:
        raise InvalidXML(f"The XML is longer than {limit} bytes; send a shorter one.")
    if not text.strip(" \t\r\n"):
        raise InvalidXML("The XML is empty.")
    # The text itself is searched, as an internal subset does its harm while it is parsed. Outside
    # of comments and CDATA this can only be a document type; inside them nobody misses it.
    begins = -1 if doctype else text.find("<!DOCTYPE")
    if begins != -1:
        line = text.count("\n", 0, begins) + 1
        raise InvalidXML(f"The XML has a document type (line {line}), which is not allowed.")
    parser = etree.XMLParser(  # a new one each time: it keeps its last document and its error log
        encoding="utf-8",  # whatever the XML declaration says, a str has been encoded here
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        attribute_defaults=False,
        huge_tree=False,
        recover=False,
        remove_comments=not whole,
        remove_pis=not whole,
        strip_cdata=not whole,
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        what = _PLACE.sub("", str(error.msg))
        raise InvalidXML(
            f"The XML is not well-formed at line {error.lineno or 1}: {shown(what)}."
        ) from None
    return root


def read(text: str, reader: Callable[[etree._Element], _T]) -> _T:
    """What `reader` takes out of a stranger's XML; blocks for as long as the reader runs.

    The reader must not return an element, nor keep one. Raises InvalidXML, and what it raises.
    """
    result: list[_T] = []
    failure: list[BaseException] = []

    def parse_and_read() -> None:
        try:
            result.append(reader(parse(text)))
        except BaseException as error:  # raised again below, in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=parse_and_read, name="safexml")
    thread.start()
    thread.join()
    if failure:
        raise failure.pop()
    return result.pop()


def clean(element: etree._Element) -> str:
    """The element as text, alone: without its tail and without its ancestors' namespaces."""
    # A copy brings along only the namespaces that it uses; the original would declare all it has.
    return etree.tostring(copy.deepcopy(element), encoding="unicode", with_tail=False)
