"""A Ceph cluster of a run's own: one mon, one osd that keeps all in memory, one pool for images.

cephx is on: `admin`'s keyring is beside `conf`, for the lab's own use, and `user` is somebody with
rights to the pool alone, whose key libvirt gets as a secret.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import uuid as uuids
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import quoteattr

from tests.lab.deadline import LabError, wait_until
from tests.lab.disks import DiskSpec, format_raw
from tests.lab.hypervisor import Hypervisor
from tests.lab.process import Process, end, tail
from tests.lab.program import run
from tests.lab.run import Run

POOL = "vm"
START_S = 60
# An osd may serve a placement group for 0.8 of this without hearing from its peers, and one that
# has none never finds out that it may again (its requests stay "waiting for readable"): so this is
# longer than `suspend()` is used for.
GRACE_S = 900
MEMORY_MIB = 2048  # what the osd says that it has; what is not written takes none

CONF = """[global]
fsid = {fsid}
mon host = [v1:127.0.0.1:{port}]
public addr = 127.0.0.1
keyring = {folder}/keyring
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd crush update on start = false
osd heartbeat grace = {grace}
osd objectstore = memstore
memstore device bytes = {memory}
mon allow pool size one = true
mon allow pool delete = true
mon data avail crit = 0
mon data avail warn = 0
paxos propose interval = 0.1
mgr stats period = 1
mgr tick period = 1
ms bind msgr2 = false
ms bind ipv6 = false
run dir = {folder}
admin socket = {folder}/$name.asok
crash dir = {folder}
log to stderr = true
log file =
mon cluster log file =
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
keyring = {folder}/osd/keyring
"""
CLIENT = """[global]
mon host = {host}
keyring = {folder}/keyring
"""


class Ceph:
    """Not running until `start()`; then at `host`, with the pool `vm`."""

    def __init__(self, lab: Run, hypervisor: Hypervisor) -> None:
        self._run = lab
        self._hypervisor = hypervisor
        self._processes: dict[str, Process] = {}
        self._folder = lab.folder / "ceph"
        self.port = 0
        self.user = "lab"
        self.key = ""  # of `user`, as base64
        self.secret = str(uuids.uuid4())  # libvirt's UUID of it
        self._log = lab.folder / "ceph.log"

    @property
    def host(self) -> str:
        """The monitor, as clients name it."""
        return f"127.0.0.1:{self.port}"

    @property
    def conf(self) -> Path:
        """A ceph.conf for clients, with admin's keyring; only root may read the latter."""
        return self._folder / "client.conf"

    @property
    def keyring(self) -> Path:
        """admin's."""
        return self._folder / "keyring"

    def start(self) -> Ceph:
        """Bring it up, if it is not, and hand it back: `lab.ceph.start().image("a")`."""
        if self._processes:
            self._tell_libvirt()
            return self
        folder = self._run.path("ceph")
        for name in ("mon", "osd"):
            (folder / name).mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        fsid, osd = str(uuids.uuid4()), str(uuids.uuid4())
        conf = self._server_conf
        conf.write_text(
            CONF.format(
                fsid=fsid,
                port=self.port,
                folder=folder,
                memory=MEMORY_MIB << 20,
                grace=GRACE_S,
            )
        )
        self.conf.write_text(CLIENT.format(host=self.host, folder=folder))
        self._first_keys()
        monmap = folder / "monmap"
        address = f"[v1:{self.host}]"
        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        mkfs = ("--mkfs", "-c", conf)
        run("ceph-mon", *mkfs, "-i", "a", "--monmap", monmap, "--keyring", self.keyring)
        self._begin("ceph-mon", "a")
        # Without the same UUID in both places the osd stays down without a word.
        (folder / "osd/keyring").write_text(
            f"[osd.0]\nkey = {run('ceph-authtool', '--gen-print-key').strip()}\n"
        )
        self.ceph("osd", "new", osd)
        run("ceph-osd", *mkfs, "-i", "0", "--osd-uuid", osd, "--no-mon-config")
        caps = ("mon", "allow profile osd", "osd", "allow *", "mgr", "allow profile osd")
        self.ceph("auth", "add", "osd.0", *caps, "-i", str(folder / "osd/keyring"))
        self.ceph("osd", "crush", "add", "osd.0", "1", "root=default")
        self._begin("ceph-osd", "0")
        self.pool(POOL)
        rights = ("mon", "profile rbd", "osd", f"profile rbd pool={POOL}")
        self.key = self.ceph("auth", "get-or-create-key", f"client.{self.user}", *rights).strip()
        self._tell_libvirt()
        return self

    def _tell_libvirt(self) -> None:
        """Give libvirt the key, again if need be: a libvirtd that was restarted has lost it."""
        name = f"client.{self.user} secret"
        self._hypervisor.ceph_secret(self.secret, name, self.key)

    @property
    def _server_conf(self) -> Path:
        return self._folder / "ceph.conf"

    def _first_keys(self) -> None:
        tool = ("ceph-authtool", self.keyring, "--gen-key", "-n")
        run(*tool, "mon.", "--create-keyring", "--cap", "mon", "allow *")
        allow = [word for kind in ("mon", "osd", "mgr") for word in ("--cap", kind, "allow *")]
        run(*tool, "client.admin", *allow)
        self.keyring.chmod(0o600)

    def _begin(self, program: str, name: str) -> None:
        argv: list[str | Path] = [program, "-f", "-i", name, "-c", self._server_conf]
        self._processes[program] = process = self._run.start(program, argv, self._log)

        def ready() -> bool:
            if not process.alive():
                raise LabError(f"{program} ended: {tail(self._log)}")
            if program == "ceph-mon":
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", self.port)) == 0
            return '"num_up_osds":1' in self.ceph("osd", "stat", "--format=json")

        wait_until(f"{program} answers", ready, START_S, 0.1)

    def pool(self, name: str) -> None:
        """One more pool for images."""
        self.ceph("osd", "pool", "create", name, "8")
        self.rbd("pool", "init", name)

    def ceph(self, *words: str, timeout: float = 60) -> str:
        """The program `ceph`, as admin."""
        return run("ceph", "-c", self.conf, "--connect-timeout", "30", *words, timeout=timeout)

    def rbd(self, *words: str | Path, timeout: float = 60) -> str:
        """The program `rbd`, as admin."""
        return run("rbd", "-c", self.conf, *words, timeout=timeout)

    def suspend(self) -> None:
        """SIGSTOP both: the cluster is away, and forgets nothing, until `resume()`."""
        for process in self._processes.values():
            process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT both."""
        for process in self._processes.values():
            process.signal(signal.SIGCONT)

    def take_stock(self) -> None:
        """Let the cluster find out once how much room there is, which it does not by itself.

        That is what a mgr is for; it takes 300 MB, and what it has told stays when it is ended.
        """
        folder = self._run.path("ceph/mgr")
        keyring = folder / "keyring"
        caps = ("mon", "allow profile mgr", "osd", "allow *", "mds", "allow *")
        self.ceph("auth", "get-or-create", "mgr.x", *caps, "-o", str(keyring))
        argv: list[str | Path] = ["ceph-mgr", "-f", "-i", "x", "-c", self._server_conf]
        argv += ["--mgr-data", folder, "--keyring", keyring]
        mgr = self._run.start("ceph-mgr", argv, self._log)

        def counted() -> bool:
            if not mgr.alive():
                raise LabError(f"ceph-mgr ended: {tail(self._log)}")
            pools = json.loads(self.ceph("df", "--format=json"))["pools"]
            return any(pool["name"] == POOL and pool["stats"]["max_avail"] for pool in pools)

        wait_until("the cluster knows its room", counted, START_S, 0.5)
        end(mgr)
        # The monitor shuts out a mgr that went, half a minute later: now, and not for a day.
        self.ceph("mgr", "fail", "x")
        self.ceph("osd", "blocklist", "clear")

    def fill(self, full: bool) -> None:
        """Let the osd believe that its disk is full, or no more, until all have heard of it."""
        socket_of = self._folder / "osd.0.asok"
        run("ceph", "daemon", socket_of, "injectfull", "full" if full else "none")

        def heard() -> bool:
            pools = self.ceph("osd", "pool", "ls", "detail").splitlines()
            found = [pool for pool in pools if f"'{POOL}'" in pool]
            return any("full" in pool for pool in found) is full

        wait_until("the pool is full, or not", heard, 30, 0.3)

    def uri(self, image: str) -> str:
        """What qemu-img reads an image (or `image@snapshot`) of the pool by, as admin."""
        return f"rbd:{POOL}/{image}:conf={self.conf}"

    def source(self, image: str, *, inside: str = "", pool: str = POOL) -> str:
        """The `<source>` of a disk on an image, read as `user`."""
        name = quoteattr(f"{pool}/{image}")
        return (
            f"<source protocol='rbd' name={name}><host name='127.0.0.1' port='{self.port}'/>"
            f"{inside}{self.auth}</source>"
        )

    @property
    def auth(self) -> str:
        """The `<auth>` that names user and secret."""
        return f"<auth username='{self.user}'><secret type='ceph' uuid='{self.secret}'/></auth>"

    def disk(
        self,
        name: str,
        image_format: Literal["raw", "qcow2"] = "raw",
        *arguments: str,
        inside: str = "",
        driver: str = "",
        pool: str = POOL,
        size_mib: int = 64,
    ) -> DiskSpec:
        """A disk on a new image with a file system; `arguments` are those of `rbd import`."""
        spec = DiskSpec(image_format, size_mib=size_mib)
        raw = self._folder / f"{name}.new"
        format_raw(raw, spec, size_mib << 20)
        if image_format == "qcow2":
            qcow2 = raw.with_suffix(".qcow2")
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2)
            qcow2.replace(raw)
        self.image(name, raw, *arguments, pool=pool)
        raw.unlink()
        source = self.source(name, inside=inside, pool=pool)
        return DiskSpec(image_format, source=source, type="network", driver=driver)

    def image(self, name: str, content: Path, *arguments: str, pool: str = POOL) -> None:
        """A new image that holds what the raw file `content` does."""
        self.rbd("import", *arguments, content, f"{pool}/{name}")

    def read(self, image: str, to: Path) -> Path:
        """Copy out an image (or `image@snapshot`) of the pool, through qemu-img."""
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", self.uri(image), to)
        os.chmod(to, 0o600)
        return to
