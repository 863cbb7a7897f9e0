"""What the parts of the engine share: configuration, libvirt, methods, journal, threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

from snapd_vm.config import Config
from snapd_vm.engine.journal import AnyStep, Journal
from snapd_vm.errors import MethodUnknown
from snapd_vm.methods.method import Method
from snapd_vm.model import Domain
from snapd_vm.virt.agent import Agent
from snapd_vm.virt.hypervisor import OffState

P = ParamSpec("P")
T = TypeVar("T")


class Hypervisor(Protocol):
    """What the engine itself asks of the hypervisor; blocking, raises SnapdErrors."""

    def read(self, uuid: str) -> Domain: ...
    def off_state(self, uuid: str) -> OffState: ...
    def suspend(self, uuid: str) -> None: ...
    def resume(self, uuid: str) -> bool: ...
    def running_job(self, uuid: str, target: str) -> str: ...
    def agent(self, domain: Domain, former_timeout: int | None = None) -> Agent: ...
    def store_methods(self, uuid: str, methods: Mapping[str, str]) -> None: ...
    def pool_folders(self) -> Sequence[str]: ...
    def user_of(self, path: str, uuid: str, target: str) -> str: ...


@dataclass(frozen=True, slots=True)
class World:
    """See the top of the file. `reach` is told of every step of an operation, in any thread.

    What runs in `executor` may hand work to `beside` and wait for it; what runs there hands out
    none, so that no thread waits for one that waits for it.
    """

    config: Config
    hypervisor: Hypervisor
    methods: Mapping[str, Method]
    journal: Journal
    executor: ThreadPoolExecutor
    beside: ThreadPoolExecutor
    reach: Callable[[AnyStep], None]

    def method(self, name: str) -> Method:
        """The method of a snapshot on record. Raises MethodUnknown if it is not there."""
        found = self.methods.get(name)
        if found is None:
            raise MethodUnknown(
                f"The method {name}, by which the snapshot was taken, is not there any more; put "
                "it back into the configuration, and restart the service."
            )
        return found

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a blocking function in a thread. Cancelling the await does not stop the thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.executor, lambda: function(*args, **kwargs))
