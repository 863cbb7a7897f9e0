"""The `<diskSnapshot>`s in a domain's `<metadata>`: which method each disk is to be taken by.

libvirt drops elements that it does not know from `<disk>`, and keeps one element of each namespace
in the metadata (virDomainSetMetadata); it puts all that is inside into that namespace too.
"""

from __future__ import annotations

from collections.abc import Mapping

from lxml import etree

from snapd_vm import safexml
from snapd_vm.model import NAMESPACE

PREFIX = "snapd-vm"
"""Of the namespace, as it is written in the domain's XML."""

_NS = f"{{{NAMESPACE}}}"


def read(domain: etree._Element) -> Mapping[str, str]:
    """The `<diskSnapshot>` of each disk by its target, from a `<domain>`; not looked into."""
    found = {}
    for disk in domain.iterfind(f"metadata/{_NS}disks/{_NS}disk"):
        method = disk.find(f"{_NS}diskSnapshot")
        if method is not None:
            for element in method.iter(f"{_NS}*"):
                element.tag = etree.QName(element).localname
                if len(element):  # libvirt's indentation
                    element.text = None
                element.tail = None
            etree.cleanup_namespaces(method)
            found[disk.get("target") or ""] = safexml.clean(method)
    return found


def write(methods: Mapping[str, str]) -> str:
    """The element for virDomainSetMetadata: what `read` then finds. Raises InvalidXML."""
    root = etree.Element("disks")
    for target, method in methods.items():
        disk = etree.SubElement(root, "disk", target=target)
        disk.append(safexml.parse(method))
    return etree.tostring(root, encoding="unicode")
