"""Unpadded ranges of unsealed sectors: trailers, changes while reading, copies that fail."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sectorfs.errors import (
    BadRange,
    DiskError,
    NoSource,
    NotFound,
    SectorFSError,
    SourceFailed,
    Unreachable,
)
from sectorfs.stores import fr32, rle, trailer
from sectorfs.stores.lanes import Lane
from sectorfs.stores.rle import Runs
from sectorfs.stores.unsealed import LOOKS, STEP, DiskCopy, UnsealedReader
from sectorfs.types import Facts, FileType, SectorFile, SectorID

FILE = SectorFile(FileType.UNSEALED, SectorID(1000, 7))
SMALL, LARGE = 2048, 8 << 20
CLIENT = random.Random("client").randbytes(fr32.unpadded(LARGE))
PADDED = bytes(fr32.pad(CLIENT))


def with_trailer(data: bytes, allocated: Runs) -> bytes:
    """The bytes of a partial file."""
    bitmap = rle.encode(allocated)
    return data + bitmap + len(bitmap).to_bytes(4, "little")


class MemoryCopy:
    """A copy in memory that notes what is asked of it."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.mtime_ns = 1
        self.reads: list[tuple[int, int]] = []
        self.looks = 0
        self.failure: SectorFSError | None = None
        self.after_read: Callable[[MemoryCopy], object] = lambda copy: None

    async def facts(self) -> Facts:
        self.looks += 1
        if self.failure is not None:
            raise self.failure
        return Facts(len(self.content), self.mtime_ns)

    async def read(self, offset: int, size: int) -> bytes:
        if self.failure is not None:
            raise self.failure
        assert 0 <= offset <= offset + size <= len(self.content)
        self.reads.append((offset, size))
        data = self.content[offset : offset + size]
        self.after_read(self)
        return data

    def data_reads(self) -> list[tuple[int, int]]:
        """Reads that are not of the trailer."""
        return [one for one in self.reads if one[0] + one[1] <= LARGE]


class Sink:
    """Takes what is written, piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def __call__(self, data: memoryview) -> None:
        self.pieces.append(bytes(data))

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


async def read(copies: Sequence[MemoryCopy], start: int, stop: int) -> Sink:
    """Read a range through a new reader."""
    sink = Sink()
    await UnsealedReader(FILE, copies).read(start, stop, sink)
    return sink


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (0, 1),
        (0, 127),
        (126, 128),
        (5, 5),
        (1000, 1016),
        (0, len(CLIENT)),
        (len(CLIENT) - 1, len(CLIENT)),
        (3_999_999, 8_000_001),
        (fr32.unpadded(STEP) - 1, fr32.unpadded(STEP) + 1),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
async def test_any_range(start: int, stop: int, whole: bool) -> None:
    content = PADDED if whole else with_trailer(PADDED, Runs.span(0, LARGE))
    copy = MemoryCopy(content)
    sink = await read([copy], start, stop)
    assert sink.data == CLIENT[start:stop]
    assert all(size <= STEP for _, size in copy.data_reads())


async def test_only_the_chunks_of_the_range_are_read() -> None:
    copy = MemoryCopy(PADDED)
    await read([copy], 127 * 10 + 1, 127 * 12)
    assert copy.reads == [(1280, 256)]


async def test_trailer_is_read_once() -> None:
    copy = MemoryCopy(with_trailer(PADDED, Runs.span(0, LARGE)))
    sink = await read([copy], 0, len(CLIENT))
    assert len(sink.pieces) == 2
    assert len(copy.reads) == 2 + 2
    assert copy.looks == 1 + 2


@pytest.mark.parametrize("size", [2048, 8 << 20])
async def test_smallest_and_small_sectors(size: int) -> None:
    data = CLIENT[: fr32.unpadded(size)]
    copy = MemoryCopy(with_trailer(bytes(fr32.pad(data)), Runs.span(0, size)))
    assert (await read([copy], 0, len(data))).data == data


PART = Runs.of([(0, 1024), (1280, 2048)])


@pytest.mark.parametrize(
    ("start", "stop", "missing"),
    [
        (0, 1016, None),
        (1270, 2032, None),
        (0, 1017, "1016 to 1017"),
        (1016, 1270, "1016 to 1270"),
        (1000, 1300, "1016 to 1270"),
        (1100, 1120, "1100 to 1120"),
        (0, 2032, "1016 to 1270"),
    ],
)
async def test_holes_are_never_handed_out(start: int, stop: int, missing: str | None) -> None:
    small = PADDED[:SMALL]
    copy = MemoryCopy(with_trailer(small, PART))
    if missing is None:
        assert (await read([copy], start, stop)).data == CLIENT[start:stop]
        return
    with pytest.raises(NotFound, match=f"bytes {missing} are not unsealed") as caught:
        await read([copy], start, stop)
    assert caught.value.exit_code == 3
    assert f"asked for {start} to {stop}" in str(caught.value)


async def test_nothing_is_written_when_the_end_is_missing() -> None:
    copy = MemoryCopy(with_trailer(PADDED, Runs.span(0, LARGE - 128)))
    sink = Sink()
    with pytest.raises(NotFound):
        await UnsealedReader(FILE, [copy]).read(0, len(CLIENT), sink)
    assert sink.pieces == []
    assert copy.data_reads() == []


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, len(CLIENT) + 1), (len(CLIENT), len(CLIENT) + 1), (2**61, 2**61 + 1)],
)
async def test_ranges_behind_the_sector(start: int, stop: int) -> None:
    other = MemoryCopy(PADDED)
    with pytest.raises(BadRange, match=f"the sector ends at {len(CLIENT)}"):
        await read([MemoryCopy(PADDED), other], start, stop)
    assert other.looks == 0


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 2**63), (2**63, 2**64)])
async def test_ranges_that_are_none(start: int, stop: int) -> None:
    copy = MemoryCopy(PADDED)
    with pytest.raises(BadRange, match="no range of unpadded bytes"):
        await read([copy], start, stop)
    assert copy.looks == 0


BITMAP = rle.encode(Runs.span(0, SMALL))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        PADDED[: SMALL - 1],
        PADDED[: SMALL + 1],
        PADDED[: SMALL + 3],
        PADDED[:SMALL] + BITMAP + b"\x02\0\0\0",
        PADDED[:SMALL] + BITMAP + b"\x04\0\0\0",
        PADDED[:SMALL] + BITMAP + b"\xff\xff\xff\xff",
        PADDED[:SMALL] + BITMAP + b"\0" + b"\x04\0\0\0",
        with_trailer(PADDED[:SMALL], Runs.span(0, SMALL + 2)),
        PADDED[: LARGE - 1],
        PADDED + b"\0" * 7,
    ],
)
async def test_damaged_file(content: bytes) -> None:
    with pytest.raises(NoSource) as caught:
        await read([MemoryCopy(content)], 0, 5)
    assert caught.value.exit_code == 1
    assert all(isinstance(cause, SourceFailed) for cause in caught.value.causes)


async def test_trailer_beyond_reason_is_not_read() -> None:
    """The size of a file is what a stranger says it is."""
    length = trailer.MAX_LENGTH + 1
    size = SMALL + length

    class Huge(MemoryCopy):
        async def facts(self) -> Facts:
            return Facts(size, 1)

        async def read(self, offset: int, size: int) -> bytes:
            assert size == 4
            return (length - 4).to_bytes(4, "little")

    with pytest.raises(NoSource):
        await read([Huge(b"")], 0, 5)


async def test_bytes_that_are_not_padded_data_are_not_handed_out() -> None:
    damaged = bytearray(PADDED)
    damaged[128 * 9 + 31] |= 0x80
    sink = Sink()
    with pytest.raises(NoSource, match=r"not fr32.*byte 1183"):
        await UnsealedReader(FILE, [MemoryCopy(bytes(damaged))]).read(0, len(CLIENT), sink)
    assert sink.pieces == []
    good = MemoryCopy(PADDED)
    assert (await read([MemoryCopy(bytes(damaged)), good], 0, 5000)).data == CLIENT[:5000]


# --- several copies ---


async def test_next_copy_is_taken_when_one_fails_or_misses_bytes() -> None:
    down = MemoryCopy(PADDED)
    down.failure = Unreachable("cannot connect", "http://a")
    partial = MemoryCopy(with_trailer(PADDED, Runs.span(0, 1024)))
    short = MemoryCopy(b"")
    good = MemoryCopy(PADDED)
    unused = MemoryCopy(PADDED)
    sink = await read([down, partial, short, good, unused], 0, len(CLIENT))
    assert sink.data == CLIENT
    assert (partial.data_reads(), unused.looks) == ([], 0)
    assert down.looks == 1, "asked again for the second piece"


async def test_copy_that_dies_half_way_is_continued_by_another() -> None:
    dying, good = MemoryCopy(PADDED), MemoryCopy(with_trailer(PADDED, Runs.span(0, LARGE)))

    def die(copy: MemoryCopy) -> None:
        if copy.reads[-1][0]:
            copy.failure = Unreachable("reset", "http://a")

    dying.after_read = die
    sink = await read([dying, good], 0, len(CLIENT))
    assert sink.data == CLIENT
    assert good.data_reads() == [(STEP, LARGE - STEP)]


async def test_errors_when_no_copy_works() -> None:
    down, sick = MemoryCopy(PADDED), MemoryCopy(PADDED)
    down.failure = Unreachable("cannot connect", "http://a")
    sick.failure = DiskError("read: EIO", "/mnt/disk")
    with pytest.raises(Unreachable, match=r"no node that has it answers.*cannot connect"):
        await read([down, down], 0, 5)
    with pytest.raises(NoSource, match=r"cannot connect.*EIO"):
        await read([down, sick], 0, 5)
    partial = MemoryCopy(with_trailer(PADDED, Runs()))
    with pytest.raises(NotFound, match=r"not unsealed.*another copy cannot be read.*EIO"):
        await read([partial, sick], 0, 5)
    with pytest.raises(NoSource, match="no copy can be read"):
        await read([], 0, 5)


# --- files that change ---


async def test_bytes_freed_while_they_are_read_are_not_handed_out() -> None:
    """A punched hole reads as zeros, which are good padded data."""
    copy = MemoryCopy(with_trailer(PADDED, Runs.span(0, LARGE)))

    def free(copy: MemoryCopy) -> None:
        if copy.reads[-1] == (STEP, LARGE - STEP):
            copy.content = with_trailer(PADDED[:STEP] + bytes(LARGE - STEP), Runs.span(0, STEP))
            copy.mtime_ns += 1

    copy.after_read = free
    sink = Sink()
    with pytest.raises(NotFound, match="are not unsealed"):
        await UnsealedReader(FILE, [copy]).read(0, len(CLIENT), sink)
    assert sink.data == CLIENT[: fr32.unpadded(STEP)]


async def test_file_that_grows_is_read_on() -> None:
    """Another piece is unsealed into it meanwhile."""
    copy = MemoryCopy(with_trailer(PADDED, Runs.span(0, 4096)))

    def grow(copy: MemoryCopy) -> None:
        if len(copy.reads) == 3:
            copy.content = with_trailer(PADDED, Runs.of([(0, 4096), (8192, 9216)]))
            copy.mtime_ns += 1

    copy.after_read = grow
    assert (await read([copy], 0, 4000)).data == CLIENT[:4000]
    assert copy.reads[2] == (0, 4096)
    assert copy.reads[-1] == (0, 4096)


async def test_file_that_never_rests_is_given_up() -> None:
    copy = MemoryCopy(PADDED)

    def touch(copy: MemoryCopy) -> None:
        copy.mtime_ns += 1

    copy.after_read = touch
    with pytest.raises(NoSource, match="changes while it is read"):
        await read([copy], 0, 5)
    assert len(copy.reads) == LOOKS


# --- disks ---


@pytest.fixture
def lane() -> Lane:
    return Lane("disk", deadline=5)


async def test_copy_on_a_disk(tmp_path: Path, lane: Lane) -> None:
    path = tmp_path / FILE.sector.name
    path.write_bytes(with_trailer(PADDED, Runs.span(0, LARGE)))
    copy = DiskCopy(str(path), lane)
    facts = await copy.facts()
    assert (facts.size, facts.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    sink = Sink()
    before = len(os.listdir("/proc/self/fd"))
    await UnsealedReader(FILE, [copy]).read(77, len(CLIENT), sink)
    assert sink.data == CLIENT[77:]
    assert len(os.listdir("/proc/self/fd")) == before


async def test_disks_without_the_file(tmp_path: Path, lane: Lane) -> None:
    gone = DiskCopy(str(tmp_path / "none"), lane)
    with pytest.raises(NotFound):
        await gone.facts()
    with pytest.raises(NotFound):
        await gone.read(0, 5)
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(SourceFailed, match="has 3 bytes instead of 5 at 0"):
        await DiskCopy(str(tmp_path / "short"), lane).read(0, 5)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceFailed, match="is not a regular file"):
        await DiskCopy(str(tmp_path / "fifo"), lane).read(0, 5)
    with pytest.raises(DiskError, match=os.strerror(errno.EISDIR)):
        await DiskCopy(str(tmp_path), lane).read(0, 5)


# --- trailers from elsewhere ---


@pytest.mark.parametrize(
    "data", [b"", b"\0\0\0", b"\1\0\0\0", b"\x04\x10\x10\x02\0\0\0", b"\x04\x10\x10\x04\0\0\0"]
)
def test_bytes_that_are_no_trailer(data: bytes) -> None:
    with pytest.raises(SourceFailed, match="are no trailer"):
        trailer.decode(data, sector_size=SMALL, thing=FILE)


def test_trailer_from_elsewhere() -> None:
    assert trailer.decode(b"\0\0\0\0", sector_size=SMALL, thing=FILE) == Runs()
    full = bytes.fromhex("04100203000000")
    assert trailer.decode(full, sector_size=SMALL, thing=FILE) == Runs.span(0, SMALL)
