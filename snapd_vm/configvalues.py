"""Values of the configuration, checked one at a time; what is wrong names the key."""

from __future__ import annotations


class ConfigError(Exception):
    """The configuration can't be used; the message names the file and the key."""


def absolute(key: str, value: object) -> str:
    """An absolute path. Raises ConfigError."""
    if not isinstance(value, str) or not value.startswith("/"):
        raise ConfigError(f"'{key}' must be an absolute path")
    return value


def number(key: str, value: object, least: int, most: int, unit: str = "") -> int:
    """A whole number in these bounds. Raises ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"'{key}' must be a whole number{unit} from {least} to {most}")
    return value
