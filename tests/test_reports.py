"""What operators are shown: pure functions over values of the Index."""

from __future__ import annotations

import json

import msgspec
import pytest

from sectorfs.index.protocol import (
    Declaration,
    FsStat,
    LeaseStatus,
    Lock,
    StorageInfo,
    StorageStatus,
)
from sectorfs.node import reports
from sectorfs.types import Facts, FileType, SectorFile, SectorID, StorageID

SECTOR = SectorID(1000, 7)
ONE, TWO = StorageID("one"), StorageID("two")
CUTOFF = 50.0


def status(
    storage: StorageID,
    *,
    error: str = "",
    age: float = 1.0,
    beat_ns: int = 1_700_000_000_123_456_789,
) -> StorageStatus:
    return StorageStatus(
        info=StorageInfo(
            storage=storage,
            urls=(f"http://{storage}/remote",),
            weight=7,
            max_storage=99,
            can_seal=True,
            groups=("g",),
            allow_to=("t",),
            allow_types=("sealed",),
            deny_types=("key",),
            allow_miners=("t01000",),
            deny_miners=("t02000",),
        ),
        stat=FsStat(capacity=6, available=5, fs_available=4, reserved=3, max=2, used=1),
        error=error,
        last_heartbeat_ns=1_700_000_000_123_456_789,
        heartbeat_age=age,
    )


def storage_shape(found: StorageStatus, **changes: object) -> dict[str, object]:
    arguments = {"path": "/disk", "cutoff": CUTOFF, "files": {}, **changes}
    report = reports.storage_report(found, **arguments)  # type: ignore[arg-type]  # from a dict
    shape: dict[str, object] = json.loads(msgspec.json.encode(report))
    return shape


def sector_shape(*held: Declaration, **changes: object) -> dict[str, list[dict[str, object]]]:
    arguments = {
        "storages": {ONE: status(ONE), TWO: status(TWO, age=60.0)},
        "cutoff": CUTOFF,
        "path_of": lambda file, storage: f"/disk/{file}" if storage == ONE else None,
        "state": None,
        **changes,
    }
    report = reports.sector_report(SECTOR, held, **arguments)  # type: ignore[arg-type]  # a dict
    shape: dict[str, list[dict[str, object]]] = json.loads(msgspec.json.encode(report))
    return shape


def held(
    storage: StorageID,
    file_type: FileType = FileType.SEALED,
    *,
    primary: bool = True,
    facts: Facts | None = None,
) -> Declaration:
    return Declaration(SectorFile(file_type, SECTOR), storage, primary, facts)


def test_each_location_tells_its_own_digest() -> None:
    facts = Facts(1, 2)
    told = Facts(1, 2, None, b"\x0a" * 32)
    [found] = sector_shape(held(ONE, facts=told), held(TWO, facts=facts))["files"]
    locations = found["locations"]
    assert isinstance(locations, list)
    assert [one["digest"] for one in locations] == ["0a" * 32, None]
    [found] = sector_shape(held(ONE))["files"]
    assert isinstance(found["locations"], list)
    assert found["locations"][0]["digest"] is None


def test_storage_in_full() -> None:
    files = {FileType.CACHE: 2, FileType.UNSEALED: 3, FileType.KEY: 0}
    assert storage_shape(status(ONE), files=files) == {
        "storage": "one",
        "path": "/disk",
        "urls": ["http://one/remote"],
        "weight": 7,
        "can_seal": True,
        "can_store": False,
        "max_storage": 99,
        "groups": ["g"],
        "allow_to": ["t"],
        "allow_types": ["sealed"],
        "deny_types": ["key"],
        "allow_miners": ["t01000"],
        "deny_miners": ["t02000"],
        "capacity": 6,
        "available": 5,
        "fs_available": 4,
        "reserved": 3,
        "used": 1,
        "healthy": True,
        "error": None,
        "last_heartbeat": "2023-11-14T22:13:20.123Z",
        "files": {"unsealed": 3, "cache": 2},
        "nodes": {},
    }


def test_storage_elsewhere_has_no_path() -> None:
    assert storage_shape(status(ONE), path=None)["path"] is None


@pytest.mark.parametrize(
    ("error", "age", "shown"),
    [
        ("", CUTOFF, None),
        ("", CUTOFF + 1, "no heartbeat for 51 s"),
        ("disk is sick", 1.0, "disk is sick"),
        ("disk is sick", CUTOFF + 1, "disk is sick"),
    ],
)
def test_health_and_its_reason(error: str, age: float, shown: str | None) -> None:
    shape = storage_shape(status(ONE, error=error, age=age))
    assert (shape["error"], shape["healthy"]) == (shown, shown is None)


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1_700_000_000_999_999_999, "2023-11-14T22:13:20.999Z"),
        (4_102_444_800_000_000_000, "2100-01-01T00:00:00.000Z"),
    ],
)
def test_times(time_ns: int, text: str) -> None:
    assert reports.rfc3339(time_ns) == text


def test_sector_in_full() -> None:
    shape = sector_shape(
        held(ONE, facts=Facts(10, 5)),
        held(TWO, primary=False, facts=Facts(10, 5)),
        held(TWO, FileType.UNSEALED),
        state=lambda file: "shared" if file.file_type is FileType.SEALED else "remote",
    )
    assert shape == {
        "sector": "s-t01000-7",
        "files": [
            {
                "file_type": "unsealed",
                "size": None,
                "mtime_ns": None,
                "state": "remote",
                "locations": [
                    {
                        "storage": "two",
                        "primary": True,
                        "urls": ["http://two/remote"],
                        "path": None,
                        "healthy": False,
                        "digest": None,
                    }
                ],
            },
            {
                "file_type": "sealed",
                "size": 10,
                "mtime_ns": 5,
                "state": "shared",
                "locations": [
                    {
                        "storage": "one",
                        "primary": True,
                        "urls": ["http://one/remote"],
                        "path": "/disk/sealed/s-t01000-7",
                        "healthy": True,
                        "digest": None,
                    },
                    {
                        "storage": "two",
                        "primary": False,
                        "urls": ["http://two/remote"],
                        "path": None,
                        "healthy": False,
                        "digest": None,
                    },
                ],
            },
        ],
    }


def test_storage_the_index_forgot_meanwhile() -> None:
    [file] = sector_shape(held(TWO), storages={})["files"]
    [location] = file["locations"]  # type: ignore[misc]  # it is a list
    assert (location["urls"], location["healthy"]) == ([], False)


@pytest.mark.parametrize(
    ("storages", "state"),
    [
        ([ONE], "local"),
        ([TWO, ONE], "local"),
        ([TWO], "unavailable"),
        ([StorageID("three")], "remote"),
    ],
)
def test_state_where_no_node_runs(storages: list[StorageID], state: str) -> None:
    known = {ONE: status(ONE), TWO: status(TWO, age=60.0)}
    known[StorageID("three")] = status(StorageID("three"))
    [file] = sector_shape(*(held(storage) for storage in storages), storages=known)["files"]
    assert file["state"] == state


def test_sector_without_declarations() -> None:
    assert sector_shape() == {"sector": "s-t01000-7", "files": []}


def lease_status(
    number: int, *, read: int = 0, write: int = 0, owner: str = "a", expires_in: float | None = 30
) -> LeaseStatus:
    return LeaseStatus(
        lock=Lock(sector=SectorID(1000, number), read=read, write=write),
        owner=owner,
        reason="a move",
        since_ns=0,
        expires_in=expires_in,
    )


def test_locks_by_sector_with_readers_counted() -> None:
    both = FileType.UNSEALED | FileType.UPDATE_CACHE
    found = reports.lock_reports(
        [
            lease_status(9, read=both),
            lease_status(7, write=FileType.SEALED, read=FileType.UNSEALED),
            lease_status(9, read=FileType.UNSEALED, owner="b"),
            lease_status(9, write=both, owner="c", expires_in=None),
            lease_status(10, write=FileType.KEY, expires_in=None),
        ]
    )
    shape = json.loads(msgspec.json.encode(found))
    assert [one["sector"] for one in shape] == ["s-t01000-7", "s-t01000-9", "s-t01000-10"]
    assert shape[0] == {
        "sector": "s-t01000-7",
        "read": {"unsealed": 1},
        "write": ["sealed"],
        "leases": [
            {
                "owner": "a",
                "reason": "a move",
                "read": ["unsealed"],
                "write": ["sealed"],
                "since": "1970-01-01T00:00:00.000Z",
                "expires_in": 30.0,
            }
        ],
        "waiting": [],
    }
    assert (shape[1]["read"], shape[1]["write"]) == ({"unsealed": 2, "update-cache": 1}, [])
    assert [one["owner"] for one in shape[1]["leases"]] == ["a", "b"]
    assert [one["owner"] for one in shape[1]["waiting"]] == ["c"]
    assert shape[1]["waiting"][0]["expires_in"] is None
    assert (shape[2]["read"], shape[2]["write"], shape[2]["leases"]) == ({}, [], [])
