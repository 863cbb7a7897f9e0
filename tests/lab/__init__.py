"""The lab: real guests with real agents, libvirt, a system bus and polkit, on one machine.

`with Lab() as lab:` is the way in; README.md beside this file shows the rest.
"""

from tests.lab.cleanup import cleanup
from tests.lab.control import NoAnswerError
from tests.lab.deadline import LabError, wait_until
from tests.lab.disks import Disk, DiskSpec
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.polkit import allow
from tests.lab.stall import Stall

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
