"""Real storages with a guest on each, as the conformance suite asks them; one class a method.

A further method is one more class that fits `Storage`, and a line in STORAGES. Nothing here takes
for granted that a guest boots fast: there is one for all tests of a storage.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.lab.blockdev import Mounted
from tests.lab.ceph import POOL
from tests.lab.deadline import wait_until
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import CHECKOUT, run
from tests.lab.volumegroup import Group
from tests.lab.zpool import Pool, make_pool
from tests.real import images
from tests.real.api import Created
from tests.real.arrays import Array, Plugin
from tests.real.places import file_of, image

# Under TCG an lvcreate, which waits for udev, takes seconds, and so does a guest's agent.
IN_A_VM = {"agent_timeout_s": 60, "freeze_timeout_s": 60, "frozen_limit_s": 60}


class Storage(Protocol):
    """A storage, and a running guest whose disk `vda`, in ext4, is on it.

    `method` takes that disk by default; `format` is that of the backup source. `config` is what the
    daemon is to be told for it. `snapshot_s` bounds a Create from its call to its answer, in
    seconds: a guest inside a host's VM is slow. One whose method is no default has `xml` to ask for
    it, and `env` is the environment that its daemon needs; see `xml_of` and `env_of`,
    `unfrozen_of` and `takes_back_only_newest`.
    """

    method: str
    format: str
    config: Mapping[str, Any]
    guest: Guest
    snapshot_s: float

    def contents(self) -> Collection[str]:
        """All on the storage that a snapshot, whole or half made, could be or leave."""

    def raw(self, created: Created, to: Path) -> Path:
        """The immutable view as a raw file at `to`, read as a backup program would."""

    def present(self, to: Path) -> Path:
        """What the disk of the guest, which is off, holds now, as a raw file at `to`."""

    def foreign(self) -> AbstractContextManager[None]:
        """Somebody else's snapshot of the disk, as much like ours as it can be.

        Asserts at its end that it is still there, and as it was.
        """

    def in_the_way(self, operation: str, label: str) -> AbstractContextManager[None]:
        """Something that has the name which this operation's snapshot, called so, is to have.

        The operation is written down, and nothing of it made that has a name.

        Asserts at its end that it is as it was.
        """

    def full(self) -> AbstractContextManager[None]:
        """No room for a snapshot."""

    def crippled(self) -> Mapping[str, str] | None:
        """The environment of a daemon without the tool or library that the method needs; None:
        it needs none.
        """


def xml_of(storage: Storage) -> str:
    """The XML that asks for the method, where it is not the default; else ''."""
    return str(getattr(storage, "xml", ""))


def takes_back_only_newest(storage: Storage) -> bool:
    """Whether a revert is refused where there are newer snapshots."""
    return bool(getattr(storage, "only_newest", False))


def unfrozen_of(storage: Storage) -> str:
    """The consistency of a snapshot of a running guest that is not frozen."""
    return str(getattr(storage, "unfrozen", "crash"))


def env_of(storage: Storage) -> Mapping[str, str]:
    """What the environment of its daemon has besides."""
    found: Mapping[str, str] = getattr(storage, "env", {})
    return found


class OnHost:
    """One of which disk and backup source are files or devices of the host, the disk a raw one."""

    guest: Guest
    _disk_format = "raw"

    def raw(self, created: Created, to: Path) -> Path:
        return images.raw_copy(created.file, created.ours("format"), to)

    def present(self, to: Path) -> Path:
        return images.raw_copy(file_of(self.guest), self._disk_format, to)


class Copies(OnHost):
    """A method from outside, which has to be asked for, and copies raw files into a folder."""

    format = "raw"
    snapshot_s = 20.0

    def __init__(self, lab: Lab, mounted: Mounted, made: Array | Plugin) -> None:
        self.method, self.xml = made.name, made.xml
        self.unfrozen = "paused" if isinstance(made, Plugin) else "crash"
        self.config: Mapping[str, Any] = made.config
        self.env: Mapping[str, str] = made.env
        self._mounted, self._made = mounted, made
        self._folder = lab.folder(f"for-{made.name}")
        self.guest = lab.guest([DiskSpec(format="raw", folder=self._folder)])

    def contents(self) -> Collection[str]:
        return files_in(self._mounted.path) | files_in(self._folder)

    @contextmanager
    def foreign(self) -> Iterator[None]:
        disk = self.guest.disk().path
        path = self._made.folder / f"{NOT_OURS}{self._made.suffix}"
        with kept(path, lambda to: run("cp", "--sparse=always", disk, to)):
            yield

    @contextmanager
    def in_the_way(self, operation: str, label: str) -> Iterator[None]:
        name = f"snapd-vm-{operation}{self._made.suffix}"
        with kept(self._made.folder / name, not_ours):
            yield

    @contextmanager
    def full(self) -> Iterator[None]:
        self._mounted.fill(leave=64 << 10)
        yield
        self._mounted.drain()

    def crippled(self) -> Mapping[str, str] | None:
        return None


class Overlays(OnHost):
    """Method qemu: a qcow2 image in a small file system of its own."""

    method, format = "qemu", "qcow2"
    snapshot_s = 20.0
    _disk_format = "qcow2"

    def __init__(self, lab: Lab, mounted: Mounted) -> None:
        self.config: Mapping[str, Any] = {}
        self._mounted = mounted
        self._lab = lab
        self.guest = lab.guest([DiskSpec(folder=mounted.path)])

    def contents(self) -> Collection[str]:
        return files_in(self._mounted.path)

    @contextmanager
    def foreign(self) -> Iterator[None]:
        with kept(self.guest.disk().path.with_name(NOT_OURS), image):
            yield

    @contextmanager
    def in_the_way(self, operation: str, label: str) -> Iterator[None]:
        with kept(self.guest.disk().path.with_suffix(f".{label}"), not_ours):
            yield

    @contextmanager
    def full(self) -> Iterator[None]:
        self._mounted.fill(leave=64 << 10)
        yield
        self._mounted.drain()

    def crippled(self) -> Mapping[str, str] | None:
        return None


class Clones(OnHost):
    """Method reflink: a raw image on XFS."""

    method, format = "reflink", "raw"
    snapshot_s = 20.0

    def __init__(self, lab: Lab, mounted: Mounted) -> None:
        self.config: Mapping[str, Any] = {}
        self._mounted = mounted
        self.guest = lab.guest([DiskSpec(format="raw", folder=mounted.path)])

    def contents(self) -> Collection[str]:
        return files_in(self._mounted.path)

    @contextmanager
    def foreign(self) -> Iterator[None]:
        disk = self.guest.disk().path
        with kept(disk.with_name(NOT_OURS), lambda to: run("cp", "--reflink=always", disk, to)):
            yield

    @contextmanager
    def in_the_way(self, operation: str, label: str) -> Iterator[None]:
        with kept(self._mounted.path / f"snapd-vm-{operation}", not_ours):
            yield

    @contextmanager
    def full(self) -> Iterator[None]:
        self._mounted.fill(leave=300 << 10)
        yield
        self._mounted.drain()

    def crippled(self) -> Mapping[str, str] | None:
        return None


class Subvolumes(OnHost):
    """Method btrfs: a raw image in a subvolume."""

    method, format = "btrfs", "raw"
    snapshot_s = 20.0

    def __init__(self, lab: Lab, mounted: Mounted) -> None:
        self.config: Mapping[str, Any] = {}
        self._mounted = mounted
        self._subvolume = mounted.path / "vm"
        run("btrfs", "-q", "subvolume", "create", self._subvolume)
        self.guest = lab.guest([DiskSpec(format="raw", folder=self._subvolume)])
        self._without = lab.folder("without")

    def contents(self) -> Collection[str]:
        listed = run("btrfs", "subvolume", "list", "-o", "-a", self._mounted.path).splitlines()
        patterns = ("*", ".snapd-vm/*", ".snapd-vm/*/*")
        there = {str(path) for pattern in patterns for path in self._subvolume.glob(pattern)}
        return there | {line.rpartition(" path ")[2] for line in listed}

    @contextmanager
    def foreign(self) -> Iterator[None]:
        place = self._subvolume / ".snapd-vm"
        place.mkdir(0o700, exist_ok=True)
        path = place / NOT_OURS
        run("btrfs", "-q", "subvolume", "snapshot", "-r", self._subvolume, path)
        before = run("btrfs", "subvolume", "show", path)
        yield
        assert run("btrfs", "subvolume", "show", path) == before
        run("btrfs", "-q", "subvolume", "delete", path)
        place.rmdir()

    @contextmanager
    def in_the_way(self, operation: str, label: str) -> Iterator[None]:
        shown = run("btrfs", "subvolume", "show", self._subvolume)
        (uuid,) = re.findall(r"^\s*UUID:\s*(\S+)$", shown, re.MULTILINE)
        place = self._subvolume / ".snapd-vm"
        place.mkdir(0o700)
        folder = place / f"{operation}.{uuid[:8]}"
        folder.mkdir()
        with kept(folder / f"snapd-vm-{operation}", not_ours):
            yield
        folder.rmdir()
        place.rmdir()

    @contextmanager
    def full(self) -> Iterator[None]:
        self._mounted.fill(leave=300 << 10)
        yield
        self._mounted.drain()
        run("sync", "--file-system", self._mounted.path)  # what is freed is free after a commit
        wait_until("there is room", lambda: self._free() > 100 << 20, 20)

    def _free(self) -> int:
        state = os.statvfs(self._subvolume)
        return state.f_bavail * state.f_frsize

    def crippled(self) -> Mapping[str, str] | None:
        (self._without / "btrfsutil.py").write_text("raise ImportError('as if it was not there')")
        return {"PYTHONPATH": str(self._without)}


class Datasets(OnHost):
    """Method zfs: a raw image in a dataset, or on a volume. Only where the kernel has ZFS."""

    method, format = "zfs", "raw"
    snapshot_s = 120.0

    def __init__(self, lab: Lab, pool: Pool, *, volume: bool) -> None:
        self.config: Mapping[str, Any] = IN_A_VM
        self._pool = pool
        self._area = f"{pool.name}/area"
        self.only_newest = volume  # what `zfs rollback` can
        pool.dataset("area")
        if volume:
            self._disk = f"{self._area}/vm"
            spec = DiskSpec(format="raw", device=pool.volume("area/vm"))
        else:
            self._disk = self._area
            spec = DiskSpec(format="raw", folder=pool.path / "area")
        self.guest = lab.guest([spec])
        self._without = lab.folder("without")

    def contents(self) -> Collection[str]:
        return self._pool.everything()

    @contextmanager
    def foreign(self) -> Iterator[None]:
        with self._another(NOT_OURS):
            yield

    @contextmanager
    def in_the_way(self, operation: str, label: str) -> Iterator[None]:
        with self._another(f"snapd-vm-{operation}"):
            yield

    @contextmanager
    def _another(self, name: str) -> Iterator[None]:
        snapshot = f"{self._disk}@{name}"
        run("zfs", "snapshot", snapshot)
        before = run("zfs", "get", "-H", "guid,userrefs,clones", snapshot)
        yield
        assert run("zfs", "get", "-H", "guid,userrefs,clones", snapshot) == before
        run("zfs", "destroy", snapshot)

    @contextmanager
    def full(self) -> Iterator[None]:
        used = int(self._pool.get(self._area, "used"))
        run("zfs", "set", f"quota={used + (900 << 10)}", self._area)
        yield
        run("zfs", "set", "quota=none", self._area)

    def crippled(self) -> Mapping[str, str] | None:
        (self._without / "sitecustomize.py").write_text(
            f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n"
            "from snapd_vm import command\n"
            "command._PATH = '/nowhere'\n"
        )
        return {"PYTHONPATH": str(self._without)}


class ClusterImages:
    """Method rbd: a raw image in a Ceph cluster."""

    method, format = "rbd", "raw"
    snapshot_s = 20.0

    def __init__(self, lab: Lab) -> None:
        self.config: Mapping[str, Any] = {}
        self._ceph = lab.ceph.start()
        self._ceph.take_stock()
        self._image = f"{POOL}/conformance"
        self.guest = lab.guest([self._ceph.disk("conformance")])
        self._id = json.loads(self._ceph.rbd("info", self._image, "--format=json"))["id"]
        self._without = lab.folder("without")

    def contents(self) -> Collection[str]:
        listed = json.loads(self._ceph.rbd("snap", "ls", self._image, "--format=json"))
        # A way of asking that a cluster which is full does not put off.
        said = run("rados", "-p", POOL, "listomapkeys", f"rbd_header.{self._id}").splitlines()
        found = [key for key in said if key.startswith("metadata_")]
        return [str(sorted(snap.items())) for snap in listed] + found

    def raw(self, created: Created, to: Path) -> Path:
        snapshot = created.source.find("snapshot")
        assert snapshot is not None
        to.unlink(missing_ok=True)
        return self._ceph.read(f"conformance@{snapshot.get('name')}", to)

    def present(self, to: Path) -> Path:
        to.unlink(missing_ok=True)
        return self._ceph.read("conformance", to)

    @contextmanager
    def foreign(self) -> Iterator[None]:
        with self._another(NOT_OURS):
            yield

    @contextmanager
    def in_the_way(self, operation: str, label: str) -> Iterator[None]:
        with self._another(f"snapd-vm-{operation}"):
            yield

    @contextmanager
    def _another(self, name: str) -> Iterator[None]:
        self._ceph.rbd("snap", "create", f"{self._image}@{name}")
        before = [one for one in self.contents() if name in one]
        yield
        assert [one for one in self.contents() if name in one] == before
        self._ceph.rbd("snap", "rm", f"{self._image}@{name}")

    @contextmanager
    def full(self) -> Iterator[None]:
        self._ceph.fill(True)
        yield
        self._ceph.fill(False)

    def crippled(self) -> Mapping[str, str] | None:
        (self._without / "sitecustomize.py").write_text(
            f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n"
            "from snapd_vm.methods.rbd import cluster\n"
            "cluster._START = 'import ctypes; ctypes.CDLL = lambda name: open(name);' "
            "+ cluster._START\n"
        )
        return {"PYTHONPATH": str(self._without)}


class Volumes(OnHost):
    """Method lvm: a raw disk on a logical volume, thick or thin; the host needs device mapper."""

    method, format = "lvm", "raw"
    snapshot_s = 120.0

    def __init__(self, lab: Lab, group: Group, device: Path) -> None:
        self.config: Mapping[str, Any] = IN_A_VM
        self._group, self._device = group, device
        self.guest = lab.guest([DiskSpec(format="raw", device=device)])
        self._without = lab.folder("without")

    def contents(self) -> Collection[str]:
        """Of a thin disk that has gone back to a snapshot, that is the origin: it is left out."""
        lines = self._group.contents()
        own = f"{self._device.name} "
        return [line.rpartition(" ")[0] if line.startswith(own) else line for line in lines]

    @contextmanager
    def foreign(self) -> Iterator[None]:
        size = ("-L", "80M") if self._device.name == "thick" else ("-kn",)
        words = ("lvcreate", "-q", "-y", "-s", "-pr", "-n", NOT_OURS, *size)
        with self._another(NOT_OURS, *words, f"{self._group.name}/{self._device.name}"):
            yield

    @contextmanager
    def in_the_way(self, operation: str, label: str) -> Iterator[None]:
        name = f"snapd-vm-{operation}"
        words = ("lvcreate", "-q", "-y", "-Wn", "-n", name, "-L", "4M", self._group.name)
        with self._another(name, *words):
            yield

    @contextmanager
    def _another(self, name: str, *words: str) -> Iterator[None]:
        run(*words)
        before = self._group.volumes()[name]
        yield
        assert self._group.volumes()[name] == before
        run("lvremove", "-q", "-y", "--", f"{self._group.name}/{name}")

    @contextmanager
    def full(self) -> Iterator[None]:
        name = self._group.name
        if self._device.name == "thick":
            run("lvcreate", "-q", "-y", "-Wn", "-n", "filler", "-l", "100%FREE", name)
        else:
            filler = self._group.thin("filler", 512)
            words = ("lvs", "--noheadings", "-o", "data_percent", f"{name}/pool")
            with filler.open("r+b") as file:
                while float(run(*words)) < 97:
                    file.write(os.urandom(2 << 20))
                    file.flush()
                    os.fsync(file.fileno())
        yield
        run("lvremove", "-q", "-y", f"{name}/filler")

    def crippled(self) -> Mapping[str, str] | None:
        (self._without / "sitecustomize.py").write_text(
            f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n"
            "from snapd_vm import command\n"
            "found = command.which\n"
            "missing = 'lvcreate'\n"
            "command.which = lambda name, **how: None if name == missing else found(name, **how)\n"
        )
        return {"PYTHONPATH": f"{self._without}:{os.environ.get('PYTHONPATH', '')}"}


def _array(lab: Lab, mounted: Mounted) -> Storage:
    return Copies(lab, mounted, Array.install(lab, mounted.path / "copies", reverts=True))


def _plugin(lab: Lab, mounted: Mounted) -> Storage:
    return Copies(lab, mounted, Plugin.install(lab, mounted.path / "copies"))


NOT_OURS = "snapd-vm-0b9a2f10-1111-4222-8333-444455556666"
"""A name such as we give; nothing else of what bears it is ours."""


@contextmanager
def kept(path: Path, make: Callable[[Path], object]) -> Iterator[None]:
    """A file of the test's, which must be the same at the end; it is removed then."""
    make(path)
    before = path.stat().st_ino, path.read_bytes()
    yield
    assert (path.stat().st_ino, path.read_bytes()) == before
    path.unlink()


def not_ours(path: Path) -> None:
    """Write something of somebody else's."""
    path.write_text("somebody else's")


def files_in(folder: Path) -> set[str]:
    """All files below a folder."""
    return {os.path.join(where, name) for where, _, names in os.walk(folder) for name in names}


@contextmanager
def _mounted(
    lab: Lab, filesystem: Any, size_mib: int, on: Callable[[Lab, Mounted], Storage]
) -> Iterator[Storage]:
    made = lab.block.mounted(filesystem, size_mib)
    storage = on(lab, made)
    yield storage
    storage.guest.remove()
    made.unmount()


@contextmanager
def _in_pool(lab: Lab, *, volume: bool) -> Iterator[Storage]:
    pool = make_pool(lab)
    storage = Datasets(lab, pool, volume=volume)
    yield storage
    storage.guest.remove()
    pool.destroy()


@contextmanager
def _in_ceph(lab: Lab) -> Iterator[Storage]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CEPH_CONF", str(lab.ceph.start().conf))  # as a person has it in /etc/ceph
        storage = ClusterImages(lab)
        yield storage
        storage.guest.remove()


@contextmanager
def _in_group(lab: Lab, kind: str) -> Iterator[Storage]:
    loop = lab.block.loop(640)
    group = Group(loop.device, f"conformance-{kind}")
    if kind == "thick":
        device = group.linear(kind, 64)
    else:
        group.pool(mib=256)
        device = group.thin(kind, 64)
    storage = Volumes(lab, group, device)
    yield storage
    storage.guest.remove()
    group.remove()
    loop.detach()


STORAGES: Mapping[str, Callable[[Lab], AbstractContextManager[Storage]]] = {
    "qemu": lambda lab: _mounted(lab, "ext4", 400, Overlays),
    "reflink": lambda lab: _mounted(lab, "xfs", 600, Clones),
    "btrfs": lambda lab: _mounted(lab, "btrfs", 600, Subvolumes),
    "rbd": _in_ceph,
    "lvm": lambda lab: _in_group(lab, "thick"),
    "lvm-thin": lambda lab: _in_group(lab, "thin"),
    "zfs": lambda lab: _in_pool(lab, volume=False),
    "zvol": lambda lab: _in_pool(lab, volume=True),
    "array": lambda lab: _mounted(lab, "xfs", 300, _array),
    "copy": lambda lab: _mounted(lab, "ext4", 300, _plugin),
}
"""What makes each, with its guest, and takes it away."""

NAMES = os.environ.get("SNAPD_VM_STORAGES", "qemu,reflink,btrfs,rbd,array,copy").split(",")
"""Those of a run of the tests: all that this kernel has, unless the host VM's."""
