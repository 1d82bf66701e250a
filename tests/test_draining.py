"""Where the files of a storage that is emptied may go."""

from __future__ import annotations

from sectorfs.index.draining import targets
from sectorfs.index.protocol import Declaration, FsStat, StorageInfo, StorageStatus
from sectorfs.types import FileType, SectorFile, SectorID, StorageID

FILE = SectorFile(FileType.SEALED, SectorID(1000, 7))
SOURCE = StorageID("source")


def status(name: str, available: int = 100, *, age: float = 0, **info: object) -> StorageStatus:
    values = {"storage": StorageID(name), "can_store": True, **info}
    return StorageStatus(
        info=StorageInfo(**values),  # type: ignore[arg-type]  # fields by name
        stat=FsStat(capacity=1000, available=available),
        error="",
        last_heartbeat_ns=0,
        heartbeat_age=age,
    )


def chosen(*statuses: StorageStatus, held: dict[str, bool] | None = None) -> list[str]:
    known = {
        StorageID(name): Declaration(FILE, StorageID(name), primary)
        for name, primary in (held or {}).items()
    }
    everything = [status("source", 10_000), *statuses]
    return [*targets(FILE, 50, known, everything, source=SOURCE, cutoff=50)]


def test_the_most_room_times_weight_comes_first_and_equals_by_id() -> None:
    found = chosen(status("b"), status("a"), status("c", 90, weight=20), status("d", 200, weight=1))
    assert found == ["c", "a", "b", "d"]


def test_what_cannot_take_it_is_left_out() -> None:
    assert (
        chosen(
            status("full", 49),
            status("dead", age=51),
            status("sealing", can_store=False, can_seal=True),
            status("type", deny_types=("sealed",)),
            status("miner", allow_miners=("t02000",)),
            status("odd", allow_types=("no such type",)),
        )
        == []
    )
    assert chosen(status("exact", 50)) == ["exact"]


def test_one_that_has_it_needs_no_room_and_comes_first() -> None:
    assert chosen(status("a", 1000), status("full", 0), held={"full": True}) == ["full", "a"]
    assert chosen(status("full", 0), held={"full": False}) == []


def test_the_source_is_never_its_own_target() -> None:
    assert chosen(held={"source": True}) == []
