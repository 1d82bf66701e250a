"""Ending a mount from outside its process, whether its node is well, hung or long dead.

The mount's source in ``mountinfo`` names the repo (``sectorfs:/root/.sectorfs``), and the repo's
lock tells whether its node lives: nothing here ever touches the mount itself, which may hang.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, unquote

from sectorfs.errors import NotFound, PermissionRefused, Refused
from sectorfs.fuse import mounts
from sectorfs.fuse.mounts import MountInfo
from sectorfs.node import stop
from sectorfs.node.repo import Repo, process_runs

_PREFIX = "sectorfs:"
PATIENCE = stop.PATIENCE + 4.0
"""Seconds a node may take to end after SIGTERM, its own last resort included."""
POLL = 0.05


def source_of(repo: Repo) -> str:
    """The mount source that names a repo; quoted, since option strings break at commas."""
    return _PREFIX + quote(str(repo.root), safe="/")


def repo_of(mount: MountInfo) -> Repo | None:
    """The repo whose node made a mount."""
    if not mount.is_ours or not mount.source.startswith(_PREFIX):
        return None
    return Repo(Path(unquote(mount.source.removeprefix(_PREFIX))))


def is_served(mount: MountInfo) -> bool:
    """True while the node that made a mount lives and serves it."""
    repo = repo_of(mount)
    if repo is None:
        return mount.is_ours  # of an unknown repo: not ours to judge
    return repo.holder() is not None and repo.mountpoint() == mount.path


def unmount(target: str) -> str:
    """End the mount at `target` and its node; returns how, in words."""
    mount = mounts.find_mount(target)
    if mount is None:
        raise NotFound("nothing is mounted here", target)
    if not mount.is_ours:
        raise Refused(f"not a mount of sectorfs ({mount.fstype})", target)
    how = "its node was gone"
    repo = repo_of(mount)
    pid = repo.holder() if repo is not None and is_served(mount) else None
    if pid:
        how = "its node was stopped"
        _terminate(pid, target)
        if not _until(lambda: not process_runs(pid) and mounts.find_mount(target) != mount):
            how = "its node hangs: its connection was aborted"
    if mounts.find_mount(target) == mount:
        mounts.abort(mount.minor)
        mounts.detach(target)
    return how


def _terminate(pid: int, target: str) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError as exc:
        raise PermissionRefused(
            f"its node (process {pid}) belongs to another user", target, "run as that user or root"
        ) from exc


def _until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True
