"""librados and librbd as the program rbdworker.py needs them; knows no snapshot of ours.

By ctypes, as the two libraries are there wherever QEMU reads RBD images, for whichever Python runs;
signatures are those of <rados/librados.h> and <rbd/librbd.h>. A call blocks for as long as the
cluster is away, whatever limits are set here: the process that makes it must be one to be killed.
"""

from __future__ import annotations

import ctypes
import errno
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

FEATURE_LAYERING = 1 << 0
FEATURE_EXCLUSIVE_LOCK = 1 << 2
_SKIP_QUIESCE = 1 << 0  # RBD_SNAP_CREATE_SKIP_QUIESCE: the guest is frozen by us
_LOCK_EXCLUSIVE = 0
_NAMESPACE_USER = 0

_NEVER_BLOCKLIST = {
    "rbd_blocklist_on_break_lock": "false",
    "rbd_blacklist_on_break_lock": "false",  # before Ceph 16
}
"""Or librbd shuts a guest's QEMU out for good, when the cluster was away and somebody else is there
before it has heard of that QEMU again."""

Progress = Callable[[int, int], None]
_ProgressFn = ctypes.CFUNCTYPE(c_int, c_uint64, c_uint64, c_void_p)


class Failed(OSError):
    """A call failed; `errno` says how."""


class _SnapInfo(ctypes.Structure):
    _fields_ = (("id", c_uint64), ("size", c_uint64), ("name", c_char_p))


class _LinkedImage(ctypes.Structure):
    _fields_ = (
        ("pool_id", c_int64),
        ("pool_name", c_char_p),
        ("pool_namespace", c_char_p),
        ("image_id", c_char_p),
        ("image_name", c_char_p),
        ("trash", ctypes.c_bool),
    )


class _Watcher(ctypes.Structure):
    _fields_ = (("addr", c_char_p), ("id", c_int64), ("cookie", c_uint64))


@dataclass(frozen=True)
class Snap:
    """A snapshot of an image, as users make them."""

    id: int
    name: str
    size: int


def load() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """librados and librbd. Raises OSError where they are missing."""
    return ctypes.CDLL("librados.so.2"), ctypes.CDLL("librbd.so.1")


def _check(status: int) -> int:
    if status < 0:
        raise Failed(-status, "")
    return status


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


class Cluster:
    """A connection to a cluster; raises Failed, and OSError where the libraries are missing."""

    def __init__(self, user: str, conf: str, options: dict[str, str]) -> None:
        """As QEMU does it (rbd in qemu-block-drivers(7)): `conf`, if given, must be there; else the
        usual places are looked in. `options` go before what it says.
        """
        self._rados, self.rbd = load()
        self._handle = c_void_p()
        name = f"client.{user or 'admin'}".encode()
        _check(self._rados.rados_create2(byref(self._handle), b"ceph", name, c_uint64(0)))
        path = conf.encode() if conf else None
        found = self._rados.rados_conf_read_file(self._handle, path)
        if found < 0 and conf:
            raise Failed(-found, "")
        for key, value in {**options, **_NEVER_BLOCKLIST}.items():
            status = self._rados.rados_conf_set(self._handle, key.encode(), value.encode())
            if key not in _NEVER_BLOCKLIST:  # which has another name in other versions
                _check(status)
        _check(self._rados.rados_connect(self._handle))

    @contextmanager
    def image(
        self, pool: str, namespace: str, name: str, *, write: bool = False
    ) -> Iterator[Image]:
        """An image, open as long as the block lasts; one not for writing is not watched."""
        context = c_void_p()
        _check(self._rados.rados_ioctx_create(self._handle, pool.encode(), byref(context)))
        try:
            if namespace:
                self._rados.rados_ioctx_set_namespace(context, namespace.encode())
            image = c_void_p()
            opened = self.rbd.rbd_open if write else self.rbd.rbd_open_read_only
            _check(opened(context, name.encode(), byref(image), None))
            try:
                yield Image(self.rbd, image)
            finally:
                self.rbd.rbd_close(image)
        finally:
            self._rados.rados_ioctx_destroy(context)

    def command(self, **words: str) -> Any:
        """What the monitors answer to a command, as JSON."""
        text = json.dumps({**words, "format": "json"}).encode()
        argv = (c_char_p * 1)(text)
        out, out_length = c_void_p(), c_size_t()
        said, said_length = c_void_p(), c_size_t()
        status = self._rados.rados_mon_command(
            self._handle,
            argv,
            c_size_t(1),
            None,
            c_size_t(0),
            byref(out),
            byref(out_length),
            byref(said),
            byref(said_length),
        )
        try:
            _check(status)
            return json.loads(ctypes.string_at(out, out_length.value) if out else b"null")
        finally:
            for buffer in (out, said):
                if buffer:
                    self._rados.rados_buffer_free(buffer)


class Image:
    """An open image."""

    def __init__(self, library: ctypes.CDLL, handle: c_void_p) -> None:
        self._rbd = library
        self._image = handle

    @property
    def size(self) -> int:
        """In bytes."""
        found = c_uint64()
        _check(self._rbd.rbd_get_size(self._image, byref(found)))
        return found.value

    @property
    def features(self) -> int:
        """RBD_FEATURE_…, added up."""
        found = c_uint64()
        _check(self._rbd.rbd_get_features(self._image, byref(found)))
        return found.value

    @property
    def id(self) -> str:
        """What it is called inside the cluster, whatever its name."""
        found = ctypes.create_string_buffer(1024)
        _check(self._rbd.rbd_get_id(self._image, found, c_size_t(len(found))))
        return _text(found.value)

    @property
    def data_pool(self) -> int:
        """The number of the pool that its data are in, -1 where that is the image's own."""
        self._rbd.rbd_get_data_pool_id.restype = c_int64
        return int(self._rbd.rbd_get_data_pool_id(self._image))

    def read(self, length: int) -> bytes:
        """Its beginning."""
        buffer = ctypes.create_string_buffer(length)
        self._rbd.rbd_read.restype = ctypes.c_ssize_t
        count = self._rbd.rbd_read(self._image, c_uint64(0), c_size_t(length), buffer)
        return buffer.raw[: _check(count)]

    def snaps(self) -> Sequence[Snap]:
        """The snapshots that users made; not those of groups, mirrors or the trash."""
        count = c_int(64)
        while True:
            array = (_SnapInfo * count.value)()
            found = self._rbd.rbd_snap_list(self._image, array, byref(count))
            if found != -errno.ERANGE:
                break
        _check(found)
        snaps = [Snap(one.id, _text(one.name), one.size) for one in array[:found]]
        if found:
            self._rbd.rbd_snap_list_end(array)
        return [snap for snap in snaps if self._of_user(snap)]

    def _of_user(self, snap: Snap) -> bool:
        kind = c_int()
        _check(self._rbd.rbd_snap_get_namespace_type(self._image, c_uint64(snap.id), byref(kind)))
        return kind.value == _NAMESPACE_USER

    def create_snap(self, name: str) -> None:
        """Take a snapshot; whoever has the exclusive lock is asked to do it."""
        _check(
            self._rbd.rbd_snap_create2(
                self._image, name.encode(), c_uint32(_SKIP_QUIESCE), _ProgressFn(_nobody), None
            )
        )

    def remove_snap(self, name: str) -> None:
        """Remove one that is not protected."""
        _check(self._rbd.rbd_snap_remove(self._image, name.encode()))

    def is_protected(self, name: str) -> bool:
        """Whether `rbd snap rm` and `rbd snap purge` leave it alone."""
        found = c_int()
        _check(self._rbd.rbd_snap_is_protected(self._image, name.encode(), byref(found)))
        return bool(found.value)

    def protect(self, name: str, on: bool) -> None:
        """Protect it or not; the image needs FEATURE_LAYERING."""
        if self.is_protected(name) != on:
            call = self._rbd.rbd_snap_protect if on else self._rbd.rbd_snap_unprotect
            _check(call(self._image, name.encode()))

    def rollback(self, name: str, progress: Progress) -> None:
        """Copy a snapshot's contents over the image's; every snapshot stays as it is."""

        def told(done: int, total: int, _data: int | None) -> int:
            progress(done, total)
            return 0

        callback = _ProgressFn(told)
        _check(
            self._rbd.rbd_snap_rollback_with_progress(self._image, name.encode(), callback, None)
        )

    def children(self, name: str) -> Sequence[str]:
        """The clones of a snapshot, as pool/image."""
        _check(self._rbd.rbd_snap_set(self._image, name.encode()))
        count = c_size_t(64)
        while True:
            array = (_LinkedImage * count.value)()
            found = self._rbd.rbd_list_children3(self._image, array, byref(count))
            if found != -errno.ERANGE:
                break
        _check(found)
        names = []
        for one in array[: count.value]:
            place = (_text(one.pool_name), _text(one.pool_namespace), _text(one.image_name))
            names.append("/".join(part for part in place if part))
        self._rbd.rbd_linked_image_spec_list_cleanup(array, count)
        return names

    def watchers(self) -> Sequence[str]:
        """The addresses of who has the image open for writing, or at a snapshot as QEMU does."""
        count = c_size_t(64)
        while True:
            array = (_Watcher * count.value)()
            found = self._rbd.rbd_watchers_list(self._image, array, byref(count))
            if found != -errno.ERANGE:
                break
        _check(found)
        addresses = [_text(one.addr) for one in array[: count.value]]
        self._rbd.rbd_watchers_list_cleanup(array, count)
        return addresses

    def lockers(self) -> Sequence[str]:
        """The addresses of who has the exclusive lock, whether they live or not."""
        kinds = [(ctypes.create_string_buffer(4096), c_size_t(4096)) for _ in range(4)]
        arguments = [one for buffer, length in kinds for one in (buffer, byref(length))]
        _check(self._rbd.rbd_list_lockers(self._image, byref(c_int()), *arguments))
        addresses, length = kinds[-1]
        found = addresses.raw[: length.value].split(b"\0")
        return [_text(address) for address in found if address]

    def lock(self) -> None:
        """Take the exclusive lock from who has it, when they have ended what they were asked to do,
        and give it to nobody until the image is closed.
        """
        _check(self._rbd.rbd_lock_acquire(self._image, c_int(_LOCK_EXCLUSIVE)))

    def put_metadata(self, key: str, value: str) -> None:
        """Keep a value with the image."""
        _check(self._rbd.rbd_metadata_set(self._image, key.encode(), value.encode()))

    def remove_metadata(self, key: str) -> None:
        """Forget it, if it is there."""
        found = self._rbd.rbd_metadata_remove(self._image, key.encode())
        if found != -errno.ENOENT:
            _check(found)

    def metadata(self, key: str) -> str:
        """The value, or ''."""
        length = c_size_t(4096)
        value = ctypes.create_string_buffer(length.value)
        found = self._rbd.rbd_metadata_get(self._image, key.encode(), value, byref(length))
        if found == -errno.ENOENT:
            return ""
        _check(found)
        return _text(value.value)


def _nobody(_done: int, _total: int, _data: int | None) -> int:
    return 0
