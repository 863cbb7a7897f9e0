"""The examples of the README that say of themselves that they are tested."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def examples() -> str:
    """All of them, in their order, as one script of bash's; the domain is called `web`."""
    blocks = re.findall(r"<!-- tested -->\n```sh\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 5
    return "".join(blocks)
