"""Reading a remote file while it comes: the right bytes, asked once, past failing sources."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sectorfs.errors import (
    DiskError,
    DiskFull,
    NoSource,
    SectorFSError,
    SourceFailed,
    Stale,
    TimedOut,
    Unreachable,
)
from sectorfs.stores import arrivals
from sectorfs.stores import stream as stream_module
from sectorfs.stores.answers import Version
from sectorfs.stores.arrivals import Arrivals, Memory
from sectorfs.stores.blocks import PIECE, Identity, PartialFile
from sectorfs.stores.gates import Gate, Priority
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.prover import Prover
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.stream import BULK, Stream
from sectorfs.stores.windows import Window
from sectorfs.types import StorageID
from tests.local_fixtures import until
from tests.test_blocks import content

MTIME_NS = 1_600_000_000_123_456_789
SIZE = 24 << 20
ONE, TWO, THREE = (PeerSource(StorageID(name), f"http://{name}/remote") for name in "abc")

Spans = Sequence[tuple[int, int]]
Behaviour = Callable[[Spans], Version]


class Sources:
    """Peers in memory, with every fault on command; implements `range_requests.Carrier`."""

    def __init__(self) -> None:
        self.ranked = [ONE]
        self.sharing: set[PeerSource] = set()
        self.gate = Gate(4, reserved=1)
        self.asked: list[tuple[PeerSource, list[tuple[int, int]]]] = []
        self.failures: dict[PeerSource, SectorFSError] = {}
        self.stop_after: dict[PeerSource, int] = {}
        self.versions: dict[PeerSource, Version] = {}
        self.hold: trio.Event | None = None
        self.cancelled = 0
        self.past_cache = 0
        """Writes past the page cache."""
        self.is_open = False
        self.disk_error: SectorFSError | None = None
        self.failed: list[PeerSource] = []
        self.returns: list[Callable[[], object]] = []
        """What happens when the failed ones are waited for; nobody does once it is empty."""

    async def back(self, causes: Mapping[PeerSource, SectorFSError], since: float) -> bool:
        await trio.lowlevel.checkpoint()
        if self.returns:
            self.returns.pop(0)()
            return True
        return False

    def place(self, source: PeerSource, priority: Priority) -> AbstractAsyncContextManager[None]:
        return self.gate.place(priority)

    async def _answer(self, source: PeerSource, spans: Spans, expect: Version | None) -> Version:
        self.asked.append((source, list(spans)))
        try:
            if self.hold is not None:
                await self.hold.wait()
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        if source in self.failures:
            raise self.failures[source]
        version = self.versions.get(source, Version(SIZE, MTIME_NS, f'"{source.storage}"'))
        if expect is not None and version != expect:
            raise Stale("changed", source.url)
        return version

    async def ranges(
        self,
        source: PeerSource,
        spans: Spans,
        *,
        expect: Version | None,
        prover: Prover | None,
        deliver: Callable[[int, bytes], object],
    ) -> Version:
        version = await self._answer(source, spans, expect)
        for count, (start, end) in enumerate(spans):
            if count >= self.stop_after.get(source, count + 1):
                raise SourceFailed("stopped", source.url)
            deliver(start, content(start, end))
        return version

    async def receive(
        self,
        source: PeerSource,
        span: tuple[int, int],
        descriptor: Descriptor,
        *,
        expect: Version | None,
        prover: Prover | None,
        past_cache: bool,
        progress: Callable[[int], object],
    ) -> Version:
        version = await self._answer(source, [span], expect)
        if self.disk_error is not None:
            raise self.disk_error
        start, end = span
        step = 300_000
        for count, at in enumerate(range(start, end, step)):
            if count >= self.stop_after.get(source, count + 1):
                raise SourceFailed("stopped", source.url)
            part = content(at, min(end, at + step))
            self.past_cache += past_cache
            with descriptor as fd:
                os.pwrite(fd, part, at)
            progress(at + len(part) - start)
            await trio.lowlevel.checkpoint()
        return version

    def spans(self) -> list[tuple[int, int]]:
        return [span for _, spans in self.asked for span in spans]


class Reader:
    """A stream, and what lies around it."""

    def __init__(self, sources: Sources, stream: Stream, root: Path) -> None:
        self.sources = sources
        self.stream = stream
        self.root = root

    async def read(self, offset: int, size: int, window: Window | None = None) -> bytes:
        with trio.fail_after(20):
            return bytes(await self.stream.read(window or Window(), offset, size))


async def started(
    root: Path, nursery: trio.Nursery, sources: Sources, *, keep: bool = True, size: int = SIZE
) -> Reader:
    lane = Lane(str(root), deadline=10)
    identity = Identity(size, MTIME_NS)
    kept = await PartialFile.open(lane, root, "f", identity) if keep else None
    there = Arrivals("f", lane, nursery, Memory())
    if kept is not None:
        there.keep(kept)
    made = Stream(
        "f",
        identity,
        there,
        carrier=sources,
        sources=lambda: sources.ranked,
        sharing=lambda: sources.sharing,
        failed=lambda source, _: sources.failed.append(source),
        is_open=lambda: sources.is_open,
        nursery=nursery,
    )
    return Reader(sources, made, root)


@pytest.fixture
def sources() -> Sources:
    return Sources()


@pytest.fixture
async def reader(tmp_path: Path, nursery: trio.Nursery, sources: Sources) -> AsyncIterator[Reader]:
    made = await started(tmp_path, nursery, sources)
    yield made
    made.stream.close()
    await wait_all_tasks_blocked()


async def test_a_small_read_brings_its_piece_and_no_more(reader: Reader) -> None:
    assert await reader.read(100_000, 10) == content(100_000, 100_010)
    assert reader.sources.spans() == [(PIECE, 2 * PIECE)]
    assert await reader.read(70_000, 50_000) == content(70_000, 120_000)
    assert len(reader.sources.asked) == 1


async def test_the_end_of_the_file(reader: Reader) -> None:
    assert await reader.read(SIZE - 5, 100) == content(SIZE - 5, SIZE)
    assert await reader.read(SIZE, 10) == b""
    assert await reader.read(SIZE + 10, 10) == b""


async def test_random_reads_are_right_and_never_asked_for_twice(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "FILE_MEMORY", SIZE)  # however slow the disk is
    source = random.Random(3)

    async def one(number: int) -> None:
        for _ in range(20):
            start = source.randrange(SIZE)
            size = source.choice([1, 4096, 100_000, 700_000])
            assert await reader.read(start, size) == content(start, min(SIZE, start + size))

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(one, number)
    spans = sorted(reader.sources.spans())
    assert all(one[1] <= other[0] for one, other in pairwise(spans))


async def test_a_sequential_reader_finds_the_bytes_ahead(reader: Reader) -> None:
    window, at = Window(), 0
    while at < SIZE:
        data = await reader.read(at, 128 << 10, window)
        assert data == content(at, at + len(data))
        at += len(data)
        await wait_all_tasks_blocked()
    assert len(reader.sources.asked) < SIZE / (128 << 10) / 4
    assert sum(end - start for start, end in reader.sources.spans()) == SIZE


async def test_readers_of_one_range_share_a_request(reader: Reader) -> None:
    reader.sources.hold = trio.Event()
    found: list[bytes] = []

    async def one(offset: int) -> None:
        found.append(await reader.read(offset, 100))

    async with trio.open_nursery() as nursery:
        for offset in range(0, 1000, 100):
            nursery.start_soon(one, offset)
        await wait_all_tasks_blocked()
        assert len(reader.sources.asked) == 1
        reader.sources.hold.set()
    assert sorted(found) == sorted(content(at, at + 100) for at in range(0, 1000, 100))


async def test_readers_that_queue_go_out_together(
    tmp_path: Path, nursery: trio.Nursery, sources: Sources
) -> None:
    sources.gate = Gate(1)
    sources.hold = trio.Event()
    reader = await started(tmp_path, nursery, sources)
    async with trio.open_nursery() as readers:
        for number in range(12):
            readers.start_soon(reader.read, number * 3 * PIECE, 10)
            if number == 0:
                await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        assert len(sources.asked) == 1
        sources.hold.set()
    assert [len(spans) for _, spans in sources.asked] == [1, 11]
    reader.stream.close()


async def test_a_reader_that_leaves_takes_its_request_along(reader: Reader) -> None:
    reader.sources.hold = trio.Event()
    with trio.move_on_after(0.05):
        await reader.read(0, 10)
    await wait_all_tasks_blocked()
    assert reader.sources.cancelled == 1
    assert reader.sources.gate.taken == 0
    reader.sources.hold.set()
    assert await reader.read(0, 10) == content(0, 10)


async def test_a_request_stays_while_anybody_waits(reader: Reader) -> None:
    reader.sources.hold = trio.Event()
    found: list[bytes] = []

    async def patient() -> None:
        found.append(await reader.read(5, 10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(patient)
        with trio.move_on_after(0.05):
            await reader.read(0, 10)
        await wait_all_tasks_blocked()
        assert reader.sources.cancelled == 0
        reader.sources.hold.set()
    assert found == [content(5, 15)]
    assert len(reader.sources.asked) == 1


async def test_a_leader_that_leaves_does_not_strand_those_who_follow(
    tmp_path: Path, nursery: trio.Nursery, sources: Sources
) -> None:
    sources.gate = Gate(1)
    sources.hold = trio.Event()
    reader = await started(tmp_path, nursery, sources)
    scopes = [trio.CancelScope() for _ in range(4)]
    found: dict[int, bytes] = {}

    async def one(number: int) -> None:
        with scopes[number]:
            found[number] = await reader.read(number * 4 * PIECE, 10)

    async with trio.open_nursery() as readers:
        for number in range(4):
            readers.start_soon(one, number)
            await wait_all_tasks_blocked()
        scopes[0].cancel()  # its place goes to the second, which takes the others along
        await wait_all_tasks_blocked()
        scopes[1].cancel()
        await wait_all_tasks_blocked()
        sources.hold.set()
    assert found == {
        number: content(number * 4 * PIECE, number * 4 * PIECE + 10) for number in (2, 3)
    }
    reader.stream.close()


async def test_the_next_source_goes_on_where_one_stopped(reader: Reader) -> None:
    sources = reader.sources
    sources.ranked = [ONE, TWO]
    sources.stop_after[ONE] = 2
    assert await reader.read(0, 4 * BULK) == content(0, 4 * BULK)
    (first, whole), (second, rest) = sources.asked[:2]
    assert (first, second) == (ONE, TWO)
    assert whole == [(0, 4 * BULK)]
    assert rest[0][0] == 600_000
    assert sources.failed == [ONE]


async def test_all_sources_dead_says_why_and_one_that_comes_back_is_used(reader: Reader) -> None:
    sources = reader.sources
    sources.ranked = [ONE, TWO]
    sources.failures = {ONE: TimedOut("no answer", ONE.url), TWO: SourceFailed("bad", TWO.url)}
    with pytest.raises(NoSource) as found:
        await reader.read(0, 10)
    assert [type(cause) for cause in found.value.causes] == [TimedOut, SourceFailed]
    del sources.failures[TWO]
    assert await reader.read(0, 10) == content(0, 10)
    assert reader.stream.source == TWO


async def test_a_changed_source_is_left_for_one_that_is_not(reader: Reader) -> None:
    sources = reader.sources
    sources.ranked = [ONE, TWO]
    await reader.read(0, 10)
    sources.versions[ONE] = Version(SIZE, MTIME_NS + 1, '"new"')
    assert await reader.read(PIECE, 10) == content(PIECE, PIECE + 10)
    assert sources.asked[-1][0] == TWO


async def test_changed_everywhere_is_stale_for_good(reader: Reader) -> None:
    sources = reader.sources
    await reader.read(0, 10)
    sources.versions[ONE] = Version(SIZE, MTIME_NS + 1, '"new"')
    with pytest.raises(Stale):
        await reader.read(PIECE, 10)
    sources.versions.clear()
    with pytest.raises(Stale):
        await reader.read(0, 10)


async def test_a_fill_brings_the_rest_and_never_delays_a_reader(reader: Reader) -> None:
    await reader.read(5 * PIECE, 10)
    reader.sources.hold = trio.Event()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.stream.fill)
            await wait_all_tasks_blocked()
            assert reader.sources.gate.taken == 3  # one place is kept for readers
            hold, reader.sources.hold = reader.sources.hold, None
            assert await reader.read(SIZE - 100, 100) == content(SIZE - 100, SIZE)
            hold.set()
    kept = reader.stream.arrivals.kept
    assert kept is not None
    assert kept.is_whole
    await kept.finish(reader.root / "whole")
    assert (reader.root / "whole").read_bytes() == content(0, SIZE)
    assert sum(end - start for start, end in reader.sources.spans()) == SIZE


async def test_ahead_of_a_reader_that_pauses_memory_is_filled_once(
    tmp_path: Path, nursery: trio.Nursery, sources: Sources
) -> None:
    """The disk fails while a long window is under way, and nobody reads on."""
    reader, window, at = await started(tmp_path, nursery, sources, size=128 << 20), Window(), 0
    with trio.fail_after(60):
        while reader.stream.arrivals.kept is not None:
            await reader.read(at, 1 << 20, window)
            at += 1 << 20
            if at == 36 << 20:
                sources.disk_error = DiskFull("no room", "cache")
                sources.asked.clear()
            await wait_all_tasks_blocked()
    assert sum(end - start for start, end in sources.spans()) < 64 << 20
    reader.stream.close()


@pytest.mark.parametrize(
    ("is_open", "least", "past"),
    [(False, SIZE, True), (True, SIZE, False), (False, SIZE + 1, False)],
)
async def test_what_nobody_reads_soon_goes_past_the_page_cache(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, is_open: bool, least: int, past: bool
) -> None:
    monkeypatch.setattr(stream_module, "PAST_CACHE", least)
    reader.sources.is_open = is_open
    await reader.stream.fill()
    assert (reader.sources.past_cache > 0) is past
    window = Window()
    assert await reader.read(0, 4 << 20, window) == content(0, 4 << 20)


async def test_what_a_reader_comes_to_in_sequence_stays_in_the_page_cache(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "PAST_CACHE", 1)
    window = Window()
    for at in range(0, 8 << 20, 1 << 20):
        await reader.read(at, 1 << 20, window)
    assert reader.sources.past_cache == 0


async def test_sources_that_are_alike_share_a_fill(reader: Reader) -> None:
    sources = reader.sources
    sources.ranked = [ONE, TWO, THREE]
    sources.sharing = {ONE, THREE}
    await reader.read(0, 10)
    await reader.stream.fill()
    by = [source for source, _ in sources.asked]
    assert by[0] is ONE, "readers take the best"
    assert set(by) == {ONE, THREE}
    assert sum(end - start for start, end in sources.spans()) == SIZE


async def test_a_fill_goes_past_one_that_fails(reader: Reader) -> None:
    sources = reader.sources
    sources.ranked = [ONE, TWO]
    sources.sharing = {ONE, TWO}
    sources.failures[TWO] = SourceFailed("bad", TWO.url)
    await reader.stream.fill()
    assert reader.stream.arrivals.is_whole


async def test_a_source_that_is_back_soon_is_waited_for(reader: Reader) -> None:
    reader.sources.failures[ONE] = Unreachable("cannot connect", ONE.url)
    reader.sources.returns = [lambda: None, reader.sources.failures.clear]
    assert await reader.read(5 << 20, 4096) == content(5 << 20, (5 << 20) + 4096)
    assert len(reader.sources.asked) == 3


async def test_a_fill_without_sources_ends_with_the_reason(reader: Reader) -> None:
    reader.sources.failures[ONE] = SourceFailed("bad", ONE.url)
    with pytest.raises(NoSource, match="bad"):
        await reader.stream.fill()
    reader.sources.failures.clear()
    await reader.stream.fill()
    assert reader.stream.arrivals.is_whole


async def test_a_fill_that_nobody_wants_any_more_stops(reader: Reader) -> None:
    reader.sources.gate = Gate(2, reserved=1)
    reader.sources.hold = trio.Event()
    with trio.move_on_after(0.05):
        await reader.stream.fill()
    reader.sources.hold.set()
    await wait_all_tasks_blocked()
    assert len(reader.sources.asked) == 1
    assert not reader.stream.arrivals.is_whole


async def test_a_fill_goes_on_for_another_that_wants_it(reader: Reader) -> None:
    reader.sources.hold = trio.Event()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.stream.fill)
            with trio.move_on_after(0.05):
                await reader.stream.fill()
            reader.sources.hold.set()
    assert sum(end - start for start, end in reader.sources.spans()) == SIZE


async def test_a_fill_brings_what_its_readers_gave_up(reader: Reader) -> None:
    reader.sources.hold = trio.Event()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.05):
                async with trio.open_nursery() as readers:
                    readers.start_soon(reader.read, 0, 10)
                    await wait_all_tasks_blocked()
                    nursery.start_soon(reader.stream.fill)
                    await trio.sleep_forever()
            reader.sources.hold.set()
    assert reader.stream.arrivals.is_whole


async def test_a_fill_without_a_place_to_keep_it_says_so(
    tmp_path: Path, nursery: trio.Nursery, sources: Sources
) -> None:
    reader = await started(tmp_path, nursery, sources, keep=False)
    with pytest.raises(DiskError, match="no place"):
        await reader.stream.fill()


async def test_a_disk_that_fails_in_a_transfer_is_not_the_sources_fault(reader: Reader) -> None:
    kept = reader.stream.arrivals.kept
    assert kept is not None
    reader.sources.disk_error = DiskFull("no room", kept.path)
    assert await reader.read(0, 2 * BULK) == content(0, 2 * BULK)
    assert reader.sources.failed == []
    assert reader.stream.arrivals.kept is None


async def test_without_a_cache_it_is_read_from_memory(
    tmp_path: Path, nursery: trio.Nursery, sources: Sources
) -> None:
    reader = await started(tmp_path, nursery, sources, keep=False)
    for at in range(0, SIZE, 1 << 20):
        assert await reader.read(at, 1 << 20) == content(at, at + (1 << 20))
    assert reader.stream.arrivals._fresh_bytes <= 17 << 20
    assert await reader.read(0, 10) == content(0, 10)
    reader.stream.close()


async def test_a_full_disk_does_not_end_the_reading(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    await reader.read(0, 10)
    await wait_all_tasks_blocked()

    async def full(self: PartialFile, pieces: object) -> None:
        raise DiskFull("no room", self.path)

    monkeypatch.setattr(PartialFile, "write", full)
    monkeypatch.setattr(arrivals, "WRITE_FROM", 1)
    for at in range(PIECE, 20 * PIECE, 5 * PIECE):
        assert await reader.read(at, 10) == content(at, at + 10)
    await until(lambda: reader.stream.arrivals.kept is None)
    assert await reader.read(0, 10) == content(0, 10)  # asked for again


async def test_an_unexpected_failure_reaches_the_reader_and_not_the_node(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(stream_module.Stream, "_gather", broken)
    with pytest.raises(NoSource):
        await reader.read(0, 10)
    assert "unexpectedly" in caplog.text
