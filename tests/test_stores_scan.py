"""What is read from type directories, and the rule of two looks."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.errors import DiskError, NotFound, StorageUnavailable
from sectorfs.stores import scan, space
from sectorfs.stores.metadata import METADATA_NAME
from sectorfs.stores.scan import (
    Look,
    Names,
    Odd,
    PathLost,
    check_identity,
    file_facts,
    look_many,
    opened_path,
)
from sectorfs.stores.settling import MAX_WAIT, Settling
from sectorfs.stores.space import RawSpace, fs_stat, usage_steps
from sectorfs.types import (
    MAX_NUMBER,
    Facts,
    FileType,
    SectorFile,
    SectorID,
    StorageID,
    parse_storage_id,
)
from tests.local_fixtures import make_path, put, sector_file

SEALED = sector_file(FileType.SEALED, 7)
CACHE = sector_file(FileType.CACHE, 7)


@pytest.fixture
def storage(tmp_path: Path) -> StorageID:
    return make_path(tmp_path)


def listed(path: Path, storage: StorageID, file_type: FileType = FileType.SEALED) -> Names:
    names = Names(file_type)
    for _ in names.steps(str(path), storage):
        pass
    return names


def files_of(names: Names, size: int = 100) -> list[SectorFile]:
    return [file for chunk in names.chunks(size) for file in chunk]


# Names


def test_a_missing_type_directory_is_empty(tmp_path: Path, storage: StorageID) -> None:
    names = listed(tmp_path, storage)
    assert (len(names), names.seen, names.mtime_ns, files_of(names)) == (0, 0, 0, [])


def test_names_come_in_the_order_of_the_index(tmp_path: Path, storage: StorageID) -> None:
    sectors = [SectorID(miner, n) for miner in (2, 10, MAX_NUMBER) for n in (0, 9, 10, MAX_NUMBER)]
    for sector in reversed(sectors):
        put(tmp_path, SectorFile(FileType.SEALED, sector))
    names = listed(tmp_path, storage)
    assert [file.sector for file in files_of(names, 5)] == sectors
    assert [len(chunk) for chunk in names.chunks(5)] == [5, 5, 2]


@pytest.mark.parametrize("name", ["fetching", "stash", "s-t01000-1.tmp", ".tmp", "lost+found.tmp"])
def test_names_that_are_skipped_quietly(name: str) -> None:
    names = Names(FileType.SEALED)
    names.add(name)
    assert (len(names), names.odd) == (0, [])


@pytest.mark.parametrize(
    "name",
    [
        "lost+found",
        "s-t01000-7.bak",
        "s-t01000-07",
        "s-t001000-7",
        "s-t1000-7",
        "s-f01000-7",
        "S-t01000-7",
        "s-t01000-7\n",
        "s-t01000-",
        "s-t01000-9223372036854775808",
        "s-t0٣-7",
        "x" * 300,
        "s-t0" + "1" * 300 + "-7",
        "\udcff",
        "",
    ],
)
def test_names_that_are_odd(name: str) -> None:
    names = Names(FileType.SEALED)
    names.add(name)
    assert (len(names), names.odd) == (0, [(name, "not a sector name")])


def test_odd_names_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_ODD", 3)
    names = Names(FileType.SEALED)
    for number in range(10):
        names.add(f"odd{number}")
    assert (len(names.odd), names.odd_count) == (3, 10)


def test_steps_report_progress(
    tmp_path: Path, storage: StorageID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "STEP_ENTRIES", 3)
    for number in range(10):
        put(tmp_path, sector_file(FileType.SEALED, number))
    names = Names(FileType.SEALED)
    assert list(names.steps(str(tmp_path), storage)) == [3, 6, 9, 10]


def test_a_million_names_are_compact() -> None:
    names = Names(FileType.SEALED)
    tracemalloc.start()
    try:
        for number in range(100_000):
            names._keys.add(SectorID(1000, number))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 100_000 * 24


@pytest.mark.parametrize("trick", ["file", "loop", "link to nothing"])
def test_an_unreadable_type_directory_is_never_an_empty_one(
    tmp_path: Path, storage: StorageID, trick: str
) -> None:
    if trick == "file":
        (tmp_path / "sealed").write_text("")
    else:
        (tmp_path / "sealed").symlink_to("sealed" if trick == "loop" else "nowhere")
    with pytest.raises(DiskError, match=f"{tmp_path}/sealed"):
        listed(tmp_path, storage)
    with pytest.raises(DiskError, match=f"{tmp_path}/sealed"):
        look_many(str(tmp_path), storage, [SEALED])


def test_a_listing_that_breaks_off_is_thrown_away(
    tmp_path: Path, storage: StorageID, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, SEALED)

    class Broken:
        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __iter__(self) -> Broken:
            return self

        def __next__(self) -> os.DirEntry[str]:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(scan.os, "scandir", lambda fd: Broken())
    with pytest.raises(DiskError, match="Input/output error"):
        listed(tmp_path, storage)


def test_a_path_that_goes_away_while_it_is_listed(tmp_path: Path, storage: StorageID) -> None:
    put(tmp_path, SEALED)
    names = Names(FileType.SEALED)
    scan_steps = names.steps(str(tmp_path), storage)
    original = scan.check_identity
    seen: list[int | None] = []

    def check(path: str, storage: StorageID, *, dir_fd: int | None = None) -> None:
        seen.append(dir_fd)
        original(path, storage, dir_fd=dir_fd)
        (tmp_path / METADATA_NAME).unlink()  # right after the first proof

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "check_identity", check)
        with pytest.raises(PathLost, match="is gone"):
            list(scan_steps)
    assert len(seen) == 2
    assert seen[0] is not None


def test_identity(tmp_path: Path, storage: StorageID) -> None:
    check_identity(str(tmp_path), storage)
    with pytest.raises(PathLost, match=f"holds storage {storage} instead of other"):
        check_identity(str(tmp_path), parse_storage_id("other"))
    (tmp_path / METADATA_NAME).write_text("{")
    with pytest.raises(PathLost, match="malformed"):
        check_identity(str(tmp_path), storage)
    (tmp_path / METADATA_NAME).unlink()
    with pytest.raises(PathLost, match="is gone"):
        check_identity(str(tmp_path), storage)
    for name in ("missing", "file/x"):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(PathLost, match="directory is gone"),
            opened_path(str(tmp_path / name), storage),
        ):
            pass
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DiskError), opened_path(str(tmp_path / "loop"), storage):
        pass
    assert issubclass(PathLost, StorageUnavailable)


# Looks


def one(path: Path, storage: StorageID, file: SectorFile) -> Look:
    (look,) = look_many(str(path), storage, [file])
    return look


def test_looks_at_files(tmp_path: Path, storage: StorageID) -> None:
    target = put(tmp_path, SEALED, b"12345")
    assert one(tmp_path, storage, SEALED) == Facts(5, target.stat().st_mtime_ns)
    assert one(tmp_path, storage, sector_file(FileType.SEALED, 8)) is None
    assert one(tmp_path, storage, sector_file(FileType.KEY, 8)) is None  # no such directory
    for number, make in enumerate((Path.mkdir, os.mkfifo)):
        file = sector_file(FileType.SEALED, 100 + number)
        make(tmp_path / str(file))
        look = one(tmp_path, storage, file)
        assert isinstance(look, Odd)
        assert not look.unreadable


def test_looks_at_directories(tmp_path: Path, storage: StorageID) -> None:
    target = put(tmp_path, CACHE, {"t_aux": b"22", "p_aux": b"1", "a.tmp": b"", ".hidden": b""})
    (target / "sub").mkdir()
    (target / "dangling").symlink_to("nowhere")
    (target / "linked").symlink_to("t_aux")
    os.mkfifo(target / "fifo")
    facts = one(tmp_path, storage, CACHE)
    assert isinstance(facts, Facts)
    assert [(member.name, member.size) for member in facts.members or ()] == [
        ("linked", 2),
        ("p_aux", 1),
        ("t_aux", 2),
    ]
    assert (facts.size, facts.mtime_ns) == (5, target.stat().st_mtime_ns)
    file = put(tmp_path, sector_file(FileType.CACHE, 8), b"a file")
    look = one(tmp_path, storage, sector_file(FileType.CACHE, 8))
    assert look == Odd("is not a directory")
    file.unlink()
    assert one(tmp_path, storage, sector_file(FileType.CACHE, 8)) is None


def test_links(tmp_path: Path, storage: StorageID) -> None:
    for file, content in ((SEALED, b"12345"), (CACHE, {"p_aux": b"1"})):
        target = put(tmp_path, file, content)
        target.rename(tmp_path / "elsewhere")
        target.symlink_to(tmp_path / "elsewhere")
        assert isinstance(one(tmp_path, storage, file), Facts)
        (tmp_path / "elsewhere").rename(tmp_path / f"away{file.file_type}")
        look = one(tmp_path, storage, file)
        assert isinstance(look, Odd)
        assert look.unreadable
        target.unlink()
        target.symlink_to(target.name)
        look = one(tmp_path, storage, file)
        assert isinstance(look, Odd)
        assert look.unreadable


def test_a_directory_with_too_many_files(
    tmp_path: Path, storage: StorageID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "MAX_MEMBERS", 3)
    put(tmp_path, CACHE, {f"m{number}": b"" for number in range(4)})
    look = one(tmp_path, storage, CACHE)
    assert isinstance(look, Odd)
    assert "more than 3" in look.reason


def test_a_directory_whose_files_cannot_be_read_is_unreadable(
    tmp_path: Path, storage: StorageID
) -> None:
    put(tmp_path, CACHE, {"p_aux": b"1"})
    (tmp_path / str(CACHE) / "loop").symlink_to("loop")
    look = one(tmp_path, storage, CACHE)
    assert isinstance(look, Odd)
    assert look.unreadable


def test_looks_stop_at_the_budget_and_after_one_at_least(
    tmp_path: Path, storage: StorageID
) -> None:
    files = [sector_file(FileType.SEALED, number) for number in range(5)]
    for file in files:
        put(tmp_path, file)
    assert len(look_many(str(tmp_path), storage, files, budget=0)) == 1
    assert len(look_many(str(tmp_path), storage, files)) == 5


def test_directories_are_armed_before_they_are_looked_at(
    tmp_path: Path, storage: StorageID
) -> None:
    def arm(file: SectorFile, name: str) -> None:
        assert (file, name) == (CACHE, str(tmp_path / str(CACHE)))
        put(tmp_path, CACHE, {"p_aux": b"1"})

    (tmp_path / "cache").mkdir()
    (look,) = look_many(str(tmp_path), storage, [CACHE], arm=arm)
    assert isinstance(look, Facts)


def test_file_facts(tmp_path: Path, storage: StorageID) -> None:
    put(tmp_path, SEALED, b"12345")
    assert file_facts(str(tmp_path), storage, SEALED).size == 5
    with pytest.raises(NotFound, match="no such"):
        file_facts(str(tmp_path), storage, CACHE)
    put(tmp_path, CACHE, b"a file")
    with pytest.raises(NotFound, match="not a directory"):
        file_facts(str(tmp_path), storage, CACHE)
    linked = sector_file(FileType.SEALED, 8)
    (tmp_path / str(linked)).symlink_to("nowhere")
    with pytest.raises(DiskError, match="link to nothing"):
        file_facts(str(tmp_path), storage, linked)


# Two looks


def settling(limit: int = 10) -> Settling:
    return Settling(settle=1.0, limit=limit)


def test_two_looks_that_agree() -> None:
    waiting = settling()
    assert waiting.note(SEALED, 0)
    assert waiting.next_due() == 0
    assert waiting.due(0) == [SEALED]
    assert not waiting.saw(SEALED, Facts(1, 1), 0)
    assert waiting.due(0.9) == []
    assert waiting.due(1) == [SEALED]
    assert waiting.saw(SEALED, Facts(1, 1), 1)
    assert len(waiting) == 0
    assert waiting.next_due() == float("inf")


def test_a_first_look_may_be_given() -> None:
    waiting = settling()
    waiting.note(SEALED, 0, Facts(1, 1))
    assert waiting.due(0.5) == []
    assert waiting.due(1) == [SEALED]
    assert waiting.saw(SEALED, Facts(1, 1), 1)


def test_looks_that_differ_grow_rare() -> None:
    waiting = settling()
    waiting.note(SEALED, 0)
    now, waits = 0.0, []
    for size in range(10):
        before = now
        now = waiting.next_due()
        waits.append(now - before)
        assert waiting.due(now) == [SEALED]
        assert not waiting.saw(SEALED, Facts(size, size), now)
    assert waits == [0, 1, 2, 4, 8, 16, MAX_WAIT, MAX_WAIT, MAX_WAIT, MAX_WAIT]
    waiting.note(SEALED, now)  # it was closed: look soon
    assert waiting.next_due() == now + 1


def test_what_happens_during_a_look_is_not_lost() -> None:
    waiting = settling()
    waiting.note(SEALED, 0, Facts(1, 1))
    assert waiting.due(1) == [SEALED]
    waiting.note(SEALED, 1)  # after the disk was asked
    assert not waiting.saw(SEALED, Facts(1, 1), 1)
    assert waiting.due(2) == [SEALED]
    assert waiting.saw(SEALED, Facts(1, 1), 2)


@pytest.mark.parametrize("look", [None, Odd("is a directory")])
def test_what_is_gone_is_settled_at_once(look: Look) -> None:
    waiting = settling()
    waiting.note(SEALED, 0)
    assert waiting.due(0) == [SEALED]
    assert waiting.saw(SEALED, look, 0)
    assert len(waiting) == 0


def test_what_cannot_be_read_is_looked_at_later() -> None:
    waiting = settling()
    waiting.note(SEALED, 0)
    waiting.due(0)
    assert not waiting.saw(SEALED, Odd("input/output error", unreadable=True), 0)
    assert waiting.next_due() == MAX_WAIT


def test_the_bound_and_forgetting() -> None:
    waiting = settling(limit=1)
    assert waiting.note(SEALED, 0)
    assert not waiting.note(CACHE, 0)
    assert waiting.note(SEALED, 0)
    waiting.clear()
    assert not waiting.saw(SEALED, None, 0)
    assert waiting.note(CACHE, 0)


@given(st.lists(st.sampled_from(["write", "note", "look"]), max_size=60))
def test_only_content_that_stopped_changing_is_settled(steps: list[str]) -> None:
    waiting = settling()
    now, size, changed_at = 0.0, 0, 0.0
    waiting.note(SEALED, now)
    for step in steps:
        now += 0.3
        if step == "write":
            size, changed_at = size + 1, now
        elif step == "note":
            waiting.note(SEALED, now)
        elif waiting.due(now) and waiting.saw(SEALED, Facts(size, size), now):
            assert now - changed_at >= 0.3
            return
    for _ in range(4):  # and once it is quiet it is settled
        now = waiting.next_due()
        assert waiting.due(now) == [SEALED]
        if waiting.saw(SEALED, Facts(size, size), now):
            return
    raise AssertionError("never settled")


# Space


@pytest.mark.parametrize(
    ("limit", "used", "reserved", "available"),
    [
        (0, None, 0, 60),
        (0, None, 50, 10),
        (0, None, 70, 0),
        (50, None, 0, 0),
        (50, 20, 0, 30),
        (50, 70, 0, 0),
        (500, 70, 0, 60),
        (500, 70, 20, 40),
    ],
)
def test_what_a_path_still_accepts(
    limit: int, used: int | None, reserved: int, available: int
) -> None:
    stat = fs_stat(RawSpace(100, 60), max_storage=limit, used=used, reserved=reserved)
    assert stat.available == available
    assert (stat.capacity, stat.fs_available, stat.max) == (100, 60, limit)
    assert stat.used == ((used or 0) if limit else 0)
    assert stat.reserved == reserved


def test_use_is_counted_in_blocks_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "STEP_ENTRIES", 2)
    for number in range(5):
        put(tmp_path, sector_file(FileType.CACHE, number), {"p_aux": b"1" * 10_000})
    (tmp_path / "link").symlink_to("/")
    totals = list(usage_steps(str(tmp_path)))
    blocks = sum(entry.stat().st_blocks for entry in tmp_path.rglob("p_aux"))
    assert totals[-1] == blocks * 512
    assert totals == sorted(totals)
    assert len(totals) > 4
    assert list(usage_steps(str(tmp_path / "missing"))) == [0]
