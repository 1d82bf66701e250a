"""The works that are measured, as a table: what, by whom, in which unit.

Every figure is a rate: more is better. "First time" means that the file lies in the page cache of
the disk's file system while the mount has nothing of it cached; so file systems are compared, and
not a disk with itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench import codecs
from tests.bench.processes import program, said, seconds
from tests.bench.runner import Side, Work
from tests.bench.stage import (
    BIG,
    BIG_DIR,
    LISTED,
    LISTED_DIR,
    OPENED,
    OPENED_DIR,
    Stage,
)
from tests.cluster import until

MB = 1e6
FILE = Path(BIG_DIR) / "s-t01000-0"
RANDOM_TIME = "500ms"
BLOCK = 4096

# --- local files through a mount ---


def read_first(view: str, stage: Stage) -> float:
    """Read the big file through a mount that has nothing of it cached."""
    path = stage.view(view) / FILE
    forget_pages(stage, view)
    return BIG / MB / seconds("dd", f"if={path}", "of=/dev/null", "bs=1M")


def read_again(view: str, stage: Stage) -> float:
    """Read the big file as before; the pair that warms up was the first time."""
    path = stage.view(view) / FILE
    return BIG / MB / seconds("dd", f"if={path}", "of=/dev/null", "bs=1M")


def read_random(jobs: int, view: str, stage: Stage) -> float:
    """Blocks read per second at random places of the big file, by so many threads."""
    path = stage.view(view) / FILE
    fio = program("fio")
    forget_pages(stage, view)
    report = said(
        *(fio, "--name=random", f"--filename={path}", "--readonly", "--rw=randread"),
        *(f"--bs={BLOCK}", "--ioengine=psync", f"--numjobs={jobs}", "--thread"),
        *("--time_based", f"--runtime={RANDOM_TIME}", "--norandommap", "--randrepeat=0"),
        *("--invalidate=0", "--group_reporting", "--output-format=json"),
    )
    return float(json.loads(report)["jobs"][0]["read"]["iops"])


def open_small(view: str, stage: Stage) -> float:
    """Open, read a block and close, file after file."""
    folder = stage.view(view) / OPENED_DIR
    paths = [folder / f"s-t01000-{number}" for number in range(OPENED)]
    start = time.perf_counter()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            count = len(os.read(fd, BLOCK))
        finally:
            os.close(fd)
        if count != BLOCK:
            raise ValueError(f"{path}: {count} bytes")
    return OPENED / (time.perf_counter() - start)


def list_first(view: str, stage: Stage) -> float:
    """``ls -l`` while the kernel knows no name of the mount."""
    folder = stage.view(view) / LISTED_DIR
    Path("/proc/sys/vm/drop_caches").write_text("2")
    _list(stage.view("bare") / LISTED_DIR)  # the disk's own names are known again
    return LISTED / _list(folder)


def list_again(view: str, stage: Stage) -> float:
    """``ls -l`` as before."""
    return LISTED / _list(stage.view(view) / LISTED_DIR)


def _list(folder: Path) -> float:
    return seconds("env", "LC_ALL=C", "ls", "-l", folder)


def forget_pages(stage: Stage, view: str) -> None:
    """Empty the mount's page cache of the big file, and have the disk's hold all of it."""
    if view != "bare":
        fd = os.open(stage.view(view) / FILE, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    seconds("dd", f"if={stage.view('bare') / FILE}", "of=/dev/null", "bs=1M")


# --- whole files from another node ---


def fetch_sectorfs(stage: Stage) -> float:
    """From the open until the copy is whole, synced and in its place."""
    node = stage.fetcher
    name = Path(BIG_DIR) / stage.next_link()
    copy = node.repo.cache_path(node.repo.config()) / name

    def whole() -> bool:
        return copy.exists() and copy.stat().st_size == BIG

    os.sync()
    start = time.perf_counter()
    with (node.mountpoint / name).open("rb") as file:
        file.read(BLOCK)
        until(f"{copy} to be whole", whole)
        elapsed = time.perf_counter() - start
    copy.unlink()
    return BIG / MB / elapsed


def fetched(by: Callable[[Stage, str, Path], float], stage: Stage) -> float:
    """One fetch by a peer's means into a file of its own."""
    target = stage.root / "fetched"
    name = f"{BIG_DIR}/{stage.next_link()}"
    url = stage.holder.repo.api()
    assert url is not None
    os.sync()
    try:
        elapsed = by(stage, name, target)
        if target.stat().st_size != BIG:
            raise ValueError(f"{target.stat().st_size} bytes came")
    finally:
        target.unlink(missing_ok=True)
    return BIG / MB / elapsed


def curl(stage: Stage, name: str, target: Path) -> float:
    """curl from the same node."""
    token = stage.holder.repo.root / "token"
    header = stage.root / "header"
    header.write_text(f"Authorization: Bearer {token.read_text().strip()}\n")
    url = f"{stage.holder.repo.api()}/remote/{name}"
    return seconds(program("curl"), "-sSf", "-H", f"@{header}", "-o", target, url)


def curl_synced(stage: Stage, name: str, target: Path) -> float:
    """curl, and the file on the disk before anybody relies on it."""
    return curl(stage, name, target) + seconds("sync", target)


def _rclone(stage: Stage) -> tuple[str, ...]:
    return (program("rclone"), "--config=/dev/null", f"--webdav-url={stage.webdav}")


def rclone_copy(stage: Stage, name: str, target: Path) -> float:
    """rclone to rclone, as a copy (several connections)."""
    return seconds(*_rclone(stage), "copyto", f":webdav:{name}", target)


def rclone_cat(stage: Stage, name: str, target: Path) -> float:
    """rclone to rclone, as one stream."""
    return seconds(*_rclone(stage), "cat", f":webdav:{name}", output=target)


def sshfs_copy(stage: Stage, name: str, target: Path) -> float:
    """cp out of an sshfs mount."""
    return seconds("cp", stage.sshfs / name, target)


# --- the table ---


def _views(call: Callable[[str, Stage], float]) -> tuple[Side[Stage], tuple[Side[Stage], ...]]:
    """A work on files of this node: through sectorfs, and through what else shows them."""
    names = {"bare": "bare files", "mergerfs": "mergerfs (auto-full)", "bindfs": "bindfs"}
    peers = tuple(Side(text, partial(call, view)) for view, text in names.items())
    return Side("sectorfs", partial(call, "sectorfs")), peers


def _view_work(
    name: str, title: str, unit: str, call: Callable[[str, Stage], float]
) -> Work[Stage]:
    return Work(name, title, unit, *_views(call))


WORKS: tuple[Work[Stage], ...] = (
    _view_work("read-first", "read a local 1 GiB file, first time", "MB/s", read_first),
    _view_work("read-again", "read a local 1 GiB file, again", "MB/s", read_again),
    _view_work("random-1", "random 4 KiB, 1 reader", "IOPS", partial(read_random, 1)),
    _view_work("random-16", "random 4 KiB, 16 readers", "IOPS", partial(read_random, 16)),
    _view_work("open", "open + 4 KiB + close, 2 000 files", "files/s", open_small),
    _view_work("ls-first", "ls -l of 20 000 entries, first time", "entries/s", list_first),
    _view_work("ls-again", "ls -l of 20 000 entries, again", "entries/s", list_again),
    Work(
        "fetch",
        "fetch a remote 1 GiB file whole (sectorfs: synced)",
        "MB/s",
        Side("sectorfs", fetch_sectorfs),
        (
            Side("curl -o", partial(fetched, curl)),
            Side("curl -o, sync", partial(fetched, curl_synced)),
            Side("rclone copy", partial(fetched, rclone_copy)),
            Side("rclone cat", partial(fetched, rclone_cat)),
            Side("sshfs, cp", partial(fetched, sshfs_copy)),
        ),
    ),
    *codecs.WORKS,
)
