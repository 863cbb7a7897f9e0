"""The methods that the configuration brings in: entry points of other distributions, and programs.

One that is configured and not there, or can't be what it is called, is an error that names it. A
plugin that is there and breaks, when it is imported or made, is told in the log and left out, so
that all other methods, and guests that wait for a thaw, have their daemon.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from snapd_vm.config import Config, ConfigError
from snapd_vm.errors import SnapdError
from snapd_vm.methods.method import Method
from snapd_vm.model import Domain
from snapd_vm.outsideconfig import ExecutableConfig

log = logging.getLogger(__name__)

GROUP = "snapd_vm.methods"
"""Of the entry points."""

_EMPTY = (
    "<element name='diskSnapshot' xmlns='http://relaxng.org/ns/structure/1.0'>"
    "<attribute name='method'><value>{name}</value></attribute></element>"
)
Register = Callable[[str, str], None]
"""Takes a method's name and RELAX NG schema; ValueError for what is none."""

_NEEDED = {"": ("setpcap", "setgid"), "user": ("setpcap", "setuid", "setgid", "kill")}
_CAPABILITY_NUMBERS = {"kill": 5, "setgid": 6, "setuid": 7, "setpcap": 8}  # capability.h


class Hypervisor(Protocol):
    """What is needed of the hypervisor; blocking, raises SnapdErrors."""

    def read(self, uuid: str) -> Domain: ...
    def managed_save(self, uuid: str) -> bool: ...
    def user_of(self, path: str, uuid: str, target: str) -> str: ...


def load(settings: Config, hypervisor: Hypervisor, register: Register) -> Sequence[Method]:
    """All of them, each registered with the schema of its `<diskSnapshot>`. Raises ConfigError."""
    found = [_executable(one, settings, hypervisor, register) for one in settings.executable]
    if settings.plugins.methods:
        found += _plugins(settings, hypervisor, register)
    return found


def _executable(
    one: ExecutableConfig, settings: Config, hypervisor: Hypervisor, register: Register
) -> Method:
    from snapd_vm.methods.outside.executable import Executable
    from snapd_vm.methods.outside.executablerevert import RevertingExecutable
    from snapd_vm.methods.outside.program import kept_by_root

    _check_rights(one)
    schema = _EMPTY.format(name=one.name)
    try:
        if one.schema is not None:
            with open(kept_by_root(str(one.schema), "The schema"), encoding="utf-8") as file:
                schema = file.read()
        register(one.name, schema)
    except (SnapdError, OSError, ValueError) as error:  # it is not UTF-8, or no schema
        raise ConfigError(f"the schema of method '{one.name}' can't be used: {error}") from None
    kind = RevertingExecutable if one.reverts else Executable
    mark = f"{one.name}@{settings.state_dir}"
    method = kind(one, hypervisor, mark)
    try:
        method.fit()
    except SnapdError as error:  # it is looked at again before each run
        log.error("method %s can't be used: %s", one.name, error)
    return method


def _check_rights(one: ExecutableConfig) -> None:
    """Raise ConfigError where the daemon lacks what takes rights away from a program."""
    import pwd

    if one.user:
        try:
            pwd.getpwnam(one.user)
        except KeyError:
            raise ConfigError(
                f"there is no user '{one.user}', whom 'executable.user' names"
            ) from None
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        line = next(line for line in file if line.startswith("CapEff:"))
    own = int(line.split()[1], 16)
    for name in _NEEDED["user" if one.user else ""]:
        if not own >> _CAPABILITY_NUMBERS[name] & 1:
            raise ConfigError(
                f"the service lacks the capability CAP_{name.upper()}, without which it can't take "
                f"rights from the program of method '{one.name}'; see 'executable' in "
                "snapd-vm.toml(5)"
            )


def _plugins(settings: Config, hypervisor: Hypervisor, register: Register) -> list[Method]:
    from importlib.metadata import entry_points

    there: dict[str, list[Any]] = {}
    for point in entry_points(group=GROUP):
        there.setdefault(point.name, []).append(point)
    found = list[Method]()
    for name in settings.plugins.methods:
        points = {point.value: point for point in there.get(name, [])}
        if not points:
            raise ConfigError(
                f"'plugins.methods' lists '{name}', and no distribution that the service's Python "
                f"finds has an entry point of that name in the group '{GROUP}'"
            )
        if len(points) > 1:
            raise ConfigError(f"several distributions have a method '{name}': {', '.join(points)}")
        ((_, point),) = points.items()
        try:
            found.append(_made(name, point, settings, hypervisor, register))
        except BaseException as error:  # SystemExit too
            if isinstance(error, KeyboardInterrupt):
                raise
            log.error(
                "method %s is left out, as it could not be loaded: %s: %s",
                name,
                type(error).__name__,
                " ".join(str(error).split()),
            )
            log.debug("method %s could not be loaded", name, exc_info=error)
    return found


def _made(
    name: str, point: Any, settings: Config, hypervisor: Hypervisor, register: Register
) -> Method:
    from snapd_vm.methods.outside.fence import Fenced, Wrong
    from snapd_vm.methods.plugin import PROTOCOL_VERSION

    plugin = point.load()
    version = getattr(plugin, "protocol_version", None)
    if version != PROTOCOL_VERSION:
        raise Wrong(
            f"it was written for version {version!r} of the protocol, and this daemon has "
            f"{PROTOCOL_VERSION}"
        )
    made = plugin(_context(name, settings.plugins.options.get(name, {}), hypervisor))
    schema = getattr(made, "schema", None) or _EMPTY.format(name=name)
    if not isinstance(schema, str):
        raise Wrong("its schema is no text")
    method = Fenced(name, made)
    register(name, schema)
    return method


def _context(name: str, options: Any, hypervisor: Hypervisor) -> Any:
    from snapd_vm import command, storage
    from snapd_vm.errors import StorageFailed
    from snapd_vm.methods import off
    from snapd_vm.methods.plugin import Context

    def run(argv: Sequence[str], timeout: float) -> command.Result:
        try:
            return command.run(argv, timeout=timeout)
        except command.CommandError as error:
            raise StorageFailed(f"Method {name}: {error}.") from error

    return Context(
        name=name,
        options=options,
        log=logging.getLogger(f"snapd_vm.plugins.{name}"),
        run=run,
        user_of=lambda path: hypervisor.user_of(path, "", ""),
        other_user_of=lambda domain, disk: hypervisor.user_of(disk.path, domain.uuid, disk.target),
        reader_of=lambda path: storage.reader_of(path, ""),
        domain=hypervisor.read,
        check_off=lambda domain: off.check_off(hypervisor, domain),
    )
