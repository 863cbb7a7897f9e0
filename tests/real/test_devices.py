"""Who uses a block device, as the kernel tells: by real loop devices."""

from __future__ import annotations

import os

from snapd_vm import storage
from tests.lab.lab import Lab


def test_who_only_reads_a_device_is_no_writer(lab: Lab) -> None:
    loop = lab.block.loop(8)
    device = str(loop.device)
    assert (storage.claimed(device), storage.writer_of(device)) == (False, "")
    pids = []
    for flags, said in ((os.O_RDONLY, ""), (os.O_RDWR, "sleep (process {})")):
        fd = os.open(device, flags)
        pids.append(os.posix_spawnp("sleep", ["sleep", "60"], os.environ))
        os.set_inheritable(fd, True)
        pids.append(os.posix_spawnp("sleep", ["sleep", "60"], os.environ))
        os.close(fd)
        try:
            assert storage.writer_of(device) == said.format(pids[-1])
        finally:
            for pid in pids:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
            pids.clear()


def test_a_mount_is_a_writer(lab: Lab) -> None:
    mounted = lab.block.mounted("ext4", 16)
    device = str(mounted.loop.device)
    assert storage.claimed(device)
    assert storage.writer_of(device) == "a mount, or another device"
    mounted.unmount()
