"""Errors of D-Bus itself, beside those of snapd_vm.errors; raises nothing itself.

SnapdError
├── UnknownObject  UnknownInterface  UnknownMethod  UnknownProperty  PropertyReadOnly
└── LimitsExceeded  FileNotFound
"""

from __future__ import annotations

from snapd_vm.errors import SnapdError

STANDARD = "org.freedesktop.DBus.Error."


class UnknownObject(SnapdError):
    """There is no object at that path."""

    dbus_name = STANDARD + "UnknownObject"


class UnknownInterface(SnapdError):
    """The object has no such interface."""

    dbus_name = STANDARD + "UnknownInterface"


class UnknownMethod(SnapdError):
    """The interface has no such method."""

    dbus_name = STANDARD + "UnknownMethod"


class UnknownProperty(SnapdError):
    """The interface has no such property."""

    dbus_name = STANDARD + "UnknownProperty"


class PropertyReadOnly(SnapdError):
    """No property can be set."""

    dbus_name = STANDARD + "PropertyReadOnly"


class LimitsExceeded(SnapdError):
    """Too many calls are in progress."""

    dbus_name = STANDARD + "LimitsExceeded"


class FileNotFound(SnapdError):
    """This machine has no machine id."""

    dbus_name = STANDARD + "FileNotFound"
