"""Small ranges of many files at a time: our client asks, our server and a peer's answer.

What such a request costs is the steps around it, on both sides; the bytes are next to nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import trio

from sectorfs.config import TimeoutsConfig
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import SectorFile, parse_file_type, parse_sector
from sectorfs.wire.client import Client
from tests.bench.runner import Side, Work
from tests.bench.stage import PROOF_DIR, PROOF_SIZE, Stage

FILES = 64
AT_ONCE = 128
REQUESTS = 4_000
SPAN = 64 << 10

Source = Callable[[Stage], tuple[str, str | None]]
"""Base URL and token of a server over the storage path."""


def ours(stage: Stage) -> tuple[str, str | None]:
    """The node that holds every file."""
    repo = stage.holder.repo
    return f"{repo.api()}/remote", (repo.root / "token").read_text()


def rclone(stage: Stage) -> tuple[str, str | None]:
    """rclone's server over the same files."""
    return stage.webdav, None


def _nothing(start: int, data: bytes, told: bytes) -> None:
    """What came is not looked at."""


def requests(source: Source, stage: Stage) -> float:
    """Ranges a second."""
    url, token = source(stage)
    file_type = parse_file_type(PROOF_DIR)
    files = [SectorFile(file_type, parse_sector(f"s-t01000-{n}")) for n in range(FILES)]
    chosen = random.Random(3)
    left = iter(range(REQUESTS))

    async def ask(peers: PeerClient) -> None:
        for _ in left:
            start = chosen.randrange(0, PROOF_SIZE - SPAN)
            span, file = (start, start + SPAN), chosen.choice(files)
            await peers.ranges(url, file, None, [span], expect=None, leaves=False, deliver=_nothing)

    async def run() -> float:
        async with Client(TimeoutsConfig(), token=token, per_peer=AT_ONCE) as client:
            peers = PeerClient(client)
            start = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(ask, peers)
            return REQUESTS / (time.perf_counter() - start)

    return trio.run(run)


WORKS: tuple[Work[Stage], ...] = (
    Work(
        "requests",
        f"{AT_ONCE} ranges of 64 KiB at a time, of {FILES} files, by our client",
        "requests/s",
        Side("sectorfs's server", lambda stage: requests(ours, stage)),
        (Side("rclone serve webdav", lambda stage: requests(rclone, stage)),),
    ),
)
