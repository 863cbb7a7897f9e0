"""The `<source>` of a disk in a domain's XML: which storage it is, and how to reach it.

What belongs to the running domain, or is secret, is left out; a storage pool's volume becomes the
file, device or RBD image that it is.
"""

from __future__ import annotations

from collections.abc import Callable

from lxml import etree

from snapd_vm import safexml

ResolveVolume = Callable[[str, str], tuple[str, str] | None]
"""(pool, volume) -> (type "file" or "block", path) or ("network", `<source>`), or None."""

PATH_ATTRIBUTES = {"file": "file", "block": "dev"}
"""The attribute of `<source>` with the path on this host, by the disk's type."""

# Of `<source>`, what says which storage it is and how it is reached; the rest (index, labels,
# cookies, policies) belongs to the running domain or is secret. A slice is part of the storage:
# without it the same file reads as another disk.
_NOT_IDENTITY = ("index", "startupPolicy", "fdgroup")
_IDENTITY = (
    *("host", "snapshot", "config", "slices", "initiator", "identity", "ssl", "address"),
    "auth",
)


def said(source: etree._Element | None) -> dict[str, str]:
    """The attributes of a `<source>` that say which storage it is."""
    if source is None:
        return {}
    return {str(k): str(v) for k, v in source.attrib.items() if k not in _NOT_IDENTITY}


def read_source(
    kind: str,
    source: etree._Element | None,
    auth: etree._Element | None,
    resolve_volume: ResolveVolume,
) -> tuple[str, str, str]:
    """(type, path, cleaned `<source>`), a pool's volume resolved; the last two '' if empty.

    A volume that is none of these stays a volume: its pool knows the hosts.
    """
    identity = said(source)
    if source is None or not (identity or len(source)):
        return kind, "", ""
    kept = [child for child in source if child.tag in _IDENTITY]
    if kind == "volume":
        found = resolve_volume(identity.get("pool", ""), identity.get("volume", ""))
        if found is not None and found[0] in PATH_ATTRIBUTES:
            kind, path = found
            identity = {PATH_ATTRIBUTES[kind]: path}
            kept = [child for child in kept if child.tag == "slices"]
        elif found is not None:
            kind, whole = found
            image = safexml.parse(whole)
            identity = said(image)
            kept = [*image, *(child for child in kept if child.tag in ("slices", "snapshot"))]
    cleaned = etree.Element("source", identity)
    for child in kept:
        cleaned.append(safexml.parse(safexml.clean(child)))
    # Where `<auth>` was given in the disk, as before libvirt 3.9, libvirt leaves it there.
    if auth is not None and kind == "network":
        cleaned.append(safexml.parse(safexml.clean(auth)))
    for reference in cleaned.findall("auth"):
        _only_reference(reference)
    for child in cleaned.iter():  # without the indentation of the domain's XML
        child.text = (child.text or "").strip() or None
        child.tail = None
    return kind, identity.get(PATH_ATTRIBUTES.get(kind, ""), ""), safexml.clean(cleaned)


def _only_reference(auth: etree._Element) -> None:
    """Leaves of an `<auth>` the user's name and which of libvirt's secrets it is."""
    for child in list(auth):
        if child.tag != "secret":
            auth.remove(child)
    for element, allowed in (
        (auth, ("username",)),
        *((s, ("type", "usage", "uuid")) for s in auth),
    ):
        for name in set(element.attrib) - set(allowed):
            del element.attrib[name]


def image_in_pool(pool: etree._Element, path: str) -> str:
    """The `<source>` of an image in a pool of the type rbd, with what that says of the cluster.

    `path` is the image's, as libvirt gives it: the cluster's pool, a slash, and its name.
    """
    source = etree.Element("source", protocol="rbd", name=path)
    for tag in ("host", "auth"):
        for child in pool.findall(f"source/{tag}"):
            source.append(safexml.parse(safexml.clean(child)))
    for secret in source.findall("auth/secret"):
        secret.set("type", "ceph")  # in a pool it stands with `<auth>`
    return safexml.clean(source)
