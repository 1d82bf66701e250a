"""How far scrubs are and what they found, over restarts, odd clocks, full disks and odd files."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from sectorfs.stores.manifest import BLOCK
from sectorfs.stores.scrub_notes import MOST_FINDINGS, Notes, ScrubNotes, StorageNotes
from sectorfs.stores.verdicts import MAX_RANGES, Finding, State
from sectorfs.types import FileType, SectorFile, StorageID
from tests.local_fixtures import sector_file

STORAGE = StorageID("storage")
DAY = 86_400 * 10**9
ONE, TWO, THREE = (sector_file(FileType.SEALED, number) for number in (1, 2, 3))


class Clock:
    """A time of day that is set at will."""

    def __init__(self) -> None:
        self.now_ns = 1000 * DAY

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def notes(clock: Clock) -> StorageNotes:
    return StorageNotes(Notes(), clock)


def finding(file: SectorFile, state: State = "damaged", **more: object) -> Finding:
    return msgspec.convert(
        {"file": file, "storage": STORAGE, "state": state, **more}, Finding, from_attributes=True
    )


def named(notes: StorageNotes) -> list[str]:
    return [told.sector for told in notes.findings]


# --- when a pass is due ---


def test_a_pass_is_due_when_the_last_one_is_long_ago(notes: StorageNotes, clock: Clock) -> None:
    assert not notes.is_due(0)
    assert notes.is_due(30 * 86_400), "there was none yet"
    notes.begin(anew=False)
    clock.now_ns += DAY
    notes.end()
    assert not notes.is_due(0)
    assert not notes.is_due(30 * 86_400)
    clock.now_ns += 30 * DAY - 1
    assert not notes.is_due(30 * 86_400)
    clock.now_ns += 1
    assert notes.is_due(30 * 86_400)


def test_a_time_in_the_future_is_not_believed(notes: StorageNotes, clock: Clock) -> None:
    notes.begin(anew=False)
    notes.end()
    clock.now_ns -= 10**9
    assert not notes.is_due(30 * 86_400), "clocks are set by a second now and then"
    clock.now_ns -= 400 * DAY
    assert notes.is_due(30 * 86_400)


# --- how far it is ---


def test_a_pass_goes_on_where_it_was(notes: StorageNotes) -> None:
    assert notes.begin(anew=False) is None
    notes.looked(ONE, 10, [finding(ONE, "ok")])
    notes.looked(TWO, 20, [finding(TWO)])
    notes.stop("the disk is gone")
    assert notes.now is not None
    assert notes.now.stopped == "the disk is gone"
    assert notes.begin(anew=False) == TWO
    assert (notes.now.files, notes.now.bytes, notes.now.stopped) == (2, 30, "")
    assert notes.now.states == {"ok": 1, "damaged": 1}
    notes.looked(THREE, 30, [finding(THREE, "unproved")])
    notes.end()
    assert notes.last is not None
    assert notes.last.files == 3
    assert notes.begin(anew=False) is None


def test_a_pass_can_begin_anew(notes: StorageNotes) -> None:
    notes.begin(anew=False)
    notes.looked(ONE, 10, [finding(ONE)])
    assert notes.begin(anew=True) is None
    assert notes.now is not None
    assert notes.now.files == 0
    assert named(notes) == ["s-t01000-1"], "what was found stays until the pass has been there"


# --- what was found ---


def test_what_is_well_or_repaired_is_not_remembered(notes: StorageNotes) -> None:
    notes.begin(anew=False)
    for state in ("ok", "unproved"):
        notes.looked(ONE, 1, [finding(ONE, state)])
    notes.looked(TWO, 1, [finding(TWO, repaired=True)])
    notes.looked(THREE, 1, [finding(THREE), finding(THREE, "incomplete", member="p_aux")])
    assert named(notes) == ["s-t01000-3"] * 2
    notes.take(THREE, [finding(THREE, "ok")])
    assert named(notes) == []


def test_what_is_gone_is_forgotten_at_the_end_of_the_pass(notes: StorageNotes) -> None:
    notes.begin(anew=False)
    notes.looked(ONE, 1, [finding(ONE)])
    notes.looked(TWO, 1, [finding(TWO)])
    notes.end()
    notes.begin(anew=False)
    notes.looked(TWO, 1, [finding(TWO)])
    assert named(notes) == ["s-t01000-1", "s-t01000-2"]
    notes.end()
    assert named(notes) == ["s-t01000-2"]


def test_many_findings_are_counted(notes: StorageNotes) -> None:
    notes.begin(anew=False)
    for number in range(MOST_FINDINGS + 50):
        file = sector_file(FileType.SEALED, number)
        notes.looked(file, 1, [finding(file)])
    assert (len(notes.findings), notes.more) == (MOST_FINDINGS, 50)
    notes.end()
    notes.begin(anew=False)
    notes.end()
    assert (notes.findings, notes.more) == ([], 0)


def test_ten_thousand_damaged_blocks_take_little_room(notes: StorageNotes) -> None:
    notes.begin(anew=False)
    bad = tuple(range(0, 20_000, 2))
    notes.looked(ONE, 1, [finding(ONE, size=20_000 * BLOCK, bad=bad)])
    (told,) = notes.findings
    assert told.blocks == 10_000
    assert len(told.ranges) <= MAX_RANGES
    assert len(notes.encode()) < 10_000


# --- on disk ---


async def test_notes_outlive_the_process(tmp_path: Path, clock: Clock) -> None:
    first = ScrubNotes(tmp_path / "scrub", deadline=5, now_ns=clock)
    await first.read()
    first.of(STORAGE).begin(anew=False)
    first.of(STORAGE).looked(ONE, 10, [finding(ONE, detail="gone", bad=(3,), size=10 * BLOCK)])
    await first.write(STORAGE)
    again = ScrubNotes(tmp_path / "scrub", deadline=5, now_ns=clock)
    await again.read()
    assert again.of(STORAGE).findings == first.of(STORAGE).findings
    assert again.of(STORAGE).begin(anew=False) == ONE
    assert oct((tmp_path / "scrub" / "storage.json").stat().st_mode)[-3:] == "600"


async def test_what_did_not_change_is_not_written(tmp_path: Path, clock: Clock) -> None:
    notes = ScrubNotes(tmp_path / "scrub", deadline=5, now_ns=clock)
    await notes.write(STORAGE)
    assert not (tmp_path / "scrub").exists()


async def test_a_disk_that_takes_nothing_costs_no_pass(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "scrub").write_bytes(b"no directory")
    notes = ScrubNotes(tmp_path / "scrub", deadline=5, now_ns=clock)
    await notes.read()
    notes.of(STORAGE).begin(anew=False)
    await notes.write(STORAGE)
    assert "is not noted" in caplog.text
    os.unlink(tmp_path / "scrub")
    await notes.write(STORAGE)
    assert (tmp_path / "scrub" / "storage.json").exists(), "it is tried again"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"number": "one"}',
        b'{"last": {"states": {"excellent": 1}}}',
        b'{"findings": [{"number": 1, "told": {}}]}',
    ],
)
async def test_notes_that_make_no_sense_are_set_aside(
    tmp_path: Path, clock: Clock, data: bytes
) -> None:
    folder = tmp_path / "scrub"
    folder.mkdir()
    (folder / "storage.json").write_bytes(data)
    (folder / "repairs").mkdir()
    notes = ScrubNotes(folder, deadline=5, now_ns=clock)
    await notes.read()
    assert notes.of(STORAGE).begin(anew=False) is None
    assert (folder / "storage.malformed").read_bytes() == data


@pytest.mark.parametrize("after", ["nonsense", "sealed/s-t0", "/", "sealed"])
def test_a_place_that_is_none_begins_anew(clock: Clock, after: str) -> None:
    notes = StorageNotes(Notes(), clock)
    notes.begin(anew=False)
    assert notes.now is not None
    notes.now.after = after
    assert notes.begin(anew=False) is None
    assert notes.now.after == ""
