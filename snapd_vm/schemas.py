"""What a `<diskSnapshot>` may hold: the RELAX NG schema of each method, ours or from outside.

It checks an element that was read already, and knows neither what its parts mean nor whether the
method is there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lxml import etree

from snapd_vm.errors import InvalidXML, MethodUnknown
from snapd_vm.model import BUILT_IN_METHODS
from snapd_vm.safexml import place, shown

KNOWN_METHODS = BUILT_IN_METHODS
"""The methods whose form `data/diskSnapshot.rng` describes; each is a definition there."""

_RNG = "{http://relaxng.org/ns/structure/1.0}"
_outside: dict[str, bytes] = {}


def register(method: str, schema: str) -> None:
    """Let a `<diskSnapshot>` of this method from outside be what its RELAX NG schema allows.

    The schema is the only thing of such a method that is used before its caller is authorised.
    Called before anything is served. Raises ValueError for what is no schema.
    """
    try:
        parsed = _parsed(schema.encode())
        etree.RelaxNG(parsed)
    except (etree.LxmlError, UnicodeEncodeError) as error:
        raise ValueError(f"its schema is no RELAX NG schema: {error}") from None
    _outside[method] = schema.encode()


def is_outside(method: str) -> bool:
    """Whether the method was registered."""
    return method in _outside


def check(method: str, element: etree._Element) -> None:
    """Raise MethodUnknown, or InvalidXML where its schema does not allow the element."""
    if method not in KNOWN_METHODS and method not in _outside:
        raise MethodUnknown(f"There is no method {method}; Methods on the bus lists what there is.")
    schema = _schema(method)
    if not schema.validate(element):
        raise InvalidXML(_complaint(schema, element))


@cache
def _grammar() -> bytes:
    return (Path(__file__).parent / "data" / "diskSnapshot.rng").read_bytes()


def _parsed(schema: bytes) -> etree._Element:
    """A schema of ours or of the administrator's, for which nothing else is read."""
    return etree.fromstring(schema, etree.XMLParser(resolve_entities=False, no_network=True))


def _schema(method: str) -> etree.RelaxNG:
    """The schema for this method alone.

    With a choice of all the methods libxml2 complains of the method's attribute, whatever is wrong.
    Made anew each time: it has an error log, and must be of the thread that uses it.
    """
    if method in _outside:
        return etree.RelaxNG(_parsed(_outside[method]))
    grammar = _parsed(_grammar())
    start = grammar.find(f"{_RNG}start")
    if start is None:
        raise AssertionError("the schema has no start")
    del start[:]
    etree.SubElement(start, f"{_RNG}ref", name=method)
    return etree.RelaxNG(grammar)


def _complaint(schema: etree.RelaxNG, element: etree._Element) -> str:
    """One sentence on what the schema does not allow, with its line and element."""
    method = element.get("method")
    log = [entry for entry in schema.error_log if entry.line]
    if not log:
        return f"The method {method} does not allow that ({place(element)})."
    name = (log[0].path or "").rpartition("/")[2].partition("[")[0] or "diskSnapshot"
    return (
        f"The method {method} does not allow that (line {log[0].line}, element <{shown(name)}>: "
        f"{shown(log[0].message)})."
    )
