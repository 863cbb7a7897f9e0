"""The lab: real guests with real agents, libvirt, a system bus and polkit, on one machine.

`with Lab() as lab:` is the way in; README.md beside this file shows the rest.
"""

from tests.lab.cleanup import cleanup
from tests.lab.control import NoAnswerError
from tests.lab.deadline import LabError, wait_until
from tests.lab.disks import Disk, DiskSpec
from tests.lab.guest import Guest, Stall
from tests.lab.lab import Lab
from tests.lab.polkit import allow

__all__ = [
    "Disk",
    "DiskSpec",
    "Guest",
    "Lab",
    "LabError",
    "NoAnswerError",
    "Stall",
    "allow",
    "cleanup",
    "wait_until",
]
