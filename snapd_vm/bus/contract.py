"""The contract, read from data/org.example.DiskSnapshot.xml, and introspection made from it.

The interfaces are served as they stand in the file, documentation and names of arguments included;
the standard ones are added here. Knows nothing of objects and how they answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lxml import etree

FILE = "org.example.DiskSnapshot.xml"

DISK_SNAPSHOT = "org.example.DiskSnapshot"
MANAGER = DISK_SNAPSHOT + ".Manager"
DOMAIN = DISK_SNAPSHOT + ".Domain"
SNAPSHOT = DISK_SNAPSHOT + ".Snapshot"
JOB = DISK_SNAPSHOT + ".Job"
BUS_NAME = DISK_SNAPSHOT

PROPERTIES = "org.freedesktop.DBus.Properties"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
PEER = "org.freedesktop.DBus.Peer"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"

DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)

STANDARD = f"""
<node>
  <interface name="{PROPERTIES}">
    <method name="Get">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
    </method>
    <method name="GetAll">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="properties" type="a{{sv}}" direction="out"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface_name" type="s"/>
      <arg name="changed_properties" type="a{{sv}}"/>
      <arg name="invalidated_properties" type="as"/>
    </signal>
  </interface>
  <interface name="{INTROSPECTABLE}">
    <method name="Introspect">
      <arg name="xml_data" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="{PEER}">
    <method name="Ping"/>
    <method name="GetMachineId">
      <arg name="machine_uuid" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="{OBJECT_MANAGER}">
    <method name="GetManagedObjects">
      <arg name="objects" type="a{{oa{{sa{{sv}}}}}}" direction="out"/>
    </method>
    <signal name="InterfacesAdded">
      <arg name="object_path" type="o"/>
      <arg name="interfaces" type="a{{sa{{sv}}}}"/>
    </signal>
    <signal name="InterfacesRemoved">
      <arg name="object_path" type="o"/>
      <arg name="interfaces" type="as"/>
    </signal>
  </interface>
</node>
"""


@dataclass(frozen=True, slots=True)
class MethodSignature:
    """The D-Bus signatures of a method's arguments."""

    takes: str
    gives: str


@dataclass(frozen=True, slots=True)
class Property:
    """A property's type, and whether PropertiesChanged tells of it."""

    signature: str
    constant: bool


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface of the contract; `xml` is its element as the file has it."""

    name: str
    methods: Mapping[str, MethodSignature]
    properties: Mapping[str, Property]
    signals: Mapping[str, str]
    xml: str


@dataclass(frozen=True, slots=True)
class Contract:
    """What is served: the interfaces of the file, and the standard ones, by name."""

    own: Mapping[str, Interface]
    standard: Mapping[str, Interface]

    def interface(self, name: str) -> Interface:
        """The interface of this name, ours or a standard one. Raises KeyError."""
        return self.own[name] if name in self.own else self.standard[name]

    def introspect(self, interfaces: Iterable[str], children: Iterable[str]) -> str:
        """The introspection of an object with these interfaces and child nodes."""
        parts = [DOCTYPE, "<node>\n"]
        parts += [f"  {self.interface(name).xml}\n" for name in interfaces]
        parts += [f'  <node name="{child}"/>\n' for child in children]
        return "".join([*parts, "</node>\n"])


def load_contract() -> Contract:
    """Reads the contract that the package brings along."""
    text = (Path(__file__).parent.parent / "data" / FILE).read_bytes()
    return Contract(own=read_interfaces(text), standard=read_interfaces(STANDARD.encode()))


def read_interfaces(text: bytes) -> Mapping[str, Interface]:
    """The interfaces of an introspection document, in the order of the document."""
    parser = etree.XMLParser(resolve_entities=False, load_dtd=False, no_network=True)
    return {
        element.get("name", ""): _read_interface(element)
        for element in etree.fromstring(text, parser).iterchildren("interface")
    }


def _read_interface(element: etree._Element) -> Interface:
    return Interface(
        name=element.get("name", ""),
        methods={
            method.get("name", ""): MethodSignature(
                takes=_signature(method, "in"), gives=_signature(method, "out")
            )
            for method in element.iterchildren("method")
        },
        properties={
            child.get("name", ""): Property(child.get("type", ""), _is_constant(child))
            for child in element.iterchildren("property")
        },
        signals={
            signal.get("name", ""): "".join(
                arg.get("type", "") for arg in signal.iterchildren("arg")
            )
            for signal in element.iterchildren("signal")
        },
        xml=etree.tostring(element, encoding="unicode", with_tail=False),
    )


def _signature(method: etree._Element, direction: str) -> str:
    return "".join(
        arg.get("type", "")
        for arg in method.iterchildren("arg")
        if arg.get("direction", "in") == direction
    )


def _is_constant(element: etree._Element) -> bool:
    return any(
        note.get("name") == "org.freedesktop.DBus.Property.EmitsChangedSignal"
        and note.get("value") == "const"
        for note in element.iterchildren("annotation")
    )
