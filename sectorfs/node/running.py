"""The life of a node's process: ready, until it is told to stop or its mount ends."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from sectorfs.config import Config
from sectorfs.fuse import mounts
from sectorfs.fuse.operations import Mount
from sectorfs.node import unmount
from sectorfs.node.node import open_node
from sectorfs.node.repo import Repo
from sectorfs.node.stop import LastResort
from sectorfs.stores.lanes import Lane

log = logging.getLogger(__name__)

MOUNT_SECONDS = 15.0
"""A new mount must answer within this time."""


async def run_node(
    repo: Repo,
    config: Config,
    mountpoint: Path | None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Run a node until SIGTERM, SIGINT, or until its mount is unmounted."""
    resort = LastResort(lambda: _release(repo, mountpoint))
    scope = trio.CancelScope()
    with resort.listening(partial(_tell, trio.lowlevel.current_trio_token(), scope)), scope:
        async with open_node(repo, config, mountpoint) as node:
            ended = trio.Event()
            async with trio.open_nursery() as serving:
                if node.mount is not None:
                    serving.start_soon(_serve_mount, node.mount, ended)
                    await _wait_answer(node.mount.path)
                    node.check_mount()
                _spare_collector()
                repo.write_api(node.api)
                try:
                    log.info("node %s is ready", node.api)
                    if ready is not None:
                        ready(node.remark)
                    await ended.wait()
                finally:
                    repo.remove_api()


def _spare_collector() -> None:
    """Keep the garbage collector from what is there now and stays.

    It would hold the loop for tens of milliseconds each time it looks through all of it.
    """
    gc.collect()
    gc.freeze()


async def _serve_mount(mount: Mount, ended: trio.Event) -> None:
    """Answer the kernel; the node ends with its mount."""
    await mount.run()
    ended.set()


async def _wait_answer(mountpoint: str) -> None:
    """Return once the mount answers; the kernel's own request goes through the loop."""
    lane = Lane(mountpoint, deadline=MOUNT_SECONDS, width=1)
    await lane.run(lambda: os.stat(mountpoint), what="first look at the mount")


def _tell(token: trio.lowlevel.TrioToken, scope: trio.CancelScope, number: signal.Signals) -> None:
    """In a thread: have the loop stop, if it still runs."""

    def stop() -> None:
        log.info("%s: stopping", number.name)
        scope.cancel()

    with suppress(trio.RunFinishedError):
        token.run_sync_soon(stop)


def _release(repo: Repo, mountpoint: Path | None) -> None:
    """What the last resort does: no request may hang in a mount of ours."""
    if mountpoint is None:
        return
    mount = mounts.find_mount(mountpoint)
    if mount is not None and mount.source == unmount.source_of(repo):
        mounts.abort(mount.minor)
        mounts.detach(mountpoint)
