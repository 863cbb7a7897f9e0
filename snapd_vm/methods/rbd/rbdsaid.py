"""What an image's metadata says of a snapshot of ours; needs only the standard library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def read(text: str) -> Mapping[str, Any]:
    """What was written when the snapshot was taken; empty for what is none of that, as anybody who
    may write to the image can have put it there.
    """
    try:
        said = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
