"""Reads the daemon's one TOML file; knows every key and its default, and refuses the others."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from snapd_vm.model import RESERVED_METHODS

DEFAULT_PATH = Path("/etc/snapd-vm/snapd-vm.toml")

_LONGEST_CHAIN = 200
"""The most that libvirt itself loads (QEMU_DOMAIN_STORAGE_SOURCE_CHAIN_MAX_DEPTH)."""
_MOST_SNAPSHOTS = 10_000
_FASTEST_MIB_S = 1 << 20
_METHOD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
_USER = re.compile(r"[a-z_][a-z0-9_.-]{0,31}")
_CAPABILITY = re.compile(r"[a-z_]{1,32}")


class ConfigError(Exception):
    """The configuration can't be used; the message names the file and the key."""


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
class PluginsConfig:
    """The table `[plugins]`: methods that other Python distributions bring.

    `methods`: names of entry points in the group `snapd_vm.methods`, none of which is imported
    unless it is here; `options`: the table `[plugins.NAME]` of each that has one, as it is.
    """

    methods: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExecutableConfig:
    """One `[[executable]]`: a program that is a method; see methods/executable.py.

    `timeout_s`: the limit of each of its runs; inside the freeze it is less, see there. `user`: who
    it runs as, '' for root. `capabilities`: what it keeps of root's, by their names without "cap_".
    `source_dirs`: absolute folders in one of which each file or device that it hands out must lie.
    `schema`: a file with the RELAX NG schema of its `<diskSnapshot>`; None: that must be empty.
    `reverts`: it knows the operation revert.
    """

    name: str
    path: str
    timeout_s: int = 30
    user: str = ""
    capabilities: tuple[str, ...] = ()
    source_dirs: tuple[str, ...] = ()
    schema: Path | None = None
    reverts: bool = False


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
            values[key] = _executables(value)
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


def _plugins(table: Mapping[str, object]) -> PluginsConfig:
    methods = tuple(_method("plugins.methods", one) for one in _list("plugins", table, "methods"))
    options: dict[str, Mapping[str, object]] = {}
    for key, value in table.items():
        if key == "methods":
            continue
        if key not in methods:
            raise ConfigError(f"unknown key 'plugins.{key}'; 'plugins.methods' does not list it")
        if not isinstance(value, dict):
            raise ConfigError(f"'plugins.{key}' must be a table")
        options[key] = value
    return PluginsConfig(methods, options)


def _executables(value: object) -> tuple[ExecutableConfig, ...]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ConfigError("'executable' must be a list of tables, each begun by [[executable]]")
    return tuple(map(_executable, value))


def _executable(table: Mapping[str, object]) -> ExecutableConfig:
    known = {f.name for f in fields(ExecutableConfig)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = f"executable.{key}"
        if key not in known:
            raise ConfigError(f"unknown key '{name}'")
        if key == "name":
            values[key] = _method(name, value)
        elif key == "path":
            values[key] = _absolute(name, value)
        elif key == "schema":
            values[key] = Path(_absolute(name, value))
        elif key == "timeout_s":
            values[key] = _number(name, value, 1, 3600, " of seconds")
        elif key == "reverts":
            if not isinstance(value, bool):
                raise ConfigError(f"'{name}' must be true or false")
            values[key] = value
        elif key == "source_dirs":
            values[key] = tuple(_absolute(name, one) for one in _list("executable", table, key))
        elif key == "capabilities":
            words = _list("executable", table, key)
            values[key] = tuple(_word(name, _CAPABILITY, one, "like 'sys_admin'") for one in words)
        else:
            values[key] = _word(name, _USER, value, "the name of a user")
    for key in ("name", "path"):
        if key not in values:
            raise ConfigError(f"'executable.{key}' is missing")
    if values.get("user") and values.get("capabilities"):
        raise ConfigError("'executable.capabilities' are for one that runs as root, without 'user'")
    return ExecutableConfig(**values)


_TABLES: Mapping[str, Callable[[Mapping[str, object]], object]] = {
    "qemu": _qemu,
    "plugins": _plugins,
}
"""What reads the table of each method that has one."""


def _uri(value: object) -> str:
    if not isinstance(value, str) or not urlsplit(value).scheme:
        raise ConfigError("'uri' must be a libvirt URI such as 'qemu:///system'")
    if urlsplit(value).netloc:
        # Overlays are made and headers read here, so the domains must be here as well.
        raise ConfigError("'uri' must name the libvirt of this host, without a host name")
    return value


def _absolute(key: str, value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/"):
        raise ConfigError(f"'{key}' must be an absolute path")
    return value


def _list(table_name: str, table: Mapping[str, object], key: str) -> Sequence[object]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise ConfigError(f"'{table_name}.{key}' must be a list")
    return value


def _method(key: str, value: object) -> str:
    """The name of a method from outside."""
    name = _word(key, _METHOD, value, "a name of at most 32 letters, digits, '_' and '-'")
    if name in RESERVED_METHODS:
        raise ConfigError(f"'{key}' can't be '{name}', which is reserved; choose another name")
    return name


def _word(key: str, form: re.Pattern[str], value: object, what: str) -> str:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ConfigError(f"'{key}' must be {what}")
    return value


def _number(key: str, value: object, least: int, most: int, unit: str = "") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"'{key}' must be a whole number{unit} from {least} to {most}")
    return value
