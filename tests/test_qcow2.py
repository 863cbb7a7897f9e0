"""A new qcow2 image is what `qemu-img create` would have made, and QEMU writes to it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from snapd_vm import qcow2, storage

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")

GIB = 1 << 30
SIZES = [512, 1 << 20, GIB // 2, GIB // 2 + 512, 100 * GIB, 4096 * GIB, 4096 * GIB + 512, 1 << 46]


def tool(*argv: str | Path) -> str:
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def described(path: Path) -> dict[str, Any]:
    """What qemu-img says of it, but for where it is and how much of the host's disk it takes."""
    found: dict[str, Any] = json.loads(tool("qemu-img", "info", "-U", "--output=json", path))
    for key in ("filename", "actual-size"):
        del found[key]
    return found


def written(path: Path, size: int, base: Path, base_format: str) -> Path:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    qcow2.write_new(fd, size, str(base), base_format)
    os.close(fd)
    return path


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_what_qemu_img_makes(tmp_path: Path, size: int, base_format: str) -> None:
    base = tmp_path / "base"
    tool("qemu-img", "create", "-q", "-f", base_format, base, "1M")
    ours = written(tmp_path / "ours", size, base, base_format)
    theirs = tmp_path / "theirs"
    create = ("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", base_format, "-b", base)
    tool(*create, theirs, str(size))
    assert described(ours) == described(theirs)
    assert "No errors" in tool("qemu-img", "check", "-f", "qcow2", ours)
    assert json.loads(tool("qemu-img", "check", "-f", "qcow2", "--output=json", ours))[
        "image-end-offset"
    ] == qcow2.new_size(size)


@pytest.mark.parametrize("size", SIZES)
def test_qemu_writes_to_it_and_reads_the_rest_from_its_base(tmp_path: Path, size: int) -> None:
    base = tmp_path / "base"
    tool("qemu-img", "create", "-q", "-f", "raw", base, str(min(size, 1 << 40)))
    tool("qemu-io", "-f", "raw", "-c", "write -P 0x11 0 512", base)
    ours = written(tmp_path / "ours", size, base, "raw")
    assert "Pattern" not in tool("qemu-io", "-f", "qcow2", "-c", "read -P 0x11 0 512", ours)
    last = size - 512
    tool("qemu-io", "-f", "qcow2", "-c", f"write -P 0x22 {last} 512", ours)
    assert "Pattern" not in tool("qemu-io", "-f", "qcow2", "-c", f"read -P 0x22 {last} 512", ours)
    assert "No errors" in tool("qemu-img", "check", "-f", "qcow2", ours)


def test_our_own_reader_agrees(tmp_path: Path) -> None:
    ours = written(tmp_path / "ours", GIB, tmp_path / "a name, ünusual", "raw")
    fd = os.open(ours, os.O_RDONLY)
    found = qcow2.read_header(fd)
    os.close(fd)
    assert found == qcow2.Header(GIB, str(tmp_path / "a name, ünusual"), "raw", False)


def test_a_backing_name_may_be_1023_bytes_long(tmp_path: Path) -> None:
    longest = "/" + "x" * 1022
    ours = written(tmp_path / "ours", GIB, Path(longest), "qcow2")
    assert described(ours)["backing-filename"] == longest
    with pytest.raises(ValueError, match="longer than 1023 bytes"):
        written(tmp_path / "other", GIB, Path(longest + "x"), "qcow2")


@pytest.mark.parametrize(
    "header",
    [
        b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(80),  # cut off
        b"QFI\xfb" + (2).to_bytes(4, "big") + (1 << 63).to_bytes(8, "big") + bytes(100),
        b"QFI\xfb" + (3).to_bytes(4, "big") + (2**64 - 1).to_bytes(8, "big") + bytes(100),
    ],
    ids=["short", "far", "farthest"],
)
def test_a_header_that_a_guest_may_have_made_up(tmp_path: Path, header: bytes) -> None:
    made_up = tmp_path / "made up"
    made_up.write_bytes(header)
    with made_up.open("rb") as file, pytest.raises(qcow2.NotQcow2):
        qcow2.read_header(file.fileno())
    assert list(storage.backing_chain(str(made_up))) == []
