"""Methods of other services that we call: how one is written down, and how a call can fail."""

from __future__ import annotations

from dataclasses import dataclass

ANSWER_LIMIT_S = 25.0
"""How long another service may take to answer, as libdbus has it."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A method of another service, and the signatures of what it takes and gives."""

    destination: str
    path: str
    interface: str
    member: str
    takes: str
    gives: str


def _of_bus(member: str, takes: str, gives: str) -> Remote:
    name = "org.freedesktop.DBus"
    return Remote(name, "/org/freedesktop/DBus", name, member, takes, gives)


BUS = "org.freedesktop.DBus"
REQUEST_NAME = _of_bus("RequestName", "su", "u")
CONNECTION_USER = _of_bus("GetConnectionUnixUser", "s", "u")
ADD_MATCH = _of_bus("AddMatch", "s", "")
REMOVE_MATCH = _of_bus("RemoveMatch", "s", "")
GET_ID = _of_bus("GetId", "", "s")
LEAVING = (
    "type='signal',sender='org.freedesktop.DBus',path='/org/freedesktop/DBus',"
    "interface='org.freedesktop.DBus',member='NameOwnerChanged',arg2=''"
)


class ConnectionLost(Exception):
    """There is no connection to the bus, or no more; the message says why."""


class NameTaken(Exception):
    """Another process owns the name."""


class CallFailed(Exception):
    """A call of ours was answered by an error, or by something that does not belong there."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name
