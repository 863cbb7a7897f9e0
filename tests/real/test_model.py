"""Anything in any order, on a real guest, against a model of what its disk and snapshots hold.

For 60 s, in CI for ten minutes, and for as long as SNAPD_VM_MODEL_S says; the storages share that,
which are those of SNAPD_VM_STORAGES or what runs everywhere. What fails prints the steps that led
to it; it is not shrunk, as each step takes a real guest.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, ParamSpec

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.bus.clients import Client
from tests.lab.deadline import wait_until
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real import images
from tests.real.api import NO_QUIESCE, QUIESCE_REQUIRED, SNAPSHOT, Api, ApiError, Created
from tests.real.places import file_of
from tests.real.storages import NAMES, STORAGES, Storage, env_of, takes_back_only_newest

ALL = float(os.environ.get("SNAPD_VM_MODEL_S") or (600 if os.environ.get("CI") else 60))
SECONDS = ALL / len(NAMES)
P = ParamSpec("P")
MOST = 4
FILES = ("a", "b", "c")
WENT_BACK = "went back to snapshot"


class TimeIsUp(KeyboardInterrupt):
    """Not a failure: hypothesis lets it through."""


class Failed(KeyboardInterrupt):
    """A failure that hypothesis does not try to repeat: the guest is not what it was before."""


def step(function: Callable[P, None]) -> Callable[P, None]:
    """Notes what is done, and ends all where it fails."""

    @functools.wraps(function)
    def done(*args: P.args, **kwargs: P.kwargs) -> None:
        said = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
        Model.done.append(f"{function.__name__}({said})")
        try:
            function(*args, **kwargs)
        except Exception as error:
            raise Failed("\n".join(["after", *Model.done[-60:]])) from error

    return done


@dataclass
class Known:
    """A snapshot as it must be; `files` is None where it was taken of a disk that was not clean."""

    path: str
    checksum: str
    files: dict[str, str] | None


@dataclass(frozen=True)
class Drawn:
    """What an action may need to know: which snapshot, when to kill, and so on."""

    which: int
    after: float
    quiesce: bool
    file: str
    text: str


DRAWN = st.builds(
    Drawn,
    st.integers(0, MOST * 12),
    st.floats(0, 0.3),
    st.booleans(),
    st.sampled_from(FILES),
    st.text("abcdef", min_size=1, max_size=8),
)
ACTIONS = (
    *("write", "write", "create", "create", "delete", "revert", "revert", "read"),
    *("pause", "resume", "power_off", "pull_the_plug", "start", "start"),
    *("restart_the_daemon", "killed_in_create", "killed_in_delete", "killed_in_revert"),
)


class Model(RuleBasedStateMachine):
    """The guest's disk and its snapshots.

    There is one rule, as of many hypothesis leaves out most for a whole run. What can't be done now
    is not done: hypothesis draws the same again after the same choices, so nothing that is drawn
    may depend on how a killed daemon's work came out.
    """

    lab: ClassVar[Lab]
    storage: ClassVar[Storage]
    guest: ClassVar[Guest]
    scratch: ClassVar[Path]
    before: ClassVar[set[str]]
    traces: ClassVar[list[int]]
    loop: ClassVar[asyncio.AbstractEventLoop]
    api: ClassVar[Api]
    end: ClassVar[float]
    steps: ClassVar[int] = 0
    done: ClassVar[list[str]] = []

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, str] = {}
        self.known: list[Known] = []
        self.state = "running"
        self.clean = True
        Model.done.append("-- anew")

    def wait(self, what: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(what)

    @initialize()
    @step
    def begin(self) -> None:
        assert self.guest.state == "running"
        for name in FILES:
            self._write(name, "first")

    @rule(action=st.sampled_from(ACTIONS), drawn=DRAWN)
    @step
    def act(self, action: str, drawn: Drawn) -> None:
        getattr(self, action)(drawn)

    # -- what the guest and its keeper do --------------------------------------------------------

    def write(self, drawn: Drawn) -> None:
        if self.state != "running":
            return
        self._write(drawn.file, drawn.text)

    def _write(self, name: str, text: str) -> None:
        self.guest.write("vda", name, text)
        self.files[name] = text

    def pause(self, drawn: Drawn) -> None:
        if self.state != "running":
            return
        self.guest.domain.suspend()
        self.state = "paused"

    def resume(self, drawn: Drawn) -> None:
        if self.state != "paused":
            return
        self.guest.domain.resume()
        self.state = "running"

    def power_off(self, drawn: Drawn) -> None:
        if self.state != "running":
            return
        self.guest.poweroff()
        self.state, self.clean = "shutoff", True

    def pull_the_plug(self, drawn: Drawn) -> None:
        if self.state != "running":
            return
        self.guest.destroy()
        self.state, self.clean = "shutoff", False

    def start(self, drawn: Drawn) -> None:
        if self.state != "shutoff":
            return
        self.guest.start()
        self.state = "running"

    # -- what is asked of the daemon -------------------------------------------------------------

    def create(self, drawn: Drawn) -> None:
        if not (len(self.known) < MOST):
            return
        off = self.state == "shutoff" and self.clean
        whole = off or (self.state == "running" and drawn.quiesce)
        flags = QUIESCE_REQUIRED if whole else NO_QUIESCE
        self._remember(self.wait(self._create(flags)), whole=whole)

    def _create(self, flags: int = 0) -> Awaitable[Created]:
        method = f"<diskSnapshot method='{self.storage.method}'/>"
        return self.api.create(self.guest, method_xml=method, flags=flags)

    def _remember(self, created: Created, *, whole: bool) -> None:
        files = dict(self.files) if whole else None
        self.known.append(Known(created.snapshot, self._checksum(created), files))

    def delete(self, drawn: Drawn) -> None:
        if not (self.known):
            return
        gone = self.known.pop(drawn.which % len(self.known))
        self.wait(self.api.call(gone.path, SNAPSHOT, "Delete", "u", 0))

    def revert(self, drawn: Drawn) -> None:
        one = self._to_go_back_to(drawn.which)
        if one is None:
            return
        before = self.lab.daemon.log.count(WENT_BACK)
        try:
            self.wait(self.api.call(one.path, SNAPSHOT, "Revert", "u", 0))
        except ApiError as error:
            assert not self._revertible(one), error
            return
        assert self.lab.daemon.log.count(WENT_BACK) == before + 1
        assert self._present() == one.checksum
        self.files = dict(one.files or {})

    def _to_go_back_to(self, which: int) -> Known | None:
        """A snapshot of which it is known what files are in it; the guest is off then."""
        known = [one for one in self.known if one.files is not None]
        if not known:
            return None
        if self.state == "paused":  # or it would hardly ever come to it
            self.guest.domain.resume()
            self.state = "running"
        if self.state == "running":
            self.guest.poweroff()
            self.state, self.clean = "shutoff", True
        return known[which % len(known)]

    def _revertible(self, one: Known) -> bool:
        """Method qemu discards no image that was there before the first snapshot."""
        if takes_back_only_newest(self.storage):
            return one is self.known[-1]
        return self.storage.method != "qemu" or file_of(self.guest) != str(self.guest.disk().path)

    def read(self, drawn: Drawn) -> None:
        if not (self.known):
            return
        one = self.known[drawn.which % len(self.known)]
        source = Created("", self.wait(self.api.backup_source(one.path)))
        assert self._checksum(source) == one.checksum
        if one.files is not None:
            raw = self.storage.raw(source, self.scratch / "raw")
            assert images.is_clean(raw)
            for name, text in one.files.items():
                assert run("debugfs", "-R", f"cat /{name}", raw).strip() == text

    # -- and what goes wrong ---------------------------------------------------------------------

    def restart_the_daemon(self, drawn: Drawn) -> None:
        self.lab.daemon.restart()

    def killed_in_create(self, drawn: Drawn) -> None:
        if not (len(self.known) < MOST):
            return
        self._killed(self._create(), drawn.after)
        paths = set(self.wait(self.api.snapshots_of(self.guest)))
        for path in paths - {one.path for one in self.known}:
            source = Created("", self.wait(self.api.backup_source(path)))
            self.known.append(Known(path, self._checksum(source), None))

    def killed_in_delete(self, drawn: Drawn) -> None:
        if not (self.known):
            return
        one = self.known[drawn.which % len(self.known)]
        self._killed(self.api.call(one.path, SNAPSHOT, "Delete", "u", 0), drawn.after)
        if one.path not in self.wait(self.api.snapshots_of(self.guest)):
            self.known.remove(one)

    def killed_in_revert(self, drawn: Drawn) -> None:
        one = self._to_go_back_to(drawn.which)
        if one is None or not self._revertible(one):
            return
        before = self._present()
        self._killed(self.api.call(one.path, SNAPSHOT, "Revert", "u", 0), drawn.after)
        assert self._present() in (before, one.checksum)
        if self._present() == one.checksum:
            self.files = dict(one.files or {})

    def _present(self) -> str:
        """The checksum of the disk of a guest that is off."""
        return _sum(self.storage.present(self.scratch / "present"))

    def _killed(self, call: Awaitable[Any], after: float) -> None:
        """Kill the daemon in mid-call, and wait until the next one has settled everything."""

        async def begin() -> None:
            task = asyncio.ensure_future(call)
            await asyncio.sleep(after * self.storage.snapshot_s / 20)
            self.lab.daemon.kill()
            try:
                await task
            except ApiError as error:
                assert error.name.endswith(("NoReply", "ServiceUnknown")), error

        self.wait(begin())
        self.lab.daemon.start()

        def settled() -> bool:
            rows = self.wait(self.api.snapshots_of(self.guest)).values()
            return all(row["State"] == "ready" for row in rows)

        wait_until("all is settled", settled, 30, 0.2)

    # -- what must be true all the time ----------------------------------------------------------

    @invariant()
    @step
    def the_disk_is_as_the_model_says(self) -> None:
        if self.state == "running":
            self.guest.writes_go_on()
            for name, text in self.files.items():
                assert self.guest.read("vda", name) == text

    @invariant()
    @step
    def the_snapshots_are_as_the_model_says(self) -> None:
        type(self).steps += 1
        if time.monotonic() > self.end:
            raise TimeIsUp
        rows = self.wait(self.api.snapshots_of(self.guest))
        assert set(rows) == {one.path for one in self.known}
        assert {row["State"] for row in rows.values()} <= {"ready"}
        assert file_of(self.guest) == file_of(self.guest, 2)
        self._nothing_is_left_over()

    def _nothing_is_left_over(self) -> None:
        """On the storage are its first contents, the disk, and what makes up the snapshots."""
        assert self.before <= set(self.storage.contents())
        assert len(self._others()) == self._expected(len(self.known))

    def _others(self) -> set[str]:
        """What is there besides the first contents, the disk, and files that are a source."""
        sources = [self.wait(self.api.backup_source(one.path)) for one in self.known]
        named = {Created("", source).source.get("file") or "" for source in sources}
        return set(self.storage.contents()) - self.before - named - {file_of(self.guest)}

    def _expected(self, snapshots: int) -> int:
        """How many of those there are: a first snapshot may need more than each further one."""
        none, one, two = self.traces
        return one + (snapshots - 1) * (two - one) if snapshots else none

    @classmethod
    def learn(cls) -> None:
        """What snapshots leave on the storage, so that more than this is seen, and less."""
        learner, cls.traces = cls(), []
        for count in range(3):
            if count:
                learner.create(Drawn(0, 0, True, "", ""))
            cls.traces.append(len(learner._others()))
        learner.revert(Drawn(1, 0, True, "", ""))  # as chance may not come to one in good time
        learner._nothing_is_left_over()
        learner.guest.start()
        for one in learner.known:
            learner.wait(learner.api.call(one.path, SNAPSHOT, "Delete", "u", 0))
        assert set(cls.storage.contents()) == cls.before

    @step
    def teardown(self) -> None:
        for one in self.known:
            self.wait(self.api.call(one.path, SNAPSHOT, "Delete", "u", 0))
        if self.state == "paused":
            self.guest.domain.resume()
        elif self.state == "shutoff":
            self.guest.start()
        self.known.clear()
        file = file_of(self.guest)
        assert not file or len(images.chain(file)) == 1
        self._nothing_is_left_over()

    def _checksum(self, source: Created) -> str:
        return _sum(self.storage.raw(source, self.scratch / "checked"))


def _sum(raw: Path) -> str:
    return hashlib.sha256(raw.read_bytes()).hexdigest()


@pytest.fixture(params=NAMES)
def machine(lab: Lab, scratch: Path, request: pytest.FixtureRequest) -> Iterator[type[Model]]:
    """The model of a disk on this storage, and a daemon that is told what it needs."""
    with STORAGES[request.param](lab) as storage:
        shutil.rmtree(lab.daemon.state_dir, ignore_errors=True)
        lab.daemon.start(storage.config, env=env_of(storage))
        Model.lab, Model.scratch = lab, scratch
        Model.storage, Model.guest = storage, storage.guest
        Model.before = set(storage.contents())
        yield Model
        if lab.daemon.running:
            lab.daemon.stop()


@pytest.mark.timeout(SECONDS + 300)
def test_anything_in_any_order(lab: Lab, machine: type[Model]) -> None:
    """Asserts in its steps; ends when the time is up."""
    loop = asyncio.new_event_loop()
    client = loop.run_until_complete(Client.connect(lab.address))
    machine.loop, machine.api = loop, Api(client)
    try:
        machine.learn()
        machine.end, machine.steps = time.monotonic() + SECONDS, 0
        machine.done.clear()
        with pytest.raises(TimeIsUp):
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=100_000,
                    stateful_step_count=60,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                ),
            )
        assert machine.steps > SECONDS / 10 / (machine.storage.snapshot_s / 20)
    except Failed as failed:
        raise AssertionError(str(failed)) from failed.__cause__
    finally:
        client.close()
        loop.close()
