"""What the configuration says of methods from outside: `[plugins]` and `[[executable]]`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from snapd_vm.configvalues import ConfigError, absolute, number
from snapd_vm.model import RESERVED_METHODS

_METHOD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
_USER = re.compile(r"[a-z_][a-z0-9_.-]{0,31}")
_CAPABILITY = re.compile(r"[a-z_]{1,32}")


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
    """One `[[executable]]`: a program that is a method; see methods/outside/executable.py.

    `timeout_s`: the limit of each of its runs. `user`: who it runs as, '' for root. `capabilities`:
    what it keeps of root's, by their names without "cap_".
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


def plugins(table: Mapping[str, object]) -> PluginsConfig:
    """The table `[plugins]`. Raises ConfigError."""
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


def executables(value: object) -> tuple[ExecutableConfig, ...]:
    """All of `[[executable]]`. Raises ConfigError."""
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
            values[key] = absolute(name, value)
        elif key == "schema":
            values[key] = Path(absolute(name, value))
        elif key == "timeout_s":
            values[key] = number(name, value, 1, 3600, " of seconds")
        elif key == "reverts":
            if not isinstance(value, bool):
                raise ConfigError(f"'{name}' must be true or false")
            values[key] = value
        elif key == "source_dirs":
            values[key] = tuple(absolute(name, one) for one in _list("executable", table, key))
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
