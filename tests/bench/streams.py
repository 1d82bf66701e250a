"""Reading files of another node while they come, beside other remote file systems.

The files are sparse at their source, and nobody has opened them: each measurement takes new ones.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.bench.processes import said, seconds
from tests.bench.remote import MB, curl
from tests.bench.runner import Side, Work
from tests.bench.stage import COLD_DIR, LONG, Stage
from tests.cluster import SECTORFS, until

BLOCK = 4096
FIRST = 50
"""Files that are opened one after another."""
CROWD = 64
"""Files that are read at once."""
THREADS = "128"
LOAD_SECONDS = "2"

View = Callable[[Stage], Path]


def _sectorfs(stage: Stage) -> Path:
    return stage.fetcher.mountpoint


def _rclone(stage: Stage) -> Path:
    return stage.rclone[1]


def _sshfs(stage: Stage) -> Path:
    return stage.sshfs


def _cold(stage: Stage, view: View, count: int, **size: int) -> list[Path]:
    """New files through a file system that knows their names."""
    return _known(view(stage) / COLD_DIR, stage.cold(count, **size))


def _known(folder: Path, names: list[str]) -> list[Path]:
    until("its names to be known", lambda: set(names) <= set(os.listdir(folder)))
    return [folder / name for name in names]


def first_block(view: View, stage: Stage) -> float:
    """One by the median of the seconds from `open` to the first 4 KiB."""
    waits = []
    for path in _cold(stage, view, FIRST):
        start = time.perf_counter()
        fd = os.open(path, os.O_RDONLY)
        assert len(os.pread(fd, BLOCK, 0)) == BLOCK
        waits.append(time.perf_counter() - start)
        os.close(fd)
    return 1 / statistics.median(waits)


def sequential(view: View, stage: Stage) -> float:
    """Read 4 GiB from begin to end."""
    (path,) = _cold(stage, view, 1, size=LONG)
    try:
        return LONG / MB / seconds("dd", f"if={path}", "of=/dev/null", "bs=1M")
    finally:
        _make_room(stage, view, path.name)


def sequential_curl(stage: Stage) -> float:
    """curl from the same node into a file."""
    (name,) = stage.cold(1, LONG)
    target = stage.root / "fetched"
    try:
        return LONG / MB / curl(stage, f"{COLD_DIR}/{name}", target)
    finally:
        target.unlink(missing_ok=True)


def _make_room(stage: Stage, view: View, name: str) -> None:
    """Delete what a file system keeps of a file that was read: gigabytes each."""
    if view is _sectorfs:
        node = stage.fetcher
        root = node.repo.cache_path(node.repo.config()) / COLD_DIR
    elif view is _rclone:
        root = stage.root / "rclone-cache"
    else:
        return
    kept = [path for path in root.rglob(f"{name}*") if path.is_file()]
    holder = stage.rclone[0].pid if view is _rclone else stage.fetcher.pid()
    until("the file to be let go", lambda: not _has_open(holder, kept))
    for path in kept:
        path.unlink(missing_ok=True)


def _has_open(pid: int, paths: list[Path]) -> bool:
    names = {str(path) for path in paths}
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(os.readlink(entry))
        except FileNotFoundError:
            continue
    return bool(names & found)


def crowd(view: View, stage: Stage) -> float:
    """4 KiB at random places of 64 cold files, by 128 threads."""
    return _load(stage, "pread", _cold(stage, view, CROWD))


def read_here_and_there(stage: Stage, names: list[str]) -> float:
    """The same of these cold files."""
    return _load(stage, "pread", _known(stage.fetcher.mountpoint / COLD_DIR, names))


def crowd_wait(stage: Stage) -> float:
    """One by the seconds within which 99 of 100 such reads are done."""
    return _load(stage, "wait", _cold(stage, _sectorfs, CROWD))


def crowd_wait_beside_bulk(stage: Stage) -> float:
    """The same while a whole copy of another file is made."""
    paths = _cold(stage, _sectorfs, CROWD)
    with _fetching(stage):
        return _load(stage, "wait", paths)


def _load(stage: Stage, work: str, paths: list[Path]) -> float:
    names = "".join(f"{path}\n" for path in paths)
    return float(said(stage.load, work, THREADS, LOAD_SECONDS, given=names))


@contextmanager
def _fetching(stage: Stage) -> Iterator[None]:
    """A fetch under way while the block runs."""
    (name,) = stage.cold(1, LONG)
    node = stage.fetcher
    command = [
        *SECTORFS,
        "--repo",
        str(node.repo.root),
        "sector",
        "fetch",
        name,
        "--type",
        COLD_DIR,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    fetching = node.repo.cache_path(node.repo.config()) / COLD_DIR / "fetching"
    try:
        until("the fetch to begin", lambda: list(fetching.glob(f"{name}*")))
        yield
    finally:
        process.terminate()
        process.wait()
        _make_room(stage, _sectorfs, name)


WORKS: tuple[Work[Stage], ...] = (
    Work(
        "cold-first",
        "open + first 4 KiB of a cold remote 1 GiB file, median of 50",
        "1/s",
        Side("sectorfs", partial(first_block, _sectorfs)),
        (
            Side("rclone mount", partial(first_block, _rclone), 5.0),
            Side("sshfs", partial(first_block, _sshfs), 1 / 3),
        ),
    ),
    Work(
        "cold-read",
        "read a cold remote 4 GiB file from begin to end",
        "MB/s",
        Side("sectorfs", partial(sequential, _sectorfs)),
        (
            Side("rclone mount", partial(sequential, _rclone), 2.0),
            Side("curl -o", sequential_curl, 0.7),
        ),
    ),
    Work(
        "cold-crowd",
        "random 4 KiB over 64 cold remote files, 128 threads",
        "IOPS",
        Side("sectorfs", partial(crowd, _sectorfs)),
        (
            Side("rclone mount", partial(crowd, _rclone), 50.0),
            Side("sshfs", partial(crowd, _sshfs), 0.3),
        ),
    ),
    Work(
        "cold-crowd-bulk",
        "the same while one bulk fetch runs, 1 / p99",
        "1/s",
        Side("sectorfs", crowd_wait_beside_bulk),
        (Side("without the fetch", crowd_wait, 1 / 3),),
    ),
)
