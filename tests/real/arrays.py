"""Methods from outside, installed for a test, and the daemon's configuration that has them."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tests.lab.lab import Lab
from tests.lab.program import run

NAME = "array"
METHOD = f"<diskSnapshot method='{NAME}'/>"


@dataclass
class Array:
    """The executable of file_array.py, with a folder for its copies; root's, as it must be."""

    program: Path
    folder: Path
    more: dict[str, Any] = field(default_factory=dict)
    name: ClassVar[str] = NAME
    xml: ClassVar[str] = METHOD
    suffix: ClassVar[str] = ".img"

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
            **({} if "user" in self.more else {"capabilities": ["dac_override"]}),
            "source_dirs": [str(self.folder)],
            **self.more,
        }
        return {"executable": [one]}

    @property
    def env(self) -> dict[str, str]:
        """The daemon's environment needs nothing."""
        return {}

    @property
    def copies(self) -> set[str]:
        """The names of all that is in its folder."""
        return {path.name for path in self.folder.iterdir()}


COPY = "copy"
COPY_METHOD = f"<diskSnapshot method='{COPY}'/>"
EXAMPLE = Path(__file__).parents[2] / "docs/example-method"


@dataclass(frozen=True)
class Plugin:
    """The example distribution, installed by pip into a folder of its own."""

    site: Path
    folder: Path
    name: ClassVar[str] = COPY
    xml: ClassVar[str] = COPY_METHOD
    suffix: ClassVar[str] = ""

    @classmethod
    def install(cls, lab: Lab, where: Path | None = None) -> Plugin:
        """Install it below the run's folder, once."""
        site, folder = lab.folder("site"), where or lab.folder("plugin-copies")
        folder.mkdir(exist_ok=True)
        if not any(site.iterdir()):
            source = lab.folder("plugin-source") / "example-method"  # pip builds where it lies
            shutil.copytree(EXAMPLE, source)
            quiet = ("--quiet", "--disable-pip-version-check", "--no-index")
            how = ("--no-build-isolation", "--no-deps", "--target", site)
            run(sys.executable, "-m", "pip", "install", *quiet, *how, source, timeout=120)
        return cls(site, folder)

    @property
    def config(self) -> dict[str, Any]:
        """The daemon's configuration that has it."""
        return {"plugins": {"methods": [COPY], COPY: {"folder": str(self.folder)}}}

    @property
    def env(self) -> dict[str, str]:
        """With which the daemon's Python finds it."""
        return {"PYTHONPATH": str(self.site)}

    @property
    def copies(self) -> set[str]:
        """The names of all that is in its folder."""
        return {path.name for path in self.folder.iterdir()}
