"""The Method protocol: what a way of taking snapshots must offer to the engine.

All functions block and run in worker threads. They know neither D-Bus nor libvirt. They raise
SnapdErrors, with the reason as one sentence.

`check` changes nothing, so that Plan is the same code as Create; `prepare` tells what it made
before others can find it, so that a daemon killed at any moment finds it again in its journal.

`check`, `prepare` and `create` are called once for all disks of an operation that the method takes,
as some storages can take several at one instant. The tag that they, `taken` and `undo` are given is
the operation's; that of `claim`, `check_delete` and `delete` is the snapshot's own. That of `claim`
says of which operation it is (`Tag.operation`), for storages that give it one name for several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from snapd_vm.errors import HypervisorUnavailable
from snapd_vm.model import Disk, Domain, MethodRequest, Needs, Tag, Target

Record = Callable[[Sequence[Target]], None]
"""Writes targets durably into the journal; blocks until it is done."""


BASE_IN_USE = (
    "A domain's definition names the image that the snapshot is; correct it, or what was written "
    "since is lost and the snapshot changes."
)
"""What a Warning says of it."""


class Watch(Protocol):
    """Who watches a long operation, and may ask it to stop; called from the worker thread."""

    @property
    def cancelled(self) -> bool: ...

    def progress(self, done: int, total: int) -> None:
        """So many bytes of so many; total 0: unknown."""

    def past_return(self) -> None:
        """From here it can't be cancelled. Raises Cancelled if that was asked for before."""

    def spoil(self) -> None:
        """From here the contents of what is being deleted change: broken off, it is spoilt."""

    @property
    def spoilt(self) -> bool:
        """Whether that was said."""


class Kept(HypervisorUnavailable):
    """A snapshot can't be undone without losing the guest's writes, and stands."""

    dbus_name = HypervisorUnavailable.dbus_name


class Method(Protocol):
    """One way of taking snapshots."""

    @property
    def name(self) -> str: ...

    @property
    def redirects(self) -> bool:
        """Whether the domain uses another image once the snapshot is taken."""

    def together(self, targets: Sequence[Target]) -> bool:
        """Whether `create` takes these, or this one, at one instant, and not bit by bit."""

    def suits(self, disk: Disk) -> str:
        """What kind of disk it is, in words, that the method is the default for."""

    def claim(
        self, domain: Domain, disk: Disk, request: MethodRequest | None, tag: Tag
    ) -> Target | None:
        """What this method would act on, without a change; None: not a disk for it.

        `request` is what the caller asked of this method, if anything. Raises MethodNotSupported
        (or another SnapdError) where the disk is one for it but can't be done.
        """

    def source(self, target: Target, disk: Disk) -> tuple[Disk, str]:
        """What will read the immutable view: a Disk whose source it is, and the image's format."""

    def size(self, target: Target) -> int:
        """The virtual size of the disk in bytes; after it is known, it is in the target."""

    def check(self, targets: Sequence[Target], tag: Tag) -> Needs:
        """Everything that can be refused, without a change: names, space, tools, users."""

    def prepare(self, targets: Sequence[Target], tag: Tag, record: Record) -> Sequence[Target]:
        """Make what can be made before the guest is frozen; returns the targets with what it knows.

        Calls `record` once with those, before anything has a name that others could take as theirs.
        """

    def create(self, targets: Sequence[Target], tag: Tag) -> None:
        """Take the snapshots; the only part inside the freeze."""

    def taken(self, target: Target, tag: Tag, domain: Domain | None = None) -> bool:
        """Whether the snapshot is there, whole, and known to all who must know it.

        `domain` is as libvirt has just described it; None: it is read anew.
        """

    def undo(self, target: Target, tag: Tag, *, again: bool) -> bool:
        """Take back what a Create did, however far it came; the disk's present contents stay.

        `again`: it may have been tried before, and cut off.
        False: nothing was there. Raises Kept where the snapshot can't be taken back and stands.
        """

    def check_delete(self, target: Target, tag: Tag) -> None:
        """Everything for which a delete can be refused, without a change: readers, users, space."""

    def delete(self, target: Target, tag: Tag, watch: Watch) -> None:
        """Remove a snapshot that stands; the disk's present contents, and other snapshots', stay.

        May be called again after it was broken off at any moment. Raises Cancelled if `watch` says
        so in time: all is as it was then, unless `watch.spoil()` was called, after which the
        deleted snapshot's own contents are not.
        """

    def moved(self, deleted: Target, other: Target) -> Target | None:
        """What another snapshot's Target is now, if the delete has moved its source; else None."""

    def state(self, target: Target, domains: Mapping[str, Domain]) -> str:
        """ "ready", "missing", "failed" or "detached": what the storage and the domains say now.

        `domains` are all that there are, by UUID.
        """


@dataclass(frozen=True, slots=True)
class Standing:
    """How a snapshot stands: `state` as Method.state says, and `why`, for the log, with paths.

    `code` and `message` are for a Warning where there is something to be done; the message goes to
    everybody, so it names no path. `released`: although it is "failed", a delete has nothing to do
    but to drop the record, as nothing of it is left that we may touch. `removable`: although it is
    "failed", it is deleted as one that is "ready".
    """

    state: str
    why: str = ""
    code: str = ""
    message: str = ""
    released: bool = False
    removable: bool = False


@runtime_checkable
class Shows(Protocol):
    """A Method whose backup source may not be there to be read although the snapshot is, as when
    what was mounted for it is gone since the host was started anew.
    """

    def show(self, target: Target) -> None:
        """Let the backup source of a snapshot that stands be there. Raises SnapdErrors."""


@runtime_checkable
class Explains(Protocol):
    """A Method that can say why a snapshot stands as it does, and which files its record is of."""

    def standing(self, target: Target, domains: Mapping[str, Domain]) -> Standing:
        """What `state` says, and why; looks, and changes nothing."""

    def files(self, target: Target) -> Sequence[str]:
        """The files of the snapshot that may bear our mark, there or not; or what the storage calls
        it, where that has snapshots.
        """


@dataclass(frozen=True, slots=True)
class Stored:
    """A snapshot of ours as the storage itself tells of it.

    `place` is its name as Explains.files gives it; `snapshot` and `name` are its UUID and label,
    `domain` is the domain's name, each '' where the storage does not say. `use` is in words who
    uses it; `command` would remove it, '' where none can safely be named.
    """

    place: str
    snapshot: str
    name: str
    domain: str
    use: str
    command: str


@runtime_checkable
class Lists(Protocol):
    """A Method whose storage can be asked for all snapshots of ours, on record or not."""

    def stored(self, domains: Mapping[str, Domain]) -> Iterable[Stored]:
        """Every snapshot that bears our mark on the storages that these domains' disks are on;
        looks, and changes nothing. Asked once, after the start.
        """


@runtime_checkable
class OnRequest(Protocol):
    """A Method that says whether it is the default for no disk, and taken only if it is named."""

    @property
    def on_request(self) -> bool: ...


@runtime_checkable
class Ways(Protocol):
    """A Method that can say without `check`, for next to nothing, where it won't enter a folder on
    the way to the disk's image, or to what it makes, as others than root can change it.
    """

    def check_way(self, target: Target) -> None:
        """Raises MethodNotSupported, and StorageFailed where a folder can't be opened."""


@runtime_checkable
class Warns(Protocol):
    """A Method that can tell of trouble to come, too."""

    def warnings(self, target: Target, domains: Mapping[str, Domain]) -> Mapping[str, str]:
        """What will soon go wrong with a snapshot or because of it: sentences by their codes.

        Asked every few seconds, so it is to cost next to nothing; a caller is told of a code when
        it appears. The sentences go to everybody, so they name no path. `domains` are all that
        there are, by UUID.
        """


@runtime_checkable
class Reverts(Protocol):
    """A method that can also bring a disk back to a snapshot of its own, the domain being off.

    What is done, in order: `check_revert`; its answer goes into the journal; `prepare_revert`;
    `revert`; `settle_revert`. The last is also the way back, after an error and after a daemon was
    killed at any moment: a disk is reverted or it is as it was.
    """

    def check_revert(self, target: Target, tag: Tag, others: Sequence[Target]) -> Target:
        """Everything for which a revert can be refused, without a change; `others` are the Targets
        of the disk's other snapshots, of all methods.

        The Target that it returns says all that the rest has to know.
        """

    def prepare_revert(self, target: Target, tag: Tag, record: Record) -> Target:
        """Make what can be made before the disk changes; returns the Target with what it knows.

        Calls `record` once with that, before anything has a name that others could take as theirs.
        """

    def revert(self, target: Target, tag: Tag, watch: Watch) -> None:
        """Let the disk be the snapshot's; what it held until now is kept by the storage still.

        Raises InvalidState if the domain was started meanwhile, and Cancelled if `watch` says so.
        """

    def settle_revert(self, target: Target, tag: Tag) -> bool:
        """True: the disk is reverted, and what it held is removed. False: it is as it was, and
        what was prepared is removed. It may be called again, whatever has happened in between.
        """

    def reverted(self, target: Target, other: Target) -> Target | None:
        """What the Target of the snapshot itself, or of another of its disk, is after the revert;
        None: what it was.
        """

    def among(self, target: Target, others: Sequence[Target]) -> Target:
        """The Target with what a delete has to know of the domain's other snapshots."""


@runtime_checkable
class Forgets(Protocol):
    """A method that Reverts, and keeps on the storage how far a revert came."""

    def forget_revert(self, target: Target) -> None:
        """Take that away, if it is there: the disk is reverted, and the journal says so."""
