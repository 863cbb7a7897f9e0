"""Reads the daemon's one TOML file; knows every key and its default, and refuses the others."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from snapd_vm.configvalues import ConfigError
from snapd_vm.configvalues import absolute as _absolute
from snapd_vm.configvalues import number as _number
from snapd_vm.outsideconfig import ExecutableConfig, PluginsConfig, executables, plugins

__all__ = [
    "BtrfsConfig",
    "Config",
    "ConfigError",
    "ExecutableConfig",
    "LvmConfig",
    "PluginsConfig",
    "QemuConfig",
    "load",
    "parse",
]

DEFAULT_PATH = Path("/etc/snapd-vm/snapd-vm.toml")

_LONGEST_CHAIN = 200
"""The most that libvirt itself loads (QEMU_DOMAIN_STORAGE_SOURCE_CHAIN_MAX_DEPTH)."""
_MOST_SNAPSHOTS = 10_000
_FASTEST_MIB_S = 1 << 20


@dataclass(frozen=True, slots=True)
class QemuConfig:
    """The table `[qemu]`.

    `overlay_dirs`: absolute folders, besides a disk's own, in which overlays may be made; the first
    one is used for a disk whose own folder can't hold one (a block device).
    `commit_bandwidth`: the most that a delete may write, in MiB/s; 0: as much as it can.
    """

    overlay_dirs: tuple[str, ...] = ()
    commit_bandwidth: int = 0


@dataclass(frozen=True, slots=True)
class BtrfsConfig:
    """The table `[btrfs]`.

    `snapshot_dir`: the folder that snapshots of subvolumes of its file system are made in; '': the
    folder `.snapd-vm` in the root of each.
    """

    snapshot_dir: str = ""


@dataclass(frozen=True, slots=True)
class LvmConfig:
    """The table `[lvm]`, for snapshots of volumes that are not thin and for which no size was said.

    `snapshot_percent`: the share of the volume that such a one has room for; `snapshot_min_mib`: at
    least so many MiB, if the volume is not smaller.
    `warn_percent`: one that is filled to this share is warned of; 0: never.
    """

    snapshot_percent: int = 20
    snapshot_min_mib: int = 1024
    warn_percent: int = 70


@dataclass(frozen=True, slots=True)
class Config:
    """What the daemon can be told; times in seconds.

    `snapshot_limit`: the most snapshots that a disk may have.
    `chain_limit`: the most images that a disk's chain may have, the active one counted.
    `low_space_percent`: a file system in which a snapshot makes a disk grow is warned of when a
    smaller share of it is free; 0: never.

    `agent_timeout_s`: an agent that does not answer in this time is not there.
    `freeze_timeout_s`: limit of the freeze command itself.
    `frozen_limit_s`: longest time between freeze and thaw.
    `lock_timeout_s`: how long a writing call waits for another one on the same domain.
    """

    uri: str = "qemu:///system"
    state_dir: Path = Path("/var/lib/snapd-vm")
    agent_timeout_s: int = 5
    freeze_timeout_s: int = 10
    frozen_limit_s: int = 10
    lock_timeout_s: int = 30
    snapshot_limit: int = 16
    chain_limit: int = 16
    low_space_percent: int = 10
    executable: tuple[ExecutableConfig, ...] = ()
    qemu: QemuConfig = field(default_factory=QemuConfig)
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    btrfs: BtrfsConfig = field(default_factory=BtrfsConfig)
    lvm: LvmConfig = field(default_factory=LvmConfig)


def load(path: Path | None) -> Config:
    """The configuration in `path`, or in the default place; no file there means the defaults.

    Raises ConfigError for a named file that can't be read, for TOML that can't be parsed, for an
    unknown key and for a value of the wrong kind.
    """
    try:
        with (path or DEFAULT_PATH).open("rb") as file:
            document = tomllib.load(file)
    except FileNotFoundError:
        if path is None:
            return Config()
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path or DEFAULT_PATH}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path or DEFAULT_PATH}: {error}") from error
    try:
        return parse(document)
    except ConfigError as error:
        raise ConfigError(f"{path or DEFAULT_PATH}: {error}") from None


def parse(document: Mapping[str, object]) -> Config:
    """The configuration that a parsed TOML document says. Raises ConfigError."""
    known = {f.name for f in fields(Config)}
    for key in document:
        if key not in known:
            raise ConfigError(f"unknown key '{key}'")
    values: dict[str, object] = {}
    for key, value in document.items():
        if key in _TABLES:
            if not isinstance(value, dict):
                raise ConfigError(f"'{key}' must be a table")
            values[key] = _TABLES[key](value)
        elif key == "executable":
            values[key] = executables(value)
        elif key == "uri":
            values[key] = _uri(value)
        elif key == "state_dir":
            values[key] = Path(_absolute(key, value))
        elif key == "snapshot_limit":
            values[key] = _number(key, value, 1, _MOST_SNAPSHOTS)
        elif key == "chain_limit":
            values[key] = _number(key, value, 1, _LONGEST_CHAIN)
        elif key == "low_space_percent":
            values[key] = _number(key, value, 0, 99)
        else:
            # libvirt's response timeout counts in whole seconds (virDomainAgentSetResponseTimeout).
            values[key] = _number(key, value, 1, 3600, " of seconds")
    config = Config(**values)  # type: ignore[arg-type]  # each value was checked under its key
    names = [*config.plugins.methods, *(one.name for one in config.executable)]
    twice = next((name for name in names if names.count(name) > 1), "")
    if twice:
        raise ConfigError(f"the method '{twice}' is there twice; give each a name of its own")
    return config


def _qemu(table: Mapping[str, object]) -> QemuConfig:
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = f"qemu.{key}"
        if key == "overlay_dirs":
            if not isinstance(value, list):
                raise ConfigError(f"'{name}' must be a list of absolute paths")
            values[key] = tuple(_absolute(name, path) for path in value)
        elif key == "commit_bandwidth":
            values[key] = _number(name, value, 0, _FASTEST_MIB_S, " of MiB/s")
        else:
            raise ConfigError(f"unknown key '{name}'")
    return QemuConfig(**values)


def _btrfs(table: Mapping[str, object]) -> BtrfsConfig:
    for key in table:
        if key != "snapshot_dir":
            raise ConfigError(f"unknown key 'btrfs.{key}'")
    path = table.get("snapshot_dir", "")
    return BtrfsConfig("" if path == "" else _absolute("btrfs.snapshot_dir", path))


def _lvm(table: Mapping[str, object]) -> LvmConfig:
    most = {"snapshot_percent": (1, 200), "snapshot_min_mib": (1, 1 << 30), "warn_percent": (0, 99)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in most:
            raise ConfigError(f"unknown key 'lvm.{key}'")
        values[key] = _number(f"lvm.{key}", value, *most[key])
    return LvmConfig(**values)


_TABLES: Mapping[str, Callable[[Mapping[str, object]], object]] = {
    "qemu": _qemu,
    "btrfs": _btrfs,
    "lvm": _lvm,
    "plugins": plugins,
}
"""What reads the table of each method that has one."""


def _uri(value: object) -> str:
    if not isinstance(value, str) or not urlsplit(value).scheme:
        raise ConfigError("'uri' must be a libvirt URI such as 'qemu:///system'")
    if urlsplit(value).netloc:
        # Overlays are made and headers read here, so the domains must be here as well.
        raise ConfigError("'uri' must name the libvirt of this host, without a host name")
    return value
