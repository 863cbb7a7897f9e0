"""Methods from outside, installed for a test: a program of its own folder, and its configuration."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab.lab import Lab

NAME = "array"
METHOD = f"<diskSnapshot method='{NAME}'/>"


@dataclass
class Array:
    """The executable of file_array.py, with a folder for its copies; root's, as it must be."""

    program: Path
    folder: Path
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def install(cls, lab: Lab, where: Path | None = None, **more: Any) -> Array:
        """Install it below the run's folder, or with its copies at `where`."""
        home = lab.folder("array")
        program = home / "file-array"
        shutil.copy(Path(__file__).with_name("file_array.py"), program)
        program.chmod(0o755)
        folder = where or home / "copies"
        folder.mkdir(exist_ok=True)
        made = cls(program, folder, more)
        made.faults()
        return made

    def faults(self, **faults: str) -> None:
        """From now on this goes wrong, and nothing else; see file_array.fault."""
        settings = {"folder": str(self.folder), "faults": faults}
        new = self.program.with_suffix(".new")
        new.write_text(json.dumps(settings))
        new.rename(self.program.with_suffix(".json"))

    @property
    def config(self) -> dict[str, Any]:
        """The daemon's configuration that has it."""
        one = {
            "name": NAME,
            "path": str(self.program),
            "capabilities": ["dac_override"],
            "source_dirs": [str(self.folder)],
            **self.more,
        }
        return {"executable": [one]}

    @property
    def copies(self) -> set[str]:
        """The names of all that is in its folder."""
        return {path.name for path in self.folder.iterdir()}
