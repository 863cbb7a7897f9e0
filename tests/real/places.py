"""Domains on folders of their own, and what is told of them before and after a call; asks no bus.

Most questions about a disk's files need no booted guest: a domain that is only defined has all of
libvirt's ways with definitions, and a Create on it takes milliseconds.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest
from lxml import etree

from snapd_vm.model import ROOT_PATH
from tests.lab.deadline import LabError
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real.api import DOMAIN, MANAGER, SNAPSHOT, Api, ApiError, Created, path_of

INACTIVE = 2  # VIR_DOMAIN_XML_INACTIVE
LIVE, CONFIG = 1, 2  # VIR_DOMAIN_AFFECT_…


class Places:
    """Makes folders and domains in them for one test, and takes the domains away at its end."""

    _number = 0

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._guests: list[Guest] = []

    def folder(self) -> Path:
        """A new folder that QEMU's user may read and nobody else uses."""
        Places._number += 1
        return self.lab.folder(f"place{Places._number}")

    def guest(self, *specs: DiskSpec, start: bool = False, **more: Any) -> Guest:
        """A guest with these disks, defined and not started unless told; see Lab.guest."""
        made = self.lab.guest(specs or (self.disk(),), start=False, **more)
        self._guests.append(made)
        if start:  # without a file system there is nothing that its agent could tell of
            made.domain.create()
        return made

    def disk(self, folder: Path | None = None, **more: Any) -> DiskSpec:
        """A small qcow2 in a folder of its own."""
        return DiskSpec(folder=folder or self.folder(), size_mib=16, filesystem=None, **more)

    async def known(self, api: Api) -> None:
        """Wait until the daemon has heard of all of them from libvirt."""
        deadline = asyncio.get_running_loop().time() + 20
        for guest in self._guests:
            while (await _name(api, guest)) != guest.name:
                assert asyncio.get_running_loop().time() < deadline, f"{guest.name} is not known"
                await asyncio.sleep(0.02)

    async def unknown(self, api: Api, guest: Guest) -> None:
        """Take a domain away, and wait until the daemon has heard of it."""
        guest.remove()
        self._guests.remove(guest)
        deadline = asyncio.get_running_loop().time() + 20
        while await _name(api, guest):
            assert asyncio.get_running_loop().time() < deadline, f"{guest.name} is still known"
            await asyncio.sleep(0.02)

    def forget(self) -> None:
        """Take away the domains that are left."""
        for guest in reversed(self._guests):
            with suppress(LabError):  # the test may have done so
                guest.remove()


async def _name(api: Api, guest: Guest) -> str:
    try:
        return str((await api.properties(path_of(guest), DOMAIN))["Name"])
    except ApiError:
        return ""


def with_image(path: Path | str, image_format: str = "qcow2", **more: Any) -> DiskSpec:
    """A disk whose image the test made itself."""
    source = f"<source file={quoteattr(str(path))}/>"
    return DiskSpec(format=image_format, source=source, **more)  # type: ignore[arg-type]


def image(path: Path, base: Path | str = "", base_format: str = "qcow2") -> Path:
    """A small qcow2 image, on a base if one is given."""
    words = ["-b", base, "-F", base_format, "-u"] if base else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *words, path, "16M", cwd=path.parent)
    path.chmod(0o644)
    return path


def disk_of(guest: Guest, flags: int = 0, target: str = "vda") -> etree._Element:
    """A `<disk>` as libvirt has it, live or (INACTIVE) of the definition."""
    for disk in etree.fromstring(guest.domain.XMLDesc(flags)).findall("devices/disk"):
        named = disk.find("target")
        if named is not None and named.get("dev") == target:
            return disk
    raise AssertionError(f"no disk {target}")


def file_of(guest: Guest, flags: int = 0, target: str = "vda") -> str:
    """The file or device that it names."""
    source = disk_of(guest, flags, target).find("source")
    return "" if source is None else source.get("file") or source.get("dev") or ""


def world(guest: Guest) -> tuple[str, str, dict[str, list[str]]]:
    """The live XML and the definition of a domain, and the files beside its disks' images."""
    tree = etree.fromstring(guest.domain.XMLDesc())
    paths = [s.get("file") for s in tree.findall("devices/disk/source")]
    folders = {os.path.dirname(path) for path in paths if path}
    return (
        guest.domain.XMLDesc(),
        guest.domain.XMLDesc(INACTIVE) if guest.domain.isPersistent() else "",
        {folder: sorted(os.listdir(folder)) for folder in folders},
    )


async def reconnected(api: Api, guest: Guest) -> None:
    """Wait until the daemon is connected to a libvirtd that was restarted."""
    deadline = asyncio.get_running_loop().time() + 30
    while True:
        with suppress(ApiError):
            await api.disks(guest)  # finds out whether the connection it has is a living one
            if (await api.properties(ROOT_PATH, MANAGER))["Connected"]:
                return
        assert asyncio.get_running_loop().time() < deadline, "not connected again"
        await asyncio.sleep(0.1)


async def ready(api: Api, created: Created) -> None:
    """Wait until what was begun with a snapshot is settled."""
    deadline = asyncio.get_running_loop().time() + 60
    while (await api.properties(created.snapshot, SNAPSHOT))["State"] != "ready":
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.1)


async def refused(call: Awaitable[Any], *names: str) -> ApiError:
    """The error that the call ends with, which must be one of these."""
    with pytest.raises(ApiError) as error:
        await call
    assert error.value.name in names, error.value
    return error.value


async def unchanged(api: Api, guest: Guest, *names: str, disk: str = "vda", **how: Any) -> ApiError:
    """Create and Plan are both refused with one of these errors, and change nothing."""
    before = world(guest), await api.snapshots_of(guest)
    xml = f"<disk><target dev='{disk}'/></disk>"
    planned = await refused(api.plan(guest, xml, **how), *names)
    error = await refused(api.create(guest, xml, **how), *names)
    assert planned.name == error.name
    assert (world(guest), await api.snapshots_of(guest)) == before
    return error
