"""`make demo`: a quiesced snapshot of a running guest, made over D-Bus, read and deleted.

Each `+` line is a command as it is run. Ends with status 0 only if everything was as promised.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.lab.deadline import LabError
from tests.lab.guest import Guest
from tests.lab.lab import Lab

NAME = "org.example.DiskSnapshot"
ROOT = "/org/example/DiskSnapshot"
OURS = "{https://example.org/xmlns/disk-snapshot/1}"
QUIESCE_REQUIRED = "1"
DISK = "<disk><target dev='vda'/></disk>"


class BrokenPromiseError(Exception):
    """Something was not as it should be; the message says what."""


class Show:
    """Runs commands before the eyes of a person, and keeps count of what was promised."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def title(self, text: str) -> None:
        """A line that says what comes."""
        print(f"\n== {text}", flush=True)

    def note(self, text: str) -> None:
        """What a person should see in it."""
        if text:
            print(textwrap.indent(text, "   "), flush=True)

    def run(self, *argv: str | Path, show: bool = True, status: int = 0) -> str:
        """Runs a command on the lab's bus, shown, and returns its output."""
        words = [str(word) for word in argv]
        print(f"+ {' '.join(map(quoted, words))}", flush=True)
        done = self._lab.as_user(None, words, timeout=120)
        if show:
            self.note(done.stdout.rstrip())
        if done.returncode != status:
            raise BrokenPromiseError(f"status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def call(self, path: str, interface: str, member: str, *arguments: str) -> Any:
        """Calls a method with busctl, shown, and returns what it answered."""
        words = ("busctl", "--json=short", "--timeout=1h", "call", NAME, path, interface, member)
        return json.loads(self.run(*words, *arguments, show=False))["data"]

    def promise(self, what: str, kept: object) -> None:
        """Says whether a promise was kept. Raises BrokenPromiseError where it was not."""
        if not kept:
            raise BrokenPromiseError(what)
        self.note(f"✓ {what}")


def demonstrate(lab: Lab, guest: Guest) -> None:
    """The whole of it on one running guest. Raises BrokenPromiseError."""
    show = Show(lab)
    domain = f"{ROOT}/domain/_{guest.uuid.replace('-', '_')}"

    show.title("The service on the bus")
    show.run("busctl", "tree", "--no-pager", NAME)
    show.run("busctl", "introspect", "--no-pager", NAME, domain, f"{NAME}.Domain")

    show.title("The guest's disk, and what a snapshot would be")
    for disk in show.call(domain, f"{NAME}.Domain", "Disks")[0]:
        show.note("\n".join(f"{key}: {value['data']}" for key, value in disk.items()))
    plan = show.call(domain, f"{NAME}.Domain", "Plan", "sssu", DISK, "", "demo", QUIESCE_REQUIRED)
    show.note("\n".join(f"{key}: {value['data']}" for key, value in plan[0].items()))

    show.title("A snapshot that must be quiesced, while the guest writes without a pause")
    guest.write("vda", "before", "written before the snapshot")
    guest.reset()
    began = time.monotonic()
    modified_disk, backup_source = show.call(
        domain, NAME, "Create", "sssu", DISK, "", "demo", QUIESCE_REQUIRED
    )
    took = time.monotonic() - began
    guest.writes_go_on()
    stall = guest.longest_stall()
    guest.write("vda", "after", "written after the snapshot")
    show.note(f"modified_disk, which the guest writes to now:\n{modified_disk}")
    show.note(f"backup_source, to read from:\n{backup_source}")

    source = ElementTree.fromstring(backup_source)
    path = source.get(f"{OURS}snapshot", "")
    show.run("busctl", "introspect", "--no-pager", NAME, path, f"{NAME}.Snapshot")
    snapshot = show.call(
        path, "org.freedesktop.DBus.Properties", "GetAll", "s", f"{NAME}.Snapshot"
    )[0]
    show.promise("it is quiesced", snapshot["Consistency"]["data"] == "quiesced")
    show.promise("and says so in the source", source.get(f"{OURS}consistency") == "quiesced")
    show.promise("the guest agent froze its file system", snapshot["FrozenFilesystems"]["data"] > 0)
    show.promise("the guest runs and writes on", guest.state == "running")
    show.note(
        f"frozen for {snapshot['FrozenTime']['data'] / 1000:.0f} ms; the whole command took"
        f" {took * 1000:.0f} ms;\nthe longest that the guest itself saw its disk stand still:"
        f" {stall * 1000:.0f} ms"
    )

    show.title("Reading the snapshot")
    read_snapshot(show, lab, guest, Path(source.get("file", "")), source.get(f"{OURS}format", ""))

    show.title("The same by the command line")
    listed = show.run(sys.executable, "-m", "snapd_vm", "list", guest.name)
    show.promise("it is listed", "demo" in listed and "quiesced" in listed)

    show.title("The snapshot deleted, while the guest writes on")
    overlay = image_of(modified_disk)
    delete_snapshot(show, lab, guest, path, Path(source.get("file", "")), overlay)


def delete_snapshot(
    show: Show, lab: Lab, guest: Guest, path: str, base: Path, overlay: Path
) -> None:
    """Deletes the snapshot with this object, and looks at what is left."""
    images = ("virsh", "--connect", lab.hypervisor.uri, "domblklist", guest.name)
    show.run(*images)
    guest.reset()
    began = time.monotonic()
    (modified_disk,) = show.call(path, f"{NAME}.Snapshot", "Delete", "u", "0")
    took = time.monotonic() - began
    guest.writes_go_on()
    stall = guest.longest_stall()
    show.note(f"modified_disk, which the guest writes to now:\n{modified_disk}")
    show.note(
        f"the whole command took {took * 1000:.0f} ms; the longest that the guest itself saw its"
        f" disk stand still: {stall * 1000:.0f} ms"
    )
    for definition in ((), ("--inactive",)):
        used = show.run(*images, *definition)
        show.promise("it is its first image", f" {base}\n" in used and str(overlay) not in used)
    show.promise("the answer says so too", image_of(modified_disk) == base)
    show.promise("the overlay's file is gone", not overlay.exists())
    tree = show.run("busctl", "tree", "--list", NAME)
    show.promise("and so is the snapshot's object", path not in tree.splitlines())
    for file in ("before", "after"):
        kept = guest.read("vda", file)
        show.promise(f"the guest has what it wrote {file} the snapshot", f"written {file}" in kept)


def image_of(disk: str) -> Path:
    """The file of a `<disk>`."""
    source = ElementTree.fromstring(disk).find("source")
    return Path(source.get("file", "") if source is not None else "")


def read_snapshot(show: Show, lab: Lab, guest: Guest, image: Path, image_format: str) -> None:
    """Copies the view out, twice, and looks at the file system in it."""
    first, second = (lab.folder("copies") / name for name in ("first.raw", "second.raw"))
    copy = ("qemu-img", "convert", "-f", image_format, "-O", "raw", image)
    show.run(*copy, first)
    guest.writes_go_on()
    show.run(*copy, second)
    show.promise(
        "the guest has written between two copies, and they are equal", same(first, second)
    )

    show.run("e2fsck", "-fn", first)
    show.promise("e2fsck finds it clean", True)
    features = show.run("dumpe2fs", "-h", first, show=False)
    show.promise("its journal needs no recovery", "needs_recovery" not in features)
    before = show.run("debugfs", "-R", "cat /before", first)
    show.promise("what was written before is in it", "written before" in before)
    after = show.run("debugfs", "-R", "cat /after", first)
    show.promise("what was written after is not", "written after" not in after)
    show.promise("but the guest has it", "written after" in guest.read("vda", "after"))


def quoted(word: str) -> str:
    """A word as a person would write it for the shell: XML, which has quotes, in double quotes."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def same(first: Path, second: Path) -> bool:
    """Whether two files have the same contents."""
    sums = [hashlib.sha256(path.read_bytes()).digest() for path in (first, second)]
    return sums[0] == sums[1]


def main(arguments: Sequence[str] = ()) -> int:
    """Starts what is needed, shows it, takes it away."""
    if arguments:
        print("usage: python -m tests.lab.demo", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("The demo starts a bus, libvirtd and a guest: run it as root.", file=sys.stderr)
        return 1
    try:
        print("== Starting a private bus, polkitd, libvirtd and a guest", flush=True)
        with Lab() as lab:
            guest = lab.guest(name="web")
            lab.daemon.start()
            demonstrate(lab, guest)
            print("\n== Taking it all down", flush=True)
    except (BrokenPromiseError, LabError) as error:
        print(f"\nNot as promised: {error}", file=sys.stderr)
        return 1
    print("\nAll as promised.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
