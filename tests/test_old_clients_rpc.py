"""The calls that lotus nodes and workers make of an Index and of a node, in their own JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sectorfs.wire import tokens
from tests.cluster import Node, cluster
from tests.cluster_fixtures import configure, noise, put, rescan
from tests.old_clients import GoClient, GoRpc, Refused

SECTOR = {"Miner": 1000, "Number": 7}
SIZE = 34359738368
SEALED, CACHE, BOTH = 2, 4, 6
SPACE = {"Capacity": 1 << 40, "Available": 1 << 39, "Reserved": 0}
"""As the first nodes tell it."""
FULL_SPACE = {**SPACE, "FSAvailable": 1 << 39, "Max": 0, "Used": 0}
FIRST_INFO: dict[str, Any] = {
    "ID": "first",
    "URLs": ["http://10.0.0.5:2345/remote"],
    "Weight": 10,
    "CanSeal": True,
    "CanStore": False,
}
INFO: dict[str, Any] = {
    **FIRST_INFO,
    "ID": "late",
    "URLs": ["http://10.0.0.6:3456/remote", "http://10.0.0.7:3456/remote"],
    "CanStore": True,
    "MaxStorage": 0,
    "Groups": None,
    "AllowTo": None,
    "AllowTypes": None,
    "DenyTypes": ["unsealed"],
    "AllowMiners": None,
    "DenyMiners": [],
}

# What Go decodes results into: a type per key; keys that are not named here are passed over.
_STRINGS = (list, type(None))
GO_INFO = {
    "ID": str,
    "URLs": _STRINGS,
    "Weight": int,
    "MaxStorage": int,
    "CanSeal": bool,
    "CanStore": bool,
    **{f"{verb}{what}": _STRINGS for verb in ("Allow", "Deny") for what in ("Types", "Miners")},
    "Groups": _STRINGS,
    "AllowTo": _STRINGS,
}
GO_ROW = {
    "ID": str,
    "URLs": _STRINGS,
    "BaseURLs": _STRINGS,
    "Weight": int,
    "CanSeal": bool,
    "CanStore": bool,
    "Primary": bool,
    "AllowTypes": _STRINGS,
    "DenyTypes": _STRINGS,
}
GO_STAT = dict.fromkeys(FULL_SPACE, int)


def decoded(value: Any, shape: dict[str, Any]) -> Any:
    """A JSON object that Go takes for a struct of this shape."""
    for key, kind in shape.items():
        assert key in value, (key, value)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        assert type(value[key]) in kinds, (key, value)
        if list in kinds:
            assert all(type(one) is str for one in value[key] or ())
    return value


class Site:
    """A node with the Index and a disk, and a client of it."""

    def __init__(self, node: Node, disk: Path) -> None:
        self.node = node
        self.disk = disk
        self.storage = next(
            one["storage"] for one in node.json("storage", "list") if one["path"] == str(disk)
        )
        self._http: list[GoClient] = []
        self.rpc = self.client("admin")

    def client(self, *allow: str) -> GoRpc:
        return self.client_with(tokens.sign(self.node.repo.secret(create=False), allow))

    def client_with(self, token: str) -> GoRpc:
        self._http.append(GoClient(token))
        return GoRpc(f"{self.node.repo.api()}/rpc/v0", self._http[-1])

    def close(self) -> None:
        for http in self._http:
            http.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("old-rpc")
    with cluster(root, "node") as (node,):
        configure(node)
        node.start()
        disk = node.disk()
        put(disk / "sealed/s-t01000-1", noise("sealed", 2048))
        rescan(node)
        made = Site(node, disk)
        yield made
        made.close()
        assert "Traceback" not in node.log()


@pytest.fixture
def rpc(site: Site) -> GoRpc:
    for info, space in ((FIRST_INFO, SPACE), (INFO, FULL_SPACE)):
        assert site.rpc.call("StorageAttach", info, space) is None
    return site.rpc


# --- storages ---


def test_what_was_attached_is_told(rpc: GoRpc) -> None:
    found = decoded(rpc.call("StorageInfo", "late"), GO_INFO)
    assert found == {**INFO, "DenyMiners": None}
    first = decoded(rpc.call("StorageInfo", "first"), GO_INFO)
    assert {key: first[key] for key in FIRST_INFO} == FIRST_INFO
    with pytest.raises(Refused, match="not"):
        rpc.call("StorageInfo", "nobody's")


def test_urls_are_joined_at_every_attachment(rpc: GoRpc) -> None:
    more = {**INFO, "URLs": ["http://10.0.0.8:3456/remote"], "Weight": 3}
    rpc.call("StorageAttach", more, FULL_SPACE)
    found = rpc.call("StorageInfo", "late")
    assert (found["URLs"], found["Weight"]) == ([*INFO["URLs"], *more["URLs"]], 3)
    rpc.call("StorageDetach", "late", "http://10.0.0.8:3456/remote")
    assert rpc.call("StorageInfo", "late")["URLs"] == INFO["URLs"]


@pytest.mark.parametrize(
    ("error", "well"), [("", True), (None, True), ({}, False), ("disk gone", False)]
)
def test_heartbeats(site: Site, rpc: GoRpc, error: object, well: bool) -> None:
    assert rpc.call("StorageReportHealth", "first", {"Stat": SPACE, "Err": error}) is None
    known = {one["storage"]: one for one in site.node.json("storage", "list")}
    assert known["first"]["healthy"] is well
    with pytest.raises(Refused):
        rpc.call("StorageReportHealth", "nobody's", {"Stat": SPACE, "Err": error})


# --- sectors ---


def test_a_sector_is_declared_found_and_dropped(rpc: GoRpc) -> None:
    assert rpc.call("StorageDeclareSector", "first", SECTOR, BOTH, False) is None
    assert rpc.call("StorageDeclareSector", "late", SECTOR, SEALED, True) is None
    # A proof's number stands in the place of the size in calls of 2020 and 2021.
    for size in (SIZE, 0, 8):
        rows = rpc.call("StorageFindSector", SECTOR, SEALED, size, False)
        found = {row["ID"]: decoded(row, GO_ROW) for row in rows}
        assert found.keys() == {"first", "late"}
        assert found["late"]["URLs"] == [f"{url}/sealed/s-t01000-7" for url in INFO["URLs"]]
        assert found["late"]["BaseURLs"] == INFO["URLs"]
        assert [found[name]["Primary"] for name in ("first", "late")] == [False, True]
    (both,) = rpc.call("StorageFindSector", SECTOR, CACHE, SIZE, False)
    assert both["ID"] == "first"
    assert rpc.call("StorageDeclareSector", "first", SECTOR, SEALED, True) is None
    assert rpc.call("StorageDropSector", "first", SECTOR, BOTH) is None
    assert rpc.call("StorageDropSector", "first", SECTOR, BOTH) is None
    (left,) = rpc.call("StorageFindSector", SECTOR, BOTH, SIZE, False)
    assert left["ID"] == "late"
    assert rpc.call("StorageDropSector", "late", SECTOR, SEALED) is None
    assert rpc.call("StorageFindSector", SECTOR, SEALED, SIZE, False) in (None, [])


def test_cached_copies_are_found_only_where_nobody_has_the_primary_one(rpc: GoRpc) -> None:
    """The lightest holder is asked first, and of a move only that one is told to delete."""
    cache = {**FIRST_INFO, "ID": "cache", "Weight": 0, "CanSeal": False}
    rpc.call("StorageAttach", cache, SPACE)
    rpc.call("StorageDeclareSector", "cache", SECTOR, SEALED, False)
    rpc.call("StorageDeclareSector", "first", SECTOR, SEALED, False)
    assert _finds(rpc) == {"cache", "first"}
    rpc.call("StorageDeclareSector", "late", SECTOR, SEALED, True)
    assert _finds(rpc) == {"first", "late"}
    rpc.call("StorageDropSector", "late", SECTOR, SEALED)
    assert _finds(rpc) == {"cache", "first"}
    rpc.call("StorageDropSector", "first", SECTOR, SEALED)
    rpc.call("StorageDetach", "cache", FIRST_INFO["URLs"][0])


def _finds(rpc: GoRpc) -> set[str]:
    return {row["ID"] for row in rpc.call("StorageFindSector", SECTOR, SEALED, SIZE, False)}


def test_a_sector_may_be_fetched_where_there_is_room(rpc: GoRpc) -> None:
    rpc.call("StorageDeclareSector", "late", SECTOR, SEALED, True)
    for name in ("first", "late"):
        rpc.call("StorageReportHealth", name, {"Stat": SPACE, "Err": ""})
    rows = rpc.call("StorageFindSector", SECTOR, SEALED, SIZE, True)
    assert [(row["ID"], row["Primary"]) for row in rows] == [("late", True), ("first", False)]
    rpc.call("StorageDropSector", "late", SECTOR, SEALED)


def test_a_place_for_a_new_file(rpc: GoRpc) -> None:
    for name in ("first", "late"):
        rpc.call("StorageReportHealth", name, {"Stat": SPACE, "Err": ""})
    late = rpc.call("StorageBestAlloc", CACHE, 2048, "sealing", 1000)
    old = rpc.call("StorageBestAlloc", CACHE, 2048, "sealing")
    for rows in (late, old):
        assert {decoded(row, GO_INFO)["ID"] for row in rows} >= {"first", "late"}
    with pytest.raises(Refused):
        rpc.call("StorageBestAlloc", CACHE, 2048)


def test_the_list_of_everything(site: Site, rpc: GoRpc) -> None:
    rpc.call("StorageDeclareSector", "late", SECTOR, BOTH, True)
    found = rpc.call("StorageList")
    assert found["late"] == [{**SECTOR, "SectorFileType": BOTH}]
    assert found["first"] == []
    assert found[site.storage] == [{"Miner": 1000, "Number": 1, "SectorFileType": SEALED}]
    rpc.call("StorageDropSector", "late", SECTOR, BOTH)


# --- locks ---


def test_locks(rpc: GoRpc) -> None:
    assert rpc.call("StorageLock", SECTOR, SEALED, CACHE) is None
    assert rpc.call("StorageTryLock", SECTOR, 0, BOTH) is True
    assert rpc.call("StorageTryLock", SECTOR, 0, 0) is False
    with pytest.raises(Refused, match="failed to acquire lock"):
        rpc.call("StorageLock", SECTOR, 0, 0)
    assert rpc.call("StorageGetLocks") in ({"Locks": None}, {"Locks": []})


# --- a node's own ---


def test_paths_of_the_node(site: Site, rpc: GoRpc, tmp_path: Path) -> None:
    assert rpc.call("StorageLocal")[site.storage] == str(site.disk)
    decoded(rpc.call("StorageStat", site.storage), GO_STAT)
    assert rpc.call("StorageRedeclareLocal", site.storage, False) is None
    assert rpc.call("StorageRedeclareLocal", None, True) is None
    with pytest.raises(Refused):
        rpc.call("StorageAddLocal", str(tmp_path))


def test_what_a_token_allows(site: Site, rpc: GoRpc) -> None:
    secret = site.node.repo.secret(create=False)
    every = ["read", "write", "sign", "admin"]
    assert rpc.call("StorageAuthVerify", tokens.sign(secret, every)) == every
    reads = site.client("read")
    assert reads.call("StorageAuthVerify", tokens.sign(secret, ["read"])) == ["read"]
    other = tokens.sign(tokens.Secret(bytes(32)), every)
    for token in (other, "", "x", tokens.sign(secret, every, -1)):
        with pytest.raises(Refused):
            rpc.call("StorageAuthVerify", token)


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("StorageFindSector", (SECTOR, SEALED, SIZE)),
        ("StorageFindSector", (SECTOR, SEALED, SIZE, False, 1)),
        ("StorageDeclareSector", ("late", SECTOR, SEALED)),
        ("StorageDeclareSector", ("late", SECTOR, "sealed", True)),
        ("StorageInfo", ()),
        ("StorageNothing", ()),
        ("StorageBestAlloc", (CACHE, 2048, "elsewhere", 1000)),
        ("StorageBestAlloc", (CACHE, 2048, "sealing", 1000, 1)),
    ],
)
def test_bad_calls_are_errors_with_a_message(
    rpc: GoRpc, method: str, params: tuple[object, ...]
) -> None:
    with pytest.raises(Refused, match=r"\w+"):
        rpc.call(method, *params)


def test_a_token_to_read_does_not_change_anything(site: Site, rpc: GoRpc) -> None:
    reads = site.client("read")
    assert decoded(reads.call("StorageInfo", "late"), GO_INFO)
    with pytest.raises(Refused, match=r"missing permission to invoke 'Filecoin.StorageDeclareS"):
        reads.call("StorageDeclareSector", "late", SECTOR, SEALED, True)
    with pytest.raises(Refused, match="http status 401"):
        site.client_with("x.y.z").call("StorageInfo", "late")


def test_all_calls_share_a_connection(site: Site) -> None:
    client = site.client("admin")
    for _ in range(50):
        client.call("StorageList")
        client.call("StorageFindSector", SECTOR, SEALED, SIZE, False)
        with pytest.raises(Refused):
            client.call("StorageInfo", "nobody's")
    assert client.http.connections == 1
