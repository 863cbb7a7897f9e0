"""Objects, properties and methods answer as the contract says; what is not there has its error."""

from __future__ import annotations

from typing import Any

import pytest
from dbus_next.constants import MessageType
from dbus_next.signature import Variant

from snapd_vm.bus.contract import (
    DISK_SNAPSHOT,
    DOMAIN,
    JOB,
    MANAGER,
    OBJECT_MANAGER,
    PEER,
    PROPERTIES,
    SNAPSHOT,
)
from snapd_vm.model import ROOT_PATH, AgentChannel, domain_path, job_path, snapshot_path
from tests.bus.clients import Client
from tests.bus.conftest import VERSION
from tests.bus.fakes import (
    FakeEngine,
    StandInPolkit,
    make_disk,
    make_domain,
    make_job,
    make_snapshot,
    uuid,
)

STANDARD = "org.freedesktop.DBus.Error."
ERROR = "org.example.DiskSnapshot.Error."
VDA = "<disk><target dev='vda'/></disk>"


async def test_root_properties(client: Client) -> None:
    assert await client.properties(ROOT_PATH, MANAGER) == {
        "Version": VERSION,
        "URI": "test:///default",
        "Connected": True,
        "Methods": ["qemu"],
    }


async def test_domain_properties(client: Client) -> None:
    assert await client.properties(domain_path(uuid(1)), DOMAIN) == {
        "Name": "vm1",
        "UUID": uuid(1),
        "State": "running",
        "GuestAgent": True,
    }


@pytest.mark.parametrize(
    "changes",
    [{"agent": None}, {"agent": AgentChannel("a", "", False)}, {"id": -1, "state": "shutoff"}],
)
async def test_no_agent_that_is_not_connected_in_a_running_domain(
    client: Client, engine: FakeEngine, changes: dict[str, Any]
) -> None:
    engine.domains[uuid(1)] = make_domain(1, **changes)
    assert (await client.properties(domain_path(uuid(1)), DOMAIN))["GuestAgent"] is False


async def test_a_set_is_answered_in_its_order(client: Client, engine: FakeEngine) -> None:
    engine.domains[uuid(1)] = make_domain(1, disks=(make_disk("vda"), make_disk("vdb")))
    given = [[VDA, ""], ["<disk><target dev='vdb'/></disk>", "<diskSnapshot method='qemu'/>"]]
    path = domain_path(uuid(1))
    answer = await client.call(DOMAIN, "CreateSet", "a(ss)su", [given, "both", 1], path=path)
    assert answer.body == [
        [[snapshot_path(uuid(1000 + n)), "<disk now='overlay'/>", "<source/>"] for n in (1, 2)]
    ]
    asked = [request for call, request in engine.calls if call == "create"]
    assert [(r.disk.target, r.name, r.flags, r.uuid) for r in asked] == [
        ("vda", "both", 1, uuid(1)),
        ("vdb", "both", 1, uuid(1)),
    ]
    assert [request.method and request.method.method for request in asked] == [None, "qemu"]


async def test_a_set_asks_polkit_once_for_all_its_disks(
    client: Client, engine: FakeEngine, polkit: StandInPolkit
) -> None:
    overlay = "<diskSnapshot method='qemu'><overlay file='/pool/a'/></diskSnapshot>"
    given = [[VDA, ""], ["<disk><target dev='vdb'/></disk>", overlay]]
    await client.call(DOMAIN, "CreateSet", "a(ss)su", [given, "both", 0], path=domain_path(uuid(1)))
    asked = [(q.action.rpartition(".")[2], q.details["disk"]) for q in polkit.questions]
    assert sorted(set(asked)) == [("configure", "vda,vdb"), ("create", "vda,vdb")]
    assert {q.details["method"] for q in polkit.questions} == {",qemu"}


async def test_a_set_without_methods_asks_polkit_with_none(
    client: Client, polkit: StandInPolkit
) -> None:
    given = [[VDA, ""], ["<disk><target dev='vdb'/></disk>", ""]]
    await client.call(DOMAIN, "CreateSet", "a(ss)su", [given, "both", 0], path=domain_path(uuid(1)))
    assert {q.details.get("method", "") for q in polkit.questions} == {""}


@pytest.mark.parametrize(("count", "error"), [(128, ""), (129, STANDARD + "InvalidArgs")])
async def test_a_set_has_a_limit(
    client: Client, engine: FakeEngine, count: int, error: str
) -> None:
    disks = tuple(make_disk(f"vd{number}") for number in range(count))
    engine.domains[uuid(1)] = make_domain(1, disks=disks)
    given = [[f"<disk><target dev='{disk.target}'/></disk>", ""] for disk in disks]
    path = domain_path(uuid(1))
    answer = await client.call(DOMAIN, "CreateSet", "a(ss)su", [given, "", 0], path=path)
    assert (answer.error_name or "") == error


async def test_arrays_have_a_limit_before_they_are_read(client: Client, engine: FakeEngine) -> None:
    given = [["", ""]] * 20_000
    answer = await client.call(
        DOMAIN, "CreateSet", "a(ss)su", [given, "", 0], path=domain_path(uuid(1))
    )
    assert answer.error_name == STANDARD + "LimitsExceeded"
    assert not engine.calls


async def test_snapshot_properties(client: Client, engine: FakeEngine) -> None:
    snapshot = make_snapshot()
    engine.snapshots[snapshot.uuid] = snapshot
    path = snapshot_path(snapshot.uuid)
    assert await client.properties(path, SNAPSHOT) == {
        "Name": "label1",
        "Domain": domain_path(uuid(1)),
        "DomainUUID": uuid(1),
        "Target": "vda",
        "Method": "qemu",
        "Created": 1_700_000_000_000_000,
        "State": "ready",
        "Consistency": "quiesced",
        "FrozenFilesystems": 2,
        "FrozenTime": 45_000,
        "Format": "qcow2",
        "Size": 1 << 33,
    }
    answer = await client.call(PROPERTIES, "Get", "ss", [SNAPSHOT, "Domain"], path=path)
    assert answer.body == [Variant("o", domain_path(uuid(1)))]


async def test_all_properties_at_once_and_those_of_standard_interfaces(client: Client) -> None:
    path = domain_path(uuid(1))
    assert len(await client.properties(path, "")) == 4
    assert await client.properties(path, PEER) == {}
    assert await client.properties(path, DISK_SNAPSHOT) == {}


@pytest.mark.parametrize(
    ("path", "interface", "member", "signature", "body", "error"),
    [
        ("/nowhere", MANAGER, "FindDomain", "s", ["vm1"], "UnknownObject"),
        (ROOT_PATH + "/domain", MANAGER, "FindDomain", "s", ["vm1"], "UnknownInterface"),
        (ROOT_PATH, "org.example.Other", "FindDomain", "s", ["vm1"], "UnknownInterface"),
        (ROOT_PATH, MANAGER, "LoseDomain", "s", ["vm1"], "UnknownMethod"),
        (ROOT_PATH, None, "LoseDomain", "s", ["vm1"], "UnknownMethod"),
        (ROOT_PATH, DOMAIN, "Disks", "", [], "UnknownInterface"),
        (ROOT_PATH, MANAGER, "FindDomain", "u", [1], "InvalidArgs"),
        (ROOT_PATH, MANAGER, "FindDomain", "", [], "InvalidArgs"),
        (ROOT_PATH, MANAGER, "FindDomain", "ss", ["vm1", ""], "InvalidArgs"),
        (ROOT_PATH, PROPERTIES, "Get", "ss", [MANAGER, "Nothing"], "UnknownProperty"),
        (ROOT_PATH, PROPERTIES, "Get", "ss", [PEER, "Nothing"], "UnknownProperty"),
        (ROOT_PATH, PROPERTIES, "Get", "ss", ["org.example.Other", "X"], "UnknownInterface"),
        (ROOT_PATH, PROPERTIES, "GetAll", "s", ["org.example.Other"], "UnknownInterface"),
        (ROOT_PATH, PROPERTIES, "GetAll", "s", [DOMAIN], "UnknownInterface"),
        ("/org", PROPERTIES, "GetAll", "s", [MANAGER], "UnknownInterface"),
        (
            ROOT_PATH,
            PROPERTIES,
            "Set",
            "ssv",
            [MANAGER, "URI", Variant("s", "qemu:///system")],
            "PropertyReadOnly",
        ),
        (ROOT_PATH, PROPERTIES, "Set", "ssv", [MANAGER, "X", Variant("u", 1)], "UnknownProperty"),
    ],
)
async def test_what_is_not_there_has_its_standard_error(
    client: Client,
    path: str,
    interface: str | None,
    member: str,
    signature: str,
    body: list[Any],
    error: str,
) -> None:
    answer = await client.call(interface, member, signature, body, path=path)
    assert answer.error_name == STANDARD + error
    assert "\n" not in answer.body[0]


async def test_a_call_may_leave_out_the_interface(client: Client) -> None:
    answer = await client.call(None, "FindDomain", "s", ["vm1"])
    assert answer.body == [domain_path(uuid(1))]


@pytest.mark.parametrize("path", ["/", "/nowhere", ROOT_PATH, domain_path(uuid(1))])
@pytest.mark.parametrize("interface", [PEER, None])
async def test_peer_is_at_every_path(client: Client, path: str, interface: str | None) -> None:
    answer = await client.call(interface, "Ping", path=path)
    assert (answer.message_type, answer.body) == (MessageType.METHOD_RETURN, [])
    answer = await client.call(interface, "GetMachineId", path=path)
    if answer.message_type is MessageType.METHOD_RETURN:
        assert len(answer.body[0]) == 32
    else:
        assert answer.error_name == STANDARD + "FileNotFound"


async def test_managed_objects_are_told_at_the_root_alone(
    client: Client, engine: FakeEngine
) -> None:
    snapshot = make_snapshot()
    engine.snapshots[snapshot.uuid] = snapshot
    engine.jobs[3] = make_job(3)
    answer = await client.call(OBJECT_MANAGER, "GetManagedObjects")
    assert answer.signature == "a{oa{sa{sv}}}"
    assert {path: set(interfaces) for path, interfaces in answer.body[0].items()} == {
        domain_path(uuid(1)): {DISK_SNAPSHOT, DOMAIN},
        domain_path(uuid(2)): {DISK_SNAPSHOT, DOMAIN},
        snapshot_path(snapshot.uuid): {SNAPSHOT},
        job_path(3): {JOB},
    }
    assert answer.body[0][domain_path(uuid(2))][DOMAIN]["Name"] == Variant("s", "vm2")
    engine.domains = {uuid(2): make_domain(2, name="renamed"), uuid(3): make_domain(3)}
    engine.snapshots = {}
    engine.jobs = {}
    answer = await client.call(OBJECT_MANAGER, "GetManagedObjects")
    assert {path: i[DOMAIN]["Name"].value for path, i in answer.body[0].items()} == {
        domain_path(uuid(2)): "renamed",
        domain_path(uuid(3)): "vm3",
    }
    for path in ("/", "/org/example", domain_path(uuid(2)), ROOT_PATH + "/domain"):
        answer = await client.call(OBJECT_MANAGER, "GetManagedObjects", path=path)
        assert answer.error_name == STANDARD + "UnknownInterface"


async def test_no_objects_are_an_empty_answer(client: Client, engine: FakeEngine) -> None:
    engine.domains = {}
    answer = await client.call(OBJECT_MANAGER, "GetManagedObjects")
    assert (answer.signature, answer.body) == ("a{oa{sa{sv}}}", [{}])


@pytest.mark.parametrize("asked", ["vm2", uuid(2), uuid(2).upper()])
async def test_a_domain_is_found_by_name_or_uuid(client: Client, asked: str) -> None:
    answer = await client.call(MANAGER, "FindDomain", "s", [asked])
    assert (answer.signature, answer.body) == ("o", [domain_path(uuid(2))])


@pytest.mark.parametrize("asked", ["", "vm3", uuid(3), "VM1", "../vm1", "x" * 100_000])
async def test_an_unknown_domain_is_not_found(client: Client, asked: str) -> None:
    answer = await client.call(MANAGER, "FindDomain", "s", [asked])
    assert answer.error_name == ERROR + "NoSuchDomain"


async def test_properties_and_finding_ask_no_polkit(client: Client, polkit: StandInPolkit) -> None:
    await client.properties(ROOT_PATH, MANAGER)
    await client.call(MANAGER, "FindDomain", "s", ["vm1"])
    await client.call(OBJECT_MANAGER, "GetManagedObjects")
    assert polkit.questions == []


async def test_create_on_a_domain_is_of_that_domain(client: Client, engine: FakeEngine) -> None:
    answer = await client.call(
        DISK_SNAPSHOT, "Create", "sssu", [VDA, "", "nightly", 1], path=domain_path(uuid(2))
    )
    assert (answer.signature, answer.body) == ("ss", ["<disk now='overlay'/>", "<source/>"])
    ((what, request),) = engine.calls
    assert (what, request.uuid, request.name, request.flags) == ("create", uuid(2), "nightly", 1)
    assert request.disk.target == "vda"


async def test_create_on_the_root_takes_a_domain(client: Client, engine: FakeEngine) -> None:
    xml = f"<domain><name>vm2</name><devices>{VDA}</devices></domain>"
    answer = await client.call(DISK_SNAPSHOT, "Create", "sssu", [xml, "", "", 0])
    assert answer.signature == "ss"
    ((_, request),) = engine.calls
    assert (request.domain, request.uuid) == ("vm2", "")


async def test_plan(client: Client, engine: FakeEngine) -> None:
    answer = await client.call(DOMAIN, "Plan", "sssu", [VDA, "", "", 0], path=domain_path(uuid(1)))
    assert answer.signature == "a{sv}"
    assert answer.body[0] == {
        "method": Variant("s", "qemu"),
        "backup_source": Variant("s", "<source/>"),
        "consistency": Variant("s", "quiesced"),
        "space_needed": Variant("t", 1 << 40),
        "space_available": Variant("t", 1 << 41),
        "warnings": Variant("as", ["careful"]),
    }
    assert [what for what, _ in engine.calls] == ["plan"]


async def test_disks(client: Client) -> None:
    answer = await client.call(DOMAIN, "Disks", path=domain_path(uuid(1)))
    assert answer.signature == "aa{sv}"
    assert answer.body[0] == [
        {
            "target": Variant("s", "vda"),
            "device": Variant("s", "disk"),
            "type": Variant("s", "file"),
            "format": Variant("s", "qcow2"),
            "source": Variant("s", "<source file='/pool/vm1.qcow2'/>"),
            "method": Variant("s", "qemu"),
            "reason": Variant("s", "because"),
        }
    ]


async def test_the_stored_method(client: Client, engine: FakeEngine) -> None:
    path = domain_path(uuid(1))
    text = "<diskSnapshot method='qemu'/>"
    answer = await client.call(DOMAIN, "SetMethod", "ss", [VDA, text], path=path)
    assert (answer.signature, answer.body) == ("", [])
    answer = await client.call(DOMAIN, "GetMethod", "s", [VDA], path=path)
    assert (answer.signature, answer.body) == ("s", [text])
    [(_, (request, stored)), (_, asked)] = engine.calls
    assert (request.disk.target, request.method.method, stored) == ("vda", "qemu", text)
    assert (asked.disk.target, asked.method) == ("vda", None)
    engine.calls.clear()
    for given, error in (
        ([VDA, "<diskSnapshot method='qemu'><size>1</size></diskSnapshot>"], "InvalidXML"),
        (["<disk/>", ""], "InvalidXML"),
        (["<disk><target dev='nope'/></disk>", ""], "NoSuchDisk"),
    ):
        answer = await client.call(DOMAIN, "SetMethod", "ss", given, path=path)
        assert answer.error_name == ERROR + error
    assert not engine.calls


async def test_source_and_disk_of_a_snapshot(client: Client, engine: FakeEngine) -> None:
    snapshot = make_snapshot()
    engine.snapshots[snapshot.uuid] = snapshot
    path = snapshot_path(snapshot.uuid)
    answer = await client.call(SNAPSHOT, "GetBackupSource", path=path)
    assert answer.body == [snapshot.backup_source]
    answer = await client.call(SNAPSHOT, "GetModifiedDisk", path=path)
    assert answer.body == [snapshot.modified_disk]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["<disk", "", "", 0], ERROR + "InvalidXML"),
        (["<domain/>", "", "", 0], ERROR + "InvalidXML"),
        ([VDA, "<diskSnapshot method='nonsense!'/>", "", 0], ERROR + "InvalidXML"),
        ([VDA, "", "-x", 0], ERROR + "InvalidName"),
        ([VDA, "", "", 3], STANDARD + "InvalidArgs"),
        ([VDA, "", "", 1 << 31], STANDARD + "InvalidArgs"),
    ],
)
async def test_what_can_not_be_read_is_refused_before_polkit_is_asked(
    client: Client,
    engine: FakeEngine,
    polkit: StandInPolkit,
    arguments: list[Any],
    error: str,
) -> None:
    path = domain_path(uuid(1))
    answer = await client.call(DISK_SNAPSHOT, "Create", "sssu", arguments, path=path)
    assert answer.error_name == error
    assert polkit.questions == []
    assert engine.calls == []


async def test_text_that_the_bus_would_cut_us_off_for_is_made_fit(
    client: Client, engine: FakeEngine
) -> None:
    engine.domains[uuid(1)] = make_domain(1, name="a\0b\udcffc")
    properties = await client.properties(domain_path(uuid(1)), DOMAIN)
    assert properties["Name"] == "a?b?c"
