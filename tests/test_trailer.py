"""Partial files: the trailer to the byte, bad ones, changes, holes, and crashes at every step."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectorfs.errors import BadRange, Refused, SourceFailed
from sectorfs.stores import holes, rle, trailer
from sectorfs.stores.lanes import Descriptor
from sectorfs.stores.rle import Runs
from sectorfs.stores.trailer import PartialFile

KIB, MIB, GIB = 2**10, 2**20, 2**30
SIZE = 2 * KIB

VECTORS = [
    (2 * KIB, [], "00000000"),
    (2 * KIB, [(0, 2 * KIB)], "04100203000000"),
    (2 * KIB, [(0, 1024)], "04100103000000"),
    (2 * KIB, [(1024, 2048)], "001001400405000000"),
    (2 * KIB, [(128, 256)], "003000c004000000"),
    (8 * MIB, [(0, 8 * MIB)], "0410109004000000"),
    (512 * MIB, [(0, 512 * MIB)], "041010105005000000"),
    (32 * GIB, [(0, 32 * GIB)], "04101010103006000000"),
    (64 * GIB, [(0, 64 * GIB)], "04101010105006000000"),
    (32 * GIB, [(16 * GIB, 20 * GIB)], "00101010100840404040080b000000"),
]


@contextmanager
def descriptor(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[Descriptor]:
    held = Descriptor(os.open(path, flags, 0o644))
    try:
        yield held
    finally:
        held.close()


@contextmanager
def partial(path: Path, size: int = SIZE) -> Iterator[PartialFile]:
    """A partial file, made if there is nothing at the path."""
    with descriptor(path) as held:
        make = PartialFile.open if os.path.getsize(path) else PartialFile.create
        yield make(held, sector_size=size, thing=path)


def write_file(path: Path, tail: bytes, size: int = SIZE) -> None:
    """A sparse file with these bytes after its data."""
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(tail)


def tail(path: Path, size: int = SIZE) -> bytes:
    with path.open("rb") as file:
        file.seek(size)
        return file.read()


def allocated(path: Path, size: int = SIZE) -> Runs:
    with descriptor(path, os.O_RDONLY) as held:
        return PartialFile.open(held, sector_size=size, thing=path).allocated


@pytest.mark.parametrize(("size", "spans", "expected"), VECTORS)
def test_vectors_are_read(
    tmp_path: Path, size: int, spans: list[tuple[int, int]], expected: str
) -> None:
    path = tmp_path / "s-t01000-7"
    write_file(path, bytes.fromhex(expected), size)
    assert allocated(path, size) == Runs.of(spans)


@pytest.mark.parametrize(("size", "spans", "expected"), VECTORS)
def test_vectors_are_written(
    tmp_path: Path, size: int, spans: list[tuple[int, int]], expected: str
) -> None:
    path = tmp_path / "s-t01000-7"
    write_file(path, bytes(4), size)
    with partial(path, size) as file:
        for start, end in spans:
            file.mark(start, end - start)
    assert tail(path, size).hex() == expected


def test_a_new_file_has_blocks_and_the_empty_trailer(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    with partial(path, MIB) as file:
        assert file.allocated == Runs()
    assert tail(path, MIB) == bytes(4)
    assert path.stat().st_blocks * 512 >= MIB
    assert allocated(path, MIB) == Runs()


def test_a_file_with_bytes_is_not_made_partial(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    path.write_bytes(b"x")
    with descriptor(path) as held, pytest.raises(Refused, match="not empty") as caught:
        PartialFile.create(held, sector_size=SIZE, thing=path)
    assert caught.value.thing == str(path)
    assert path.read_bytes() == b"x"


def test_a_file_system_that_reserves_nothing_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holes, "allocate", lambda fd, size: False)
    monkeypatch.setattr(holes, "punch", lambda fd, offset, size: False)
    with partial(tmp_path / "s-t01000-7") as file:
        file.mark(0, SIZE)
        file.free(0, 128)
        assert file.allocated == Runs.span(128, SIZE - 128)


def test_a_full_disk_leaves_a_valid_empty_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, size: int) -> bool:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(holes, "allocate", full)
    path = tmp_path / "s-t01000-7"
    with descriptor(path) as held, pytest.raises(OSError, match="no room"):
        PartialFile.create(held, sector_size=SIZE, thing=path)
    assert allocated(path) == Runs()


def test_exactly_a_sector_is_all_there_and_keeps_no_trailer(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    write_file(path, b"")
    with partial(path) as file:
        assert file.allocated == Runs.span(0, SIZE)
        file.mark(0, 512)
    assert path.stat().st_size == SIZE
    with partial(path) as file:
        file.free(0, 1024)
    assert tail(path).hex() == "001001400405000000"


@pytest.mark.parametrize(
    ("size", "after", "message"),
    [
        (SIZE - 1, b"", "2047 bytes, less than"),
        (0, b"", "0 bytes, less than"),
        (SIZE, b"\0", "trailer of 1 bytes"),
        (SIZE, b"\0\0\0", "trailer of 3 bytes"),
        (SIZE, b"\1\0\0\0", "bitmap of 1"),
        (SIZE, bytes.fromhex("04100202000000"), "bitmap of 2"),
        (SIZE, bytes.fromhex("04100204000000"), "bitmap of 4"),
        (SIZE, bytes.fromhex("041002ffffffff"), "bitmap of 4294967295"),
        (SIZE, bytes.fromhex("0410020003000000"), "bitmap of 3"),
        (SIZE, bytes.fromhex("0410020004000000"), "ends in a zero byte"),
        (SIZE, bytes.fromhex("05100203000000"), "unknown version"),
        (SIZE, bytes.fromhex("04100403000000"), "names byte 4095 of a sector of 2048"),
        (SIZE, bytes.fromhex("04101010105006000000"), "names byte 68719476735"),
    ],
)
def test_bad_trailers_are_refused(tmp_path: Path, size: int, after: bytes, message: str) -> None:
    path = tmp_path / "s-t01000-7"
    write_file(path, after, size)
    with pytest.raises(SourceFailed, match=message) as caught:
        allocated(path)
    assert caught.value.thing == str(path)


def test_the_bit_just_past_the_end_passes_but_is_not_served(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    bitmap = rle.encode(Runs.span(0, SIZE + 1))
    write_file(path, bitmap + len(bitmap).to_bytes(4, "little"))
    assert allocated(path) == Runs.span(0, SIZE)
    bitmap = rle.encode(Runs.span(0, SIZE + 2))
    write_file(path, bitmap + len(bitmap).to_bytes(4, "little"))
    with pytest.raises(SourceFailed, match="names byte 2049"):
        allocated(path)


def padded_bitmap(runs: Runs, length: int) -> bytes:
    """A bitmap with rubbish after a run of zero length: valid, only long."""
    bitmap = rle.encode(runs) + bytes(2)
    return bitmap + b"\1" * (length - len(bitmap))


def test_a_bitmap_above_a_mebibyte_only_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s-t01000-7"
    for length, warnings in ((MIB, 0), (MIB + 1, 1)):
        caplog.clear()
        write_file(path, padded_bitmap(Runs.span(0, 1), length) + length.to_bytes(4, "little"))
        assert allocated(path) == Runs.span(0, 1)
        assert len(caplog.records) == warnings
    assert "the trailer is large: 1048577 bytes" in caplog.text


def test_a_bitmap_beyond_reason_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s-t01000-7"
    length = trailer.MAX_BITMAP + 1
    with path.open("wb") as file:
        file.truncate(SIZE + length)
        file.seek(SIZE + length)
        file.write(length.to_bytes(4, "little"))
    with pytest.raises(SourceFailed, match=f"bitmap of {length} bytes"):
        allocated(path)
    assert "large" in caplog.text


def test_hostile_runs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    bitmap = b"\xfc" + b"\xff" * 300_000
    write_file(path, bitmap + len(bitmap).to_bytes(4, "little"), MIB)
    with pytest.raises(SourceFailed, match="more than 1048576 runs"):
        allocated(path, MIB)


def test_every_change_through_one_object_lasts(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    with partial(path) as file:
        file.mark(0, 256)
        file.mark(1024, 512)
        file.free(128, 64)
        expected = Runs.of([(0, 128), (192, 256), (1024, 1536)])
        assert file.allocated == expected
    assert allocated(path) == expected


def test_changes_through_two_objects_last(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    with partial(path) as one, partial(path) as other:
        one.mark(0, 256)
        other.mark(1024, 512)
        one.mark(512, 128)
    assert allocated(path) == Runs.of([(0, 256), (512, 640), (1024, 1536)])


def test_threads_do_not_lose_each_others_changes(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    with partial(path) as file:
        offsets = range(0, SIZE, 128)
        threads = [threading.Thread(target=file.mark, args=(at, 64)) for at in offsets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert allocated(path) == Runs.of((at, at + 64) for at in offsets)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=12
    )
)
def test_any_changes_agree_with_a_set(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[bool, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("partial") / "s-t01000-7"
    model: set[int] = set()
    with partial(path, 512) as file:
        for marks, low, high in changes:
            start, end = min(low, high), max(low, high)
            if marks:
                file.mark(start, end - start)
                model |= set(range(start, end))
            else:
                file.free(start, end - start)
                model -= set(range(start, end))
            expected = Runs.of((n, n + 1) for n in model)
            assert file.allocated == expected
            assert allocated(path, 512) == expected


def test_bytes_are_read_back_once_marked(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    data = os.urandom(512)
    with partial(path) as file:
        file.write(256, memoryview(data))
        with pytest.raises(BadRange, match="not unsealed"):
            file.read(256, 512)
        file.mark(256, 512)
        assert file.read(256, 512) == data
        assert file.read(300, 100) == data[44:144]
        assert file.read(SIZE, 0) == b""
        with pytest.raises(BadRange, match="not unsealed"):
            file.read(256, 513)
        with pytest.raises(BadRange, match="not unsealed"):
            file.read(255, 2)


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (0, SIZE + 1), (SIZE, 1)])
def test_nothing_outside_the_sector_is_touched(tmp_path: Path, offset: int, size: int) -> None:
    path = tmp_path / "s-t01000-7"
    with partial(path) as file:
        for call in (file.read, file.mark, file.free):
            with pytest.raises(BadRange, match="outside the sector") as caught:
                call(offset, size)
            assert caught.value.thing == str(path)
        if size > 0:
            with pytest.raises(BadRange, match="outside the sector"):
                file.write(offset, bytes(size))
    assert path.read_bytes() == bytes(SIZE + 4)


def test_a_file_cut_while_it_is_open_fails_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    write_file(path, b"")
    with partial(path) as file:
        os.truncate(path, 100)
        with pytest.raises(SourceFailed, match="became shorter"):
            file.read(0, 200)


def test_a_closed_descriptor_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    with partial(path) as file:
        pass
    with pytest.raises(OSError, match="closed"):
        file.mark(0, 128)


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, 127, True),
        (0, 254, True),  # 256 padded bytes
        (0, 255, False),
        (127, 127, True),  # begins at padded byte 128
        (127, 254, False),
        (1016, 508, True),  # padded 1024 to 1536
        (1016, 509, False),
        (1015, 10, False),
        (254, 0, True),
        (0, 2**63, False),
        (2**70, 1, False),
    ],
)
def test_ranges_are_asked_for_in_unpadded_numbers(
    tmp_path: Path, offset: int, size: int, expected: bool
) -> None:
    with partial(tmp_path / "s-t01000-7") as file:
        file.mark(0, 256)
        file.mark(1024, 512)
        assert file.has_allocated(offset, size) is expected


@pytest.mark.parametrize(("offset", "size"), [(-1, 127), (0, -127)])
def test_ranges_below_zero_are_refused(tmp_path: Path, offset: int, size: int) -> None:
    with partial(tmp_path / "s-t01000-7") as file, pytest.raises(BadRange, match="below zero"):
        file.has_allocated(offset, size)


def test_freed_bytes_become_a_hole_and_the_length_stays(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    with partial(path, MIB) as file:
        file.write(0, b"\xaa" * MIB)
        file.mark(0, MIB)
        before = path.stat()
        file.free(256 * KIB, 512 * KIB)
        after = path.stat()
    assert after.st_size == MIB + len(tail(path, MIB)) >= before.st_size
    assert (before.st_blocks - after.st_blocks) * 512 >= 512 * KIB
    data = path.read_bytes()
    assert data[256 * KIB : 768 * KIB] == bytes(512 * KIB)
    assert data[: 256 * KIB] + data[768 * KIB : MIB] == b"\xaa" * (512 * KIB)


def test_holes_are_not_offered_everywhere() -> None:
    fd = os.open("/proc/self/comm", os.O_WRONLY)
    try:
        assert not holes.allocate(fd, 4096)
        assert not holes.punch(fd, 0, 4096)
        assert holes.punch(fd, 0, 0)
    finally:
        os.close(fd)


def test_a_file_open_for_reading_gets_no_holes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with descriptor(path, os.O_RDONLY) as held, held as fd:
        with pytest.raises(OSError, match="descriptor") as caught:
            holes.punch(fd, 0, 3)
    assert caught.value.errno == errno.EBADF


def test_a_signal_does_not_stop_the_making_of_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [errno.EINTR, errno.EINTR, 0]

    def interrupted(fd: int, mode: int, offset: int, size: int) -> int:
        ctypes.set_errno(answers.pop(0))
        return -1 if ctypes.get_errno() else 0

    monkeypatch.setattr(holes, "_fallocate", interrupted)
    assert holes.punch(0, 0, 4096)
    assert answers == []


class Journal:
    """Writes, truncations, syncs and holes in the order in which the disk is asked for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[str, int, bytes]] = []
        pwrite, ftruncate, fdatasync, punch = os.pwrite, os.ftruncate, os.fdatasync, holes.punch

        def write(fd: int, data: bytes, offset: int) -> int:
            self.steps.append(("write", offset, bytes(data)))
            return pwrite(fd, data, offset)

        def truncate(fd: int, size: int) -> None:
            self.steps.append(("truncate", size, b""))
            ftruncate(fd, size)

        def sync(fd: int) -> None:
            self.steps.append(("sync", 0, b""))
            fdatasync(fd)

        def hole(fd: int, offset: int, size: int) -> bool:
            self.steps.append(("hole", offset, b""))
            return punch(fd, offset, size)

        monkeypatch.setattr(os, "pwrite", write)
        monkeypatch.setattr(os, "ftruncate", truncate)
        monkeypatch.setattr(os, "fdatasync", sync)
        monkeypatch.setattr(holes, "punch", hole)

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.steps]


def put(disk: bytes, offset: int, data: bytes) -> bytes:
    """A file after a write."""
    return disk[:offset].ljust(offset, b"\0") + data + disk[offset + len(data) :]


def power_cuts(disk: bytes, steps: list[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """Every file that a power cut at any step can leave.

    Of a write that is not synced any of its disk sectors may be there, and the new length or not.
    """
    unsynced = False
    for kind, at, data in steps:
        if kind == "sync":
            unsynced = False
            continue
        assert not unsynced, "two steps in flight at once"
        unsynced = True
        yield disk
        if kind == "truncate":
            disk = disk[:at].ljust(at, b"\0")
        elif kind == "write":
            yield from torn_writes(disk, at, data)
            disk = put(disk, at, data)
        yield disk


def torn_writes(disk: bytes, at: int, data: bytes) -> Iterator[bytes]:
    whole = put(disk, at, data)
    sectors = [data[i : i + 512] for i in range(0, len(data), 512)]
    for chosen in product((False, True), repeat=len(sectors)):
        torn = disk.ljust(len(whole), b"\0")
        for index, sector in enumerate(sectors):
            if chosen[index]:
                torn = put(torn, at + 512 * index, sector)
        yield torn
        yield torn[: len(disk)]


def change(
    path: Path, size: int, old: Runs, alter: Callable[[PartialFile], None]
) -> tuple[bytes, Journal, Runs]:
    """The file before a change, its steps, and what is allocated after it."""
    bitmap = rle.encode(old)
    write_file(path, bitmap + len(bitmap).to_bytes(4, "little"), size)
    before = path.read_bytes()
    with pytest.MonkeyPatch.context() as monkeypatch, partial(path, size) as file:
        journal = Journal(monkeypatch)
        alter(file)
        return before, journal, file.allocated


def outcomes(path: Path, size: int, disks: Iterator[bytes]) -> set[Runs | None]:
    """What can be read afterwards; None stands for a file that is refused."""
    found: set[Runs | None] = set()
    for disk in {*disks}:
        path.write_bytes(disk)
        try:
            found.add(allocated(path, size))
        except SourceFailed:
            found.add(None)
    return found


FRAGMENTS = Runs.of((at, at + 7) for at in range(0, 8 * KIB - 13, 13))


@pytest.mark.parametrize(
    ("old", "marks", "refused"),
    [
        (Runs(), Runs.span(128, 128), True),
        (Runs.span(0, 1024), Runs.span(1024, 1024), False),  # as long as before
        (Runs.span(128, 128), Runs.span(0, 2048), True),  # shorter
        (Runs.span(0, 5), Runs.span(3, 1), False),  # nothing changes
        (FRAGMENTS, Runs.span(4094, 1), True),
        (FRAGMENTS, Runs.span(0, 8 * KIB), True),
    ],
)
def test_a_power_cut_leaves_the_old_or_the_new_trailer_or_none(
    tmp_path: Path, old: Runs, marks: Runs, refused: bool
) -> None:
    path, size = tmp_path / "s-t01000-7", 8 * KIB
    [(start, end)] = marks.spans()
    before, journal, new = change(path, size, old, lambda file: file.mark(start, end - start))
    assert new == old.union(marks)
    found = outcomes(path, size, power_cuts(before, journal.steps))
    assert found - {None} == ({old, new} if new != old else set())
    assert (None in found) == refused


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 4096), st.integers(1, 600)), max_size=8),
    st.booleans(),
    st.tuples(st.integers(0, 4096), st.integers(0, 4096)),
)
def test_no_power_cut_leaves_a_wrong_bitmap(
    tmp_path_factory: pytest.TempPathFactory,
    spans: list[tuple[int, int]],
    marks: bool,
    ends: tuple[int, int],
) -> None:
    path, size = tmp_path_factory.mktemp("cut") / "s-t01000-7", 8 * KIB
    old = Runs.of((start, start + length) for start, length in spans)
    start, end = min(ends), max(ends)

    def alter(file: PartialFile) -> None:
        (file.mark if marks else file.free)(start, end - start)

    before, journal, new = change(path, size, old, alter)
    steps = [step for step in journal.steps if step[0] != "hole"]
    found = outcomes(path, size, power_cuts(before, steps))
    assert found <= {old, new, None}
    if len(rle.encode(old)) == len(rle.encode(new)):
        assert None not in found


def test_a_killed_process_leaves_a_trailer_that_grew_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    _, journal, _ = change(path, SIZE, Runs.span(0, 1024), lambda file: file.mark(1500, 100))
    assert journal.kinds == ["sync", "write", "sync"]


def test_data_is_synced_before_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"

    def alter(file: PartialFile) -> None:
        file.write(0, b"x" * 1024)
        file.mark(0, 1024)

    _, journal, _ = change(path, SIZE, Runs(), alter)
    assert journal.kinds == ["write", "sync", "write", "sync"]
    assert journal.steps[0][1] == 0
    assert journal.steps[2][1] == SIZE


def test_bytes_are_given_up_before_they_are_punched_out(tmp_path: Path) -> None:
    path = tmp_path / "s-t01000-7"
    _, journal, _ = change(path, SIZE, Runs.span(0, 1024), lambda file: file.free(0, 512))
    assert journal.kinds[-2:] == ["sync", "hole"]
    assert journal.kinds.count("hole") == 1


def test_a_file_made_has_its_trailer_before_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s-t01000-7"
    sizes = []
    allocate = holes.allocate

    def watched(fd: int, size: int) -> bool:
        sizes.append(os.fstat(fd).st_size)
        return allocate(fd, size)

    monkeypatch.setattr(holes, "allocate", watched)
    with partial(path):
        pass
    assert sizes == [SIZE + 4]
