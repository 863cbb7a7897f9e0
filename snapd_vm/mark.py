"""Our mark on the files that we make: whose they are can be told by it without the journal.

It is an attribute that only root can write or see (xattr(7), "trusted"); one in the namespace
`user` could be written by whoever owns the file, and that is QEMU's user. It names the file's
inode, as a copy may bear it too (cp -a): what is no more than a copy is not ours.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from enum import StrEnum

from snapd_vm.model import Json, Tag

ATTRIBUTE = "trusted.snapd-vm"


class Kind(StrEnum):
    """What a marked file is."""

    OVERLAY = "overlay"
    CLONE = "clone"
    SUBVOLUME = "subvolume"  # the folder that a read-only snapshot of a subvolume is in


def put(fd: int, kind: Kind, tag: Tag) -> bool:
    """Mark a file; False where the file system has no such attributes. Raises OSError."""
    text = json.dumps(
        {
            "kind": kind,
            "snapshot": tag.uuid,
            "name": tag.label,
            "domain": tag.domain_uuid,
            "domain_name": tag.domain_name,
            "created_us": tag.created_us,
            "inode": os.fstat(fd).st_ino,
        }
    )
    try:
        os.setxattr(fd, ATTRIBUTE, text.encode())
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EPERM):
            return False
        raise
    return True


def read(path: str) -> Mapping[str, Json]:
    """What the mark of the file says, a symlink not followed; {} where there is none of ours."""
    try:
        found = json.loads(os.getxattr(path, ATTRIBUTE, follow_symlinks=False))
        inode = os.stat(path, follow_symlinks=False).st_ino
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or found.get("inode") != inode:
        return {}
    return found


def is_clone(path: str) -> bool:
    """Whether the file, or what it is a copy of, was marked as a clone."""
    try:
        said = json.loads(os.getxattr(path, ATTRIBUTE, follow_symlinks=False))
        return bool(said["kind"] == Kind.CLONE)
    except (OSError, ValueError, TypeError, KeyError):
        return False
