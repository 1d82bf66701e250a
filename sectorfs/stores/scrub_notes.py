"""How far the scrub of each storage is, when the last one ended, and what was found: on disk.

One JSON file per storage below ``<repo>/scrub``, replaced by rename: a crash costs the looks since
it was written last. A file that makes no sense is set aside, and the scrub begins anew: nothing
depends on these notes but when a disk is read.

Passes are counted, and findings have the number of the pass they are of, so that what is gone by
the end of a pass is forgotten without any clock. Times of day are shown, and say when the next pass
is due; one that lies in the future is not believed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from sectorfs.errors import SectorFSError
from sectorfs.stores.lanes import Lane
from sectorfs.stores.metadata import write_atomically
from sectorfs.stores.verdicts import STATES, WELL, Finding, Told, tell
from sectorfs.types import (
    SectorFile,
    StorageID,
    parse_file_type,
    parse_sector,
    parse_storage_id,
)

log = logging.getLogger(__name__)

MOST_FINDINGS = 1000
"""Files that are remembered of a storage; the rest is counted."""
SLACK_NS = 60 * 10**9
"""What the clock of this node may be set back by and still be believed."""


class Pass(msgspec.Struct):
    """One look at all files of a storage."""

    begun_ns: int = 0
    ended_ns: int = 0
    """0 while it goes on."""
    after: str = ""
    """The last sector file that was looked at."""
    files: int = 0
    """Sector files."""
    bytes: int = 0
    states: dict[str, int] = {}
    """Regular files by what was found."""
    stopped: str = ""
    """Why it could not go on when it was tried last."""


class Found(msgspec.Struct):
    """A finding, and the number of the pass it is of."""

    number: int
    told: Told


class Notes(msgspec.Struct):
    """What is remembered of a storage."""

    number: int = 0
    """Passes begun so far."""
    now: Pass | None = None
    """The one that goes on, or can be gone on with."""
    last: Pass | None = None
    """The last one that came to its end."""
    findings: list[Found] = []
    more: int = 0
    """Findings beyond `MOST_FINDINGS`."""


class StorageNotes:
    """The notes of one storage. Used on the loop only."""

    def __init__(self, notes: Notes, now_ns: Callable[[], int]) -> None:
        self._notes = notes
        self._now_ns = now_ns
        self.changed = False
        """Something is not on disk yet."""

    @property
    def now(self) -> Pass | None:
        """The pass that goes on, or can be gone on with."""
        return self._notes.now

    @property
    def last(self) -> Pass | None:
        """The last that came to its end."""
        return self._notes.last

    @property
    def findings(self) -> list[Told]:
        """Files that were not well when they were looked at last."""
        return [found.told for found in self._notes.findings]

    @property
    def more(self) -> int:
        """Findings that are only counted."""
        return self._notes.more

    def is_due(self, every: float) -> bool:
        """Whether a pass is to begin, or go on; `every` in seconds, 0 for never."""
        last = self._notes.last
        if not every or last is None:
            return bool(every)
        passed = self._now_ns() - last.ended_ns
        return passed < -SLACK_NS or passed >= every * 10**9

    def begin(self, *, anew: bool) -> SectorFile | None:
        """Go on with a pass, or begin one; the sector file after which to go on."""
        now = self._notes.now
        after = _parse(now.after) if now is not None and now.after and not anew else None
        if now is None or anew or (now.after and after is None):
            self._notes.number += 1
            self._notes.now = Pass(begun_ns=self._now_ns())
        assert self._notes.now is not None
        self._notes.now.stopped = ""
        self.changed = True
        return after

    def looked(self, file: SectorFile, size: int, findings: Sequence[Finding]) -> None:
        """The next sector file of the pass was looked at."""
        now = self._notes.now
        assert now is not None
        now.after = str(file)
        now.files += 1
        now.bytes += size
        for finding in findings:
            now.states[finding.state] = now.states.get(finding.state, 0) + 1
        self.take(file, findings)

    def take(self, file: SectorFile, findings: Sequence[Finding]) -> None:
        """What is known now of a file, in place of what was."""
        self._forget(lambda found: _is_of(found.told, file))
        for finding in findings:
            if finding.state in WELL or finding.repaired:
                continue
            if len(self._notes.findings) < MOST_FINDINGS:
                self._notes.findings.append(Found(self._notes.number, tell(finding)))
            else:
                self._notes.more += 1
        self.changed = True

    def stop(self, why: str) -> None:
        """The pass cannot go on for now."""
        if self._notes.now is not None:
            self._notes.now.stopped = why
            self.changed = True

    def end(self) -> None:
        """The pass came to its end: what it did not find again is no more."""
        now = self._notes.now
        assert now is not None
        now.ended_ns = self._now_ns()
        self._notes.last, self._notes.now = now, None
        self._forget(lambda found: found.number < self._notes.number)
        if len(self._notes.findings) < MOST_FINDINGS:
            self._notes.more = 0
        self.changed = True

    def encode(self) -> bytes:
        """Its form on disk, of what is there now."""
        self.changed = False
        return msgspec.json.encode(self._notes)

    def _forget(self, which: Callable[[Found], bool]) -> None:
        self._notes.findings = [one for one in self._notes.findings if not which(one)]


class ScrubNotes:
    """The notes of all storages of a node."""

    def __init__(
        self, root: Path, *, deadline: float, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._root = root
        self._now_ns = now_ns
        # Of width 1: what a disk that hung writes late, it writes before what came after.
        self._lane = Lane(str(root), deadline=deadline, width=1)
        self._storages: dict[StorageID, StorageNotes] = {}

    def of(self, storage: StorageID) -> StorageNotes:
        """The notes of a storage, empty for one that was never looked at."""
        if storage not in self._storages:
            self._storages[storage] = StorageNotes(Notes(), self._now_ns)
        return self._storages[storage]

    async def read(self) -> None:
        """Read what an earlier run noted."""
        for storage, notes in (await self._lane.run(self._read, what="read notes")).items():
            self._storages[storage] = StorageNotes(notes, self._now_ns)

    async def write(self, storage: StorageID) -> None:
        """Note how far it is; that it cannot be done costs only looks after a restart."""
        notes = self.of(storage)
        if not notes.changed:
            return
        data = notes.encode()
        try:
            await self._lane.finish(lambda: self._write(storage, data), what="write notes")
        except SectorFSError as exc:
            notes.changed = True
            log.warning("the scrub of %s is not noted: %s", storage, exc)

    # --- blocking parts ---

    def _read(self) -> dict[StorageID, Notes]:
        found = {}
        for path in sorted(self._root.glob("*.json")):
            try:
                storage = parse_storage_id(path.stem)
            except ValueError:
                continue  # none of ours, or half written
            try:
                found[storage] = _checked(msgspec.json.decode(path.read_bytes(), type=Notes))
            except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as exc:
                log.warning("%s is malformed, and set aside: %s", path, exc)
                os.replace(path, path.with_suffix(".malformed"))
        return found

    def _write(self, storage: StorageID, data: bytes) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        write_atomically(str(self._root / f"{storage}.json"), data, mode=0o600)


def _checked(notes: Notes) -> Notes:
    """`ValueError` for what no run of this program wrote."""
    for one in (notes.now, notes.last):
        if one is not None and not one.states.keys() <= set(STATES):
            raise ValueError("unknown states")
    return notes


def _is_of(told: Told, file: SectorFile) -> bool:
    return (told.file_type, told.sector) == (file.file_type.dir_name, file.sector.name)


def _parse(text: str) -> SectorFile | None:
    file_type, _, name = text.partition("/")
    try:
        return SectorFile(parse_file_type(file_type), parse_sector(name))
    except ValueError:
        return None
