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


def copy_of(snapshot: dict[str, Any]) -> Path:
    return FOLDER / f"{snapshot['name']}.img"


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
    return {
        "space_needed": sum(os.stat(s["data"]["image"]).st_blocks * 512 for s in snapshots),
        "space_available": shutil.disk_usage(FOLDER).free,
        "warnings": [f"{len(snapshots)} copied"],
    }


def create(*snapshots: dict[str, Any]) -> dict[str, Any]:
    for snapshot in snapshots:
        draft = copy_of(snapshot).with_suffix(".new")
        words = ["cp", "--reflink=auto", "--sparse=always", snapshot["data"]["image"], str(draft)]
        subprocess.run(words, check=True)
        draft.chmod(0o444)
        fault("halfway")
        draft.rename(copy_of(snapshot))
    return {}


def delete(snapshot: dict[str, Any]) -> dict[str, Any]:
    found = False
    for path in (copy_of(snapshot), copy_of(snapshot).with_suffix(".new")):
        found = found or path.exists()
        path.unlink(missing_ok=True)
    return {"deleted": found}


def state(snapshot: dict[str, Any]) -> dict[str, Any]:
    there = copy_of(snapshot).exists()
    return {"state": "ready"} if there else {"state": "missing", "reason": "The copy is gone"}


def every() -> dict[str, Any]:
    return {"snapshots": [{"name": path.stem} for path in FOLDER.glob("snapd-vm-*.img")]}


def revert(snapshot: dict[str, Any]) -> dict[str, Any]:
    words = ["cp", "--reflink=auto", copy_of(snapshot), snapshot["data"]["image"]]
    subprocess.run(words, check=True)
    return {}


def fault(operation: str) -> None:
    """What goes wrong with it, if anything does."""
    match SETTINGS.get("faults", {}).get(operation, "").partition(":"):
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
            print(json.dumps({"error": {"name": name, "message": "The array says no"}}))
            sys.exit(1)
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
    answer = OPERATIONS[request["operation"]](*request["snapshots"])
    fault(f"after-{request['operation']}")
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
