"""A layer that is named and that can't hold the disk: NotUnderDisk, whatever the disk is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.disks import DiskSpec
from tests.lab.lab import Lab
from tests.real.api import Api
from tests.real.places import Places, image, refused, unchanged, with_image
from tests.real.test_revert import places

__all__ = ["places"]

LAYERS = {
    "lvm": "<device path='/dev/vg/lv'/>",
    "btrfs": "<subvolume path='/srv/vm'/>",
    "zfs": "<dataset name='tank/vm'/>",
    "rbd": "<image pool='vm' name='web'/>",
}


@pytest.fixture(scope="module")
def device(lab: Lab) -> Iterator[str]:
    """A block device that is none of a layer's."""
    loop = lab.block.loop(16)
    yield str(loop.device)
    loop.detach()


@pytest.mark.parametrize("method", LAYERS)
@pytest.mark.parametrize("disk", ["file", "qcow2", "block", "network"])
async def test_it_can_not_hold_the_disk(
    api: Api, places: Places, device: str, method: str, disk: str
) -> None:
    folder = places.folder()
    (folder / "raw").write_bytes(bytes(1 << 20))
    nbd = "<source protocol='nbd' name='web'><host name='192.0.2.1' port='10809'/></source>"
    spec = {
        "file": with_image(folder / "raw", "raw"),
        "qcow2": with_image(image(folder / "qcow2")),
        "block": DiskSpec("raw", source=f"<source dev='{device}'/>", type="block"),
        "network": DiskSpec("raw", source=nbd, type="network"),
    }[disk]
    guest = places.guest(spec)
    await places.known(api)
    xml = f"<diskSnapshot method='{method}'>{LAYERS[method]}</diskSnapshot>"
    if disk == "network":  # which is no file that could be looked at afterwards
        await refused(api.plan(guest, method_xml=xml), "NotUnderDisk")
        await refused(api.create(guest, method_xml=xml), "NotUnderDisk")
    else:
        await unchanged(api, guest, "NotUnderDisk", method_xml=xml)
    bare = f"<diskSnapshot method='{method}'/>"
    await refused(api.plan(guest, method_xml=bare), "MethodNotSupported")
