"""Who else has an image, without libvirt: images beside it, and what lies on other files."""

from __future__ import annotations

import os
from pathlib import Path

from snapd_vm.methods import chain
from snapd_vm.virt.users import user_of
from tests.lab.program import run


def test_an_image_beside_it_counts_only_where_it_can_be_used(tmp_path: Path) -> None:
    golden, linked = tmp_path / "golden.raw", tmp_path / "linked"
    golden.write_bytes(bytes(1 << 20))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", golden.name, "-F", "raw", linked)
    assert user_of(str(golden), "", "", [], []) == f"the image {linked}"
    assert user_of(str(golden), "", "", [], [], beside=False) == ""
    assert user_of(str(golden), "", "", [], [str(tmp_path)], beside=False) != ""


def test_an_image_whose_data_are_elsewhere_lies_on_others(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "whole", "1M")
    apart = ("-o", f"data_file={tmp_path / 'data'}")
    run("qemu-img", "create", "-q", "-f", "qcow2", *apart, tmp_path / "apart", "1M")
    for name, expected in (("whole", False), ("apart", True)):
        fd = os.open(tmp_path / name, os.O_RDONLY)
        try:
            assert chain.lies_on_others(fd, "qcow2") is expected
            assert not chain.lies_on_others(fd, "raw")
        finally:
            os.close(fd)
