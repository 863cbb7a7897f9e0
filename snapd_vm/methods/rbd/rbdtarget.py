"""What the method rbd keeps in a Target, with its types: a snapshot of an image in a Ceph cluster.

Also where a disk's XML says that the image is, and how it is reached. The secret itself is never in
it, only which of libvirt's it is; and neither host nor user is for a log or a message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from snapd_vm import safexml
from snapd_vm.model import Json, Target


@dataclass(frozen=True, slots=True)
class Access:
    """How a cluster is reached, as QEMU does it: '' and () for what its ceph.conf says.

    `secret` is the UUID and `usage` the usage name of libvirt's secret, one of them or none.
    """

    user: str
    secret: str
    usage: str
    conf: str
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """An image: in which pool and namespace ('' : the default one), and how that is reached."""

    access: Access
    pool: str
    namespace: str
    image: str

    @property
    def words(self) -> Mapping[str, str]:
        """As rbdworker.py takes it."""
        return {"pool": self.pool, "namespace": self.namespace, "name": self.image}

    def __str__(self) -> str:
        """As the program rbd names it."""
        return "/".join(part for part in (self.pool, self.namespace, self.image) if part)


def place_of(source_xml: str) -> Place | None:
    """The image that a `<source>` names; None if that is none of RBD."""
    if "protocol=" not in source_xml:
        return None
    source = safexml.parse(source_xml)
    parts = (source.get("name") or "").split("/")
    if source.get("protocol") != "rbd" or not 2 <= len(parts) <= 3 or not all(parts):
        return None
    hosts = []
    for host in source.findall("host"):
        name, port = host.get("name") or "", host.get("port") or ""
        if name:
            name = f"[{name}]" if ":" in name else name
            hosts.append(f"{name}:{port}" if port else name)
    auth, secret, conf = source.find("auth"), source.find("auth/secret"), source.find("config")
    access = Access(
        user=(auth.get("username") or "") if auth is not None else "",
        secret=(secret.get("uuid") or "") if secret is not None else "",
        usage=(secret.get("usage") or "") if secret is not None else "",
        conf=(conf.get("file") or "") if conf is not None else "",
        hosts=tuple(hosts),
    )
    return Place(access, parts[0], parts[1] if len(parts) == 3 else "", parts[-1])


@dataclass(frozen=True, slots=True)
class RbdTarget:
    """A Target's data. `image_id` is the cluster's own name of the image, '' before it is known,
    and with it before anything was made; with it comes the number of the pool that the image's data
    are in, -1 for its own.
    """

    snapshot: str
    domain: str
    format: str
    source: str
    place: Place
    image_id: str
    data_pool: int

    @classmethod
    def of(cls, target: Target) -> RbdTarget:
        data = target.data
        source = str(data["source"])
        place = place_of(source)
        if place is None:
            raise ValueError("a Target of another method")
        return cls(
            snapshot=str(data["snapshot"]),
            domain=str(data["domain"]),
            format=str(data["format"]),
            source=source,
            place=place,
            image_id=str(data.get("image_id") or ""),
            data_pool=int(str(data.get("data_pool", -1))),
        )

    @property
    def name(self) -> str:
        """The snapshot's name in the cluster: Tag.storage_name of its own tag."""
        return f"snapd-vm-{self.snapshot}"

    @property
    def key(self) -> str:
        """What the image's metadata says of it is under this key."""
        return self.name

    def __str__(self) -> str:
        """As the program rbd names it."""
        return f"{self.place}@{self.name}"


def data_of(snapshot: str, domain: str, image_format: str, source: str) -> Mapping[str, Json]:
    """The data of a new Target."""
    return {"snapshot": snapshot, "domain": domain, "format": image_format, "source": source}
