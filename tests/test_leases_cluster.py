"""Locks between real processes: a holder that is killed, an Index that is killed under a holder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from sectorfs.index.protocol import LeaseStatus, SectorIndex
from sectorfs.types import FileType
from tests.cluster import Node, cluster, until
from tests.cluster_fixtures import configure, free_port, with_index
from tests.index_fixtures import lease

HOLDER = """
import sys, trio
from pathlib import Path
from sectorfs.errors import LeaseLost
from sectorfs.index.leases import Leases
from sectorfs.node import connect
from sectorfs.node.repo import Repo
from sectorfs.types import SectorID
from sectorfs.wire import tokens

async def main():
    repo = Repo(Path(sys.argv[1]))
    config = repo.config().replace(index={"url": f"{repo.api()}/rpc/v0"})
    token = tokens.sign(repo.secret(create=False), ("admin",))
    async with connect.open_index(repo, config, token) as index:
        leases = Leases(index, owner="holder", seconds=float(sys.argv[2]))
        async with leases.held(SectorID(1000, 7), write=2, reason="work", wait=0):
            print("held", flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
    print("released", flush=True)

trio.run(main)
"""
WRITER = lease("writer", write=FileType.SEALED)


@contextmanager
def holding(index: Node, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock of a running node's Index until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(index.repo.root), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def granted(index: Node) -> bool:
    """Whether another may have the lock now; it is given back at once."""

    async def work(client: SectorIndex) -> bool:
        found = await client.lock(WRITER)
        await client.release(WRITER.token)
        return found

    return with_index(index, work)


def held(index: Node) -> list[LeaseStatus]:
    return with_index(index, lambda client: client.leases())


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Node]:
    with cluster(tmp_path, "index") as [node]:
        configure(node)
        node.start("--listen", f"127.0.0.1:{free_port()}")
        yield node


def test_a_lock_is_held_by_one_process_and_given_back(index: Node) -> None:
    with holding(index, 60) as process:
        assert not granted(index)
        said, _ = process.communicate()
        assert said == "released\n"
        assert granted(index)


def test_the_lock_of_a_killed_process_ends_with_its_lease(index: Node) -> None:
    with holding(index, 4) as process:
        process.kill()
        process.wait()
        assert [one.owner for one in held(index)] == ["holder"]
        until("the lease to end", lambda: granted(index))


def test_a_holder_outlives_the_index_that_is_killed(index: Node) -> None:
    port = (index.repo.api() or "").rsplit(":", 1)[1]
    with holding(index, 15) as process:
        index.kill()
        index.start("--listen", f"127.0.0.1:{port}")
        left: list[float] = []

        def renewed() -> bool:
            """The time left went up."""
            assert process.poll() is None
            [one] = held(index)
            left.append(one.expires_in or 0)
            return any(after > before for before, after in pairwise(left))

        assert not granted(index)
        until("a renewal", renewed)
        assert not granted(index)
        said, _ = process.communicate()
        assert said == "released\n"
    assert held(index) == []
