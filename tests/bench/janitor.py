"""Takes away what a benchmark left, even one that was killed.

Everything a benchmark makes lies below one directory with a name of its own, and the processes it
starts have that name in their environment. So what is left is found without being remembered. The
janitor is a process that waits for its standard input to end, which happens when the benchmark
ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sectorfs.fuse import mounts
from sectorfs.node.repo import process_runs
from tests.cluster import until
from tests.cluster_fixtures import unmount

PREFIX = "sectorfs-bench-"
MARK = "SECTORFS_BENCH_DIRECTORY"


@contextmanager
def watched(root: Path) -> Iterator[None]:
    """Mark what is started in the block; at its end, or at the end of this process, clean up."""
    command = [sys.executable, "-m", "tests.bench.janitor", str(root)]
    # A session of its own: an interrupt typed at the terminal is for the benchmark.
    janitor = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    os.environ[MARK] = str(root)
    try:
        yield
    finally:
        del os.environ[MARK]
        janitor.communicate()


def clean(root: Path) -> None:
    """End the processes of a benchmark, take its mounts away and remove its files."""
    if not root.name.startswith(PREFIX):
        raise ValueError(f"{root} is no directory of a benchmark")
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _processes(root):
            _send(pid, number)
        try:
            until("processes to end", lambda: not _processes(root), 10)
            break
        except AssertionError:
            continue  # what hangs in a mount ends with the mount, below
    for path in _mounts(root):
        unmount(path)
    if not _mounts(root):
        shutil.rmtree(root, ignore_errors=True)


def _processes(root: Path) -> list[int]:
    """Whoever was started with the mark of this benchmark."""
    mark = f"{MARK}={root}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it ended, or belongs to somebody else
    return [pid for pid in found if process_runs(pid)]


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _mounts(root: Path) -> list[Path]:
    """Mount points below the directory, the innermost first."""
    listed = mounts.parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())
    points = [Path(mount.path) for mount in listed]
    return sorted((point for point in points if root in point.parents), reverse=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    clean(Path(sys.argv[1]))
