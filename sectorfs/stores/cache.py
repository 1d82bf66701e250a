"""Keeps the cache path within its limits: what was not used for longest goes when room is needed.

Never what is pinned, open, or being fetched, and never what is not surely elsewhere: a copy goes as
any removal does (`removal`), its declaration first, then the file, and only after a healthy primary
copy was seen on another storage. Unfinished fetches are nobody's last copy and go as files.

While it cannot be read what is pinned (`cache_notes`), nothing goes.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec
import trio

from sectorfs import metrics
from sectorfs.config import CacheLimits
from sectorfs.errors import (
    DiskError,
    NotFound,
    Refused,
    SectorFSError,
    StorageUnavailable,
    Unreachable,
)
from sectorfs.stores import cache_contents
from sectorfs.stores.cache_notes import CacheNotes
from sectorfs.stores.copies import Copies
from sectorfs.stores.eviction import Item, Space, choose, excess
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local import LocalStore
from sectorfs.stores.removal import SLOW, Remover
from sectorfs.stores.space import raw_space
from sectorfs.stores.witnesses import FORCE_HINT
from sectorfs.types import SectorFile

log = logging.getLogger(__name__)

LOOK_SECONDS = 60.0
"""So often the limits are looked after, and use is written down."""
RETRY_SECONDS = 5.0
"""The same while the disk or the Index fails."""
ROOM_PATIENCE = 60.0
"""So long a fetch waits for room; it goes on without keeping what comes, or fails."""
FAILURES = 8
"""Copies that cannot go, after which no more are tried for a while."""
STOP_PATIENCE = 0.5
"""Seconds that the last write of the notes may take at a stop."""


class Readers(Protocol):
    """Who has copies open: the mount."""

    def in_hand(self) -> Mapping[SectorFile, bool]:
        """Copies that are open (True), or only kept open for whoever comes next."""

    def let_go(self, file: SectorFile) -> bool:
        """Close what is only kept open of a file; True when nobody has it open."""


class _Removal:
    """One eviction under way."""

    def __init__(self) -> None:
        self.freed = 0
        self.error: SectorFSError | None = None
        self.ended = trio.Event()


class CacheKeeper:
    """Decides what stays in the cache path of this node."""

    def __init__(
        self,
        nursery: trio.Nursery,
        copies: Copies,
        notes: CacheNotes,
        local: LocalStore,
        remover: Remover,
        limits: CacheLimits,
        *,
        readers: Readers,
        busy: Callable[[SectorFile], bool],
        promised: Callable[[], Awaitable[int]],
    ) -> None:
        """`busy` tells of files being fetched or streamed, `promised` the bytes still to come."""
        self._nursery = nursery
        self._copies = copies
        self._local = local
        self._remover = remover
        self._limits = limits
        self._readers = readers
        self._busy = busy
        self._promised = promised
        self.notes = notes
        """Which copies are pinned."""
        # Not that of the readers: a walk through all of it takes longer than they may wait.
        self._walks = Lane(str(copies.root), deadline=copies.lane.deadline * SLOW, width=1)
        self._making_room = trio.Lock()
        self.trouble = ""
        """Why the limits are not kept; empty when they are."""

    # What others tell and ask

    def used(self, file: SectorFile, member: str | None = None) -> None:
        """A reader opened or closed a copy, or a file of a copied directory; never waits."""
        self.notes.used(file)

    def is_pinned(self, file: SectorFile) -> bool:
        """True for what never goes by itself."""
        return self.notes.known and file in self.notes.pinned

    async def make_room(self, size: int, *, patience: float = ROOM_PATIENCE) -> bool:
        """See to it that `size` bytes may come; False when they may not, or not so soon.

        What is going to make room goes on going, whoever waits for it.
        """
        with trio.move_on_after(patience):
            try:
                if await self._needed(size) == 0:
                    return True
                async with self._making_room:
                    return await self._make_room(size)
            except SectorFSError as exc:
                log.info("%s: no room for %d bytes: %s", self._copies.root, size, exc)
        return False

    async def evict(self, file: SectorFile) -> int:
        """Remove what is here of a file, because an operator asks for it; the bytes that gives.

        `NotFound` when nothing is, `Refused` for what is pinned, open, being fetched, or has no
        healthy primary copy elsewhere.
        """
        if file in self.notes.pinned:
            raise Refused("is pinned", file, "`sectorfs sector unpin` it first")
        async with self._making_room:
            found = [item for item in (await self._look()).items if item.file == file]
            if not found:
                raise NotFound("no copy of it was fetched to this node", file)
            self._require_idle(file)
            return sum([await self._remove(item) for item in found])

    # Its task

    async def run(self) -> None:
        """Keep the limits, and the notes, until cancelled."""
        try:
            while True:
                fine = await self._tend()
                await trio.sleep(LOOK_SECONDS if fine else RETRY_SECONDS)
        finally:
            with trio.move_on_after(STOP_PATIENCE, shield=True):
                await self.notes.write_down()

    async def _tend(self) -> bool:
        """One look; False when it failed."""
        fine = False
        try:
            if not self.notes.known:
                await self.notes.read()
            for file in self._readers.in_hand():
                self.notes.used(file)
            if await self._keep_limits():
                self._tell("")
            else:
                self._tell("it is over its limits, and nothing more may go")
            fine = True
        except SectorFSError as exc:
            self._tell(str(exc))
        except Exception:  # the boundary of a task in the node's nursery
            log.exception("looking after the cache path failed")
        await self.notes.write_down()
        return fine

    async def _keep_limits(self) -> bool:
        if not await self._needed(0):
            return True
        async with self._making_room:
            return await self._make_room(0)

    def _tell(self, trouble: str) -> None:
        if trouble and trouble != self.trouble:
            log.warning("the cache path %s: %s", self._copies.root, trouble)
        self.trouble = trouble

    # Room

    async def _needed(self, size: int) -> int:
        """Bytes that have to go; the whole cache path is only looked at where that matters."""
        if self._limits.max_size:
            return excess(await self._space(await self._look()), self._limits, size)
        root = str(self._copies.root)
        raw = await self._copies.lane.share(lambda: raw_space(root), what="statfs")
        space = Space(raw.capacity, raw.available, held=0, promised=await self._promised())
        return excess(space, self._limits, size)

    async def _look(self) -> cache_contents.Contents:
        root, storage = self._copies.root, self._copies.storage
        return await self._walks.run(
            lambda: cache_contents.contents(root, storage), what="look through the cache path"
        )

    async def _space(self, found: cache_contents.Contents) -> Space:
        metrics.CACHE_BYTES.set(found.held)
        raw = found.raw
        return Space(raw.capacity, raw.available, found.held, await self._promised())

    async def _make_room(self, size: int) -> bool:
        """Evict until `size` bytes fit; nothing when they cannot.

        What went is counted by its size, and the disk not asked again: some file systems give room
        back much later, and copies that peers still read when those are done.
        """
        found = await self._look()
        self.notes.forget_others({item.file for item in found.items})
        needed = excess(await self._space(found), self._limits, size)
        left = self._evictable(found)
        failures = 0
        while needed > 0:
            victims = choose(left.values(), needed)
            if victims is None or failures >= FAILURES:
                return False
            for victim in victims:
                del left[victim.file, victim.partial]
                try:
                    self._require_idle(victim.file)
                    needed -= await self._remove(victim)
                except Unreachable:
                    raise
                except NotFound:
                    needed -= victim.size  # somebody else was faster
                except SectorFSError as exc:
                    log.info("%s stays in the cache path: %s", victim.file, exc)
                    failures += 1
        return True

    def _evictable(self, found: cache_contents.Contents) -> dict[tuple[SectorFile, bool], Item]:
        pinned, in_hand = self.notes.pinned, self._readers.in_hand()
        return {
            (item.file, item.partial): self._dated(item)
            for item in found.items
            if item.file not in pinned and not in_hand.get(item.file) and not self._busy(item.file)
        }

    def _dated(self, item: Item) -> Item:
        used_ns = max(item.used_ns, self.notes.used_ns(item.file))
        return msgspec.structs.replace(item, used_ns=used_ns)

    def _require_idle(self, file: SectorFile) -> None:
        if not self._readers.let_go(file):
            raise Refused("is open", file, "try again when it is closed")
        if self._busy(file):
            raise Refused("is being fetched or streamed", file, "try again when that is done")

    async def _remove(self, item: Item) -> int:
        """Remove it in a task of its own: whoever waits may leave, and it is done all the same."""
        removal = _Removal()
        self._nursery.start_soon(self._run_removal, item, removal)
        await removal.ended.wait()
        if removal.error is not None:
            raise removal.error
        return removal.freed

    async def _run_removal(self, item: Item, removal: _Removal) -> None:
        removal.error = StorageUnavailable("the node is stopping", item.file)
        try:
            removal.freed = await self._remove_here(item)
            removal.error = None
        except SectorFSError as exc:
            removal.error = exc
        except Exception as exc:  # the boundary of a task in the node's nursery
            log.exception("%s: eviction failed unexpectedly", item.file)
            removal.error = DiskError(f"unexpected {type(exc).__name__}", item.file)
        finally:
            removal.ended.set()

    async def _remove_here(self, item: Item) -> int:
        freed = item.size
        if item.partial:
            freed = await self._copies.remove_partials(item.file)
        else:
            await self._remove_copy(item.file)
        self.notes.forget(item.file)
        kind = "partial" if item.partial else "copy"
        metrics.EVICTIONS.labels(kind).inc()
        metrics.EVICTED_BYTES.inc(freed)
        log.info("evicted the %s of %s, %d bytes", kind, item.file, freed)
        return freed

    async def _remove_copy(self, file: SectorFile) -> None:
        storage = self._copies.storage
        path = next((one for one in self._local.paths() if one.storage == storage), None)
        if path is None:
            raise StorageUnavailable("the cache path is not attached yet", self._copies.root)
        if path.primary:
            raise Refused("the cache path holds primaries", path.path, "see CanStore in it")
        try:
            await self._remover.remove(file, only=[storage])
        except Refused as exc:
            hint = exc.hint.removesuffix(FORCE_HINT).removesuffix("; ")
            raise Refused(exc.what, exc.thing, hint) from exc
