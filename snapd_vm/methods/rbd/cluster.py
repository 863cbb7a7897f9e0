"""Ceph clusters as the method rbd asks them: each by processes of its own, with an end to waiting.

A process (rbdworker.py) is kept for a while after it was asked, as a connection takes a quarter of
a second; it ends by itself. Errors become SnapdErrors, which name neither hosts nor users.
"""

from __future__ import annotations

import errno
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from snapd_vm import command
from snapd_vm.errors import (
    Busy,
    MethodNotSupported,
    NameInUse,
    NoSpace,
    SnapdError,
    StorageFailed,
    TimedOut,
)
from snapd_vm.methods.method import Watch
from snapd_vm.methods.rbd.rbdtarget import Access

log = logging.getLogger(__name__)

_CONNECT_S = 10
_CALL_S = 15
_MARGIN_S = 5
_IDLE_S = 20.0
"""Less than rbdworker.IDLE_S, at which it ends by itself."""
_MOST_IDLE = 2
_AWAY_S = 20.0
_MISSING_S = 5.0
"""For so long libraries that were not there are not looked for: it takes a program."""
_START = "import sys; sys.path.insert(0, sys.argv[1]); from snapd_vm.methods.rbd import "
_TALK = "rbdworker; rbdworker.main()"
_LOOK = "librbd; librbd.load()"
NO_LIBRARY = -1

GONE = "The Ceph cluster of the disk did not answer in time; look at its state with 'ceph -s'."
_NO_WAY = (
    "The Ceph cluster of the disk can't be found: its configuration file, its monitors or the "
    "user's key are not on this host; see 'ceph.conf' and the disk's XML."
)
# librados goes on trying, whichever it is.
SHUT = (
    f"The Ceph cluster of the disk has let nobody in for {_CONNECT_S} s: it does not answer, or "
    "does not know the disk's user with the key in the libvirt secret; look at 'ceph -s' and "
    "'ceph auth'."
)

MISSING = (
    "Method rbd needs librados.so.2 and librbd.so.1; install the packages librados2 and librbd1."
)


class Secrets(Protocol):
    """What is needed of the hypervisor here; blocking, raises SnapdErrors."""

    def secret(self, uuid: str, usage: str) -> str: ...


class NotThere(StorageFailed):
    """The pool, the image or the snapshot is not there."""

    dbus_name = StorageFailed.dbus_name


class Lost(TimedOut):
    """There was no answer in time, and whether it was done is not known."""

    dbus_name = TimedOut.dbus_name


class Session:
    """A connection to a cluster, for one thread at a time."""

    def __init__(self, talk: command.Conversation) -> None:
        self._talk: command.Conversation | None = talk
        self.used = time.monotonic()

    def ask(
        self,
        operation: str,
        *,
        limit: float = _CALL_S + _MARGIN_S,
        watch: Watch | None = None,
        **words: Any,
    ) -> Mapping[str, Any]:
        """The answer to what rbdworker.Session can be asked; raises SnapdErrors.

        `limit` is in seconds, of a rollback for each step of it, which `watch` is told of.
        """
        return self._ask({"op": operation, **words}, limit, watch)

    def connect(self, first: Mapping[str, Any]) -> None:
        """Say what has to be said first."""
        try:
            self._ask(first, _CONNECT_S + _MARGIN_S, None)
        except NotThere:  # which of an image would mean that it is gone
            raise StorageFailed(_NO_WAY) from None

    def _ask(
        self, request: Mapping[str, Any], limit: float, watch: Watch | None
    ) -> Mapping[str, Any]:
        if self._talk is None:
            raise Lost(GONE)
        try:
            self._talk.say(json.dumps(request))
            while True:
                answer: dict[str, Any] = json.loads(self._talk.hear(limit))
                if "total" not in answer or "done" not in answer:
                    break
                if watch is not None:
                    watch.progress(answer["done"], answer["total"])
        except (command.CommandError, ValueError) as error:
            self.kill()
            log.warning("a connection to a Ceph cluster was given up: %s", error)
            raise Lost(GONE) from None
        self.used = time.monotonic()
        if "error" in answer:
            raise _error(answer["error"])
        return answer

    @property
    def usable(self) -> bool:
        """Whether it can be asked again."""
        return self._talk is not None and time.monotonic() - self.used < _IDLE_S

    def kill(self) -> None:
        """End its process at once."""
        if self._talk is not None:
            self._talk.kill()
        self._talk = None

    def close(self) -> None:
        """Let its process end."""
        if self._talk is not None:
            self._talk.close()
        self._talk = None


class Clusters:
    """Sessions with all the clusters there are; safe to use from any thread."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._lock = threading.Lock()
        self._idle: dict[Access, list[Session]] = {}
        self._away: dict[Access, float] = {}
        self._looking = threading.Lock()
        self._look_again = 0.0
        self._there = False

    def missing(self) -> str:
        """What of librados and librbd is not installed, as a sentence, or ''; no cluster is asked.

        They are not loaded here, as they would stay; once there, they are not looked for again.
        """
        with self._looking:
            if not self._there and time.monotonic() >= self._look_again:
                try:
                    command.run(_program(_LOOK), timeout=_CALL_S)
                    self._there = True
                except command.CommandError as error:
                    log.debug("librados and librbd can't be loaded: %s", error)
                    self._look_again = time.monotonic() + _MISSING_S
            return "" if self._there else MISSING

    @contextmanager
    def session(self, access: Access, *, patient: bool = True) -> Iterator[Session]:
        """A session that nobody else uses meanwhile.

        With `patient` false, a cluster that has just not answered is not asked again so soon.
        """
        session = self.take(access, patient=patient)
        try:
            yield session
        finally:
            self.give_back(access, session)

    def take(self, access: Access, *, patient: bool = True) -> Session:
        """The same, until it is given back."""
        with self._lock:
            if not patient and time.monotonic() < self._away.get(access, 0.0):
                raise Lost(GONE)
            idle = self._idle.pop(access, [])
            found = next((one for one in idle if one.usable), None)
            self._idle[access] = [one for one in idle if one is not found and one.usable]
            old = [one for one in idle if one is not found and not one.usable]
        for one in old:
            one.close()
        if found is not None:
            return found
        try:
            return self._begin(access)
        except Lost:
            with self._lock:
                self._away[access] = time.monotonic() + _AWAY_S
            raise

    def give_back(self, access: Access, session: Session) -> None:
        """Keep it for the next one."""
        with self._lock:
            if not session.usable:
                self._away[access] = time.monotonic() + _AWAY_S
            else:
                self._away.pop(access, None)
                idle = self._idle.setdefault(access, [])
                if len(idle) < _MOST_IDLE:
                    idle.append(session)
                    return
        session.close()

    def _begin(self, access: Access) -> Session:
        options = {
            # What is asked of librados has an end as far as it keeps to these.
            "client_mount_timeout": str(_CONNECT_S),
            "rados_mon_op_timeout": str(_CALL_S),
            "rados_osd_op_timeout": str(_CALL_S),
            "log_to_stderr": "false",
            "err_to_stderr": "false",
            "log_file": "",
            "admin_socket": "",
        }
        if access.hosts:
            options["mon_host"] = ",".join(access.hosts)
        if access.secret or access.usage:
            options["key"] = self._secrets.secret(access.secret, access.usage)
            options["auth_client_required"] = "cephx,none"  # as QEMU is told by libvirt
        try:
            talk = command.Conversation(_program(_TALK))
        except command.CommandError as error:
            raise StorageFailed(f"The connection to Ceph could not be made: {error}.") from error
        session = Session(talk)
        try:
            session.connect({"user": access.user, "conf": access.conf, "options": options})
        except Lost:
            session.kill()
            raise Lost(SHUT) from None
        except BaseException:
            session.kill()
            raise
        return session


def _program(what: str) -> list[str]:
    """This Python, with nothing but its standard library and ours."""
    return [sys.executable, "-I", "-S", "-c", _START + what, str(Path(__file__).parents[3])]


def _error(number: int) -> SnapdError:
    """What an errno of librados or librbd means; GONE where it had waited for too long."""
    match number:
        case errno.ETIMEDOUT:
            return Lost(GONE)
        case errno.ENOENT:
            return NotThere("Ceph has no such pool, image or snapshot any more.")
        case errno.EEXIST:
            return NameInUse("The image has a snapshot of that name already; remove it.")
        case errno.ENOSPC | errno.EDQUOT:
            return NoSpace("The Ceph cluster, or the image's pool, is full; make room first.")
        case errno.EBUSY:
            return Busy("Ceph says that the image or its snapshot is in use; try again later.")
        case errno.EAGAIN:
            return Busy(
                "The cluster has not heard of the client that has the image locked; try again when "
                "the domain writes again, or see 'rbd lock ls' if that client has crashed."
            )
        case errno.EROFS:
            return Busy(
                "The client that has the image locked does not let go of it, or the cluster can't "
                "be asked; see 'rbd lock ls' and 'ceph -s'."
            )
        case errno.EPERM | errno.EACCES:
            return StorageFailed(
                "Ceph refuses the user or key of the disk, or what was to be done with its image; "
                "give the user the capabilities 'profile rbd' for monitors and for the pool."
            )
        case errno.EOPNOTSUPP | errno.ENOSYS | errno.EINVAL:
            return MethodNotSupported("Ceph can't do that with this image.")
        case errno.ESHUTDOWN:
            return StorageFailed("The cluster has shut this host out (blocklist); see 'ceph osd'.")
        case _ if number == NO_LIBRARY:
            return MethodNotSupported(MISSING)
        case _:
            return StorageFailed(
                f"Ceph reports error {number} ({errno.errorcode.get(number, '?')})."
            )
