"""Tests that need a kernel with device mapper, and are run inside the host VM."""
