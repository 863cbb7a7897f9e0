"""The method reflink: a clone of the disk's file."""
