"""The standard interfaces: Properties, Introspectable, Peer and ObjectManager. All open to all.

Answers from memory alone. No property can be set.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from snapd_vm.bus.calls import Declared, open_to_all
from snapd_vm.bus.contract import INTROSPECTABLE, OBJECT_MANAGER, PEER, PROPERTIES
from snapd_vm.bus.refusals import (
    FileNotFound,
    PropertyReadOnly,
    UnknownInterface,
    UnknownProperty,
)
from snapd_vm.bus.tree import INTERFACES, Node, Root, Tree
from snapd_vm.bus.wire import Typed

MACHINE_ID_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))


def _properties(tree: Tree, node: Node, interface: str) -> dict[str, Typed]:
    """Of one interface; of all for an empty name, which the specification allows."""
    if not interface:
        return {
            name: value
            for values in tree.all_properties(node).values()
            for name, value in values.items()
        }
    if interface in INTERFACES[type(node)]:
        return tree.properties(node, interface)
    if interface in tree.interfaces(node):
        return {}
    raise UnknownInterface("This object has no such interface; introspect it to see those it has.")


@open_to_all(object, PROPERTIES, "Get")
def get(tree: Tree, node: Node, interface: str, name: str) -> Sequence[object]:
    """One property."""
    try:
        return (_properties(tree, node, interface)[name],)
    except KeyError:
        raise UnknownProperty(
            "This interface has no such property; introspect the object to see those it has."
        ) from None


@open_to_all(object, PROPERTIES, "Set")
def set_property(tree: Tree, node: Node, interface: str, name: str) -> Sequence[object]:
    """Never sets anything; the value was not even read."""
    get.answer(tree, node, interface, name)
    raise PropertyReadOnly("No property of this service can be set.")


@open_to_all(object, PROPERTIES, "GetAll")
def get_all(tree: Tree, node: Node, interface: str) -> Sequence[object]:
    """All properties of an interface."""
    return (_properties(tree, node, interface),)


@open_to_all(object, INTROSPECTABLE, "Introspect")
def introspect(tree: Tree, node: Node) -> Sequence[object]:
    """The contract of the object, as the file has it."""
    return (tree.contract.introspect(tree.interfaces(node), tree.children(node)),)


@open_to_all(object, PEER, "Ping")
def ping(tree: Tree, node: Node | None) -> Sequence[object]:
    """Here."""
    return ()


@open_to_all(object, PEER, "GetMachineId")
def get_machine_id(tree: Tree, node: Node | None) -> Sequence[object]:
    """The id of this machine."""
    return (machine_id(),)


@open_to_all(Root, OBJECT_MANAGER, "GetManagedObjects")
def get_managed_objects(tree: Tree, node: Root) -> Sequence[object]:
    """Every object below the root with all its properties."""
    return (tree.managed_objects(),)


@cache
def machine_id() -> str:
    """The machine id, as machine-id(5) says. Raises FileNotFound."""
    for path in MACHINE_ID_FILES:
        try:
            if text := path.read_text(encoding="ascii").strip():
                return text
        except (OSError, ValueError):
            continue
    raise FileNotFound(
        "This machine has no /etc/machine-id; make one with 'dbus-uuidgen --ensure'."
    )


STANDARD_METHODS: tuple[Declared, ...] = (
    get,
    set_property,
    get_all,
    introspect,
    ping,
    get_machine_id,
    get_managed_objects,
)
