"""Works on files of this node: through sectorfs, through other file systems, on the disk itself.

"First time" means that the file lies in the page cache of the disk's file system while the mount
has nothing of it cached; so file systems are compared, and not a disk with itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests.bench.processes import said, seconds
from tests.bench.runner import Side, Work
from tests.bench.stage import (
    BIG,
    BIG_FILE,
    LISTED,
    LISTED_DIR,
    OPENED,
    OPENED_DIR,
    PROOF,
    PROOF_DIR,
    Stage,
)

MB = 1e6
LOAD_SECONDS = "0.5"


def read_first(view: str, stage: Stage) -> float:
    """Read the big file through a mount that has nothing of it cached."""
    path = stage.view(view) / BIG_FILE
    _forget_pages(stage, view)
    return BIG / MB / seconds("dd", f"if={path}", "of=/dev/null", "bs=1M")


def read_again(view: str, stage: Stage) -> float:
    """Read the big file as before; the pair that warms up was the first time."""
    path = stage.view(view) / BIG_FILE
    return BIG / MB / seconds("dd", f"if={path}", "of=/dev/null", "bs=1M")


def random_reads(threads: int, view: str, stage: Stage) -> float:
    """Blocks read per second at random places of the big file, by so many threads."""
    _forget_pages(stage, view)
    return _load(stage, "pread", threads, [stage.view(view) / BIG_FILE])


def faults(view: str, stage: Stage) -> float:
    """Page faults per second at random places of the big file, mapped shared."""
    _forget_pages(stage, view)
    return _load(stage, "fault", 1, [stage.view(view) / BIG_FILE])


def proof(view: str, stage: Stage) -> float:
    """Blocks read per second at random places of many open files, by 128 threads."""
    below = _sectors(stage.view("bare") / PROOF_DIR, PROOF)
    seconds("cat", *below)  # in the disk's page cache
    return _load(stage, "pread", 128, _sectors(stage.view(view) / PROOF_DIR, PROOF))


def opens(threads: int, view: str, stage: Stage) -> float:
    """Open, read a block and close, file after file, each not for the first time."""
    return _load(stage, "open", threads, _sectors(stage.view(view) / OPENED_DIR, OPENED))


def list_first(view: str, stage: Stage) -> float:
    """``ls -l`` while the kernel knows no name of the mount."""
    folder = stage.view(view) / LISTED_DIR
    _forget(folder)  # a listing that the kernel keeps is a page cache too
    Path("/proc/sys/vm/drop_caches").write_text("2")
    _long_listing(stage.view("bare") / LISTED_DIR)  # the disk's own names are known again
    return LISTED / _long_listing(folder)


def names_again(view: str, stage: Stage) -> float:
    """The names of a directory that was listed before."""
    return _load(stage, "list", 1, [stage.view(view) / LISTED_DIR])


def _load(stage: Stage, work: str, threads: int, paths: list[Path]) -> float:
    names = "".join(f"{path}\n" for path in paths)
    return float(said(stage.load, work, str(threads), LOAD_SECONDS, given=names))


def _sectors(folder: Path, count: int) -> list[Path]:
    return [folder / f"s-t01000-{number}" for number in range(count)]


def _long_listing(folder: Path) -> float:
    return seconds("env", "LC_ALL=C", "ls", "-l", folder)


def _forget_pages(stage: Stage, view: str) -> None:
    """Empty the mount's page cache of the big file, and have the disk's hold all of it."""
    if view != "bare":
        _forget(stage.view(view) / BIG_FILE)
    seconds("dd", f"if={stage.view('bare') / BIG_FILE}", "of=/dev/null", "bs=1M")


def _forget(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


# --- the table ---

NAMES = {
    "bare": "bare files",
    "mergerfs": "mergerfs",
    "mergerfs-files": "mergerfs (cache.files=auto-full)",
    "mergerfs-readdir": "mergerfs (cache.readdir)",
    "bindfs": "bindfs",
}
"""Views of the peers, and what they are called in the table."""


def _work(
    name: str,
    title: str,
    unit: str,
    call: Callable[[str, Stage], float],
    peers: Mapping[str, float | None],
    *,
    ours: str = "sectorfs",
) -> Work[Stage]:
    """A work, and what is promised beside each of its peers."""
    sides = tuple(Side(NAMES[view], partial(call, view), peers[view]) for view in peers)
    return Work(name, title, unit, Side(ours, partial(call, ours)), sides)


WORKS: tuple[Work[Stage], ...] = (
    _work(
        "read-first",
        "read a local 2 GiB file, first time",
        "MB/s",
        read_first,
        {"bare": 0.95, "mergerfs-files": None},
    ),
    _work(
        "read-first-daemon",
        "read a local 2 GiB file, first time, passthrough off",
        "MB/s",
        read_first,
        {"mergerfs-files": 1.0},
        ours="sectorfs-daemon",
    ),
    _work(
        "read-again",
        "read a local 2 GiB file, again",
        "MB/s",
        read_again,
        {"bare": None, "mergerfs-files": None},
    ),
    _work(
        "random-1",
        "random 4 KiB, 1 thread",
        "IOPS",
        partial(random_reads, 1),
        {"bare": 0.85, "mergerfs-files": None, "bindfs": None},
    ),
    _work(
        "random-16",
        "random 4 KiB, 16 threads",
        "IOPS",
        partial(random_reads, 16),
        {"bare": 0.85, "mergerfs-files": None},
    ),
    _work(
        "faults",
        "random page faults in a shared mapping",
        "faults/s",
        faults,
        {"bare": 0.85, "mergerfs-files": None},
    ),
    _work(
        "proof",
        "random 4 KiB over 2 000 open files, 128 threads",
        "IOPS",
        proof,
        {"bare": 0.8, "mergerfs-files": None},
    ),
    _work(
        "open-1",
        "open + 4 KiB + close over 5 000 files, again, 1 thread",
        "files/s",
        partial(opens, 1),
        {"bare": None, "mergerfs": 1.0, "bindfs": None},
    ),
    _work(
        "open-4",
        "open + 4 KiB + close over 5 000 files, again, 4 threads",
        "files/s",
        partial(opens, 4),
        {"bare": None, "mergerfs": 0.5},
    ),
    _work(
        "ls-first",
        "ls -l of 100 000 entries, first time",
        "entries/s",
        list_first,
        {"bare": None, "mergerfs": 8.0},
    ),
    _work(
        "names-again",
        "the names of 100 000 entries, again",
        "names/s",
        names_again,
        {"bare": None, "mergerfs-readdir": 0.8},
    ),
)
