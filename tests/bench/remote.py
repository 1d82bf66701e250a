"""Whole files from another node, beside what people fetch files with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench.processes import program, seconds
from tests.bench.runner import Side, Work
from tests.bench.stage import BIG_DIR, FETCHED, Stage
from tests.cluster_fixtures import ask, sector_file

MB = 1e6


def fetch_sectorfs(stage: Stage) -> float:
    """A file that nobody fetched before."""
    return fetch_named(stage, f"{BIG_DIR}/{stage.next_link()}")


def fetch_named(stage: Stage, name: str) -> float:
    """As ``sectorfs sector fetch``: until the copy is whole, synced and in its place."""
    node = stage.fetcher
    copy = node.repo.cache_path(node.repo.config()) / name
    os.sync()
    start = time.perf_counter()
    ask(node, lambda admin: admin.caching.fetch(sector_file(name)))
    elapsed = time.perf_counter() - start
    if copy.stat().st_size != FETCHED:
        raise ValueError(f"{copy}: {copy.stat().st_size} bytes came")
    copy.unlink()
    return FETCHED / MB / elapsed


def fetched(by: Callable[[Stage, str, Path], float], stage: Stage) -> float:
    """One fetch by a peer's means into a file of its own."""
    target = stage.root / "fetched"
    name = f"{BIG_DIR}/{stage.next_link()}"
    url = stage.holder.repo.api()
    assert url is not None
    os.sync()
    try:
        elapsed = by(stage, name, target)
        if target.stat().st_size != FETCHED:
            raise ValueError(f"{target.stat().st_size} bytes came")
    finally:
        target.unlink(missing_ok=True)
    return FETCHED / MB / elapsed


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


WORKS: tuple[Work[Stage], ...] = (
    Work(
        "fetch",
        "fetch a remote 1 GiB file whole (sectorfs: synced)",
        "MB/s",
        Side("sectorfs", fetch_sectorfs),
        (
            Side("curl -o", partial(fetched, curl)),
            Side("curl -o, sync", partial(fetched, curl_synced), 1.5),
            Side("rclone copy", partial(fetched, rclone_copy)),
            Side("rclone cat", partial(fetched, rclone_cat)),
            Side("sshfs, cp", partial(fetched, sshfs_copy)),
        ),
    ),
)
