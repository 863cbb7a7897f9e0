"""The program that speaks with Ceph for the method rbd: a JSON object a line in, one a line out.

A process of its own, since librados has no call that is sure to return, and aborts where it finds
itself broken. It is started before a guest is frozen, and asked for one snapshot while it is. When
its standard input ends, so does it, soon after, in mid-call too; and when nobody has asked for a
while.

The first line is {"user", "conf", "options"}, with the key in the options. The answer is {}, or
{"error": errno}; of a rollback, lines {"done", "total"} come before it.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from snapd_vm.methods.rbd import rbdsaid
from snapd_vm.methods.rbd.librbd import (
    FEATURE_EXCLUSIVE_LOCK,
    FEATURE_LAYERING,
    Cluster,
    Failed,
    Image,
)

IDLE_S = 30.0
_END_S = 5.0
_OWNER_S = 5.0
NO_LIBRARY = -1
"""The errno for libraries that are not there."""

_Answer = dict[str, Any]


def _client(address: str) -> str:
    """What tells a client's address from others, whatever protocol is named before it."""
    return address.rpartition(":")[2] if "/" in address else address


def _create(opened: Image, name: str) -> bool:
    """Take a snapshot; whether there was one of that name already."""
    try:
        opened.create_snap(name)
    except Failed as error:
        if error.errno != errno.EEXIST:
            raise
        return True
    return False


class Session:
    """What can be asked of it, a method each; `image` is {"pool", "namespace", "name", "guarded"}.

    `guarded`: a guest may be running on the image, so that nobody's lock is broken.
    """

    def __init__(self, cluster: Cluster, say: Callable[[_Answer], None]) -> None:
        self._cluster = cluster
        self._say = say
        self._armed = ExitStack()
        self._image: Image | None = None

    @property
    def _is_armed(self) -> bool:
        """Whether an image is open for the next `create` or `rollback`."""
        return self._image is not None

    def _open(
        self, image: Mapping[str, str], *, write: bool = False
    ) -> AbstractContextManager[Image]:
        place = (image["pool"], image["namespace"], image["name"])
        if write and image.get("guarded"):
            self._wait_for_owner(place)
        return self._cluster.image(*place, write=write)

    def _wait_for_owner(self, place: tuple[str, str, str]) -> None:
        """Wait until the cluster has heard of who has the image locked, as after it was away.

        Whoever opens it to write would take the lock for a dead client's, and break it.
        """
        end = time.monotonic() + _OWNER_S
        with self._cluster.image(*place) as opened:
            if not opened.features & FEATURE_EXCLUSIVE_LOCK:
                return
            while True:
                living = {_client(address) for address in opened.watchers()}
                if {_client(address) for address in opened.lockers()} <= living:
                    return
                if time.monotonic() > end:
                    raise Failed(errno.EAGAIN, "")
                time.sleep(0.2)

    def info(self, image: Mapping[str, str], key: str = "") -> _Answer:
        """Size, what it can do, its snapshots, and what its metadata says under `key`."""
        with self._open(image) as opened:
            features = opened.features
            return {
                "id": opened.id,
                "data_pool": opened.data_pool,
                "size": opened.size,
                "layering": bool(features & FEATURE_LAYERING),
                "snaps": {snap.name: snap.id for snap in opened.snaps()},
                "said": opened.metadata(key) if key else "",
            }

    def head(self, image: Mapping[str, str], length: int) -> _Answer:
        """The image's first bytes."""
        with self._open(image) as opened:
            return {"data": base64.b64encode(opened.read(length)).decode()}

    def space(self, pool: str, data_pool: int = -1) -> _Answer:
        """Room in bytes, 0 where the cluster keeps no statistics; whether it takes no writes.

        `pool` is the image's own, and `data_pool` as info() tells it: its data may be in another.
        """
        dump = self._cluster.command(prefix="osd dump")
        numbers = {one["pool_name"]: one["pool"] for one in dump["pools"]}
        holds = numbers.get(pool) if data_pool < 0 else data_pool
        found = self._cluster.command(prefix="df")
        stats: _Answer = next((p["stats"] for p in found["pools"] if p["id"] == holds), {})
        available = int(stats.get("max_avail", 0))
        flags = set(dump.get("flags_set", []))
        for one in dump["pools"]:
            if one["pool"] in (holds, numbers.get(pool)):
                flags |= set(one.get("flags_names", "").split(","))
        full = {"full", "full_quota"} & flags
        return {
            "available": available,
            "total": available + int(stats.get("stored", 0)),
            "full": bool(full),
        }

    def arm(self, image: Mapping[str, str]) -> _Answer:
        """Open the image, for the next `create`."""
        self.disarm()
        self._image = self._armed.enter_context(self._open(image, write=True))
        return {}

    def create(self, name: str) -> _Answer:
        """Take the snapshot."""
        if self._image is None:
            raise Failed(errno.EINVAL, "")
        self._image.create_snap(name)
        return {}

    def disarm(self) -> _Answer:
        """Close the image."""
        self._image = None
        self._armed.close()
        return {}

    def keep(self, image: Mapping[str, str], name: str, key: str, said: _Answer) -> _Answer:
        """Protect a snapshot and say in the image's metadata what it is, with its number.

        `own` is false where that says the number of another.
        """
        with self._open(image, write=True) as opened:
            number = next((snap.id for snap in opened.snaps() if snap.name == name), None)
            if number is None:
                return {"own": False, "protected": False}
            before = opened.metadata(key)
            if not before:
                opened.put_metadata(key, json.dumps({**said, "snap": number}))
            elif rbdsaid.read(before).get("snap") != number:
                return {"own": False, "protected": False}
            protected = bool(opened.features & FEATURE_LAYERING)
            if protected:
                opened.protect(name, True)
            return {"own": True, "protected": protected}

    def users(self, image: Mapping[str, str], name: str) -> _Answer:
        """Its clones, and the addresses of all who have the image open."""
        with self._open(image) as opened:
            return {"watchers": opened.watchers(), "children": opened.children(name)}

    def remove(self, image: Mapping[str, str], name: str, key: str, fence: bool) -> _Answer:
        """Remove a snapshot and what the metadata says of it; whether it was there.

        `fence`: whoever has the image locked may still be at work on making it. The lock can't be
        taken, as a guest would get errors for its writes meanwhile. So another of that name is
        asked for: of the two the first one is made, and the second fails, whichever is which.
        """
        with self._open(image, write=True) as opened:
            there = any(snap.name == name for snap in opened.snaps())
            made = fence and not there and not _create(opened, name)
            there = there or (fence and not made)
            if there or made:
                if opened.features & FEATURE_LAYERING:
                    opened.protect(name, False)
                try:
                    opened.remove_snap(name)
                except Failed as error:
                    if error.errno != errno.ENOENT:  # gone in this moment
                        raise
            opened.remove_metadata(key)
            return {"there": there}

    def mark(self, image: Mapping[str, str], key: str, value: str) -> _Answer:
        """Say something in the image's metadata; '' for no more."""
        with self._open(image, write=True) as opened:
            if value:
                opened.put_metadata(key, value)
            else:
                opened.remove_metadata(key)
            return {}

    def lock(self, image: Mapping[str, str]) -> _Answer:
        """Open the image and keep everybody else from writing to it, until `disarm`."""
        self.arm(image)
        if self._image is not None and self._image.features & FEATURE_EXCLUSIVE_LOCK:
            try:
                self._image.lock()
            except Failed:  # or it would stay open, and nobody would close it
                self.disarm()
                raise
        return {}

    def rollback(self, name: str, key: str, begun: str, done: str) -> _Answer:
        """Let the image that is locked be what the snapshot is; its metadata says how far it is."""
        if self._image is None:
            raise Failed(errno.EINVAL, "")
        self._image.put_metadata(key, begun)
        self._image.rollback(name, lambda at, total: self._say({"done": at, "total": total}))
        self._image.put_metadata(key, done)
        return {}


_OPERATIONS = frozenset(name for name in vars(Session) if not name.startswith("_"))


def main() -> None:
    """Answer what is asked, until nobody asks any more."""
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    # librados writes to stderr now and then, and what it says there is for nobody.
    session: Session | None = None
    while True:
        # With an image open for a snapshot it is not idle: the other disks are being made ready.
        armed = session is not None and session._is_armed
        try:
            line = lines.get(timeout=None if armed else IDLE_S)
        except queue.Empty:
            line = ""
        if not line:
            break
        try:
            request = json.loads(line)
            if session is None:
                session = Session(Cluster(**request), _say)
                answer: _Answer = {}
            else:
                operation = request.pop("op")
                if operation not in _OPERATIONS:
                    raise Failed(errno.EINVAL, "")
                answer = getattr(session, operation)(**request)
        except Failed as error:
            answer = {"error": error.errno}
        except OSError:
            answer = {"error": NO_LIBRARY}
        _say(answer)
    if session is not None:
        session.disarm()
    os._exit(0)  # librados's threads need not be waited for


def _read(lines: queue.Queue[str]) -> None:
    """Hand on what is asked; at the end of it, end soon, whatever the main thread waits for."""
    for line in sys.stdin:
        lines.put(line)
    lines.put("")
    threading.Event().wait(_END_S)
    os._exit(1)


def _say(answer: _Answer) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
