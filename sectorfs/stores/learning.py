"""Finds out how long files are that other programs' nodes declared without a word.

Whoever opens such a file has it asked for at once (`ask`). Behind all readers, one after the other
and slowly, the others are asked for too, so that listings come to show the truth: what was declared
lately first, then whatever is left. Nodes that send nothing less than a whole file are left alone.

What is found is shown by this node's catalog at once and told to the Index, for all nodes and all
restarts; while the Index is away it waits here. A file whose source gives another content than was
found is looked at again (`look_again`): nobody else would ever tell.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import trio

from sectorfs.errors import NoRanges, NoSource, SectorFSError
from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.protocol import Changes, Declaration, LocationKey, SectorIndex
from sectorfs.stores.node_kinds import NodeKind
from sectorfs.stores.places import Places
from sectorfs.stores.ranking import Ranking
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import DIRECTORY_TYPES, Facts, FileType, SectorFile, SectorID, StorageID

log = logging.getLogger(__name__)

PAUSE = 0.05
"""Seconds between two questions that nobody waits for: a lotus node looks each file up."""
SWEEP_SECONDS = 600.0
"""So often everything is looked through for files that nobody told of."""
FIRST_PAUSE = 2.5
"""Half the seconds until that is done again after somebody failed; each time it is doubled."""
NEWS = 1000
"""Changes at a time that are looked at for such files; more come with a whole catalog."""
WANTED = 10_000
"""Files that were declared lately and wait to be asked for."""
TOLD = 10_000
"""Findings that wait for the Index."""
BATCH = 500
TELL_AGAIN = 10.0
"""Seconds until the Index is told again after it could not be."""
LOOK_AGAIN_SECONDS = 2.0

OnChange = Callable[[Sequence[FileChange]], object]


class Learner:
    """Asks for facts, and passes them on; `run` is its task."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        index: SectorIndex,
        peers: PeerClient,
        ranking: Ranking,
        places: Places,
        on_change: OnChange,
    ) -> None:
        """`on_change` is told what becomes different in the catalog."""
        self._catalog = catalog
        self._index = index
        self._peers = peers
        self._ranking = ranking
        self._places = places
        self._on_change = on_change
        self._wanted: deque[SectorFile] = deque(maxlen=WANTED)
        self._news = trio.Event()
        self._failed = False
        """Somebody who may tell did not, in the present look through everything."""
        self._found: dict[LocationKey, Declaration] = {}
        self._finding = trio.Event()

    # --- for those who wait ---

    async def ask(self, file: SectorFile) -> bool:
        """Ask for a regular file until a source tells; False when none can but by all its bytes.

        `NoSource` when each of them failed.
        """
        whole, causes = False, []
        for source in self._sources(file):
            try:
                await self._ask(file, source)
            except NoRanges:
                whole = True
            except SectorFSError as exc:
                log.info("%s: source %s does not tell its size: %s", file, source.url, exc)
                self._ranking.failed(file, source, exc)
                causes.append(exc)
            else:
                return True
        if whole:
            return False
        raise NoSource("nobody tells how long it is", file, causes)

    async def look_again(self, file: SectorFile) -> bool:
        """Ask other programs' nodes anew, which gave what they should not; True after news.

        Whoever waits has waited already, so this takes only moments.
        """
        before = self._facts(file)
        with trio.move_on_after(LOOK_AGAIN_SECONDS):
            for source in self._sources(file):
                if self._was_found(file, source):
                    try:
                        await self._ask(file, source)
                    except SectorFSError as exc:
                        log.debug("%s: %s: %s", file, source.url, exc)
        return self._facts(file) != before

    def found(self, file: SectorFile, storage: StorageID, facts: Facts) -> None:
        """A storage has a file of this size and time; nothing when it does not declare it."""
        entry = self._catalog.entry(file)
        for known in entry.declarations if entry is not None else ():
            if known.storage == storage and known.facts != facts:
                self._show(msgspec.structs.replace(known, facts=facts))

    # --- behind all readers ---

    def noticed(self, changes: Sequence[FileChange]) -> None:
        """Sector files came: those without facts are to be asked for."""
        if len(changes) > NEWS:
            return
        for change in changes:
            regular = change.file.file_type not in DIRECTORY_TYPES
            if regular and change.appeared and change.after is None:
                self._wanted.append(change.file)
                self._news.set()

    async def run(self) -> None:
        """Ask, and tell the Index, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep)
            nursery.start_soon(self._tell)

    async def _sweep(self) -> None:
        pause = FIRST_PAUSE
        while True:
            self._news = trio.Event()
            self._failed = False
            await self._ask_wanted()
            for file_type in FileType:
                if file_type not in DIRECTORY_TYPES:
                    await self._ask_all(file_type)
            pause = min(2 * pause, SWEEP_SECONDS) if self._failed else FIRST_PAUSE
            with trio.move_on_after(pause if self._failed else SWEEP_SECONDS):
                await self._news.wait()

    async def _ask_all(self, file_type: FileType) -> None:
        names = self._catalog.sectors(file_type)
        starts = list(range(0, len(names), BATCH))
        random.shuffle(starts)  # not every node of the cluster the same files at the same time
        for start in starts:
            await trio.lowlevel.checkpoint()
            rows = self._catalog.listed(file_type, names, start, BATCH)
            for row in rows:
                if row is not None and not row[4]:
                    await self._ask_quietly(SectorFile(file_type, SectorID(row[0], row[1])))
                    await self._ask_wanted()

    async def _ask_wanted(self) -> None:
        while self._wanted:
            await self._ask_quietly(self._wanted.popleft())

    async def _ask_quietly(self, file: SectorFile) -> None:
        """Ask the first source that may tell; whether it does is nobody's trouble."""
        for source in self._sources(file):
            if self._peers.kind(source.url) is NodeKind.WHOLE or self._facts(file) is not None:
                continue
            try:
                await self._ask(file, source)
            except SectorFSError as exc:
                self._failed |= not isinstance(exc, NoRanges)
                log.debug("%s: %s: %s", file, source.url, exc)
            await trio.sleep(PAUSE)

    async def _ask(self, file: SectorFile, source: PeerSource) -> None:
        with self._places.asking(source):
            told = await self._peers.told(source.url, file)
        # Nodes of ours declare what they have, and when it is another one.
        if not told.by_ours or self._catalog.declared(file, source.storage) is None:
            self.found(file, source.storage, told.facts)

    def _was_found(self, file: SectorFile, source: PeerSource) -> bool:
        """Whether what is known of this very copy came from here. What a copy gives of which nobody
        told anything is no news of the file: it would be taken for a newer one, and never proved.
        """
        foreign = self._peers.kind(source.url) is NodeKind.RANGES
        return foreign and self._catalog.declared(file, source.storage) is not None

    def _sources(self, file: SectorFile) -> Sequence[PeerSource]:
        entry = self._catalog.entry(file)
        if entry is None:
            return ()
        here, elsewhere = self._ranking.of(entry)
        return elsewhere if not here else ()

    def _facts(self, file: SectorFile) -> Facts | None:
        entry = self._catalog.entry(file)
        return entry.facts if entry is not None else None

    # --- what was found ---

    def _show(self, declaration: Declaration) -> None:
        catalog = self._catalog
        changes = Changes(epoch=catalog.epoch, seq=catalog.seq, declared=(declaration,))
        self._on_change(catalog.apply(changes, time.time_ns(), trio.current_time()))
        while len(self._found) >= TOLD:
            del self._found[next(iter(self._found))]
        self._found[declaration.key] = declaration
        self._finding.set()

    async def _tell(self) -> None:
        while True:
            await self._finding.wait()
            self._finding = trio.Event()
            while self._found:
                batch = list(self._found.values())[:BATCH]
                try:
                    await self._index.tell(batch)
                except SectorFSError as exc:
                    log.debug("the Index is not told of %d files yet: %s", len(batch), exc)
                    await trio.sleep(TELL_AGAIN)
                    continue
                for one in batch:
                    if self._found.get(one.key) is one:
                        del self._found[one.key]
