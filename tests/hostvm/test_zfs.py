"""Method zfs in the host VM, whose kernel has ZFS: its own tests and the conformance suite there,
and the installed service, confined by its unit, as systemd runs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from lxml import etree

from tests.hostvm.inside import LIMIT_S, conforms, define, passes, stands_anything
from tests.lab.hostvm import HostVm
from tests.lab.zpool import NO_AUTOMOUNT

DOMAIN = """<domain type='qemu'>
  <name>pooled</name><memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='/tank/vm/images/web.raw'/><target dev='vda'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/><source dev='/dev/zvol/tank/web'/><target dev='vdb'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='/srv/shown/web.raw'/><target dev='vdc'/>
    </disk>
  </devices>
</domain>
"""
SET_UP = """
modprobe zfs
zpool create -f tank /dev/disk/by-id/virtio-data1
zfs create tank/vm && mkdir /tank/vm/images
zfs create tank/hidden && mkdir /tank/hidden/images
zfs create -s -V 16M tank/web && udevadm settle
mkdir -p /srv/shown && mount --bind /tank/hidden/images /srv/shown && umount /tank/hidden
for image in /tank/vm/images/web.raw /dev/zvol/tank/web /srv/shown/web.raw; do
    dd if=/dev/urandom of=$image bs=1M count=4 conv=fsync status=none
done
zfs list -H -t all -o name,userrefs > /root/before
"""


@pytest.fixture
def pooled(vm: HostVm) -> Iterator[None]:
    """A domain that is off, with three disks on ZFS."""
    vm.check("bash", "-euc", SET_UP, timeout=120)
    define(vm, DOMAIN)
    yield
    vm.check("virsh", "undefine", "pooled")
    vm.check("bash", "-euc", "umount /srv/shown; zpool destroy tank", timeout=120)


def test_confined_by_its_unit_the_service_snapshots_all_three(vm: HostVm, pooled: None) -> None:
    answer = vm.check("snapd-vm", "create", "pooled", "vda", "vdb", "vdc", "--json", timeout=180)
    rows = json.loads(answer)
    assert [row["method"] for row in rows] == ["zfs"] * 3
    sources = [etree.fromstring(row["backup_source"]) for row in rows]
    paths = [source.get("file") or source.get("dev") or "" for source in sources]
    assert "/tank/vm/.zfs/snapshot/" in paths[0]
    assert paths[1].startswith("/dev/zvol/tank/snapd-vm-")
    assert paths[2].startswith("/run/snapd-vm/zfs/")
    origins = ("/tank/vm/images/web.raw", "/dev/zvol/tank/web", "/srv/shown/web.raw")
    for path, origin in zip(paths, origins, strict=True):  # seen from outside the sandbox
        vm.check("cmp", path, origin)
    vm.check("systemctl", "restart", "snapd-vm", timeout=120)
    for path, origin in zip(paths, origins, strict=True):
        vm.check("cmp", path, origin)
    name = rows[0]["name"]
    for target in ("vda", "vdb", "vdc"):
        vm.check("snapd-vm", "delete", f"pooled/{target}/{name}", timeout=120)
    vm.check("bash", "-c", "zfs list -H -t all -o name,userrefs | diff /root/before -")
    assert vm.check("findmnt", "-n", "-l", "-t", "zfs", "-o", "SOURCE").count("@") == 0


def test_what_the_kernel_does_not_show_it_mounts_for_the_whole_host(
    vm: HostVm, pooled: None
) -> None:
    vm.check("bash", "-euc", NO_AUTOMOUNT)
    try:
        answer = vm.check("snapd-vm", "create", "pooled", "vda", "--json", timeout=180)
        row = json.loads(answer)
        path = etree.fromstring(row["backup_source"]).get("file") or ""
        assert path.startswith("/tank/vm/.zfs/snapshot/")
        vm.check("cmp", path, "/tank/vm/images/web.raw")
        vm.check("snapd-vm", "delete", f"pooled/vda/{row['name']}", timeout=120)
    finally:
        vm.check("umount", "/usr/bin/env")
    vm.check("bash", "-c", "zfs list -H -t all -o name,userrefs | diff /root/before -")
    assert vm.check("findmnt", "-n", "-l", "-t", "zfs", "-o", "SOURCE").count("@") == 0


@pytest.mark.thorough
def test_on_real_pools(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_zfs.py", timeout=LIMIT_S)


def test_the_conformance_suite(vm: HostVm) -> None:
    conforms(vm, "zfs", "zvol")


@pytest.mark.thorough
def test_anything_in_any_order(vm: HostVm) -> None:
    stands_anything(vm, "zfs", "zvol")


@pytest.mark.thorough
def test_a_hundred_of_a_hundred_are_whole(vm: HostVm) -> None:
    passes(vm, "tests/inside_vm/test_whole.py", "-k", "zfs", timeout=LIMIT_S)
