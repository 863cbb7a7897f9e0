"""libvirt's domain XML: read into the model, and written for snapshots and definitions.

The XML comes from libvirt (formatdomain, formatsnapshot). What it does not say is not guessed: a
missing `<driver type>` is the format '', but where it is what libvirt itself takes for raw. It
calls neither libvirt nor the storage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from lxml import etree

from snapd_vm import safexml
from snapd_vm.errors import NoSuchDisk, StorageFailed
from snapd_vm.model import NAMESPACE, AgentChannel, Consistency, Disk, Domain
from snapd_vm.virt import methodxml
from snapd_vm.virt.sourcexml import PATH_ATTRIBUTES, ResolveVolume, read_source, said

_LIMIT = 16 << 20
_RAW_UNLESS_SAID = ("bhyve", "ch", "lxc", "test", "xen")
"""The `<domain type>`s whose images are raw where no `<driver type>` says what they are. QEMU's
driver always says it; others (vbox, vmware) have formats of their own."""
_OWN_CHANNEL = "org.qemu.guest_agent.0"
_OTHER_CHANNELS = "*guest_agent*"
_KEPT_BY_NEW_IMAGE = ("seclabel",)
_INSTANCE = re.compile(r"\s*<domain\b[^>]*\sid='(\d+)'")
_UNFIT = re.compile(r"[\x00-\x1f\x7f]")


def parse_domain(
    live_xml: str,
    inactive_xml: str | None,
    *,
    id: int,  # noqa: A002 - libvirt's word for it
    state: str,
    persistent: bool,
    resolve_volume: ResolveVolume,
) -> Domain:
    """A Domain from what libvirt says of it; `inactive_xml` is given for an active persistent one.

    Raises InvalidXML.
    """
    tree = _parse(live_xml)
    disks = _disks(tree, resolve_volume)
    definition: tuple[Disk, ...] = ()
    if persistent:
        definition = disks if inactive_xml is None else _disks(_parse(inactive_xml), resolve_volume)
    return Domain(
        uuid=tree.findtext("uuid") or "",
        name=tree.findtext("name") or "",
        id=id,
        state=state,
        driver=tree.get("type") or "",
        persistent=persistent,
        disks=disks,
        persistent_disks=definition,
        agent=_agent(tree, active=id != -1),
        nvram=tree.find("os/nvram") is not None,
        tpm=tree.find("devices/tpm") is not None,
        methods=methodxml.read(tree),
    )


def instance(live_xml: str) -> int:
    """The number of the running instance, from the `<domain id=…>` that libvirt writes; else -1."""
    found = _INSTANCE.match(live_xml)
    return int(found[1]) if found else -1


def disk_xml(domain_xml: str, target: str) -> str:
    """The whole `<disk>` as libvirt reports it. Raises NoSuchDisk."""
    return safexml.clean(_disk_element(_parse(domain_xml), target))


def targets(domain_xml: str) -> Sequence[str]:
    """The `<target dev>` of every disk."""
    tree = _parse(domain_xml)
    return [target.get("dev") or "" for target in tree.findall("devices/disk/target")]


def mirror_ready(domain_xml: str, target: str) -> bool:
    """Whether the disk's block job is ready for the pivot (`<mirror ready='yes'>`)."""
    mirror = _disk_element(_parse(domain_xml), target).find("mirror")
    return mirror is not None and mirror.get("ready") == "yes"


def backup_source(
    disk: Disk,
    *,
    format: str,  # noqa: A002 - as the attribute is called
    consistency: Consistency,
    snapshot_path: str,
) -> str:
    """The `<source>` that reads a disk's image, with our attributes (design: backup_source)."""
    source = safexml.parse(disk.source_xml, _LIMIT)
    fresh = etree.Element("source", nsmap={"ds": NAMESPACE})
    fresh.attrib.update(dict(source.attrib))
    fresh.extend(list(source))
    fresh.set(f"{{{NAMESPACE}}}type", disk.type)
    fresh.set(f"{{{NAMESPACE}}}format", format)
    fresh.set(f"{{{NAMESPACE}}}consistency", consistency)
    fresh.set(f"{{{NAMESPACE}}}snapshot", snapshot_path)
    return safexml.clean(fresh)


def with_attributes(source_xml: str, *, consistency: Consistency, snapshot_path: str) -> str:
    """The same backup source with another consistency and snapshot."""
    source = safexml.parse(source_xml, _LIMIT)
    source.set(f"{{{NAMESPACE}}}consistency", consistency)
    source.set(f"{{{NAMESPACE}}}snapshot", snapshot_path)
    return safexml.clean(source)


def snapshot_xml(all_targets: Sequence[str], taken: Mapping[str, tuple[str, str]]) -> str:
    """The `<domainsnapshot>` that switches `taken` (target -> path, format) and nothing else."""
    root = etree.Element("domainsnapshot")
    disks = etree.SubElement(root, "disks")
    for target in all_targets:
        disk = etree.SubElement(disks, "disk", name=target)
        if target not in taken:
            disk.set("snapshot", "no")
            continue
        path, image_format = taken[target]
        disk.set("snapshot", "external")
        disk.set("type", "file")
        etree.SubElement(disk, "driver", type=image_format)
        etree.SubElement(disk, "source", file=_fit(path))
    return etree.tostring(root, encoding="unicode")


def replace_source(
    inactive_xml: str, target: str, path: str, disk_type: str, image_format: str
) -> str:
    """A definition in which one disk has another image; its `<backingStore>` is left out.

    An explicit `<backingStore>` would no longer be true, and QEMU would fail to lock it. Security
    labels and startup policy stay with the disk, and everything else is as it was. Raises
    NoSuchDisk.
    """
    tree = _parse(inactive_xml, whole=True)
    disk = _disk_element(tree, target)
    for name in ("backingStore", "mirror"):
        for element in disk.findall(name):
            _remove(element)
    disk.set("type", disk_type)
    driver = disk.find("driver")
    if driver is None:
        driver = etree.Element("driver", name="qemu")
        driver.tail = disk.text
        disk.insert(0, driver)
    driver.set("type", image_format)
    source = disk.find("source")
    if source is None:
        source = etree.Element("source")
        source.tail = driver.tail
        driver.addnext(source)
    policy = source.get("startupPolicy")
    source.attrib.clear()
    source.set(PATH_ATTRIBUTES[disk_type], _fit(path))
    if policy:
        source.set("startupPolicy", policy)
    for element in list(source):
        if element.tag not in _KEPT_BY_NEW_IMAGE:
            _remove(element)
    return etree.tostring(tree, encoding="unicode")


def _parse(xml: str, *, whole: bool = False) -> etree._Element:
    """libvirt's own XML. It writes no document type, and lets anybody's comments and CDATA, which
    may hold anything, stand in the metadata (virDomainSetMetadata).
    """
    return safexml.parse(xml, _LIMIT, whole=whole, doctype=True)


def _remove(element: etree._Element) -> None:
    """Takes an element out of its parent with the space after it, and leaves the indentation."""
    parent, before = element.getparent(), element.getprevious()
    if parent is None:
        return
    if element.getnext() is None:
        if before is not None:
            before.tail = element.tail
        else:
            parent.text = None
    parent.remove(element)


def _fit(path: str) -> str:
    if _UNFIT.search(path):
        raise StorageFailed("A path with control characters can't be told to libvirt.")
    return path


def _disk_element(tree: etree._Element, target: str) -> etree._Element:
    for disk in tree.findall("devices/disk"):
        element = disk.find("target")
        if element is not None and element.get("dev") == target:
            return disk
    raise NoSuchDisk(f"The domain has no disk {target}.")


def _disks(tree: etree._Element, resolve_volume: ResolveVolume) -> tuple[Disk, ...]:
    unsaid = "raw" if tree.get("type") in _RAW_UNLESS_SAID else ""
    return tuple(_disk(element, resolve_volume, unsaid) for element in tree.findall("devices/disk"))


def _disk(element: etree._Element, resolve_volume: ResolveVolume, unsaid: str) -> Disk:
    kind = element.get("type") or "file"
    source = element.find("source")
    declared = said(source) | {"type": kind}
    kind, path, cleaned = read_source(kind, source, element.find("auth"), resolve_volume)
    target = element.find("target")
    driver = element.find("driver")
    return Disk(
        target=(target.get("dev") or "") if target is not None else "",
        device=element.get("device") or "disk",
        type=kind,
        format=(driver.get("type") or unsaid) if driver is not None else unsaid,
        path=path,
        source_xml=cleaned,
        xml=safexml.clean(element),
        declared_source=declared,
        chain=tuple(_chain(element)),
        address=_address(element.find("address")),
        serial=element.findtext("serial") or "",
        readonly=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        encrypted=element.find("encryption") is not None
        or element.find("source/encryption") is not None,
        mirror=element.find("mirror") is not None,
    )


def _chain(element: etree._Element) -> Sequence[str]:
    """The local files that the `<backingStore>`s name, nearest first."""
    paths = []
    store = element.find("backingStore")
    while store is not None:
        source = store.find("source")
        kind = store.get("type") or ""
        if source is not None and kind in ("file", "block"):
            paths.append(source.get(PATH_ATTRIBUTES[kind]) or "")
        store = store.find("backingStore")
    return [path for path in paths if path]


def _address(element: etree._Element | None) -> str:
    """A PCI address as "0000:01:00.0", or ''."""
    if element is None or element.get("type") != "pci":
        return ""
    numbers = [int(element.get(name) or "0", 16) for name in ("domain", "bus", "slot", "function")]
    return "{:04x}:{:02x}:{:02x}.{:x}".format(*numbers)


def _agent(tree: etree._Element, *, active: bool) -> AgentChannel | None:
    """The agent's channel: libvirt's own if there is one, else another that looks like one.

    libvirt tells whether the guest's end is open for its own alone; the other's is open, for all
    that is known, while the domain runs.
    """
    other = None
    for channel in tree.findall("devices/channel"):
        target = channel.find("target")
        name = (target.get("name") or "") if target is not None else ""
        if target is None or channel.get("type") != "unix":
            continue
        if name == _OWN_CHANNEL:
            return AgentChannel(name, "", active and target.get("state") == "connected")
        source = channel.find("source")
        if (
            other is None
            and fnmatchcase(name, _OTHER_CHANNELS)
            and source is not None
            and source.get("mode") == "bind"
            and source.get("path")
        ):
            other = AgentChannel(name, source.get("path") or "", active)
    return other
