"""Starts a command confined as the systemd unit says, on a machine where systemd is not PID 1.

    python -m tests.confine UNIT COMMAND...

It reads the unit and applies what decides whether the daemon can work: capabilities, no new
privileges, system calls, writable executable memory, address families, set-uid bits, and what is
read-only or hidden. DevicePolicy= needs systemd's cgroups, and is not applied; what only forbids
more of the same (namespaces, realtime, keyring, clock) is not either.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

CLONE_NEWNS = 0x00020000
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
ACT_ALLOW = 0x7FFF0000
ACT_EPERM = 0x00050000 | errno.EPERM
ACT_EAFNOSUPPORT = 0x00050000 | errno.EAFNOSUPPORT
CMP_EQ = 4
CMP_MASKED_EQ = 7
PROT_WRITE, PROT_EXEC = 2, 4
AF_MAX = 46
CAPABILITIES = "/usr/include/linux/capability.h"


class Comparison(ctypes.Structure):
    """libseccomp's struct scmp_arg_cmp: argument `number` masked with `a` equals `b`."""

    _fields_ = (
        ("number", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


class Unit:
    """A unit's settings, a list for each key in which lines that follow add up."""

    def __init__(self, path: Path) -> None:
        self._lines = [
            line.split("=", 1) for line in path.read_text().splitlines() if re.match(r"\w+=", line)
        ]

    def words(self, key: str) -> list[str]:
        """All words said for a key."""
        return [word for name, value in self._lines if name == key for word in value.split()]

    def on(self, key: str) -> bool:
        """Whether a switch is on."""
        return self.words(key) == ["yes"]


def system_calls(sets: Sequence[str]) -> set[str]:
    """The system calls of systemd's named sets, without those after "~"."""
    said = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout
    known: dict[str, list[str]] = {}
    for line in said.splitlines():
        if re.match(r"@[\w-]+$", line):
            known[line] = members = []
        elif line.startswith("    ") and not line.strip().startswith("#"):
            members.append(line.strip())

    def members_of(name: str) -> Iterator[str]:
        if not name.startswith("@"):
            yield name
        for member in known.get(name, ()):
            yield from members_of(member)

    # What follows "~" is taken away from what was said before (systemd.exec(5)).
    given, _, taken = (part.split() for part in " ".join(sets).partition("~"))
    return {call for name in ["@default", *given] for call in members_of(name)} - {
        call for name in taken for call in members_of(name)
    }


def filter_calls(unit: Unit) -> None:
    """What the unit's seccomp filters forbid is forbidden from here on."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_void_p,
    ]

    def call_number(name: str) -> int:
        number: int = library.seccomp_syscall_resolve_name(name.encode())
        return number

    def rule(context: int, action: int, name: str, *comparisons: Comparison) -> None:
        array = (Comparison * len(comparisons))(*comparisons)
        number = call_number(name)
        if number < 0:  # not on this architecture
            return
        if library.seccomp_rule_add_array(context, action, number, len(comparisons), array):
            raise OSError(f"no filter for {name}")

    def masked(argument: int, bits: int) -> Comparison:
        return Comparison(argument, CMP_MASKED_EQ, bits, bits)

    allowed = library.seccomp_init(ACT_EPERM)
    for name in system_calls(unit.words("SystemCallFilter")):
        rule(allowed, ACT_ALLOW, name)
    denied = library.seccomp_init(ACT_ALLOW)
    if unit.on("MemoryDenyWriteExecute"):
        rule(denied, ACT_EPERM, "mmap", masked(2, PROT_WRITE | PROT_EXEC))
        rule(denied, ACT_EPERM, "mprotect", masked(2, PROT_EXEC))
    if unit.on("RestrictSUIDSGID"):
        for bit in (stat.S_ISUID, stat.S_ISGID):
            for name, argument in (("chmod", 1), ("fchmod", 1), ("fchmodat", 2), ("openat", 3)):
                rule(denied, ACT_EPERM, name, masked(argument, bit))
    families = {getattr(socket, name, 0) for name in unit.words("RestrictAddressFamilies")}
    for family in set(range(AF_MAX)) - families:
        rule(denied, ACT_EAFNOSUPPORT, "socket", Comparison(0, CMP_EQ, family, 0))
    for context in (denied, allowed):
        if library.seccomp_load(context):
            raise OSError("the filter was refused")


def drop_capabilities(unit: Unit) -> None:
    """No program started from here on has another capability than the unit's."""
    library = ctypes.CDLL(None, use_errno=True)
    numbers = dict(
        re.findall(r"^#define (CAP_\w+)\s+(\d+)$", Path(CAPABILITIES).read_text(), re.MULTILINE)
    )
    for name, number in numbers.items():
        kept = name in unit.words("CapabilityBoundingSet")
        if not kept and library.prctl(PR_CAPBSET_DROP, int(number), 0, 0, 0):
            raise OSError(ctypes.get_errno(), f"could not drop {name}")
    if unit.on("NoNewPrivileges") and library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no new privileges")


def cover_files(unit: Unit) -> None:
    """A mount name space in which the unit's read-only folders are, and processes are hidden."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no mount name space")
    mount("--make-rslave", "/")
    if unit.words("ProtectProc") == ["invisible"]:
        mount("-t", "proc", "-o", "hidepid=invisible", "proc", "/proc")
    read_only = ["/usr", "/boot", "/etc"] if unit.words("ProtectSystem") == ["full"] else []
    if unit.on("ProtectKernelTunables"):
        read_only += ["/sys", "/proc/sys"]
    for folder in filter(os.path.isdir, read_only):
        mount("--rbind", folder, folder)
        mount("-o", "remount,bind,ro", folder)


def mount(*arguments: str) -> None:
    """mount(8)."""
    subprocess.run(["mount", *arguments], check=True, timeout=30)


def main(unit_file: str, *command: str) -> None:
    """Confines this process, and becomes the command."""
    unit = Unit(Path(unit_file))
    (umask,) = unit.words("UMask")
    cover_files(unit)
    drop_capabilities(unit)
    filter_calls(unit)
    os.umask(int(umask, 8))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
