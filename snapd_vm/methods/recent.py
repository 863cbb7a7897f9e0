"""What a storage's programs said a moment ago, so that many who ask at once start one of them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from snapd_vm.errors import SnapdError

V = TypeVar("V")

JUST_NOW_S = 1.0
"""For so long an answer that shows a snapshot in order is taken for what is."""


@dataclass(slots=True)
class _Answer(Generic[V]):
    """An answer, when it was complete (time.monotonic()), or what failed of it."""

    at: float = -math.inf
    value: V | None = None
    error: SnapdError | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Recent(Generic[V]):
    """What `ask` answers for a name, such as that of a volume group; it raises SnapdErrors."""

    def __init__(self, ask: Callable[[str], V]) -> None:
        self._ask = ask
        self._answers: dict[str, _Answer[V]] = {}
        self._lock = threading.Lock()

    def get(self, name: str, within_s: float) -> V:
        """An answer that may be so many seconds old.

        Only one thread asks at a time; raises what `ask` does, for all who have waited meanwhile.
        """
        asked = time.monotonic()
        with self._lock:
            answer = self._answers.setdefault(name, _Answer())
        with answer.lock:
            if answer.error is not None and answer.at >= asked:
                raise answer.error
            if answer.value is None or answer.at < asked - within_s:
                answer.value = answer.error = None
                try:
                    answer.value = self._ask(name)
                except SnapdError as error:
                    answer.error = error
                    raise
                finally:
                    answer.at = time.monotonic()
            return answer.value
