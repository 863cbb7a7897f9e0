"""What QEMU's chardev is to an agent: a lasting connection, to which clients come one at a time."""

from __future__ import annotations

import select
import socket
import threading


class Chardev:
    """Passes bytes between clients of `path` and the agent that listens on `agent`.

    What the agent says while there is no client is kept for the next: the stale answers that a
    client has to expect. qemu-ga without it exits when a client leaves with an answer unread.
    """

    def __init__(self, path: str, agent: str) -> None:
        self._agent = socket.socket(socket.AF_UNIX)
        self._agent.connect(agent)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        self._stop, self._stopped = socket.socketpair()
        self._unread = b""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._stop.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        for one in (self._agent, self._listener, self._stopped):
            one.close()

    def _run(self) -> None:
        client: socket.socket | None = None
        while True:
            near = self._listener if client is None else client
            ready, _, _ = select.select([near, self._agent, self._stopped], [], [])
            if self._stopped in ready:
                break
            if self._agent in ready:
                self._unread += self._agent.recv(65536)
            if client is None:
                if near in ready:
                    client, _ = self._listener.accept()
            elif near in ready and not self._pass_on(client):
                client.close()
                client = None
            if client is not None and self._unread:
                try:
                    client.sendall(self._unread)
                except OSError:
                    continue  # the next one gets it
                self._unread = b""
        if client is not None:
            client.close()

    def _pass_on(self, client: socket.socket) -> bool:
        """From client to agent; False: the client has gone."""
        try:
            data = client.recv(65536)
        except OSError:
            return False
        self._agent.sendall(data)
        return bool(data)
