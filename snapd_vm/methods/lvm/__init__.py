"""The method lvm: a snapshot of the logical volume that the disk is, or lies in."""
