"""What a revert that was cut off leaves of a file, wherever the image is by then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapd_vm.errors import NoSuchDomain, StorageFailed
from snapd_vm.methods import cloneback
from snapd_vm.methods.image import Image
from snapd_vm.model import Disk, Domain, Json, Tag, Target
from snapd_vm.storage import FileId

TAG = Tag("0b9a2f10-1111-4222-8333-444455556666", "name", "uuid", "web", 0)
DRAFT, KEPT = f"snapd-vm-{TAG.uuid}.revert", f"snapd-vm-{TAG.uuid}.discarded"


class Off:
    """A hypervisor with one domain, which is off and has a disk, or without any."""

    def __init__(self, path: str, known: bool) -> None:
        self.path, self.known = path, known

    def read(self, uuid: str) -> Domain:
        if not self.known:
            raise NoSuchDomain("There is none.")
        disk = Disk("vda", "disk", "file", "raw", self.path, f"<source file='{self.path}'/>", "")
        return Domain(uuid, "web", -1, "shutoff", "qemu", True, (disk,))

    def qemu_user(self) -> tuple[int, int]:
        return (0, 0)

    def managed_save(self, uuid: str) -> bool:
        return False

    def user_of(self, path: str, uuid: str, target: str, *, beside: bool = True) -> str:
        return ""


class Place:
    """A folder with an image of the disk's, and one that is to take its place."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)
        self.folder = folder
        self.image, self.draft, self.kept = folder / "image", folder / DRAFT, folder / KEPT
        self.image.write_text("old")
        self.draft.write_text("new")
        images = [Image(str(self.image), _identity(path)) for path in (self.image, self.draft)]
        plan: dict[str, Json] = {"discarded": images[0].as_json(), "made": images[1].as_json()}
        self.target = Target(method="reflink", disk="vda", data={"revert": plan})

    def switch(self) -> None:
        os.link(self.image, self.kept)
        self.draft.rename(self.image)

    def settle(self, *, known: bool = True, disk: str = "") -> bool:
        copy = cloneback.Origin("uuid", str(self.image), "raw", lambda _: None)
        off = Off(disk or str(self.image), known)
        return cloneback.settle(off, copy, self.target, TAG)

    def files(self) -> dict[str, str]:
        return {file.name: file.read_text() for file in self.folder.iterdir()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def _identity(path: Path) -> FileId:
    found = path.stat()
    return FileId(found.st_dev, found.st_ino)


def test_before_the_switch_it_is_as_it_was(place: Place) -> None:
    assert not place.settle()
    assert place.files() == {"image": "old"}


def test_after_the_switch_it_is_done(place: Place) -> None:
    place.switch()
    assert place.settle()
    assert place.files() == {"image": "new"}


def test_what_is_not_mounted_is_waited_for(place: Place, tmp_path: Path) -> None:
    away = tmp_path.with_name("away")
    away.mkdir()
    for file in list(tmp_path.iterdir()):
        file.rename(away / file.name)
    with pytest.raises(StorageFailed, match="mount its file system"):
        place.settle()
    for file in list(away.iterdir()):
        file.rename(tmp_path / file.name)
    assert not place.settle()
    assert place.files() == {"image": "old"}


def test_nothing_is_waited_for_where_the_domain_is_gone_too(place: Place) -> None:
    place.image.unlink()
    place.draft.unlink()
    assert not place.settle(known=False)
    assert not place.settle(disk="/elsewhere")
    with pytest.raises(StorageFailed):
        place.settle()


def test_an_image_that_was_moved_away_is_the_old_one_again(place: Place) -> None:
    place.switch()
    place.image.rename(place.folder / "elsewhere")
    assert not place.settle()
    assert place.files() == {"image": "old", "elsewhere": "new"}


def test_the_last_link_to_what_the_disk_held_is_kept(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.switch()
    (place.folder / "theirs").write_text("somebody's")  # with an inode of its own
    (place.folder / "theirs").rename(place.image)
    assert not place.settle()
    assert place.files() == {"image": "somebody's", KEPT: "old"}
    assert KEPT in caplog.text
