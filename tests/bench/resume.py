"""What a whole copy costs anew when its node is killed half way.

Nobody else goes on where it was, so the peer is the figure that is promised.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.runner import Side, Work
from tests.bench.stage import COLD_DIR, LONG, Stage
from tests.cluster import SECTORFS, Node, until
from tests.cluster_fixtures import metric, status

MOST_AGAIN = 0.05
"""Of what was there when the node was killed."""
LEAST = 1e-6
"""What counts where nothing at all was asked for again."""


def kept(stage: Stage) -> float:
    """One by the share of what was there that was asked for again."""
    (name,) = stage.cold(1, LONG)
    with _node(stage) as node:
        before = _sent(stage)
        with _fetching(node, name) as fetching:
            until("half of it to be here", lambda: _is_half(node))
            node.kill()
            fetching.wait()
        there = _sent(stage) - before
        node.start(index=stage.holder)
        with _fetching(node, name) as fetching:
            assert fetching.wait() == 0
        again = _sent(stage) - before - LONG
    return 1 / max(LEAST, again / there)


@contextmanager
def _node(stage: Stage) -> Iterator[Node]:
    """A node that fetches, and leaves nothing."""
    node = Node(stage.root, "killed")
    try:
        node.repo.create()
        node.start(index=stage.holder)
        yield node
    finally:
        node.end()
        shutil.rmtree(node.repo.root)


def _fetching(node: Node, name: str) -> subprocess.Popen[bytes]:
    command = [*SECTORFS, "--repo", str(node.repo.root), "sector", "fetch", name]
    quiet = subprocess.DEVNULL
    return subprocess.Popen([*command, "--type", COLD_DIR], stdout=quiet, stderr=quiet)


def _sent(stage: Stage) -> float:
    """Bytes that the node with the files sent so far."""
    return metric(stage.holder, "sectorfs_http_sent_bytes_total")


def _is_half(node: Node) -> bool:
    return any(2 * one.done >= LONG for one in status(node).fetches)


def promised(stage: Stage) -> float:
    """One by what may be asked for again."""
    return 1 / MOST_AGAIN


WORKS: tuple[Work[Stage], ...] = (
    Work(
        "resume",
        "kill -9 at half of a whole fetch of 4 GiB: what was there by what is asked for again",
        "times",
        Side("sectorfs", kept),
        (Side("5 % again", promised, 1.0),),
    ),
)
