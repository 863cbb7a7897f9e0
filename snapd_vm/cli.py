"""The command line: what can be said, and how an outcome becomes an exit status and a message.

What the commands do is in cli_commands, loaded only when one runs: `--help` and `--version` need
no D-Bus library, and `daemon` is none of the client's business.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from snapd_vm import __version__
from snapd_vm.cli_outcome import Ended, UsageError, complain

_GO_ON = ("create", "delete", "revert")
"""What the service goes on with when its client leaves."""

# The contract's numbers, repeated here as the client imports nothing of the daemon's.
QUIESCE_REQUIRED = 1
NO_QUIESCE = 2


def parser() -> argparse.ArgumentParser:
    """The whole command line, the daemon's too."""
    top = argparse.ArgumentParser(
        prog="snapd-vm",
        description="Consistent, immutable snapshots of single disks of running virtual machines.",
        epilog="All but 'daemon' are clients of the service on the system bus. See snapd-vm(1).",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"snapd-vm {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text + ".", allow_abbrev=False)

    for name, text in (
        ("create", "make a snapshot of one disk, or of several with one freeze: all or none"),
        ("plan", "say what create would do, after the same checks, and change nothing"),
    ):
        sub = command(name, text)
        sub.add_argument("domain", metavar="DOMAIN", help="the domain's name or UUID")
        sub.add_argument(
            "disk",
            metavar="DISK",
            nargs="+" if name == "create" else None,
            help="a target such as vda, or a <disk> element",
        )
        sub.add_argument("--name", default="", help="a label (default: made from the UTC time)")
        sub.add_argument(
            "--method",
            default="",
            help="a method's name, a <diskSnapshot> element, or - to read one from standard input",
        )
        _add_quiesce(sub)
        _add_json(sub)
    sub = command("list", "list snapshots by domain and disk")
    sub.add_argument("domain", metavar="DOMAIN", nargs="?", help="only those of this domain")
    _add_json(sub)
    for name, count, text in (
        ("delete", "+", "delete snapshots; what the disks hold now stays as it is"),
        ("revert", 1, "bring a disk back to a snapshot; what it holds now is lost"),
    ):
        sub = command(name, text)
        sub.add_argument(
            "snapshots",
            metavar="SNAPSHOT",
            nargs=count,
            help="DOMAIN/DISK/NAME as 'list' shows it, or the snapshot's UUID or object path",
        )
        sub.add_argument(
            "--no-wait", action="store_true", help="return as soon as the service has begun"
        )
        _add_json(sub)
    sub = command("disks", "list a domain's disks and the method that create would use for each")
    sub.add_argument("domain", metavar="DOMAIN", help="the domain's name or UUID")
    _add_json(sub)
    _add_json(command("methods", "list the snapshot methods of the service"))
    for name, text in (
        ("get-method", "show the method that is stored for a disk"),
        ("set-method", "store the method that create uses for a disk if it is told none"),
    ):
        sub = command(name, text)
        sub.add_argument("domain", metavar="DOMAIN", help="the domain's name or UUID")
        sub.add_argument("disk", metavar="DISK", help="a target such as vda, or a <disk> element")
        _add_json(sub)
    wanted = sub.add_mutually_exclusive_group(required=True)
    wanted.add_argument(
        "method",
        metavar="METHOD",
        nargs="?",
        help="a method's name, a <diskSnapshot> element, or - to read one from standard input",
    )
    wanted.add_argument("--forget", action="store_true", help="store none: it is the default again")

    sub = command("daemon", "run the service")
    sub.add_argument("--config", metavar="FILE", help="default: /etc/snapd-vm/snapd-vm.toml")
    sub.add_argument(
        "--thaw-held",
        action="store_true",
        help="do not serve: thaw and resume the guests that a daemon which ended left held",
    )
    # For the shell completion; without a help it is not listed, and it is no promise.
    sub = commands.add_parser("complete")
    sub.add_argument("what", choices=("domains", "disks", "snapshots", "methods"))
    sub.add_argument("domain", nargs="?", default="")
    return top


def _add_quiesce(command: argparse.ArgumentParser) -> None:
    quiesce = command.add_mutually_exclusive_group()
    for option, flag, text in (
        ("--quiesce-required", QUIESCE_REQUIRED, "fail if the guest agent does not quiesce it"),
        ("--no-quiesce", NO_QUIESCE, "do not try to quiesce the guest (default: try)"),
    ):
        quiesce.add_argument(
            option, action="store_const", dest="flags", const=flag, default=0, help=text
        )


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="answer in JSON")


def run(options: argparse.Namespace) -> int:
    """Runs a client's command as parsed; returns the exit status (0, 1, 2, 130)."""
    from snapd_vm import cli_commands
    from snapd_vm.cli_bus import CallError
    from snapd_vm.cli_job import GOES_ON

    try:
        try:
            text, status = asyncio.run(cli_commands.run(options)), 0
        except Ended as ended:
            text, status = ended.text, ended.status
        sys.stdout.write(text)
        sys.stdout.flush()
        return status
    except UsageError as error:
        complain(str(error))
        return 2
    except CallError as error:
        # Completion has no place for a message: it completes nothing.
        if options.command != "complete":
            complain(str(error))
        return 1
    except KeyboardInterrupt:
        complain(GOES_ON if options.command in _GO_ON else "Interrupted.")
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough; Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
