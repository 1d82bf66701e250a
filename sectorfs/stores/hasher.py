"""Makes the manifests of this node's files in the background: one task per path, one pace for all.

Paths are hashed side by side, so that a disk that is slow, read by others or hung holds up its own
files only. Nothing here is urgent: readers come first, the rate is bounded, and a node may pause it
for days (`HashPace`). What is left is found anew from the catalog, so that nothing is lost with a
node that dies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import trio

from sectorfs import metrics
from sectorfs.config import HashConfig, rate_of
from sectorfs.errors import SectorFSError
from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.protocol import SectorIndex
from sectorfs.stores.hash_pace import HashPace
from sectorfs.stores.hash_progress import HashProgress
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.manifest_adoption import Adoption
from sectorfs.stores.manifest_store import ManifestStore
from sectorfs.stores.manifest_sweep import ManifestSweep
from sectorfs.stores.path_hasher import Current, PathHasher, Shared
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import SectorFile, StorageID

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0
"""Seconds between two looks at which paths are attached."""
SWEEP_EVERY = 86_400.0
MANY = 1000
"""Changes at once from which the catalog is gone through instead."""

State = Literal["hashing", "waiting", "idle", "paused"]


class HashStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How far the hashing of a node's files is."""

    state: State
    """``waiting``: for readers, a disk or the Index, or for the delay after the node's start;
    ``idle``: there is nothing left."""
    left_files: int
    left_bytes: int
    rate: float
    """Bytes a second of late."""
    seconds_left: float | None
    """At this rate; None while nothing moves."""
    current: tuple[Current, ...]
    troubles: tuple[str, ...]
    """Why paths wait, apart from readers."""
    bad: tuple[str, ...]
    """Files with other bytes than their digest says, and such that cannot be read."""


class Hasher:
    """The hashing of a node; `run` is its task."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        index: SectorIndex,
        manifests: ManifestStore,
        paths: Callable[[], Sequence[LocalPath]],
        config: HashConfig,
        paused: bool,
        urls: tuple[str, ...],
        peers: PeerClient,
    ) -> None:
        self.pace = HashPace(rate=rate_of(config.max_rate), idle=config.idle, paused=paused)
        self._catalog = catalog
        self._manifests = manifests
        self._paths = paths
        self._shared = Shared(
            catalog,
            index,
            manifests,
            HashProgress(manifests.root, manifests.lane),
            self.pace,
            config.xattr,
            urls,
            Adoption(peers, catalog, frozenset(urls)),
        )
        self._delay = config.delay
        self._hashers: dict[StorageID, tuple[PathHasher, trio.CancelScope]] = {}

    async def run(self) -> None:
        """Hash until cancelled."""
        await trio.sleep(self._delay)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep)
            while True:
                self._follow_paths(nursery)
                await trio.sleep(LOOK_EVERY)

    def _follow_paths(self, nursery: trio.Nursery) -> None:
        paths = {path.storage: path for path in self._paths()}
        for storage, (hasher, scope) in list(self._hashers.items()):
            if paths.get(storage) is not hasher.path:
                scope.cancel()
                del self._hashers[storage]
                metrics.HASH_LEFT_BYTES.remove(storage)
                metrics.HASH_LEFT_FILES.remove(storage)
        if not self._catalog.loaded:
            return
        for storage in paths.keys() - self._hashers.keys():
            hasher, scope = PathHasher(paths[storage], self._shared), trio.CancelScope()
            self._hashers[storage] = hasher, scope
            nursery.start_soon(_run, hasher, scope)

    async def _sweep(self) -> None:
        sweep = ManifestSweep(self._manifests, self._catalog)
        while True:
            await trio.sleep(SWEEP_EVERY)
            try:
                await self._shared.progress.tidy()
                for hasher, _ in list(self._hashers.values()):
                    await sweep.run(hasher.path)
            except SectorFSError as exc:
                log.warning("old manifests are not removed: %s", exc)
            except Exception:  # the boundary of a task in the node's nursery
                log.exception("removing old manifests failed")

    def asked(self, file: SectorFile) -> None:
        """Somebody asked for a manifest that is not here."""
        for hasher, _ in self._hashers.values():
            if self._catalog.declared(file, hasher.path.storage) is not None:
                hasher.backlog.ask(file)
                hasher.wake()

    def retry(self, file: SectorFile) -> None:
        """A file whose bytes were wrong was repaired."""
        for hasher, _ in self._hashers.values():
            if hasher.bad.pop(file, None) is not None:
                hasher.backlog.retry(file)
                hasher.wake()

    def changed(self, changes: Sequence[FileChange]) -> None:
        """The catalog changed."""
        if len(changes) > MANY:
            for hasher, _ in self._hashers.values():
                hasher.backlog.pass_soon()
                hasher.wake()
            return
        for change in changes:
            entry = self._catalog.entry(change.file)
            for one in entry.declarations if entry is not None else ():
                if one.storage in self._hashers:
                    hasher, _ = self._hashers[one.storage]
                    hasher.backlog.note(change.file)
                    hasher.wake()

    def status(self) -> HashStatus:
        """How far it is."""
        hashers = [hasher for hasher, _ in self._hashers.values()]
        current = tuple(one.current for one in hashers if one.current is not None)
        files = sum(one.backlog.left.files for one in hashers)
        size = max(
            0, sum(one.backlog.left.size for one in hashers) - sum(one.done for one in current)
        )
        rate = 0.0 if self.pace.paused else self.pace.meter.rate(trio.current_time())
        return HashStatus(
            state=self._state(hashers, files),
            left_files=files,
            left_bytes=size,
            rate=rate,
            seconds_left=size / rate if rate >= 1 else None,
            current=current,
            troubles=tuple(f"{one.path.path}: {one.trouble}" for one in hashers if one.trouble),
            bad=tuple(text for one in hashers for text in self._bad(one)),
        )

    def _bad(self, hasher: PathHasher) -> list[str]:
        """What was said of files that are still there."""
        storage = hasher.path.storage
        return [
            text
            for file, text in hasher.bad.items()
            if self._catalog.declared(file, storage) is not None
        ]

    def _state(self, hashers: Sequence[PathHasher], files: int) -> State:
        if self.pace.paused:
            return "paused"
        if any(one.current is not None and not one.pace.waits for one in hashers):
            return "hashing"
        counted = len(hashers) == len(self._paths()) and all(one.backlog.counted for one in hashers)
        return "idle" if counted and not files else "waiting"


async def _run(hasher: PathHasher, scope: trio.CancelScope) -> None:
    with scope:
        await hasher.run()
