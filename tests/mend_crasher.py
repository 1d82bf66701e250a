"""Kills a repair again and again, and checks what each attempt leaves.

Run as ``python -m tests.mend_crasher ROOT FIRST COUNT``. For each seed a copy with bad blocks is
repaired by a forked child, killed as by ``kill -9`` before, after, or in the middle of the N-th
call that changes the file or the notes of repairs; then, by odd seeds, the power is cut as well:
the time that was put back last is gone. Whatever happened, the next start must leave the same
content, with no block that is worse, and a repair that is let run to its end must make it whole.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from sectorfs.stores import mending
from sectorfs.stores.manifest import BLOCK
from sectorfs.types import FileType
from tests.cluster_fixtures import noise
from tests.local_fixtures import sector_file
from tests.scrub_fixtures import SIZE, ScrubRig, flip, scrub_rig

SEALED = sector_file(FileType.SEALED, 7)
CHANGING = ("pwrite", "utime", "fsync", "rename", "replace", "unlink")
CALLS = 24
"""A repair of a few blocks is cut short at one of so many calls."""


class Killer:
    """Counts the calls that change something, and kills this process at one of them."""

    def __init__(self, at: int, how: str) -> None:
        self._at = at
        self._how = how
        self._count = 0

    def install(self) -> None:
        """From now on."""
        for name in CHANGING:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(thing: object, *rest: Any, **more: Any) -> Any:
            self._count += 1
            number = self._count
            if number == self._at and self._how == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if number == self._at and self._how == "within" and name == "pwrite":
                rest = (rest[0][: len(rest[0]) // 2], *rest[1:])
            result = original(thing, *rest, **more)
            if number == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


async def made(node: ScrubRig) -> None:
    """A good and a bad copy, both hashed."""
    data = noise("sealed", SIZE)
    await node.put("good", SEALED, data, hashed=True)
    await node.put("bad", SEALED, data, hashed=True)


async def attempt(root: Path, killer: Killer | None) -> bool:
    """Start, and repair the bad copy; whether that went well."""
    mending.LEASE_SECONDS = 1.0  # that of a child that was killed ends while the next waits
    async with scrub_rig(root) as node:
        for name in ("good", "bad"):
            await node.mender.recover()
            node.parts.ids[name] = (await node.parts.store.attach(str(root / name))).storage
        await node.sync()
        if killer is not None:
            killer.install()
        found = await node.mend("bad", SEALED)
    print(*(f"{one.state} {one.detail}" for one in found.findings), file=sys.stderr)
    return all(one.state == "ok" or one.repaired for one in found.findings)


def run(root: Path, seed: int) -> int:
    """One seed; the exit status of the repair that was cut short."""
    draw = random.Random(seed)
    root.mkdir()

    async def begin() -> None:
        async with scrub_rig(root, "good", "bad") as node:
            await made(node)

    trio.run(begin)
    path = root / "bad" / str(SEALED)
    before = path.stat()
    bad = set(draw.sample(range(SIZE // BLOCK), 3))
    for block in bad:
        flip(path, 8 * block * BLOCK + draw.randrange(8 * BLOCK))
    how = draw.choice(("before", "within", "after"))
    status = in_child(root, Killer(draw.randint(1, CALLS), how))
    if seed % 2 and list((root / "repo" / "scrub" / "repairs").glob("*.json")):
        os.utime(path)  # the last write is on the disk, and the time that was put back is not
    left = damaged(path)
    assert left <= bad, "a block became worse"
    assert trio.run(attempt, root, None), "the next repair did not make it whole"
    after = path.stat()
    assert damaged(path) == set()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list((root / "repo" / "scrub" / "repairs").glob("*.json"))
    return status


def in_child(root: Path, killer: Killer) -> int:
    child = os.fork()
    if child == 0:
        try:
            trio.run(attempt, root, killer)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), "it failed by itself"
    return status


def damaged(path: Path) -> set[int]:
    """Blocks that are not what they were."""
    data, found = noise("sealed", SIZE), path.read_bytes()
    return {
        block
        for block in range(SIZE // BLOCK)
        if data[block * BLOCK : (block + 1) * BLOCK] != found[block * BLOCK : (block + 1) * BLOCK]
    }


def main(root: Path, first: int, count: int) -> None:
    for seed in range(first, first + count):
        where = root / str(seed)
        try:
            print(run(where, seed), flush=True)
        except BaseException:
            print(f"seed {seed}", file=sys.stderr)
            raise
        shutil.rmtree(where)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
