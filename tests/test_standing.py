"""The table at the head of methods/qemu/standing.py, on real images, a row or more each."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from snapd_vm.methods.method import Standing
from snapd_vm.methods.qemu import standing
from snapd_vm.methods.qemu.layer import Layer
from snapd_vm.model import Disk, Domain, Target
from tests.bus.fakes import make_disk, make_domain
from tests.lab.program import run
from tests.real.places import image


class Case:
    """A domain whose vda has an overlay V on the image O, with the record of it."""

    def __init__(self, folder: Path) -> None:
        self.origin = image(folder / "disk.qcow2")
        self.overlay = image(folder / "disk.one", self.origin)
        self.other = image(folder / "other.qcow2")
        found = os.stat(self.overlay)
        self.domain = make_domain(1)
        self.layer = Layer.of(
            Target(
                "qemu",
                "vda",
                {
                    "domain": self.domain.uuid,
                    "instance": 1,
                    "origin": str(self.origin),
                    "origin_type": "file",
                    "origin_format": "qcow2",
                    "persistent": True,
                    "overlay": str(self.overlay),
                    "device": found.st_dev,
                    "inode": found.st_ino,
                },
            )
        )

    def stands(self, live: Path | None, definition: Path | None = None) -> Standing:
        """The snapshot with the domain running on `live` (None: off), next on `definition`."""
        next_time = definition or live or self.overlay
        domain = replace(
            self.domain,
            id=-1 if live is None else 1,
            disks=(disk(live or next_time),),
            persistent_disks=(disk(next_time),),
        )
        return self.of({domain.uuid: domain})

    def of(self, domains: Mapping[str, Domain]) -> Standing:
        return standing.of(self.layer, domains)

    def write(self) -> None:
        run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", self.overlay)

    def replace_overlay(self) -> None:
        os.rename(self.overlay, f"{self.overlay}.away")
        image(self.overlay, self.origin)


def disk(path: Path) -> Disk:
    return make_disk(path=str(path))


@pytest.fixture(params=["written", "empty"])
def case(tmp_path: Path, request: pytest.FixtureRequest) -> Case:
    made = Case(tmp_path)
    if request.param == "written":
        made.write()
    return made


def told(found: Standing) -> tuple[str, bool]:
    assert bool(found.why) == (found.state != "ready")
    assert "/" not in found.message
    return found.state, found.released


def test_ready_as_long_as_the_overlay_is_in_the_chain(case: Case) -> None:
    assert told(case.stands(case.overlay)) == ("ready", False)
    assert told(case.stands(None)) == ("ready", False)
    assert told(case.stands(image(case.other.with_name("two"), case.overlay))) == ("ready", False)


def test_it_runs_on_the_image_itself(case: Case) -> None:
    assert told(case.stands(case.origin)) == ("failed", True)
    assert told(case.stands(case.origin, case.other)) == ("failed", True)
    assert told(case.stands(case.origin, case.overlay)) == ("failed", False)
    upper = image(case.other.with_name("two"), case.overlay)
    assert told(case.stands(case.origin, upper)) == ("failed", False)


def test_the_definition_names_the_image(case: Case) -> None:
    assert told(case.stands(None, case.origin)) == ("failed", False)
    assert told(case.stands(case.overlay, case.origin)) == ("failed", False)
    assert told(case.stands(case.other, case.origin)) == ("failed", False)
    case.replace_overlay()
    assert told(case.stands(None, case.origin)) == ("failed", True)
    case.overlay.unlink()
    assert told(case.stands(None, case.origin)) == ("failed", True)


def test_another_domain_has_the_image(case: Case) -> None:
    other = make_domain(2, disks=(disk(case.origin),))
    own = replace(case.domain, disks=(disk(case.overlay),))
    assert told(case.of({own.uuid: own, other.uuid: other})) == ("failed", False)
    assert told(case.of({other.uuid: other})) == ("failed", False)


def test_the_overlay_is_open_for_writing_though_libvirt_says_otherwise(case: Case) -> None:
    argv = ["qemu-io", "-f", "qcow2", str(case.overlay)]
    with subprocess.Popen(argv, stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # its prompt: it has opened it
        assert told(case.stands(case.origin)) == ("failed", False)
        process.kill()


def test_the_overlay_is_not_in_the_chain(case: Case) -> None:
    upper = image(case.other.with_name("two"), case.origin)
    assert told(case.stands(upper)) == ("failed", True)
    assert told(case.stands(None, upper)) == ("failed", True)
    case.overlay.unlink()
    assert told(case.stands(upper)) == ("failed", True)


def test_the_overlay_is_gone_or_another_file(case: Case) -> None:
    case.replace_overlay()
    assert told(case.stands(case.overlay)) == ("detached", False)
    case.overlay.unlink()
    assert told(case.stands(None)) == ("detached", False)


def test_the_image_is_gone(case: Case) -> None:
    case.origin.unlink()
    assert told(case.stands(case.overlay)) == ("missing", False)


def test_domain_or_disk_are_gone(case: Case) -> None:
    assert told(case.of({})) == ("detached", False)
    without = replace(case.domain, disks=())
    assert told(case.of({without.uuid: without})) == ("detached", False)
    assert told(case.stands(case.other)) == ("detached", False)


def test_migrated_away(case: Case) -> None:
    off = replace(case.domain, id=-1, disks=(disk(case.overlay),), migrated=True)
    assert told(case.of({off.uuid: off})) == ("detached", False)
