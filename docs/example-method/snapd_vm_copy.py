"""The method `copy` for snapd-vm: a copy of the disk's raw file, made while the guest stands still.

It shows all that a method must do and be; see README.md and snapd-vm's docs/writing-a-method.md.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import quoteattr

from snapd_vm.methods.plugin import (
    Busy,
    Context,
    Disk,
    Domain,
    MethodNotSupported,
    MethodRequest,
    NameInUse,
    Needs,
    NoSpace,
    Record,
    Standing,
    StorageFailed,
    Stored,
    Tag,
    Target,
    Watch,
)

_PREFIX = "snapd-vm-"
_SCHEMA = """
<element name="diskSnapshot" xmlns="http://relaxng.org/ns/structure/1.0"
         datatypeLibrary="http://www.w3.org/2001/XMLSchema-datatypes">
  <attribute name="method"><value>copy</value></attribute>
  <optional>
    <element name="note">
      <attribute name="text">
        <data type="string"><param name="maxLength">80</param></data>
      </attribute>
    </element>
  </optional>
</element>
"""


class Copy:
    """See the top of the file; made once, used from many threads."""

    protocol_version = 1
    """Of snapd_vm.methods.plugin, for which this was written."""

    redirects = False
    schema = _SCHEMA
    on_request = True

    def __init__(self, context: Context) -> None:
        self.name = context.name
        self._context = context
        folder = context.options.get("folder")
        if not isinstance(folder, str) or not folder.startswith("/"):
            raise ValueError("'plugins.copy.folder' must be an absolute path")
        self._folder = folder
        self._whole = set[str]()

    def together(self, targets: Sequence[Target]) -> bool:
        """One file is copied after the other, so of several the guest's CPUs stand still, too."""
        return len(targets) == 1

    def suits(self, disk: Disk) -> str:
        """It is the default for none."""
        return "no disk"

    def claim(
        self, domain: Domain, disk: Disk, request: MethodRequest | None, tag: Tag
    ) -> Target | None:
        """Raw files; changes nothing. What else is needed later goes into the Target."""
        image = os.path.realpath(disk.path)
        whole = disk.format == "raw" and not disk.encrypted and "<slice" not in disk.source_xml
        if disk.type != "file" or not whole or not os.path.isfile(image):
            raise MethodNotSupported(
                f"Disk {disk.target} is not a whole raw file, as method {self.name} needs it."
            )
        found = os.stat(image)
        return Target(
            self.name,
            disk.target,
            {
                "copy": os.path.join(self._folder, tag.storage_name),
                "image": image,
                "inode": found.st_ino,
                "note": request.options.get("note/@text", "") if request else "",
                "label": tag.label,
                "domain": domain.name,
            },
        )

    def source(self, target: Target, disk: Disk) -> tuple[Disk, str]:
        """The copy, as libvirt would write it."""
        path = _text(target, "copy")
        xml = f"<source file={quoteattr(path)}/>"
        return dataclasses.replace(disk, type="file", path=path, source_xml=xml), "raw"

    def size(self, target: Target) -> int:
        """The image's, in whole sectors, as QEMU sees it."""
        return -(-_stat(target).st_size // 512) * 512

    def check(self, targets: Sequence[Target], tag: Tag) -> Needs:
        """All that can be refused is refused here, as nobody stands still yet."""
        needed = sum(_stat(target).st_blocks * 512 for target in targets)
        try:
            available = shutil.disk_usage(self._folder).free
        except OSError as error:
            raise StorageFailed(f"The folder of copies can't be used: {error.strerror}.") from error
        if needed > available:
            raise NoSpace(f"The copy needs {needed} bytes, and {available} are free; make room.")
        if any(os.path.lexists(_text(target, "copy")) for target in targets):
            raise NameInUse("There is a file of the copy's name already; move it away.")
        return Needs(needed, available, ("The guest stands still for as long as the copy takes.",))

    def prepare(self, targets: Sequence[Target], tag: Tag, record: Record) -> Sequence[Target]:
        """Told to the journal first, made then: drafts, empty as yet."""
        record(targets)
        for target in targets:
            draft = _draft(target)
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return targets

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        """The guest stands still: nothing but the copying."""
        for target in targets:
            try:
                _copy(_text(target, "image"), _draft(target))
            except OSError as error:
                kind = NoSpace if error.errno == errno.ENOSPC else StorageFailed
                raise kind(f"The image can't be copied: {error.strerror}.") from error
            self._whole.add(_draft(target))

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        """Called in this life for what `create` has made, and in the next for what may be there.

        What has the name is whole: it is given here, when the guest goes on, to a copy that is
        durable. How much is in a draft that another life has left, nobody knows.
        """
        path, draft = Path(_text(target, "copy")), Path(_draft(target))
        if str(draft) in self._whole:
            self._whole.remove(str(draft))
            _sync(draft)
            draft.chmod(0o444)
            draft.rename(path)
            _sync(path.parent)
        return path.exists()

    def undo(self, target: Target, tag: Tag, *, again: bool) -> bool:
        """Whatever is there goes; it may be nothing."""
        return self._remove(target)

    def check_delete(self, target: Target, tag: Tag) -> None:
        """Not while somebody reads it."""
        path = _text(target, "copy")
        who = self._context.user_of(path) or self._context.reader_of(path)
        if who:
            raise Busy(f"The snapshot is being used by {who}; wait for its end.")

    def delete(self, target: Target, tag: Tag, watch: Watch) -> None:
        """It may be gone already."""
        watch.past_return()
        self._remove(target)

    def moved(self, deleted: Target, other: Target) -> Target | None:
        """No copy depends on another."""
        return None

    def state(self, target: Target, domains: Mapping[str, Domain]) -> str:
        """Asked twice a minute and before each use: the storage is the truth."""
        return self.standing(target, domains).state

    def standing(self, target: Target, domains: Mapping[str, Domain]) -> Standing:
        """Explains."""
        if os.path.isfile(_text(target, "copy")):
            return Standing("ready")
        return Standing("missing", f"{_text(target, 'copy')} is not there")

    def files(self, target: Target) -> Sequence[str]:
        """Explains."""
        return [_text(target, "copy")]

    def stored(self, domains: Mapping[str, Domain]) -> Iterable[Stored]:
        """Lists: told of once after the start, if they are on no record."""
        for path in Path(self._folder).glob(f"{_PREFIX}*"):
            uuid = path.name.removeprefix(_PREFIX)
            yield Stored(str(path), uuid, "", "", "nobody uses it", f"rm -- {path}")

    def _remove(self, target: Target) -> bool:
        found = False
        self._whole.discard(_draft(target))
        for path in (_text(target, "copy"), _draft(target)):
            try:
                os.unlink(path)
                found = True
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageFailed(f"The copy can't be removed: {error.strerror}.") from error
        return found


def _text(target: Target, key: str) -> str:
    return str(target.data[key])


def _draft(target: Target) -> str:
    folder, name = os.path.split(_text(target, "copy"))
    return os.path.join(folder, f".{name}.new")


def _stat(target: Target) -> os.stat_result:
    """Of the image, if it is still the one that was claimed."""
    try:
        found = os.stat(_text(target, "image"))
    except OSError as error:
        raise StorageFailed(f"The image can't be read: {error.strerror}.") from error
    if found.st_ino != target.data["inode"] or not stat.S_ISREG(found.st_mode):
        raise StorageFailed("The image was replaced meanwhile; try again.")
    return found


def _copy(image: str, draft: str) -> None:
    """Copy what is no hole, by shared extents where the file system has them."""
    with open(image, "rb") as origin, open(draft, "r+b") as copy:
        end = os.fstat(origin.fileno()).st_size
        at = 0
        while at < end:
            try:
                at = os.lseek(origin.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # nothing but a hole is left
            stop = os.lseek(origin.fileno(), at, os.SEEK_HOLE)
            while at < stop:
                done = os.copy_file_range(origin.fileno(), copy.fileno(), stop - at, at, at)
                if done == 0:
                    raise OSError(errno.EIO, "the image has become shorter")
                at += done
        copy.truncate(end)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
