"""The method btrfs: a snapshot of the subvolume that holds the disk's file."""
