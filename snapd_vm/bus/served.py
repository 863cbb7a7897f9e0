"""The whole surface in one: connect, serve an engine, take the name, and leave in good order.

Only ties the parts together.
"""

from __future__ import annotations

from snapd_vm.bus.connection import Connection, open_connection
from snapd_vm.bus.contract import BUS_NAME, load_contract
from snapd_vm.bus.guard import Guard
from snapd_vm.bus.objects import METHODS
from snapd_vm.bus.polkit import Authority, Polkit
from snapd_vm.bus.publish import Publisher
from snapd_vm.bus.remote import ANSWER_LIMIT_S, ConnectionLost
from snapd_vm.bus.standard import STANDARD_METHODS
from snapd_vm.bus.tree import Tree
from snapd_vm.engine.service import Service


class DiskSnapshotBus:
    """org.example.DiskSnapshot on the system bus.

    Use: `connect`, `serve`, `take_name`; then wait for `lost`; `close` at the end.
    """

    def __init__(self, authority: Authority | None = None) -> None:
        """`authority` decides instead of polkit."""
        self._authority = authority
        self._connection: Connection | None = None
        self._guard: Guard | None = None

    async def connect(self, limit: float = ANSWER_LIMIT_S) -> None:
        """Connects, within `limit` seconds. Raises ConnectionLost."""
        self._connection = await open_connection(limit)

    def serve(self, service: Service, version: str) -> None:
        """Answers calls and sends signals for this engine from now on.

        Raises ValueError if methods and properties are not those of the contract.
        """
        connection = self._connected()
        tree = Tree(load_contract(), service, version)
        authority = self._authority or Polkit(connection)
        self._guard = Guard(connection, tree, authority, (*METHODS, *STANDARD_METHODS))
        connection.on_call = self._guard.take
        connection.on_leave = self._guard.left
        service.subscribe(Publisher(connection, tree))

    async def take_name(self) -> None:
        """Takes the name org.example.DiskSnapshot. Raises NameTaken, CallFailed, ConnectionLost."""
        await self._connected().take_name(BUS_NAME)

    async def lost(self) -> str:
        """Waits until the connection is gone, and says why."""
        return await self._connected().lost()

    async def close(self, limit: float) -> None:
        """Takes no more calls, waits `limit` seconds for those in progress, and disconnects."""
        if self._guard is not None:
            await self._guard.close(limit)
        if self._connection is not None:
            await self._connection.close()

    def _connected(self) -> Connection:
        if self._connection is None:
            raise ConnectionLost("connect() has not been called")
        return self._connection
