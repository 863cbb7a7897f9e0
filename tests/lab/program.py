"""Runs a program to its end, as root or as another user, and says what it said if it fails.

Programs that stay are started by process.py.
"""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab.deadline import SLOWNESS, LabError

CHECKOUT = Path(__file__).resolve().parents[2]


def run(
    *argv: str | Path, timeout: float = 60, cwd: Path | None = None, stdin: str | None = None
) -> str:
    """Run it, and hand back what it printed; any exit status but 0 is an error."""
    done = attempt(argv, timeout=timeout, cwd=cwd, stdin=stdin)
    if done.returncode:
        words = " ".join(str(word) for word in argv)
        raise LabError(f"{words}: exit status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def attempt(
    argv: Sequence[str | Path],
    *,
    user: str | int | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 60,
    cwd: Path | None = None,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run it whatever its exit status, if asked as another user with that user's groups only."""
    timeout *= SLOWNESS
    words = [str(word) for word in argv]
    whole_env = {**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}
    account = account_of(user) if user is not None else None
    try:
        return subprocess.run(
            words,
            env=whole_env,
            timeout=timeout,
            cwd=cwd,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            check=False,
            # setgroups, setgid, setuid, in this order: after the third the others are refused
            extra_groups=groups_of(account) if account else None,
            group=account.pw_gid if account else None,
            user=account.pw_uid if account else None,
        )
    except OSError as error:  # not there, or not for this user
        raise LabError(f"could not run {words[0]}: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(words)}: not done after {timeout:g} s") from error


def account_of(user: str | int) -> pwd.struct_passwd:
    """The account of a user name or uid."""
    try:
        return pwd.getpwnam(user) if isinstance(user, str) else pwd.getpwuid(user)
    except KeyError as error:
        raise LabError(f"no user {user} on this machine") from error


def groups_of(account: pwd.struct_passwd) -> list[int]:
    """The groups of an account besides its own."""
    return [group.gr_gid for group in grp.getgrall() if account.pw_name in group.gr_mem]
