"""Who is calling: the user behind a unique name on the bus, as the bus itself says."""

from __future__ import annotations

from snapd_vm.bus.connection import Connection
from snapd_vm.bus.remote import ANSWER_LIMIT_S, CONNECTION_USER, CallFailed, ConnectionLost
from snapd_vm.errors import NotAuthorized


async def user_of(connection: Connection, sender: str, limit: float = ANSWER_LIMIT_S) -> int:
    """The uid of the sender of a call (GetConnectionUnixUser), within `limit` seconds.

    The bus uses a unique name once only, so it is that sender's and nobody else's. Raises
    NotAuthorized where the bus does not say, as it does not of somebody who has left.
    """
    try:
        (uid,) = await connection.call(CONNECTION_USER, [sender], limit)
    except (CallFailed, TimeoutError, ConnectionLost) as error:
        raise NotAuthorized("The bus does not say who is calling; call again.") from error
    return int(uid)
