"""Kills a node again and again while it reads a remote file, and checks what each life leaves.

Run as ``python -m tests.stream_crasher ROOT FIRST COUNT`` over what `test_stream_crashes` made: a
node's repo, its mount point, the file's bytes, and a peer that has a sector for each seed. In a
life a forked child is the node, killed as by ``kill -9`` before, after, or in the middle of the
N-th call that changes something below the cache path; this process reads in its mount until then.
After each life every marked piece, and a copy that has its name, must be what the peer has. The
last life is not cut short: in it the copy becomes whole.

Half of the seeds cut the power instead: of what was written and not synced, a part is gone.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

# Before pyfuse3, which comes with the node.
import sectorfs.fuse.kernel  # noqa: F401
from sectorfs.fuse import mounts
from sectorfs.node.repo import Repo
from sectorfs.node.running import run_node
from sectorfs.stores import arrivals, streams
from sectorfs.stores.blocks import DATA_SUFFIX, MAP_SUFFIX, Identity, PartialFile
from sectorfs.stores.intervals import Intervals
from sectorfs.stores.lanes import Lane
from tests.cluster import until

log = logging.getLogger(__name__)

LIVES = 3
"""That a seed has before the last one."""
CALLS = 30
"""A life ends at one of so many calls."""
BLOCK = 4096
CHANGING = ("pwrite", "fdatasync", "fsync", "ftruncate", "rename", "unlink")
JOURNAL = "journal"


def name_of(seed: int) -> str:
    """The sector file of a seed."""
    return f"sealed/s-t01000-{seed}"


class Killer:
    """Counts the calls that change the cache path, and kills this process at one of them."""

    def __init__(self, cache: Path, at: int, how: str, journal: Path) -> None:
        self._cache = str(cache)
        self._at = at
        self._how = how
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self._count = 0
        self._lock = threading.Lock()

    def install(self) -> None:
        """From now on."""
        for name in CHANGING:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(thing: int | str | Path, *rest: Any, **more: Any) -> Any:
            path = self._path(thing)
            if not path.startswith(self._cache):
                return original(thing, *rest, **more)
            with self._lock:
                self._count += 1
                number = self._count
            if number == self._at and self._how == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if number == self._at and self._how == "within" and name == "pwrite":
                rest = (memoryview(rest[0])[: len(rest[0]) // 2], *rest[1:])
            noted = path.endswith(DATA_SUFFIX) and name in ("pwrite", "fdatasync", "fsync")
            if noted:
                place = [rest[1], len(rest[0])] if name == "pwrite" else []
                self._note(number, "begun", *place)
            result = original(thing, *rest, **more)
            if number == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
            if noted:
                self._note(number, "done")
            return result

        return call

    def _note(self, *words: object) -> None:
        os.write(self._journal, f"{' '.join(map(str, words))}\n".encode())

    def _path(self, thing: int | str | Path) -> str:
        if not isinstance(thing, int):
            return os.fspath(thing)
        try:
            return os.readlink(f"/proc/self/fd/{thing}")
        except OSError:
            return ""


def unsynced(journal: Path) -> list[tuple[int, int]]:
    """What a life wrote to a data file, and no later sync made durable, by its journal."""
    writes: dict[int, tuple[int, int]] = {}
    done: set[int] = set()
    syncs: dict[int, set[int]] = {}
    kept = Intervals()
    for line in journal.read_text().splitlines():
        number, word, *place = line.split()
        call = int(number)
        if place:
            offset, length = map(int, place)
            writes[call] = (offset, offset + length)
        elif word == "begun":
            syncs[call] = set(done)
        elif call in writes:
            done.add(call)
        else:
            for one in syncs[call]:
                kept.add(*writes[one])
    return [gap for start, end in writes.values() for gap in kept.missing(start, end)]


class Crash:
    """One seed."""

    def __init__(self, root: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.root = root
        self.repo = Repo(root / "reader")
        self.mountpoint = root / "reader-sectors"
        self.cache = self.repo.cache_path(self.repo.config())
        self.data = (root / "data").read_bytes()
        self.name = name_of(seed)
        self.shown = self.mountpoint / self.name
        self.copy = self.cache / self.name
        self.part = self.cache / "sealed" / "fetching" / f"{Path(self.name).name}{DATA_SUFFIX}"
        self.power = seed % 2 == 1
        self.durable = (0, Intervals())
        """The data file's inode, and what of it was marked when the last life began."""

    def run(self) -> None:
        """All lives."""
        for _ in range(LIVES):
            self.life(self.draw.randint(1, CALLS), self.draw.choice(("before", "within", "after")))
            if self.power:
                self.cut_power()
            self.check()
        self.life(0, "never")
        self.check()

    def life(self, at: int, how: str) -> None:
        """A node until its call number `at`, or until the copy is whole; and a reader of it."""
        log.info("%s: killed %s call %d", self.name, how, at)
        child = self.fork(Killer(self.cache, at, how, self.root / JOURNAL))
        try:
            self.read(child)
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            self.clear_mount()
        if not at:
            assert self.copy.exists(), "the last life made no copy"

    def fork(self, killer: Killer) -> int:
        """The node's process."""
        child = os.fork()
        if child:
            return child
        try:
            arrivals.SYNC_EVERY = 1 << 18
            streams.LINGER = 0.05
            streams.KEEP_FROM = 1
            killer.install()
            trio.run(run_node, self.repo, self.repo.config(), self.mountpoint)
        except BaseException:
            traceback.print_exc()
        os._exit(1)

    def read(self, child: int) -> None:
        """Read here and there, then everything, until the node is gone or the copy is there."""

        def over(condition: Callable[[], object]) -> bool:
            return (
                bool(condition())
                or os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            )

        until("a mount", lambda: over(lambda: mounts.find_mount(self.mountpoint)))
        try:
            until("the name", lambda: over(self.shown.exists))
            with self.shown.open("rb", buffering=0) as file:
                for _ in range(self.draw.randint(0, 8)):
                    self.expect(file.fileno(), self.draw.randrange(len(self.data)), BLOCK)
                for offset in range(0, len(self.data), 1 << 18):
                    self.expect(file.fileno(), offset, 1 << 18)
        except OSError:
            until("the end of the node", lambda: over(lambda: False))
            return
        until("the copy", lambda: over(self.copy.exists))

    def expect(self, fd: int, offset: int, size: int) -> None:
        """What is read is right."""
        data = os.pread(fd, size, offset)
        assert data == self.data[offset : offset + size], f"wrong bytes at {offset} of {self.name}"

    def clear_mount(self) -> None:
        """The node's mount, which outlives it."""
        while (mount := mounts.find_mount(self.mountpoint)) is not None:
            mounts.abort(mount.minor)
            mounts.detach(self.mountpoint)

    def cut_power(self) -> None:
        """Lose a part of what was not synced when the node ended."""
        path = self.part if self.part.exists() else self.copy
        if not path.exists():
            return
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        inode, durable = self.durable
        if path.stat().st_ino != inode:
            durable = Intervals()
        with path.open("r+b") as file:
            for start, end in unsynced(self.root / JOURNAL):
                # What was durable may be written again: with the same bytes, which stay.
                for low, high in durable.missing(start, end):
                    if self.draw.random() < 0.5:
                        file.seek(low)
                        file.write(bytes(high - low))
        os.utime(path, ns=times)

    def check(self) -> None:
        """No marked piece lies, and a copy that has its name is whole."""
        if self.copy.exists():
            assert self.copy.read_bytes() == self.data, f"half a copy of {self.name}"
        if not self.part.exists():
            self.durable = (0, Intervals())
            return
        aside = self.root / "aside"
        shutil.rmtree(aside, ignore_errors=True)
        marked = true_marks(self.part, aside, self.root / "data")
        print(marked.total, flush=True)
        self.durable = (self.part.stat().st_ino, marked)


def true_marks(part: Path, aside: Path, source: Path) -> Intervals:
    """What a partial file says it has to whoever opens it; all of it must be what the source has.

    It is opened as a copy: opening may change it.
    """
    aside.mkdir()
    for path in (part, part.with_suffix(MAP_SUFFIX)):
        if path.exists():
            shutil.copy2(path, aside)  # with its attributes
    status = source.stat()
    with source.open("rb") as file:
        return trio.run(_true_marks, aside, part.stem, status, file.fileno())


async def _true_marks(folder: Path, name: str, status: os.stat_result, source: int) -> Intervals:
    lane = Lane(str(folder), deadline=30)
    identity = Identity(status.st_size, status.st_mtime_ns)
    kept = await PartialFile.open(lane, folder, name, identity)
    for start, end in kept.present:
        with kept.descriptor as fd:
            found = os.pread(fd, end - start, start)
        wanted = os.pread(source, end - start, start)
        assert found == wanted, f"{name}: {start} to {end} is marked and wrong"
    kept.close()
    return kept.present


def main(root: Path, first: int, count: int) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    for seed in range(first, first + count):
        started = time.monotonic()
        try:
            Crash(root, seed).run()
        except BaseException:
            print(f"seed {seed}", file=sys.stderr)
            raise
        print(f"seed {seed}: {time.monotonic() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
