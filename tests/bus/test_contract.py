"""What is served is the contract's file: the same interfaces, at every path and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from dbus_next.constants import MessageType
from lxml import etree

from snapd_vm.bus.contract import (
    DISK_SNAPSHOT,
    DOMAIN,
    INTROSPECTABLE,
    JOB,
    MANAGER,
    OBJECT_MANAGER,
    PEER,
    PROPERTIES,
    SNAPSHOT,
    load_contract,
)
from snapd_vm.model import ROOT_PATH, domain_path, job_path, snapshot_path
from tests.bus.clients import Client
from tests.bus.fakes import FakeEngine, make_job, make_snapshot, uuid

FILE = Path(__file__).parents[2] / "data/org.example.DiskSnapshot.xml"
EVERYWHERE = {PROPERTIES, INTROSPECTABLE, PEER}


def canonical(element: etree._Element) -> bytes:
    return etree.tostring(element, method="c14n", with_tail=False)


async def introspect(client: Client, path: str) -> etree._Element:
    answer = await client.call(INTROSPECTABLE, "Introspect", path=path)
    assert answer.message_type is MessageType.METHOD_RETURN, answer.body
    assert answer.signature == "s"
    return etree.fromstring(answer.body[0])


async def test_every_object_shows_its_interfaces_as_the_file_has_them(
    client: Client, engine: FakeEngine
) -> None:
    engine.snapshots[make_snapshot().uuid] = make_snapshot()
    engine.jobs[7] = make_job(7)
    wanted = {e.get("name"): canonical(e) for e in etree.parse(FILE).getroot().iter("interface")}
    seen = set()
    for path, own in (
        (ROOT_PATH, {DISK_SNAPSHOT, MANAGER}),
        (domain_path(uuid(1)), {DISK_SNAPSHOT, DOMAIN}),
        (snapshot_path(make_snapshot().uuid), {SNAPSHOT}),
        (job_path(7), {JOB}),
    ):
        node = await introspect(client, path)
        served = {e.get("name"): canonical(e) for e in node.iterchildren("interface")}
        standard = EVERYWHERE | ({OBJECT_MANAGER} if path == ROOT_PATH else set())
        assert set(served) == own | standard
        assert {name: served[name] for name in own} == {name: wanted[name] for name in own}
        seen |= own
    assert seen == set(wanted), "the file has an interface that no object serves"


@pytest.mark.parametrize(
    ("path", "children"),
    [
        ("/", ["org"]),
        ("/org", ["example"]),
        ("/org/example", ["DiskSnapshot"]),
        (ROOT_PATH, ["domain", "snapshot", "job"]),
        (ROOT_PATH + "/domain", [domain_path(uuid(n)).rpartition("/")[2] for n in (1, 2)]),
        (ROOT_PATH + "/snapshot", []),
        (ROOT_PATH + "/job", ["7", "12"]),
        (domain_path(uuid(1)), []),
    ],
)
async def test_the_tree_can_be_walked(
    client: Client, engine: FakeEngine, path: str, children: list[str]
) -> None:
    engine.jobs = {number: make_job(number) for number in (7, 12)}
    node = await introspect(client, path)
    assert [child.get("name") for child in node.iterchildren("node")] == children
    if path.count("/") < 3:
        assert {e.get("name") for e in node.iterchildren("interface")} == EVERYWHERE


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere",
        "/org/exam",
        job_path(8),
        ROOT_PATH + "/job/07",
        ROOT_PATH + "/job/_7",
        ROOT_PATH + "/job/" + "7" * 5000,
        job_path(7) + "/x",
        domain_path(uuid(7)),
        domain_path(uuid(1)) + "/x",
        snapshot_path(uuid(1)),
        ROOT_PATH + "/domain/" + uuid(1).replace("-", "_"),
    ],
)
async def test_introspecting_what_is_not_there_is_an_error(
    client: Client, engine: FakeEngine, path: str
) -> None:
    engine.jobs[7] = make_job(7)
    answer = await client.call(INTROSPECTABLE, "Introspect", path=path)
    assert answer.error_name == "org.freedesktop.DBus.Error.UnknownObject"


def test_the_signatures_are_read_from_the_file() -> None:
    contract = load_contract()
    create = contract.own[DISK_SNAPSHOT].methods["Create"]
    assert (create.takes, create.gives) == ("sssu", "ss")
    assert contract.own[SNAPSHOT].signals["Warning"] == "ss"
    delete = contract.own[SNAPSHOT].methods["Delete"]
    assert (delete.takes, delete.gives) == ("u", "s")
    assert contract.own[MANAGER].properties["URI"].constant
    assert not contract.own[DOMAIN].properties["State"].constant


def test_the_job_is_that_of_the_design() -> None:
    job = load_contract().own[JOB]
    assert {name: value.signature for name, value in job.properties.items()} == {
        "Operation": "s",
        "Progress": "d",
        "ProgressValid": "b",
        "Bytes": "t",
        "StartTime": "t",
        "Objects": "ao",
        "StartedByUID": "u",
        "Cancelable": "b",
        "Result": "a{sv}",
    }
    constant = {name for name, value in job.properties.items() if value.constant}
    assert constant == {"Operation", "StartTime", "StartedByUID"}
    assert {name: (m.takes, m.gives) for name, m in job.methods.items()} == {"Cancel": ("", "")}
    assert job.signals == {"Completed": "bs"}
