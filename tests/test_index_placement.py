"""Type filters and who may fetch."""

from __future__ import annotations

import pytest

from sectorfs.index.placement import allows_type, found, may_fetch
from sectorfs.index.protocol import FsStat, StorageStatus
from sectorfs.types import FileType
from tests.index_fixtures import held, info, sector


def status(*, age: float = 0, error: str = "", **fields: object) -> StorageStatus:
    return StorageStatus(
        info=info("a", **fields),
        stat=FsStat(),
        error=error,
        last_heartbeat_ns=0,
        heartbeat_age=age,
    )


@pytest.mark.parametrize(
    ("allow", "deny", "allowed"),
    [
        ((), (), True),
        (("sealed",), (), True),
        (("cache",), (), False),
        (("cache", "sealed"), ("sealed",), False),
        ((), ("sealed",), False),
        ((), ("seeled",), True),
        (("seeled",), (), False),
        (("Sealed",), (), False),
    ],
)
def test_type_filter(allow: tuple[str, ...], deny: tuple[str, ...], allowed: bool) -> None:
    assert allows_type(info("a", allow_types=allow, deny_types=deny), FileType.SEALED) is allowed


def test_who_may_fetch() -> None:
    both = (FileType.SEALED, FileType.CACHE)
    assert may_fetch(status(can_seal=True), both, cutoff=50)
    assert may_fetch(status(can_seal=True, deny_types=("cache",)), both, cutoff=50)
    assert not may_fetch(status(can_seal=True, deny_types=("cache", "sealed")), both, cutoff=50)
    assert not may_fetch(status(can_store=True), both, cutoff=50)
    assert not may_fetch(status(can_seal=True, age=51), both, cutoff=50)
    assert not may_fetch(status(can_seal=True, error="x"), both, cutoff=50)


def test_declarations_of_unknown_storages_are_left_out() -> None:
    rows = found(sector(1), [held("a", 1), held("gone", 1)], [status()])
    assert [row.info.storage for row in rows] == ["a"]
