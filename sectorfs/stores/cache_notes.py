"""What a node must remember of its copies: which are pinned, and when each was last used.

One small JSON file in the cache path, so that it comes and goes with the copies. Access times would
be the other place for the second: but to set one gives a file a new change time, by which everybody
who keeps it open takes it for another file.

A pin is on disk before anybody is told so; use is written down now and then, and a crash costs a
minute of it. A file that makes no sense is left as it is: what it pinned is not to be guessed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container
from pathlib import Path

import msgspec
import trio

from sectorfs.errors import BadInput, SectorFSError, StorageUnavailable
from sectorfs.stores.lanes import Lane
from sectorfs.stores.metadata import write_atomically
from sectorfs.stores.scan import check_identity
from sectorfs.types import SectorFile, StorageID, parse_file_type, parse_sector

log = logging.getLogger(__name__)

NAME = "cache.json"


class _Stored(msgspec.Struct):
    """The file."""

    pinned: list[str] = []
    used_ns: dict[str, int] = {}


class CacheNotes:
    """The notes of one cache path. Used on the loop only."""

    def __init__(
        self,
        root: Path,
        storage: StorageID,
        *,
        deadline: float,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._root = root
        self._storage = storage
        self._now_ns = now_ns
        # Of width 1: what a disk that hung writes late, it writes before what came after.
        self._lane = Lane(str(root), deadline=deadline, width=1)
        self._pinned: frozenset[SectorFile] | None = None  # None until they were read
        self._used_ns: dict[SectorFile, int] = {}
        self._changed = False

    @property
    def known(self) -> bool:
        """True once they were read."""
        return self._pinned is not None

    @property
    def pinned(self) -> frozenset[SectorFile]:
        """What is never to go by itself; `StorageUnavailable` while that is not known."""
        if self._pinned is None:
            raise StorageUnavailable(
                "what is pinned is not known", self._root / NAME, "see `sectorfs status`"
            )
        return self._pinned

    async def pin(self, file: SectorFile, *, pinned: bool) -> bool:
        """Pin or unpin a sector file; False when it was so already."""
        before = self.pinned
        after = before | {file} if pinned else before - {file}
        if after == before:
            await trio.lowlevel.checkpoint()
            return False
        self._pinned = after
        try:
            await self._write()
        except BaseException:
            self._pinned = before
            raise
        return True

    def used(self, file: SectorFile) -> None:
        """Somebody reads a copy now."""
        self._used_ns[file] = self._now_ns()
        self._changed = True

    def used_ns(self, file: SectorFile) -> int:
        """When somebody last did; 0 for never."""
        return self._used_ns.get(file, 0)

    def forget(self, file: SectorFile) -> None:
        """It is not here any more; a pin stays."""
        self._used_ns.pop(file, None)

    def forget_others(self, here: Container[SectorFile]) -> None:
        """Remember the use of nothing but what is `here`."""
        self._used_ns = {file: when for file, when in self._used_ns.items() if file in here}

    async def read(self) -> None:
        """Read what an earlier run noted; `BadInput` for what is no such file."""
        stored = await self._lane.run(self._read, what="read what is pinned")
        try:
            used_ns = {_parse(text): when for text, when in stored.used_ns.items()}
            pinned = frozenset(map(_parse, stored.pinned))
        except ValueError as exc:
            raise self._malformed(exc) from exc
        self._used_ns = used_ns | self._used_ns
        self._pinned = pinned

    async def write_down(self) -> None:
        """Note the use of copies, if there was any; that it cannot be done harms nobody."""
        if not self._changed or not self.known:
            return
        try:
            await self._write()
        except SectorFSError as exc:
            log.debug("use of copies is not written down: %s", exc)

    async def _write(self) -> None:
        stored = _Stored(
            sorted(map(str, self.pinned)),
            {str(file): when for file, when in self._used_ns.items()},
        )
        self._changed = False
        try:
            await self._lane.run(lambda: self._store(stored), what="write down what is pinned")
        except BaseException:
            self._changed = True
            raise

    # --- blocking parts ---

    def _read(self) -> _Stored:
        check_identity(str(self._root), self._storage)
        try:
            return msgspec.json.decode((self._root / NAME).read_bytes(), type=_Stored)
        except FileNotFoundError:
            return _Stored()
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise self._malformed(exc) from exc

    def _store(self, stored: _Stored) -> None:
        check_identity(str(self._root), self._storage)
        write_atomically(str(self._root / NAME), msgspec.json.encode(stored))

    def _malformed(self, exc: Exception) -> BadInput:
        hint = "delete it, and pin again what is to stay"
        return BadInput(f"is malformed: {exc}", self._root / NAME, hint)


def _parse(text: str) -> SectorFile:
    file_type, _, name = text.partition("/")
    return SectorFile(parse_file_type(file_type), parse_sector(name))
