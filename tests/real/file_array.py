#!/usr/bin/python3 -I
"""The smallest storage that is a program: snapshots are copies in a folder of its own.

Beside it lies a JSON file of its name: `folder`, and `faults`, which say for an operation what goes
wrong with it in place of, or after, the work.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS = json.loads(Path(__file__).with_suffix(".json").read_text())
FOLDER = Path(SETTINGS["folder"])
MARK = "user.file-array"
REVERTED = "user.file-array.reverted"


def copy_of(snapshot: dict[str, Any]) -> Path:
    return FOLDER / f"{snapshot['name']}.img"


def is_ours(path: Path) -> bool:
    """Whether it bears the mark: what does not, whatever its name, is not there for us."""
    try:
        return bool(os.getxattr(path, MARK))
    except OSError:
        return False


def claim(snapshot: dict[str, Any]) -> dict[str, Any]:
    disk = snapshot["disk"]
    if not disk["path"]:
        return {"mine": False, "reason": "It has no file"}
    return {
        "mine": True,
        "data": {"image": disk["path"]},
        "group": "all",
        "source": {"file": str(copy_of(snapshot))},
    }


def check(*snapshots: dict[str, Any]) -> dict[str, Any]:
    needed = sum(os.stat(s["data"]["image"]).st_blocks * 512 for s in snapshots)
    free = shutil.disk_usage(FOLDER).free
    if needed > free:
        refuse("NoSpace", f"{needed} bytes are needed, and {free} are free; make room")
    return {
        "space_needed": needed,
        "space_available": free,
        "warnings": [f"{len(snapshots)} copied"],
    }


def create(*snapshots: dict[str, Any]) -> dict[str, Any]:
    for snapshot in snapshots:
        copy, draft = copy_of(snapshot), copy_of(snapshot).with_suffix(".new")
        words = ["cp", "--reflink=auto", "--sparse=always", snapshot["data"]["image"], str(draft)]
        subprocess.run(words, check=True)
        mark = f"{snapshot['label']}\n{snapshot['domain']['name']}"
        os.setxattr(draft, MARK, mark.encode())
        draft.chmod(0o444)
        fault("halfway", draft)
        try:
            os.link(draft, copy)
        except FileExistsError:
            draft.unlink()
            refuse("NameInUse", "There is a file of that name; move it away")
        draft.unlink()
    return {}


def delete(snapshot: dict[str, Any]) -> dict[str, Any]:
    found = False
    for path in (copy_of(snapshot), copy_of(snapshot).with_suffix(".new")):
        if path.suffix == ".new" or is_ours(path):
            found = found or path.exists()
            path.unlink(missing_ok=True)
    return {"deleted": found}


def state(snapshot: dict[str, Any]) -> dict[str, Any]:
    if is_ours(copy_of(snapshot)):
        return {"state": "ready"}
    return {"state": "missing", "reason": "The copy is gone"}


def every() -> dict[str, Any]:
    found = []
    for path in filter(is_ours, FOLDER.glob("snapd-vm-*.img")):
        label, _, domain = os.getxattr(path, MARK).decode().partition("\n")
        found.append({"name": path.stem, "label": label, "domain": domain})
    return {"snapshots": found}


def revert(snapshot: dict[str, Any], revert_id: str) -> dict[str, Any]:
    image = snapshot["data"]["image"]
    if REVERTED in os.listxattr(image) and os.getxattr(image, REVERTED) == revert_id.encode():
        return {}
    subprocess.run(["cp", "--reflink=auto", copy_of(snapshot), image], check=True)
    os.setxattr(image, REVERTED, revert_id.encode())
    return {}


def refuse(name: str, message: str) -> None:
    print(json.dumps({"error": {"name": name, "message": message}}))
    sys.exit(1)


def fault(operation: str, draft: Path | None = None) -> None:
    """What goes wrong with it, if anything does."""
    match SETTINGS.get("faults", {}).get(operation, "").partition(":"):
        case ("wait", _, seconds):
            time.sleep(float(seconds))
        case ("lie-on", _, path):
            words = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", path, "-F", "raw"]
            subprocess.run([*words, str(draft), "16M"], check=True)
        case ("hang", _, _):
            time.sleep(600)
        case ("hang-child", _, _):
            subprocess.run(["sleep", "600"], check=False)
        case ("kill-daemon", _, _):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        case ("die", _, _):
            os.kill(os.getpid(), signal.SIGKILL)
        case ("fail", _, words):
            print("it is", file=sys.stderr)
            print(words, file=sys.stderr)
            sys.exit(3)
        case ("refuse", _, name):
            refuse(name, "The array says no")
        case ("say", _, words):
            print(words)
            sys.exit(0)
        case ("flood", _, _):
            while True:
                os.write(1, b"[" * 65536)
        case ("shout", _, _):
            for number in range(5000):
                print(f"line {number} \033[31m" + "x" * 1000, file=sys.stderr)
        case ("show", _, path):
            Path(path).write_text(
                json.dumps(
                    {
                        "uid": os.getuid(),
                        "groups": os.getgroups(),
                        "environment": sorted(os.environ),
                        "descriptors": sorted(os.listdir("/proc/self/fd")),
                        "status": Path("/proc/self/status").read_text(),
                        "cwd": os.getcwd(),
                    }
                )
            )


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "claim": claim,
    "check": check,
    "create": create,
    "delete": delete,
    "list": every,
    "state": state,
    "revert": revert,
}


def main() -> int:
    request = json.load(sys.stdin)
    fault(request["operation"])
    if SETTINGS.get("faults", {}).get(request["operation"]) == "show-request":
        (FOLDER / "request.json").write_text(json.dumps(request))
    more = [request["revert_id"]] if request["operation"] == "revert" else []
    answer = OPERATIONS[request["operation"]](*request["snapshots"], *more)
    fault(f"after-{request['operation']}")
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
