"""Kills a process at every step of a move or removal, and checks what the next start finds.

Run as ``python -m tests.move_crasher ROOT SCENARIO``. A step is a call into a disk's lane or into
the Index. For each step N a child does the work and is killed, as by ``kill -9``, before its N-th
step and, in another child, right after it; a second child then starts anew on the same directories,
as a node does, and proves: under the sector's name lies one whole content or none, at least one
declared copy is primary, declarations and files agree, nothing unfinished is left, and the same
work, begun again, gets done. Children are forked, so that one costs milliseconds.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from sectorfs.stores.incoming import Incoming
from sectorfs.stores.lanes import Lane
from sectorfs.types import SectorFile
from tests.moving_fixtures import CACHE, MEMBERS, SEALED, Rig, content, rig

MOST = 200
"""Steps after which the work must have ended."""
NAMES = ("one", "two")


async def move(parts: Rig, file: SectorFile) -> None:
    await parts.mover.move(file, parts.ids["two"])


async def remove(parts: Rig, file: SectorFile) -> None:
    await parts.remover.remove(file, only=[parts.ids["one"]])


SCENARIOS: dict[str, tuple[SectorFile, Callable[[Rig, SectorFile], Awaitable[None]], bool]] = {
    "link-file": (SEALED, move, True),
    "link-directory": (CACHE, move, True),
    "copy-file": (SEALED, move, False),
    "copy-directory": (CACHE, move, False),
    "remove-file": (SEALED, remove, True),
    "remove-directory": (CACHE, remove, True),
}


class Killer:
    """Counts steps, and kills this process at one of them."""

    def __init__(self, at: int, *, after: bool) -> None:
        self._at = at
        self._after = after
        self._count = 0

    async def step(self, call: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        self._count += 1
        mine = self._count == self._at
        if mine and not self._after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return await call(*args, **kwargs)
        finally:
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self, parts: Rig) -> None:
        for owner in (Lane, type(parts.index.index)):
            for name in ("run", "declare", "drop", "sector", "storages"):
                original = getattr(owner, name, None)
                if original is not None:
                    setattr(owner, name, self._wrapped(original))

    def _wrapped(self, original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self.step(original, *args, **kwargs)

        return call


async def never_link(self: Incoming, source: str, seen: object) -> bool:
    return False


async def prepare(root: Path, scenario: str) -> None:
    """The directories and the Index before the work."""
    file, work, _ = SCENARIOS[scenario]
    async with rig(root, *NAMES) as parts:
        await parts.put("one", file)
        if work is remove:
            await parts.put("two", file)


async def doomed(root: Path, scenario: str, killer: Killer) -> None:
    """The work, which may not end."""
    file, work, link = SCENARIOS[scenario]
    if not link:
        Incoming.link = never_link  # type: ignore[method-assign,assignment]  # in this child only
    async with rig(root) as parts:
        await attach(parts)
        killer.install(parts)
        await work(parts, file)


async def attach(parts: Rig) -> None:
    """Attach the paths that are there already, as a node's start does, scan and clear up."""
    for name in NAMES:
        parts.ids[name] = (await parts.store.attach(str(parts.path(name)))).storage
    for path in parts.store.paths():
        await parts.remover.clear_leftovers(path)


async def check(root: Path, scenario: str) -> None:
    """What a start after the crash finds; then the work, begun again."""
    file, work, _ = SCENARIOS[scenario]
    async with rig(root) as parts:
        await attach(parts)
        await truth(parts, file)
        assert parts.litter() == [], parts.litter()
        held = await parts.holders(file)
        if work is move or "one" in held:
            await work(parts, file)
        assert await parts.holders(file) == {"two": True}
        await truth(parts, file)
        assert parts.litter() == [], parts.litter()


async def truth(parts: Rig, file: SectorFile) -> None:
    """Declared is what is there, whole; and one of it is primary."""
    whole = MEMBERS if file == CACHE else b"sector" * 10_000
    there = {name for name in NAMES if (parts.path(name) / str(file)).exists()}
    for name in there:
        assert content(parts.path(name) / str(file)) == whole, f"half a file on {name}"
    held = await parts.holders(file)
    assert set(held) == there, f"declared {held}, there {there}"
    assert any(held.values()), f"no primary copy: {held}"


def child(work: Callable[[], object]) -> int:
    """Do work in a forked process; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def main(root: Path, scenario: str) -> int:
    """The number of steps is printed; the exit status tells whether all went well."""
    for step in range(1, MOST):
        for after in (False, True):
            place = root / f"{scenario}-{step}-{after}"
            place.mkdir()
            assert child(lambda place=place: trio.run(prepare, place, scenario)) == 0
            killer = Killer(step, after=after)
            status = child(
                lambda place=place, killer=killer: trio.run(doomed, place, scenario, killer)
            )
            assert child(lambda place=place: trio.run(check, place, scenario)) == 0, (
                f"killed {'after' if after else 'before'} step {step} of {scenario}"
            )
            if status == 0:
                print(step - 1)
                return 0
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
    raise AssertionError(f"{scenario} does not end")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
