"""The method `copy` for snapd-vm: a copy of the disk's raw file, made while the guest stands still.

It shows all that a method must do and be; see README.md and snapd-vm's docs/writing-a-method.md.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
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
    InvalidState,
    Json,
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
_MARK = "user.snapd-vm-copy"
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


@dataclasses.dataclass(slots=True)
class _Draft:
    """A copy that has no name yet."""

    fd: int
    whole: bool = False


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
        self._drafts: dict[tuple[str, str], _Draft] = {}

    def together(self, targets: Sequence[Target]) -> bool:
        """A copy takes its time, so even of one the guest's CPUs stand still, frozen or not."""
        return False

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
        """Files without a name (O_TMPFILE), which go with the daemon, should it be killed.

        The journal is told which they are before anything of it has a name.
        """
        prepared = []
        for target in targets:
            try:
                fd = os.open(self._folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o444)
                self._drafts[tag.uuid, target.disk] = _Draft(fd)
                os.setxattr(fd, _MARK, f"{target.data['label']}\n{target.data['domain']}".encode())
            except OSError as error:
                raise StorageFailed(f"No copy can be made: {error.strerror}.") from error
            data: dict[str, Json] = {**target.data, "made": os.fstat(fd).st_ino}
            prepared.append(dataclasses.replace(target, data=data))
        record(prepared)
        return prepared

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        """The guest stands still: nothing but the copying."""
        for target in targets:
            draft = self._drafts[tag.uuid, target.disk]
            try:
                _copy(_text(target, "image"), draft.fd)
            except OSError as error:
                kind = NoSpace if error.errno == errno.ENOSPC else StorageFailed
                raise kind(f"The image can't be copied: {error.strerror}.") from error
            draft.whole = True

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        """In this life, of what `create` has made, which gets its name now that the guest goes on;
        in the next, of what may be there: what has the name, and is ours, is whole.
        """
        draft = self._drafts.get((tag.uuid, target.disk))
        if draft is not None:
            if not draft.whole:
                return False
            try:
                os.fsync(draft.fd)
                _give_name(draft.fd, _text(target, "copy"))
            except FileExistsError:
                raise NameInUse("There is a file of the copy's name already; move it.") from None
            except OSError as error:
                raise StorageFailed(f"The copy can't be named: {error.strerror}.") from error
            self._close(target, tag)
        return _is_ours(target)

    def undo(self, target: Target, tag: Tag, *, again: bool) -> bool:
        """Whatever is there of ours goes; it may be nothing, and called again."""
        closed = self._close(target, tag)
        return self._remove(target) or closed

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
        if _is_ours(target):
            return Standing("ready")
        return Standing("missing", f"{_text(target, 'copy')} is not there, or another file")

    def files(self, target: Target) -> Sequence[str]:
        """Explains."""
        return [_text(target, "copy")]

    def stored(self, domains: Mapping[str, Domain]) -> Iterable[Stored]:
        """Lists: told of once after the start, if they are on no record."""
        for path in Path(self._folder).glob(f"{_PREFIX}*"):
            try:
                label, _, domain = os.getxattr(path, _MARK).decode(errors="replace").partition("\n")
            except OSError:  # it has no mark
                continue
            uuid = path.name.removeprefix(_PREFIX)
            words = shlex.join(["rm", "-f", "--", str(path)])
            yield Stored(str(path), uuid, label, domain, "nobody uses it", words)

    # -- Reverts: another copy takes the image's place, the domain being off ---------------------

    def check_revert(self, target: Target, tag: Tag, others: Sequence[Target]) -> Target:
        """The disk must be the one that the snapshot is of, nobody's else, and there be room."""
        image, domain = _text(target, "image"), self._off(tag)
        disk = domain.disk(target.disk)
        if disk is None or os.path.realpath(disk.path) != image:
            raise InvalidState(f"Disk {target.disk} has another image now; there is no way back.")
        who = self._context.other_user_of(domain, disk) or self._context.reader_of(image)
        if who:
            raise Busy(f"The image of disk {target.disk} is also used by {who}.")
        try:
            needed = os.stat(_text(target, "copy")).st_blocks * 512
            available = shutil.disk_usage(os.path.dirname(image)).free
        except OSError as error:
            raise StorageFailed(f"The snapshot can't be used: {error.strerror}.") from error
        if needed > available:
            raise NoSpace(f"The revert needs {needed} bytes, and {available} are free; make room.")
        return target

    def prepare_revert(self, target: Target, tag: Tag, record: Record) -> Target:
        """A copy beside the image, which has a name once the journal knows it by its inode."""
        image = _text(target, "image")
        try:
            was = os.stat(image)
            fd = os.open(os.path.dirname(image), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                target = dataclasses.replace(
                    target, data={**target.data, "new": os.fstat(fd).st_ino, "old": was.st_ino}
                )
                record([target])
                _copy(_text(target, "copy"), fd)
                os.fchown(fd, was.st_uid, was.st_gid)
                os.fchmod(fd, stat.S_IMODE(was.st_mode))
                os.fsync(fd)
                _give_name(fd, _beside(target))
            finally:
                os.close(fd)
        except OSError as error:
            kind = NoSpace if error.errno == errno.ENOSPC else StorageFailed
            raise kind(f"The snapshot can't be copied back: {error.strerror}.") from error
        return target

    def revert(self, target: Target, tag: Tag, watch: Watch) -> None:
        """At one instant, so that there is nothing in between; what it was keeps a name."""
        watch.past_return()
        self._off(tag)
        image, kept = _text(target, "image"), _beside(target, "discarded")
        try:
            os.link(image, kept)
            if _inode(kept) != target.data["old"]:
                os.unlink(kept)
                raise StorageFailed("The image was replaced meanwhile; try again.")
            os.replace(_beside(target), image)
            _sync(os.path.dirname(image))
        except OSError as error:
            raise StorageFailed(f"The image can't be replaced: {error.strerror}.") from error

    def settle_revert(self, target: Target, tag: Tag) -> bool:
        """The image is the new file, or that is not needed any more; nor is what it was."""
        if "new" not in target.data:
            return False
        image, kept = _text(target, "image"), _beside(target, "discarded")
        try:
            done = os.lstat(image).st_ino == target.data["new"]
            if done and _inode(kept) == target.data["old"] and self._runs_on(kept, tag):
                os.replace(kept, image)  # a QEMU had opened it just before it was replaced
                done = False
            for path, inode in ((_beside(target), "new"), (kept, "old")):
                if _inode(path) == target.data[inode]:
                    os.unlink(path)
            _sync(os.path.dirname(image))
        except OSError as error:
            raise StorageFailed(f"The revert can't be settled: {error.strerror}.") from error
        return done

    def reverted(self, target: Target, other: Target) -> Target | None:
        """All copies are what they were."""
        return None

    def among(self, target: Target, others: Sequence[Target]) -> Target:
        """No copy depends on another."""
        return target

    def _runs_on(self, path: str, tag: Tag) -> bool:
        # Who has it open first: the domain may be gone, and then nobody has.
        return bool(self._context.reader_of(path)) and self._context.domain(tag.domain_uuid).active

    def _off(self, tag: Tag) -> Domain:
        domain = self._context.domain(tag.domain_uuid)
        self._context.check_off(domain)
        return domain

    def _remove(self, target: Target) -> bool:
        if not _is_ours(target):
            return False
        try:
            os.unlink(_text(target, "copy"))
            _sync(self._folder)
        except OSError as error:
            raise StorageFailed(f"The copy can't be removed: {error.strerror}.") from error
        return True

    def _close(self, target: Target, tag: Tag) -> bool:
        draft = self._drafts.pop((tag.uuid, target.disk), None)
        if draft is not None:
            os.close(draft.fd)
        return draft is not None


def _text(target: Target, key: str) -> str:
    return str(target.data[key])


def _is_ours(target: Target) -> bool:
    """Whether what has the copy's name is the file that was made: told by its inode."""
    try:
        return "made" in target.data and _inode(_text(target, "copy")) == target.data["made"]
    except OSError:
        return False


def _inode(path: str) -> int | None:
    """Of what has the name; None: nothing has. What can't be looked at raises OSError."""
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return None


def _beside(target: Target, suffix: str = "revert") -> str:
    """The copy that is to take the image's place, or a second name of what that has taken."""
    return f"{_text(target, 'image')}.{os.path.basename(_text(target, 'copy'))}.{suffix}"


def _stat(target: Target) -> os.stat_result:
    """Of the image, if it is still the one that was claimed."""
    try:
        found = os.stat(_text(target, "image"))
    except OSError as error:
        raise StorageFailed(f"The image can't be read: {error.strerror}.") from error
    if found.st_ino != target.data["inode"] or not stat.S_ISREG(found.st_mode):
        raise StorageFailed("The image was replaced meanwhile; try again.")
    return found


def _copy(image: str, copy: int) -> None:
    """Copy what is no hole, by shared extents where the file system has them."""
    with open(image, "rb") as file:
        origin = file.fileno()
        end = os.fstat(origin).st_size
        at = 0
        while at < end:
            try:
                at = os.lseek(origin, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # nothing but a hole is left
            stop = os.lseek(origin, at, os.SEEK_HOLE)
            while at < stop:
                done = _copy_range(origin, copy, stop - at, at)
                if done == 0:
                    raise OSError(errno.EIO, "the image has become shorter")
                at += done
        os.ftruncate(copy, end)


def _copy_range(origin: int, copy: int, count: int, at: int) -> int:
    try:
        return os.copy_file_range(origin, copy, count, at, at)
    except OSError as error:
        if error.errno != errno.EXDEV:  # from one kind of file system to another
            raise
    os.lseek(copy, at, os.SEEK_SET)
    return os.sendfile(copy, origin, at, count)


def _give_name(fd: int, path: str) -> None:
    """linkat(2), which replaces nothing; Python calls it only with a descriptor of the folder."""
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(f"/proc/self/fd/{fd}", os.path.basename(path), dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        os.close(folder)


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
