"""The tests of snapd-vm, and in `lab` the real machines, buses and services they run against."""
