"""snapd-vm: consistent, immutable snapshots of single disks of running virtual machines."""

__version__ = "0.1.0"
