"""What every method must do on its real storage, with one guest that writes without pause.

    SNAPD_VM_STORAGES=rbd,btrfs python -m pytest tests/real/test_conformance.py

takes the storages of that list instead of all.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import sqlite3
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from snapd_vm.engine.journal import Step
from tests.lab.deadline import wait_until
from tests.lab.lab import Lab
from tests.lab.program import run
from tests.real import images
from tests.real.api import (
    DOMAIN,
    NO_QUIESCE,
    QUIESCE_REQUIRED,
    SNAPSHOT,
    Api,
    ApiError,
    Created,
    path_of,
)
from tests.real.conftest import Connect
from tests.real.storages import NAMES, STORAGES, Copies, Storage, env_of, unfrozen_of, xml_of
from tests.real.test_crash import FAULTY

COMMAND = re.compile(r"this would remove it: (.*?) MESSAGE_ID=")
TAKERS = {"lvm": "lvcreate", "zfs": "zfs snapshot", "array": "file-array"}
"""The one program of a method, where no library call does it."""
SIZE = 64 << 20
KILLS = 5


@pytest.fixture(scope="module", params=NAMES)
def storage(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Storage]:
    """Each storage in turn, with its guest."""
    with STORAGES[request.param](lab) as made:
        yield made


@pytest.fixture
def served(lab: Lab, storage: Storage) -> Iterator[Lab]:
    """The lab with a new daemon, told what the storage needs; and nothing is left at the end."""
    before = sorted(storage.contents())
    shutil.rmtree(lab.daemon.state_dir, ignore_errors=True)
    lab.daemon.start(storage.config, env=env_of(storage))
    yield lab
    if lab.daemon.running:
        lab.daemon.stop()
    storage.guest.writes_go_on()
    assert sorted(storage.contents()) == before


@pytest.fixture
async def service(served: Lab, connect: Connect) -> Api:
    """A client of that daemon, who is root."""
    return await connect()


def method(storage: Storage) -> str:
    """The XML that asks for the storage's method."""
    return f"<diskSnapshot method='{storage.method}'/>"


def checksum(storage: Storage, created: Created, scratch: Path) -> str:
    """A checksum of the immutable view."""
    return hashlib.sha256(storage.raw(created, scratch / "view").read_bytes()).hexdigest()


async def delete(api: Api, path: str) -> None:
    await api.call(path, SNAPSHOT, "Delete", "u", 0)


async def delete_all(api: Api, storage: Storage) -> None:
    """Whatever there is."""
    for path in await api.snapshots_of(storage.guest):
        await delete(api, path)


async def refused(call: Any, *names: str) -> ApiError:
    """The error that the call ends with, which must be one of these."""
    with pytest.raises(ApiError) as error:
        await call
    assert error.value.name in names, error.value
    return error.value


# -- claim and check -----------------------------------------------------------------------------


async def test_it_is_the_default_and_says_why(service: Api, storage: Storage) -> None:
    (row,) = [row for row in await service.disks(storage.guest) if row["target"] == "vda"]
    assert (row["method"] == storage.method) is not bool(xml_of(storage))
    assert "default" in row["reason"]


async def test_plan_says_what_create_does_and_changes_nothing(
    service: Api, storage: Storage, scratch: Path
) -> None:
    before, xml = sorted(storage.contents()), storage.guest.domain.XMLDesc()
    plan = await service.plan(
        storage.guest, method_xml=xml_of(storage), name="planned", flags=QUIESCE_REQUIRED
    )
    assert (plan["method"], plan["consistency"]) == (storage.method, "quiesced")
    assert 0 < plan["space_needed"] < plan["space_available"]
    assert (sorted(storage.contents()), storage.guest.domain.XMLDesc()) == (before, xml)
    created = await service.create(
        storage.guest, method_xml=xml_of(storage), name="planned", flags=QUIESCE_REQUIRED
    )
    planned = Created("", plan["backup_source"])
    assert planned.source.tag == created.source.tag == "source"
    assert planned.ours("format") == created.ours("format") == storage.format
    assert planned.ours("type") == created.ours("type")
    await delete(service, created.snapshot)


# -- create --------------------------------------------------------------------------------------


async def test_a_quiesced_snapshot_is_clean_and_stays_what_it_is(
    service: Api, storage: Storage, scratch: Path
) -> None:
    guest, before = storage.guest, sorted(storage.contents())
    guest.write("vda", "mark", "before")
    created = await service.create(
        guest, method_xml=xml_of(storage), name="nightly", flags=QUIESCE_REQUIRED
    )
    guest.write("vda", "mark", "after")
    told = await service.properties(created.snapshot, SNAPSHOT)
    wanted = {
        "Name": "nightly",
        "Method": storage.method,
        "State": "ready",
        "Consistency": "quiesced",
        "FrozenFilesystems": 1,
        "Format": storage.format,
        "Size": SIZE,
        "Target": "vda",
        "Domain": path_of(guest),
    }
    assert {key: told[key] for key in wanted} == wanted
    assert told["FrozenTime"] > 0
    assert (created.ours("format"), created.ours("consistency")) == (storage.format, "quiesced")
    raw = storage.raw(created, scratch / "raw")
    assert raw.stat().st_size == SIZE
    assert images.is_clean(raw)
    assert not images.needs_recovery(raw)
    assert run("debugfs", "-R", "cat /mark", raw).strip() == "before"
    first = checksum(storage, created, scratch)
    guest.fill("vda", "filling", 4)
    guest.writes_go_on()
    assert checksum(storage, created, scratch) == first
    assert await service.backup_source(created.snapshot) == created.backup_source
    await delete(service, created.snapshot)
    assert not await service.snapshots_of(guest)
    assert sorted(storage.contents()) == before
    assert guest.read("vda", "mark") == "after"


async def test_one_that_is_not_quiesced_is_as_after_a_power_failure(
    service: Api, storage: Storage, scratch: Path
) -> None:
    """So that the test above can tell the difference."""
    created = await service.create(storage.guest, method_xml=xml_of(storage), flags=NO_QUIESCE)
    assert created.ours("consistency") == unfrozen_of(storage)
    raw = storage.raw(created, scratch / "raw")
    assert images.needs_recovery(raw)
    assert images.recovers(raw)
    await delete(service, created.snapshot)


async def test_several_stand_beside_each_other(
    service: Api, storage: Storage, scratch: Path
) -> None:
    made = []
    for text in ("one", "two", "three"):
        storage.guest.write("vda", "mark", text)
        made.append(
            await service.create(
                storage.guest, method_xml=xml_of(storage), name=text, flags=QUIESCE_REQUIRED
            )
        )
    sums = [checksum(storage, created, scratch) for created in made]
    assert len(set(sums)) == 3
    await delete(service, made[1].snapshot)
    for number in (0, 2):
        source = Created("", await service.backup_source(made[number].snapshot))
        assert checksum(storage, source, scratch) == sums[number]
    await delete_all(service, storage)
    assert storage.guest.read("vda", "mark") == "three"


async def test_a_label_that_is_taken(service: Api, storage: Storage) -> None:
    created = await service.create(storage.guest, method_xml=xml_of(storage), name="once")
    with_it = sorted(storage.contents())
    await refused(
        service.create(storage.guest, method_xml=xml_of(storage), name="once"), "NameInUse"
    )
    await refused(service.plan(storage.guest, method_xml=xml_of(storage), name="once"), "NameInUse")
    assert sorted(storage.contents()) == with_it
    await delete(service, created.snapshot)


def serve_faulty(served: Lab, storage: Storage, step: Step, fault: str) -> None:
    """Another daemon in its place, with a fault; see faulty_daemon.py."""
    served.daemon.stop()
    argv = (*FAULTY, "--at", step, "--do", fault)
    served.daemon.start(storage.config, argv=argv, env=env_of(storage))


async def test_a_name_on_the_storage_that_is_taken(
    served: Lab, storage: Storage, connect: Connect, tmp_path: Path
) -> None:
    """Between check and use, as before that nobody knows the name."""
    flag = tmp_path / "flag"
    serve_faulty(served, storage, Step.PREPARED, f"wait:{flag}")
    api = await connect()
    call = asyncio.create_task(api.create(storage.guest, method_xml=xml_of(storage), name="taken"))
    await asyncio.to_thread(wait_until, "it is prepared", flag.exists, storage.snapshot_s)
    with sqlite3.connect(served.daemon.state_dir / "journal.sqlite3") as db:
        ((operation,),) = db.execute("SELECT uuid FROM operation").fetchall()
    with storage.in_the_way(operation, "taken"):
        flag.unlink()
        await refused(call, "NameInUse")
        assert not await api.snapshots_of(storage.guest)
        storage.guest.writes_go_on()


async def test_no_program_but_the_one_that_takes_it_is_started_in_the_freeze(
    served: Lab, storage: Storage, connect: Connect, tmp_path: Path
) -> None:
    started = tmp_path / "programs"
    serve_faulty(served, storage, Step.FROZEN, f"programs:{started}")
    looked = "looked for our files that no record knows"  # by programs, after the start
    await asyncio.to_thread(
        wait_until, looked, lambda: looked in served.daemon.log_of_this_life, 60
    )
    api = await connect()
    created = await api.create(storage.guest, method_xml=xml_of(storage), flags=QUIESCE_REQUIRED)
    lines = started.read_text().splitlines()
    assert len(lines) == (storage.method in TAKERS), lines
    assert all(TAKERS[storage.method] in line for line in lines), lines
    await delete(api, created.snapshot)


async def test_no_room(service: Api, storage: Storage) -> None:
    with storage.full():
        before = sorted(storage.contents())
        error = await refused(service.create(storage.guest, method_xml=method(storage)), "NoSpace")
        assert error.text.endswith(".")
        assert sorted(storage.contents()) == before
        assert not await service.snapshots_of(storage.guest)
    created = await service.create(storage.guest, method_xml=xml_of(storage))
    await delete(service, created.snapshot)


async def test_the_tool_is_missing(served: Lab, storage: Storage, connect: Connect) -> None:
    env = storage.crippled()
    if env is None:
        return
    before = sorted(storage.contents())
    served.daemon.stop()
    served.daemon.start(storage.config, env=env)
    api = await connect()
    error = await refused(
        api.create(storage.guest, method_xml=method(storage)), "MethodNotSupported"
    )
    assert "install" in error.text
    (row,) = [row for row in await api.disks(storage.guest) if row["target"] == "vda"]
    assert row["method"] != storage.method
    assert row["reason"]
    assert sorted(storage.contents()) == before


async def test_it_is_there_when_the_daemon_is_back(
    served: Lab, service: Api, storage: Storage, connect: Connect
) -> None:
    created = await service.create(storage.guest, name="lasting", flags=QUIESCE_REQUIRED)
    before = await service.properties(created.snapshot, SNAPSHOT)
    served.daemon.restart()
    again = await connect()
    assert (await again.snapshots_of(storage.guest)) == {created.snapshot: before}
    assert (before["State"], before["Consistency"]) == ("ready", "quiesced")
    assert (await again.backup_source(created.snapshot)) == created.backup_source
    await delete(again, created.snapshot)


# -- killed --------------------------------------------------------------------------------------


async def killed(lab: Lab, call: Any, after: float) -> None:
    """Kill the daemon so many seconds after the call has begun, and start it again."""
    task = asyncio.ensure_future(call)
    await asyncio.sleep(after)
    lab.daemon.kill()
    try:
        await task
    except ApiError as error:
        assert error.name.endswith(("NoReply", "ServiceUnknown")), error
    lab.daemon.start()


async def test_killed_in_mid_command(
    served: Lab, service: Api, storage: Storage, scratch: Path
) -> None:
    """Whenever that is, a snapshot is whole and listed, or nothing of it is there."""
    before = sorted(storage.contents())
    began = time.monotonic()
    created = await service.create(
        storage.guest, method_xml=xml_of(storage), flags=QUIESCE_REQUIRED
    )
    usual = time.monotonic() - began
    await delete(service, created.snapshot)
    for number in range(KILLS):
        after = usual * (number + 0.5) / KILLS
        await killed(
            served,
            service.create(storage.guest, method_xml=xml_of(storage), name=f"killed{number}"),
            after,
        )
        storage.guest.writes_go_on()
        rows = await service.snapshots_of(storage.guest)
        assert {row["State"] for row in rows.values()} <= {"ready"}
        if not rows:
            assert sorted(storage.contents()) == before
            continue
        (path,) = rows
        source = Created("", await service.backup_source(path))
        raw = storage.raw(source, scratch / "raw")
        assert images.recovers(raw)
        await killed(served, delete(service, path), usual * number / KILLS)
        await settled(service, storage)
        await delete_all(service, storage)
        assert sorted(storage.contents()) == before


async def settled(api: Api, storage: Storage) -> None:
    """Wait until a delete that was broken off has come to its end."""
    deadline = asyncio.get_running_loop().time() + 60
    while {r["State"] for r in (await api.snapshots_of(storage.guest)).values()} - {"ready"}:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.1)


# -- delete --------------------------------------------------------------------------------------


async def test_deleted_twice(service: Api, storage: Storage, connect: Connect) -> None:
    one = await service.create(storage.guest, method_xml=xml_of(storage), name="one")
    two = await service.create(storage.guest, method_xml=xml_of(storage), name="two")
    other = await connect()
    done = await asyncio.gather(
        delete(service, one.snapshot), delete(other, one.snapshot), return_exceptions=True
    )
    (error,) = [result for result in done if result is not None]
    assert isinstance(error, ApiError)
    assert error.name in ("Busy", "NoSuchSnapshot"), error
    with pytest.raises(ApiError, match=r"NoSuchSnapshot|UnknownObject|UnknownMethod"):
        await delete(service, one.snapshot)
    assert list(await service.snapshots_of(storage.guest)) == [two.snapshot]
    await delete(service, two.snapshot)


# -- what is there, and whose it is --------------------------------------------------------------


async def told_of(lab: Lab, label: str) -> tuple[Collection[str], str]:
    """Start the daemon again, its database lost: lines of stray snapshots, that of this label."""
    lab.daemon.stop()
    shutil.rmtree(lab.daemon.state_dir)
    before = len(lab.daemon.log)
    lab.daemon.start()
    end = "looked for our files that no record knows: "
    await asyncio.to_thread(wait_until, "it has looked", lambda: end in lab.daemon.log[before:], 60)
    lines = [line for line in lab.daemon.log[before:].splitlines() if "left alone; " in line]
    return lines, next((line for line in lines if f" snapshot {label} " in line), "")


async def test_found_again_with_the_database_lost(
    served: Lab, service: Api, storage: Storage, scratch: Path
) -> None:
    guest, before = storage.guest, sorted(storage.contents())
    guest.write("vda", "mark", "kept")
    created = await service.create(
        guest, method_xml=xml_of(storage), name="lost", flags=QUIESCE_REQUIRED
    )
    first = checksum(storage, created, scratch)
    with storage.foreign():
        lines, line = await told_of(served, "lost")
        assert guest.name in line
        assert len(lines) == 1, lines
        assert not await service.snapshots_of(guest)
        assert checksum(storage, created, scratch) == first  # it was left alone
        command = COMMAND.search(line)
        if isinstance(storage, Copies) and command is None:  # of a program none is believed
            Path(created.file).unlink()
        else:
            assert command is not None, line
            run("bash", "-c", command[1], timeout=120)
        lines, _ = await told_of(served, "lost")
        assert not lines
    assert sorted(storage.contents()) == before
    assert guest.read("vda", "mark") == "kept"


async def test_foreign_snapshots_are_left_alone(
    served: Lab, service: Api, storage: Storage
) -> None:
    with storage.foreign():
        created = await service.create(storage.guest, method_xml=xml_of(storage), name="ours")
        served.daemon.kill()
        served.daemon.start()
        assert list(await service.snapshots_of(storage.guest)) == [created.snapshot]
        await delete(service, created.snapshot)
        assert (await service.properties(path_of(storage.guest), DOMAIN))["State"] == "running"
