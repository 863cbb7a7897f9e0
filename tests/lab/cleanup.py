"""Takes away all that a run has brought into the world, at its end or after it was killed.

The same steps for both, so that the way that is seldom gone is tested every time.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.lab.cgroups import remove_cgroups
from tests.lab.deadline import LabError, wait_until
from tests.lab.mounts import detach_below
from tests.lab.run import Run


def cleanup() -> list[str]:
    """Clean up after runs that were killed, and name them; runs that live are not touched."""
    names = []
    errors = []
    for run in Run.dead():
        try:
            clean(run)
            names.append(run.name)
        except LabError as error:
            errors.append(str(error))
    if errors:
        raise LabError("; ".join(errors))
    return names


def clean(run: Run) -> None:
    """Take away one run: processes, guests, cgroups, mounts, loops, folder, in this order."""
    done = False
    try:
        if run.nursery is not None:
            run.nursery.close()
        run.ledger.end_all()
        # Definitions, logs and sockets of libvirt's are in the run's folder: only QEMU itself can
        # be left, if the nursery was killed too.
        for pid in _emulators(run):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(f"end of the guests of {run.name}", lambda: not _emulators(run), 10)
        remove_cgroups(run.domain_prefix)
        detach_below(run.folder)
        done = True
    except (LabError, OSError) as error:
        raise LabError(f"could not take away all of run {run.name}: {error}") from error
    finally:
        run.close(remove=done)  # else the next clean-up finds it, and tries again


def _emulators(run: Run) -> list[int]:
    """QEMU processes whose domain has the run's name; libvirt hands it over as `guest=NAME,…`."""
    marker = f"guest={run.domain_prefix}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if any(word.startswith(marker) for word in words):
                found.append(int(folder.name))
    return found
