"""The method rbd: a snapshot of the disk's image in its Ceph cluster."""
