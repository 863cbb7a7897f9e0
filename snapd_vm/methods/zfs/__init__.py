"""The method zfs: a snapshot of the dataset or volume that the disk is in."""
