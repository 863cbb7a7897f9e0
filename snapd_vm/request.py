"""Turns what a caller sends to Create or Plan into a model.Request, or into one clear error.

It looks at the text alone: no libvirt, no file, no knowledge of which domains, disks or methods
there are. Whether the disk exists, the path may be used or the method is to be had is for the
engine to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lxml import etree

from snapd_vm import schemas
from snapd_vm.errors import InvalidArgs, InvalidName, InvalidXML
from snapd_vm.model import NAMESPACE, DiskRequest, Flags, MethodRequest, Request
from snapd_vm.safexml import place, read

LONGEST_TEXT = 4096
"""Longest path or source attribute, in bytes: Linux's PATH_MAX."""

SOURCE_ATTRIBUTES = ("file", "dev", "dir", "protocol", "name", "pool", "volume")
"""The attributes of `<source>` that say which storage it is; all others are ignored."""

_MOST_DISKS = 128
"""Of a CreateSet: reading each takes a millisecond, before anybody has said that the caller may."""

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_METHOD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
_TARGET = re.compile(r"[A-Za-z0-9_-]{1,32}")
_DISK_TYPE = re.compile(r"[a-z]{1,32}")
_UUID = re.compile(r"([0-9a-f]{8})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{12})")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def create_request(disk_xml: str, method_xml: str, name: str, flags: int) -> Request:
    """The request of a call on a domain's object, where `disk_xml` is a `<disk>`.

    Raises InvalidArgs, InvalidName, InvalidXML, MethodUnknown.
    """
    checked, label = check_flags(flags), check_name(name)
    disk = read(disk_xml, lambda root: _disk(_root(root, "disk")))
    return Request(disk, method_request(method_xml) if method_xml else None, label, checked)


def set_requests(
    disks_and_methods: Sequence[Sequence[str]], name: str, flags: int
) -> Sequence[Request]:
    """The requests of a CreateSet: pairs of a `<disk>` and a method's XML or ''.

    Raises InvalidArgs for none or too many, and as create_request does.
    """
    if not 0 < len(disks_and_methods) <= _MOST_DISKS:
        raise InvalidArgs(f"Name at least one disk, and at most {_MOST_DISKS}.")
    return [create_request(disk, method, name, flags) for disk, method in disks_and_methods]


def root_request(disk_xml: str, method_xml: str, name: str, flags: int) -> Request:
    """The request of a call on the root object: a `<domain>` with one `<disk>`, or a `<disk>`.

    Both name and UUID are kept if both are given. Raises as create_request does.
    """
    checked, label = check_flags(flags), check_name(name)
    disk, domain, uuid = read(disk_xml, _domain_or_disk)
    method = method_request(method_xml) if method_xml else None
    return Request(disk, method, label, checked, domain, uuid)


def method_request(xml: str) -> MethodRequest:
    """A `<diskSnapshot>` that passed the schema. Raises InvalidXML, MethodUnknown."""
    return read(xml, lambda root: _method(_root(root, "diskSnapshot")))


def check_name(name: str) -> str:
    """The label itself, if it may be one; empty is fine. Raises InvalidName."""
    if name and not _LABEL.fullmatch(name):
        raise InvalidName(
            "A snapshot's name must be 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', "
            "and start with a letter or digit."
        )
    return name


def check_flags(flags: int) -> Flags:
    """The flags, if they are allowed together. Raises InvalidArgs."""
    if flags not in (0, Flags.QUIESCE_REQUIRED, Flags.NO_QUIESCE):
        raise InvalidArgs("The flags must be 0, 1 (QUIESCE_REQUIRED) or 2 (NO_QUIESCE).")
    return Flags(flags)


def _root(root: etree._Element, name: str) -> etree._Element:
    if root.tag != name:
        raise InvalidXML(f"The XML must be a <{name}> ({place(root)}).")
    return root


def _one(parent: etree._Element, name: str) -> etree._Element | None:
    """The only child of this name in no namespace, or None."""
    found = parent.findall(name)
    if len(found) > 1:
        raise InvalidXML(f"There must be one <{name}> only ({place(found[1])}).")
    return found[0] if found else None


def _domain_or_disk(root: etree._Element) -> tuple[DiskRequest, str, str]:
    if root.tag == "disk":
        return _disk(root), "", ""
    if root.tag != "domain":
        raise InvalidXML(f"The XML must be a <domain> or a <disk> ({place(root)}).")
    name = _sound(_text(_one(root, "name")), root)
    uuid = _text(_one(root, "uuid")).strip().lower()
    if not name and not uuid:
        raise InvalidXML(f"The domain must have a <name> or a <uuid> ({place(root)}).")
    if uuid:
        match = _UUID.fullmatch(uuid)
        if not match:
            raise InvalidXML(f"The <uuid> of the domain is not a UUID ({place(root)}).")
        uuid = "-".join(match.groups())
    devices = _one(root, "devices")
    disks = [] if devices is None else devices.findall("disk")
    if len(disks) != 1:
        raise InvalidXML(
            f"The domain must have exactly one <disk> in its <devices>, and has {len(disks)} "
            f"({place(root)})."
        )
    return _disk(disks[0]), name, uuid


def _text(element: etree._Element | None) -> str:
    """The text of an element that has text only, as it is; empty if there is none."""
    if element is None:
        return ""
    if len(element):
        raise InvalidXML(f"There must be nothing but text in {place(element)}.")
    return element.text or ""


def _sound(text: str, element: etree._Element) -> str:
    """The text, if it could be a name or path at all: no control characters, not too long."""
    if len(text.encode()) > LONGEST_TEXT or _CONTROL.search(text):
        raise InvalidXML(
            f"Names and paths must have no control characters and at most {LONGEST_TEXT} bytes "
            f"({place(element)})."
        )
    return text


def _disk(disk: etree._Element) -> DiskRequest:
    target = _one(disk, "target")
    dev = ""
    if target is not None:
        dev = target.get("dev") or ""
        if not _TARGET.fullmatch(dev):
            raise InvalidXML(f"The target's dev must be a name such as vda ({place(target)}).")
    source = _source(disk)
    if not dev and not source:
        raise InvalidXML(
            f"The disk must have a <target dev='…'/> or a <source> that says which it is "
            f"({place(disk)})."
        )
    if disk.find(f"{{{NAMESPACE}}}diskSnapshot") is not None:
        raise InvalidXML(f"A <diskSnapshot> must be without namespace ({place(disk)}).")
    method = _one(disk, "diskSnapshot")
    return DiskRequest(dev, source, None if method is None else _method(method))


def _source(disk: etree._Element) -> Mapping[str, str]:
    """What identifies the source; empty where the disk has none, or says nothing in it."""
    source = _one(disk, "source")
    if source is None:
        return {}
    said = {key: _sound(source.get(key) or "", source) for key in SOURCE_ATTRIBUTES}
    said = {key: value for key, value in said.items() if value}
    kind = disk.get("type") or ""
    if kind and not _DISK_TYPE.fullmatch(kind):
        raise InvalidXML(f"The disk's type must be file, block, network … ({place(disk)}).")
    if said and kind:
        said["type"] = kind
    return said


def _method(element: etree._Element) -> MethodRequest:
    method = element.get("method")
    if method is None or not _METHOD.fullmatch(method):
        raise InvalidXML(f"The method must be a name such as qemu ({place(element)}).")
    schemas.check(method, element)
    if schemas.is_outside(method):
        return MethodRequest(method, _flattened(element), outside=True)
    return MethodRequest(method, dict(map(_option, element)))


def _option(element: etree._Element) -> tuple[str, str]:
    """An element that passed the schema, as key and value."""
    match element.tag:
        case "overlay":
            return "overlay", _path(element, "file")
        case "device":
            return "device", _path(element, "path")
        case "subvolume":
            return "subvolume", _path(element, "path")
        case "dataset":
            return "dataset", _parts(element.get("name") or "", element)
        case "image":
            return "image", _parts(f"{element.get('pool')}/{element.get('name')}", element)
        case _:
            return "size", str(_bytes(element))


def _flattened(element: etree._Element) -> Mapping[str, str]:
    """What the elements of a method from outside say, each of a name of its own and without others
    in it: its attributes as "element/@attribute", its text, if any, as "element".
    """
    found: dict[str, str] = {}
    for child in element:
        name = str(child.tag)
        _one(element, name)
        text = _sound(_text(child).strip(), child)
        said = {name + "/@" + str(key): _sound(str(v), child) for key, v in child.attrib.items()}
        if text or not said:
            said[name] = text
        found |= said
    return found


def _path(element: etree._Element, attribute: str) -> str:
    path = _sound(element.get(attribute) or "", element)
    if path != "/":
        _parts(path[1:], element)
    return path


def _parts(path: str, element: etree._Element) -> str:
    """The path, if no part of it is empty, '.' or '..'."""
    if not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise InvalidXML(
            f"The path must be normal, with no empty part, '.' or '..' in it ({place(element)})."
        )
    return path


def _bytes(element: etree._Element) -> int:
    """The size in bytes; units as in libvirt, in any case: B, KB = 1000, K and KiB = 1024 …"""
    unit = (element.get("unit") or "b").lower()
    exponent = " kmgtpe".find(unit[0]) if unit[0] != "b" else 0
    factor = 1000 if unit.endswith("b") and not unit.endswith("ib") else 1024
    size = int(element.text or "0") * int(factor**exponent)
    if not 0 < size < 2**63:
        raise InvalidXML(f"The size must be at least 1 byte and below 8 EiB ({place(element)}).")
    return size
