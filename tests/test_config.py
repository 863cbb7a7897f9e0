"""What the configuration says, what it can't say, and that the error names the key."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from snapd_vm import config
from snapd_vm.config import Config, ConfigError


def test_what_is_not_said_has_its_default() -> None:
    assert config.parse({}) == Config()
    found = config.parse({"snapshot_limit": 3, "qemu": {"overlay_dirs": ["/a"]}})
    assert (found.snapshot_limit, found.chain_limit) == (3, 16)
    assert found.qemu.overlay_dirs == ("/a",)
    assert config.parse({"btrfs": {"snapshot_dir": "/a"}}).btrfs.snapshot_dir == "/a"
    assert config.parse({"btrfs": {"snapshot_dir": ""}}) == Config()
    assert config.parse({"lvm": {"snapshot_percent": 50}}).lvm.snapshot_percent == 50


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"chain_limits": 3}, "unknown key 'chain_limits'"),
        ({"qemu": {"chain_limit": 3}}, "unknown key 'qemu.chain_limit'"),
        ({"snapshot_limit": 0}, "'snapshot_limit' must be a whole number from 1 to 10000"),
        ({"chain_limit": 201}, "'chain_limit' must be a whole number from 1 to 200"),
        ({"chain_limit": True}, "'chain_limit' must be a whole number from 1 to 200"),
        ({"chain_limit": "16"}, "'chain_limit' must be a whole number from 1 to 200"),
        ({"qemu": {"commit_bandwidth": -1}}, "'qemu.commit_bandwidth' must be a whole number of"),
        ({"qemu": {"commit_bandwidth": 1.5}}, "'qemu.commit_bandwidth' must be a whole number of"),
        ({"btrfs": {"snapshot_dir": "kept"}}, "'btrfs.snapshot_dir' must be an absolute path"),
        ({"btrfs": {"snapshot_dir": ["/a"]}}, "'btrfs.snapshot_dir' must be an absolute path"),
        ({"btrfs": {"snapshot_dirs": "/a"}}, "unknown key 'btrfs.snapshot_dirs'"),
        ({"lvm": {"snapshot_percent": 0}}, "'lvm.snapshot_percent' must be a whole number from 1"),
        ({"lvm": {"warn_percent": 100}}, "'lvm.warn_percent' must be a whole number from 0 to 99"),
        ({"lvm": {"size": 5}}, "unknown key 'lvm.size'"),
        ({"btrfs": "/a"}, "'btrfs' must be a table"),
        ({"low_space_percent": 100}, "'low_space_percent' must be a whole number"),
        ({"lock_timeout_s": 0}, "'lock_timeout_s' must be a whole number of seconds from 1"),
        ({"qemu": {"overlay_dirs": "/a"}}, "'qemu.overlay_dirs' must be a list of absolute"),
    ],
)
def test_what_makes_no_sense_is_an_error_that_names_the_key(
    said: Mapping[str, object], why: str
) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(said)
    assert why in str(error.value)
