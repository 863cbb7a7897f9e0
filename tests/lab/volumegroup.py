"""A volume group of the test's own, with all that lvm says of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.lab.program import run

MIB = 1 << 20


class Group:
    """A volume group; its name is made of letters and a hyphen, which lvm doubles."""

    def __init__(self, device: Path, name: str = "snapd-lab") -> None:
        self.name = name
        if Path("/dev", name).exists():  # of tests that were killed
            run("vgremove", "-q", "-y", "-ff", "--", name)
        run("pvcreate", "-q", "-y", "-ff", device)
        run("vgcreate", "-q", "-y", name, device)

    def linear(self, name: str, mib: int = 32) -> Path:
        """A thick volume; its device."""
        run("lvcreate", "-q", "-y", "-Wn", "-n", name, "-L", f"{mib}M", self.name)
        return self.device(name)

    def pool(self, name: str = "pool", mib: int = 256) -> str:
        """A thin pool; its name."""
        run("lvcreate", "-q", "-y", "--type", "thin-pool", "-n", name, "-L", f"{mib}M", self.name)
        return name

    def thin(self, name: str, mib: int = 32, pool: str = "pool") -> Path:
        """A thin volume; its device."""
        run("lvcreate", "-q", "-y", "-n", name, "-V", f"{mib}M", "--thinpool", pool, self.name)
        return self.device(name)

    def device(self, name: str) -> Path:
        """The device of a volume."""
        return Path(f"/dev/{self.name}/{name}")

    def volumes(self) -> Mapping[str, Mapping[str, str]]:
        """What lvs says of each volume, by name."""
        words = ("lvs", "--reportformat", "json", "-o", "lv_name,lv_attr,lv_tags,origin,lv_uuid")
        rows = json.loads(run(*words, "--", self.name))["report"][0]["lv"]
        return {row["lv_name"]: row for row in rows}

    def contents(self) -> list[str]:
        """All volumes, with what they are: type, rights and origin."""
        return sorted(
            f"{name} {row['lv_attr'][:2].replace('o', '-')} {row['origin']}"
            for name, row in self.volumes().items()
        )

    def suspended(self) -> list[str]:
        """Devices that stand still."""
        found = []
        for place in Path("/sys/block").glob("dm-*"):
            with suppress(OSError):  # it goes in this moment
                if (place / "dm/suspended").read_text().strip() == "1":
                    found.append((place / "dm/name").read_text().strip())
        return found

    def remove_volumes(self, *kept: str) -> None:
        """Take away all volumes but these, as after a test that failed."""
        for name, row in self.volumes().items():
            if name not in kept and row["lv_attr"][0] != "t":
                run("lvremove", "-q", "-y", "-f", "--", f"{self.name}/{name}")

    def remove(self) -> None:
        """Take it away before the run ends."""
        run("vgremove", "-q", "-y", "-f", "--", self.name)


def fill(device: Path, mib: int, at_mib: int = 0) -> None:
    """Write something new there."""
    with device.open("r+b") as file:
        file.seek(at_mib * MIB)
        for _ in range(mib):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path | str) -> bytes:
    """All that is there."""
    return Path(path).read_bytes()
