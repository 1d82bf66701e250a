"""Tells the Index of fetched copies, behind the backs of those who read them.

A reader waits for bytes only: an Index that hangs would otherwise cost every open its time-out.
What waits is told together, one call for all. A copy that could not be told stays readable here,
and the scan of the cache path tells it later.

A sector directory becomes a copy when its last file has come: then it is put into place first. That
is left alone while one of its files is being fetched, whose end asks again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

from sectorfs.errors import SectorFSError
from sectorfs.index.protocol import Declaration, LocationKey, SectorIndex
from sectorfs.stores.copies import Copies
from sectorfs.types import Facts, SectorFile

log = logging.getLogger(__name__)

LIMIT = 10_000
"""Copies that may wait while the Index hangs; the scan of the cache path finds the others."""


class Announcer:
    """The copies that wait to be told; its task lives in `nursery` while there are any."""

    def __init__(
        self,
        nursery: trio.Nursery,
        index: SectorIndex,
        copies: Copies,
        *,
        busy: Callable[[SectorFile], bool],
        current: Callable[[SectorFile], Facts | None],
        digest: Callable[[SectorFile, Facts], Awaitable[bytes]],
    ) -> None:
        """`digest` tells that of a whole copy, as far as all of it was proved."""
        self._nursery = nursery
        self._index = index
        self._copies = copies
        self._busy = busy
        self._current = current
        self._digest = digest
        self._waiting: dict[SectorFile, Facts] = {}
        self.running = False
        """Something is being told."""

    def add(self, file: SectorFile, facts: Facts) -> None:
        """A regular file, or one file of a directory, has come; never waits."""
        if file not in self._waiting and len(self._waiting) >= LIMIT:
            log.debug("%s: left to the scan of the cache path", file)
            return
        self._waiting[file] = facts
        if not self.running:
            self.running = True
            self._nursery.start_soon(self._run)

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, {}
                await self._tell(batch)
        except Exception:  # the boundary of a task in the node's nursery
            log.exception("telling the Index of copies failed")
        finally:
            self.running = False

    async def _tell(self, batch: dict[SectorFile, Facts]) -> None:
        directories = {file: facts for file, facts in batch.items() if file.file_type.is_directory}
        whole = {file: facts for file, facts in batch.items() if file not in directories}
        whole |= await self._complete(directories)
        if not whole:
            return
        storage = self._copies.storage
        try:
            await self._index.declare(
                [
                    Declaration(file, storage, False, await self._digested(file, facts))
                    for file, facts in whole.items()
                ]
            )
        except SectorFSError as exc:
            log.warning("%s not declared yet: %s", _some(list(whole)), exc)

    async def _digested(self, file: SectorFile, facts: Facts) -> Facts:
        """The facts with the digest of the copy itself, whatever that of its source is."""
        return msgspec.structs.replace(facts, digest=await self._digest(file, facts))

    async def _complete(self, directories: dict[SectorFile, Facts]) -> dict[SectorFile, Facts]:
        """Put directories into place that are all here; returns those."""
        ready = {
            file: facts
            for file, facts in directories.items()
            if self._may_complete(file, facts) and await self._is_received(file, facts)
        }
        for file in await self._not_dropped(list(ready)):
            del ready[file]
        done = {}
        for file, facts in ready.items():
            if not self._may_complete(file, facts):
                continue
            try:
                await self._copies.complete(file, facts)
            except SectorFSError as exc:
                # Its files are read where they are; another fetch of one of them tries again.
                log.warning("%s: copy not complete yet: %s", file, exc)
            else:
                done[file] = facts
        return done

    def _may_complete(self, file: SectorFile, facts: Facts) -> bool:
        """Nothing is arriving for it, and what came is still its content."""
        current = self._current(file)
        return not self._busy(file) and (current is None or current.bare == facts.bare)

    async def _is_received(self, file: SectorFile, facts: Facts) -> bool:
        try:
            return await self._copies.is_received(file, facts)
        except SectorFSError as exc:
            log.warning("%s: copy not complete yet: %s", file, exc)
            return False

    async def _not_dropped(self, files: Sequence[SectorFile]) -> Sequence[SectorFile]:
        """Drop the older copies that are about to be replaced: nobody may be sent to them.

        Returns those that cannot be replaced yet.
        """
        try:
            older = [file for file in files if await self._copies.exists(file)]
        except SectorFSError as exc:
            log.warning("%s not complete yet: %s", _some(files), exc)
            return files
        if not older:
            return ()
        try:
            await self._index.drop([LocationKey(file, self._copies.storage) for file in older])
        except SectorFSError as exc:
            log.warning("%s not replaced yet: %s", _some(older), exc)
            return older
        return ()


def _some(files: Sequence[SectorFile]) -> str:
    """Names for a log line."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"copy of {files[0]}{more}"
