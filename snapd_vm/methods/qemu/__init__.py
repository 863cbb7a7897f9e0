"""The method qemu: overlays, their commit and what a revert does with them."""
