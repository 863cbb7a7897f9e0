"""Who may import whom: each part knows those below it, and none above."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "snapd_vm"
LOWEST = {"errors", "model"}
ALLOWED = {  # what each part may import besides itself
    "errors": set[str](),
    "model": {"errors"},
    "journald": LOWEST,
    "command": LOWEST,
    "configvalues": LOWEST,
    "outsideconfig": LOWEST | {"configvalues"},
    "config": LOWEST | {"configvalues", "outsideconfig"},
    "qcow2": LOWEST,
    "safexml": LOWEST,
    "schemas": LOWEST | {"safexml"},
    "request": LOWEST | {"safexml", "schemas"},
    "mark": LOWEST,
    "mounts": LOWEST,
    "storage": LOWEST | {"qcow2", "command"},
}
ALLOWED["virt"] = LOWEST | {
    "command",
    "config",
    "outsideconfig",
    "mark",
    "mounts",
    "qcow2",
    "safexml",
    "storage",
}
ALLOWED["methods"] = ALLOWED["virt"]
ALLOWED["engine"] = {*ALLOWED["virt"], "virt", "methods", "journald", "request"}
ALLOWED["bus"] = LOWEST | {"engine", "request", "safexml"}
ALLOWED["daemon"] = {*ALLOWED, "journald"}
CLIENT = {file.stem for file in ROOT.glob("cli*.py")}
ALLOWED |= {part: {"errors"} | CLIENT for part in CLIENT}
ALLOWED["__main__"] = {"errors", "cli", "daemon"}
ONE_PLACE = {"libvirt": "virt", "libvirt_qemu": "virt", "subprocess": "command"}


def imported(file: Path) -> set[str]:
    """The full names of the modules that a file imports, wherever it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def test_each_part_imports_only_what_is_below_it() -> None:
    parts = set()
    for file in ROOT.rglob("*.py"):
        part = file.relative_to(ROOT).parts[0].removesuffix(".py")
        parts.add(part)
        for name in imported(file):
            top, _, rest = name.partition(".")
            below = rest.partition(".")[0]
            if top == "snapd_vm" and part != "__init__" and below != "__version__":
                assert below in ALLOWED[part] | {part}, f"{file} imports {name}"
            if top in ONE_PLACE:
                assert part == ONE_PLACE[top], f"{file} imports {name}"
            if top == "dbus_next" and part != "cli_bus":
                assert file == ROOT / "bus/connection.py", f"{file} imports {name}"
    assert parts - {"__init__"} == set(ALLOWED)


def test_the_engine_names_no_method() -> None:
    for file in (ROOT / "engine").glob("*.py"):
        named = {name for name in imported(file) if name.startswith("snapd_vm.methods.")}
        assert {name.split(".")[2] for name in named} <= {"method"}, file
