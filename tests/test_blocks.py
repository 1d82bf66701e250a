"""Partial files: whatever is killed, cut off or mixed up, a mark never lies."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import xattr
from hypothesis import given, settings
from hypothesis import strategies as st

from sectorfs.errors import DiskError, SectorFSError, SourceFailed, StorageUnavailable
from sectorfs.stores import blocks
from sectorfs.stores.blocks import HEADER, IDENTITY, PIECE, Identity, PartialFile
from sectorfs.stores.intervals import Intervals
from sectorfs.stores.lanes import Lane
from tests.wire_fixtures import open_fds, wait_until

MTIME_NS = 1_600_000_000_123_456_789
SIZE = 20 * PIECE + 777
WANTED = Identity(SIZE, MTIME_NS, etag='"a"')


async def all_closed(root: Path) -> None:
    """Until nothing below a directory is open: lanes close in threads of their own."""
    await wait_until(lambda: not any(str(root) in name for name in open_fds()))


def content(start: int, end: int) -> bytes:
    """The bytes of every source here: any 32 of them tell where they stand."""
    first = start // 32
    made = b"".join(
        hashlib.sha256(number.to_bytes(8, "little")).digest()
        for number in range(first, end // 32 + 1)
    )
    return made[start - first * 32 :][: end - start]


def lane(root: Path) -> Lane:
    return Lane(str(root), deadline=10)


async def opened(root: Path, identity: Identity = WANTED, name: str = "f") -> PartialFile:
    return await PartialFile.open(lane(root), root, name, identity)


async def bring(file: PartialFile, *spans: tuple[int, int]) -> None:
    await file.write([(start, content(start, end)) for start, end in spans])


def spans(file: PartialFile) -> list[tuple[int, int]]:
    return list(file.present)


async def test_what_was_synced_is_there_again(tmp_path: Path) -> None:
    file = await opened(tmp_path)
    assert spans(file) == []
    await bring(file, (0, PIECE), (5 * PIECE, 7 * PIECE), (20 * PIECE, SIZE))
    assert file.unsynced == 3 * PIECE + 777
    await file.sync()
    assert file.unsynced == 0
    await bring(file, (9 * PIECE, 10 * PIECE))
    file.close()
    again = await opened(tmp_path)
    assert spans(again) == [(0, PIECE), (5 * PIECE, 7 * PIECE), (20 * PIECE, SIZE)]
    assert again.resumed == 3 * PIECE + 777
    with again.descriptor as fd:
        assert os.pread(fd, 2 * PIECE, 5 * PIECE) == content(5 * PIECE, 7 * PIECE)
    again.close()


async def test_parts_of_pieces_are_present_and_not_marked(tmp_path: Path) -> None:
    file = await opened(tmp_path)
    await bring(file, (100, PIECE), (PIECE, 2 * PIECE + 5), (SIZE - 800, SIZE - 1))
    assert file.present.covers(100, 2 * PIECE + 5)
    await file.sync()
    file.close()
    again = await opened(tmp_path)
    assert spans(again) == [(PIECE, 2 * PIECE)]
    await bring(again, (0, 100))
    await again.sync()
    again.close()
    # The rest of the first piece was not durable: its first hundred bytes do not make it whole.
    third = await opened(tmp_path)
    assert spans(third) == [(PIECE, 2 * PIECE)]
    third.close()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40 * PIECE),
    steps=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 40), st.integers(0, 9)), st.sampled_from(["sync", "again"])
        ),
        max_size=14,
    ),
)
def test_a_resumed_file_has_only_what_came(
    tmp_path_factory: pytest.TempPathFactory, size: int, steps: list[tuple[int, int] | str]
) -> None:
    root = tmp_path_factory.mktemp("cache")
    identity = Identity(size, MTIME_NS)

    async def run() -> None:
        file = await opened(root, identity)
        durable = Intervals()
        for step in steps:
            if step == "sync":
                await file.sync()
                durable = file.present.copy()
            elif step == "again":
                file.close()
                file = await opened(root, identity)
                pieces = Intervals(
                    (low, high)
                    for low in range(0, size, PIECE)
                    for high in [min(size, low + PIECE)]
                    if durable.covers(low, high)
                )
                assert spans(file) == list(pieces)
                durable = pieces
            else:
                assert isinstance(step, tuple)
                low, count = step
                start = min(size, low * PIECE)
                end = min(size, start + count * PIECE)
                await bring(file, (start, end))
        for low, high in file.present:
            with file.descriptor as fd:
                assert os.pread(fd, high - low, low) == content(low, high)
        file.close()

    trio.run(run)


async def test_a_whole_file_gets_its_name_and_time(tmp_path: Path) -> None:
    file = await opened(tmp_path)
    await bring(file, (0, SIZE - 1))
    target = tmp_path / "whole"
    with pytest.raises(SourceFailed, match="bytes"):
        await file.finish(target)
    await bring(file, (SIZE - 1, SIZE))
    assert file.is_whole
    await file.finish(target)
    file.close()
    assert target.read_bytes() == content(0, SIZE)
    assert target.stat().st_mtime_ns == MTIME_NS
    assert IDENTITY not in xattr.xattr(str(target))
    assert sorted(os.listdir(tmp_path)) == ["whole"]


async def test_an_empty_file_is_whole_at_once(tmp_path: Path) -> None:
    file = await opened(tmp_path, Identity(0, 5))
    assert file.is_whole
    await file.sync()
    await file.finish(tmp_path / "whole")
    file.close()
    assert (tmp_path / "whole").read_bytes() == b""


async def test_a_replaced_name_is_not_committed(tmp_path: Path) -> None:
    file = await opened(tmp_path)
    await bring(file, (0, SIZE))
    file.path.unlink()
    file.path.write_bytes(b"of somebody else")
    with pytest.raises(DiskError, match="replaced"):
        await file.finish(tmp_path / "whole")
    file.close()
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    "other",
    [
        Identity(SIZE + 1, MTIME_NS, '"a"'),
        Identity(SIZE, MTIME_NS + 1, '"a"'),
        Identity(SIZE, MTIME_NS, '"b"'),
    ],
)
async def test_another_content_begins_anew(tmp_path: Path, other: Identity) -> None:
    file = await opened(tmp_path)
    await bring(file, (0, PIECE))
    await file.sync()
    file.close()
    fresh = await opened(tmp_path, other)
    assert spans(fresh) == []
    fresh.close()
    assert blocks.identity_of(fresh.path) == other


def test_what_one_side_does_not_know_is_no_difference() -> None:
    plain = Identity(1, 2)
    assert blocks.same(plain, Identity(1, 2, "e", "d"))
    assert blocks.same(Identity(1, 2, "e", "d"), Identity(1, 2, "e", "d"))
    assert not blocks.same(Identity(1, 2, "e", "d"), Identity(1, 2, "e", "x"))


def _map(root: Path) -> Path:
    return root / "f.map"


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


SPOILERS: dict[str, Callable[[Path], object]] = {
    "no map": lambda root: _map(root).unlink(),
    "empty map": lambda root: _map(root).write_bytes(b""),
    "short header": lambda root: os.truncate(_map(root), 20),
    "magic": lambda root: _flip(_map(root), 0),
    "version": lambda root: _flip(_map(root), 8),
    "size": lambda root: _flip(_map(root), 12),
    "piece": lambda root: _flip(_map(root), 20),
    "generation": lambda root: _flip(_map(root), 24),
    "no attribute": lambda root: xattr.xattr(str(root / "f.part")).remove(IDENTITY),
    "attribute": lambda root: xattr.xattr(str(root / "f.part")).set(IDENTITY, b"{}"),
    "odd attribute": lambda root: xattr.xattr(str(root / "f.part")).set(IDENTITY, b"\xff\0"),
    "odd generation": lambda root: xattr.xattr(str(root / "f.part")).set(
        IDENTITY,
        b'{"identity":{"size":%d,"mtime_ns":%d},"generation":"rubbish"}' % (SIZE, MTIME_NS),
    ),
    "short data": lambda root: os.truncate(root / "f.part", SIZE - 1),
    "long data": lambda root: os.truncate(root / "f.part", SIZE + 1),
    "map is a directory": lambda root: os.rename(root / "aside", _map(root)),
}


@pytest.mark.parametrize("what", SPOILERS)
async def test_spoilt_leftovers_are_not_believed(tmp_path: Path, what: str) -> None:
    file = await opened(tmp_path)
    await bring(file, (0, SIZE))
    await file.sync()
    file.close()
    if what == "map is a directory":
        (tmp_path / "aside").mkdir()
        _map(tmp_path).unlink()
    SPOILERS[what](tmp_path)
    if what == "map is a directory":
        with pytest.raises(SectorFSError):
            await opened(tmp_path)
        await all_closed(tmp_path)
        return
    again = await opened(tmp_path)
    assert spans(again) == []
    await bring(again, (0, PIECE))
    await again.sync()
    again.close()
    third = await opened(tmp_path)
    assert spans(third) == [(0, PIECE)]
    third.close()
    await all_closed(tmp_path)


async def test_a_map_that_outlived_its_data_is_not_believed(tmp_path: Path) -> None:
    file = await opened(tmp_path)
    await bring(file, (0, SIZE))
    await file.sync()
    file.close()
    old = _map(tmp_path).read_bytes()
    fresh = await opened(tmp_path, Identity(SIZE, MTIME_NS, '"b"'))
    fresh.close()
    _map(tmp_path).write_bytes(old)  # as if its removal had not reached the disk
    again = await opened(tmp_path, Identity(SIZE, MTIME_NS, '"b"'))
    assert spans(again) == []
    again.close()


async def test_marks_beyond_the_end_mean_nothing(tmp_path: Path) -> None:
    file = await opened(tmp_path)
    await bring(file, (20 * PIECE, SIZE))
    await file.sync()
    file.close()
    with _map(tmp_path).open("r+b") as marks:
        marks.seek(HEADER + 2)
        marks.write(b"\xff\xff\xff")
    again = await opened(tmp_path)
    assert spans(again) == [(16 * PIECE, SIZE)]
    again.close()


async def test_without_extended_attributes_it_works_but_does_not_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no attributes here")

    monkeypatch.setattr(xattr.xattr, "set", refuse)
    file = await opened(tmp_path)
    await bring(file, (0, PIECE))
    await file.sync()
    file.close()
    again = await opened(tmp_path)
    assert spans(again) == []
    await bring(again, (0, SIZE))
    await again.finish(tmp_path / "whole")
    again.close()
    assert (tmp_path / "whole").read_bytes() == content(0, SIZE)


async def test_after_a_failed_sync_nothing_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await opened(tmp_path)
    await bring(file, (0, PIECE))
    real = os.fdatasync

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(DiskError):
        await file.sync()
    monkeypatch.setattr(os, "fdatasync", real)  # the kernel tells once
    with pytest.raises(DiskError, match="earlier"):
        await file.sync()
    await bring(file, (PIECE, SIZE))
    with pytest.raises(DiskError, match="earlier"):
        await file.finish(tmp_path / "whole")
    file.close()
    again = await opened(tmp_path)
    assert spans(again) == []
    again.close()


async def test_syncs_wait_for_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = await opened(tmp_path)
    await bring(file, (0, PIECE))
    real, gate, began = os.fdatasync, trio.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()
    running = 0
    most = 0

    def slow(fd: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        trio.from_thread.run_sync(began.set, trio_token=token)
        trio.from_thread.run(gate.wait, trio_token=token)
        running -= 1
        real(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.sync)
            await began.wait()
            await bring(file, (PIECE, 2 * PIECE))
            nursery.start_soon(file.sync)
            await trio.testing.wait_all_tasks_blocked(0.01)
            gate.set()
    assert most == 1
    assert file.unsynced == 0
    file.close()
    again = await opened(tmp_path)
    assert spans(again) == [(0, 2 * PIECE)]
    again.close()


async def test_a_cancelled_open_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, began = trio.Event(), trio.Event()
    real = os.ftruncate
    token = trio.lowlevel.current_trio_token()

    def slow(fd: int, size: int) -> None:
        trio.from_thread.run_sync(began.set, trio_token=token)
        trio.from_thread.run(gate.wait, trio_token=token)
        real(fd, size)

    monkeypatch.setattr(os, "ftruncate", slow)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened, tmp_path)
            await began.wait()
            nursery.cancel_scope.cancel()
        gate.set()
        await all_closed(tmp_path)


async def test_a_hung_disk_costs_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_lane = Lane(str(tmp_path), deadline=0.1)
    file = await PartialFile.open(slow_lane, tmp_path, "f", WANTED)
    gate = trio.Event()
    real = os.pwrite
    token = trio.lowlevel.current_trio_token()

    def hang(fd: int, data: bytes, offset: int) -> int:
        trio.from_thread.run(gate.wait, trio_token=token)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", hang)
    with pytest.raises(StorageUnavailable):
        await bring(file, (0, PIECE))
    assert spans(file) == []
    gate.set()
    file.close()


_WRITER = """
import sys, trio
from pathlib import Path
from sectorfs.stores.blocks import PIECE, Identity, PartialFile
from sectorfs.stores.lanes import Lane
from tests.test_blocks import WANTED, bring

async def main(root):
    file = await PartialFile.open(Lane(str(root), deadline=30), root, "f", WANTED)
    sys.stdout.write("begun\\n"); sys.stdout.flush()
    while True:
        for number in range(20):
            await bring(file, (number * PIECE, (number + 1) * PIECE))
            await file.sync()
            sys.stdout.write(f"{number}\\n"); sys.stdout.flush()

trio.run(main, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("until", [0, 3, 11])
async def test_a_killed_writer_leaves_true_marks(tmp_path: Path, until: int) -> None:
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else runs in this test
        [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if line.strip() == str(until):
                break
        writer.send_signal(signal.SIGKILL)
    file = await opened(tmp_path)
    assert file.present.covers(0, (until + 1) * PIECE)
    for low, high in file.present:
        with file.descriptor as fd:
            assert os.pread(fd, high - low, low) == content(low, high)
    file.close()


async def test_giving_up_deletes_both_files(tmp_path: Path) -> None:
    file = await opened(tmp_path)
    await bring(file, (0, PIECE))
    await file.remove()
    assert os.listdir(tmp_path) == []
    assert blocks.identity_of(file.path) is None
