"""Repairs damaged files in place: bad blocks are replaced by good ones from other copies.

A block travels only if it is bad, and is written only when it is proved to be what it was. The file
keeps its inode, its length and its time, so that it stays the content that was hashed, and whoever
has it open reads on; readers see a bad block or the good one.

What power can take. Every write changes the file's time, which is put back in the same call, before
anything else is done. Should both not reach the disk, the file would pass for another content that
nobody ever hashed, damaged blocks and all. So before the first write the repo notes, durably, which
file is written to and what its time is; the note goes when all of it is synced. At the next start,
before the path is attached, the time is put back if the file is the same in all else. What was not
written yet is damaged as before, and the next look finds it.

Nobody else changes the file meanwhile: its turn is held, and a lock of its sector, and before each
write it is looked at once more.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec
import trio

from sectorfs import metrics
from sectorfs.errors import (
    Locked,
    NoSource,
    Refused,
    SectorFSError,
    SourceFailed,
    Stale,
)
from sectorfs.index.catalog import Catalog
from sectorfs.index.protocol import Lease, Lock, SectorIndex
from sectorfs.stores.expected import WHOLE
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.manifest import BLOCK, HASH
from sectorfs.stores.medium import Medium
from sectorfs.stores.metadata import write_atomically
from sectorfs.stores.others import Others, Subject
from sectorfs.stores.scrub import Examined, Wanted
from sectorfs.stores.turns import Turns
from sectorfs.stores.verdicts import Finding
from sectorfs.types import SectorFile

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
LOCK_WAIT = 5.0
"""Seconds that a repair waits for whoever has its sector locked."""
RECOVERY_SECONDS = 5.0
"""So long a start waits for a disk with an unfinished repair; the next start tries again."""
LONGEST_NS = 86_400 * 10**9
"""A repair takes less."""
SLACK_NS = 10**10
"""What the clocks of files and of processes may differ by."""
SYNC_EVERY = 64
"""Blocks written between two syncs, so that none takes longer than a disk may be silent."""
GIVE_UP = 8
"""Blocks in a row that nobody has right, after which no more are asked for."""
_MENDABLE = ("damaged", "unreadable")
_BY_NAME = "is a primary copy: to repair it, name the sector and --type"


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is being written to; also one file in ``<repo>/scrub/repairs``."""

    path: str
    inode: int
    size: int
    mtime_ns: int
    """What its time is to be."""
    noted_ns: int
    """Time of day when the repair began: what changed the file much later was not it."""


class Mender:
    """Repairs files on the paths of this node."""

    def __init__(
        self,
        root: Path,
        *,
        index: SectorIndex,
        catalog: Catalog,
        others: Others,
        turns: Turns,
        owner: str,
        deadline: float,
        on_repaired: Callable[[SectorFile, str | None], object],
    ) -> None:
        """`root` is the directory of the notes, on the repo's disk."""
        self._root = root
        self._index = index
        self._catalog = catalog
        self._others = others
        self._turns = turns
        self._owner = owner
        self._deadline = deadline
        self._on_repaired = on_repaired
        self._lane = Lane(str(root), deadline=deadline)

    async def mend(
        self, path: LocalPath, file: SectorFile, examined: Examined, *, primary: bool
    ) -> Examined:
        """What was found, with what is repaired now marked so, and why the rest is not."""
        findings = []
        for finding in examined.findings:
            if finding.state in _MENDABLE:
                wanted = examined.wanted.get(finding.member or WHOLE)
                finding = await self._mend_one(path, finding, wanted, primary=primary)
            findings.append(finding)
        return msgspec.structs.replace(examined, findings=tuple(findings))

    async def _mend_one(
        self, path: LocalPath, finding: Finding, wanted: Wanted | None, *, primary: bool
    ) -> Finding:
        try:
            if wanted is None:
                raise NoSource("nobody knows what it must be", finding.file)
            if not primary and self._is_primary(path, finding.file):
                raise Refused(_BY_NAME, finding.file)
            await self._repair(path, finding, wanted)
        except SectorFSError as exc:
            why = f"{exc.what} ({exc.hint})" if exc.hint else exc.what
            words = [finding.detail, f"not repaired: {why}"]
            return msgspec.structs.replace(finding, detail="; ".join(filter(None, words)))
        return msgspec.structs.replace(finding, repaired=True)

    def _is_primary(self, path: LocalPath, file: SectorFile) -> bool:
        entry = self._catalog.entry(file)
        return entry is None or any(
            one.primary for one in entry.declarations if one.storage == path.storage
        )

    async def _repair(self, path: LocalPath, finding: Finding, wanted: Wanted) -> None:
        file, subject = finding.file, Subject(finding.file, finding.member, path.storage)
        name = path.name_of(file, finding.member)
        async with self._turns.asked(file, None), self._locked(file) as lock:
            writer = await _Writer.open(name, path.lane, wanted)
            try:
                async with self._noted(writer):
                    written = await self._write_good(writer, lock, subject, finding.bad, wanted)
                await _check(name, path.lane, written.blocks, wanted)
            finally:
                writer.close()
                self._on_repaired(file, finding.member)
        log.warning("%s: %d of %d bad blocks repaired", name, len(written.blocks), len(finding.bad))
        if written.failure is not None:
            raise written.failure

    async def _write_good(
        self,
        writer: _Writer,
        lock: _HeldLock,
        subject: Subject,
        blocks: Sequence[int],
        wanted: Wanted,
    ) -> _Written:
        """Replace what others have; nobody is asked for ever who has nothing."""
        written, failures = _Written(), 0
        for block in blocks:
            await lock.keep()
            try:
                data = await self._others.block(subject, wanted.outline, block, lane=writer.lane)
            except NoSource as exc:
                written.failure = written.failure or exc
                failures += 1
                if failures == GIVE_UP:
                    break
                continue
            failures = 0
            await writer.write(block, data)
            metrics.REPAIRED_BLOCKS.inc()
            written.blocks.append(block)
            if len(written.blocks) % SYNC_EVERY == 0:
                await writer.sync()
        return written

    @asynccontextmanager
    async def _locked(self, file: SectorFile) -> AsyncIterator[_HeldLock]:
        """Hold the write lock of a sector file, which a program that seals would want."""
        lease = Lease(
            token=secrets.token_hex(16),
            lock=Lock(sector=file.sector, write=file.file_type.value),
            owner=self._owner,
            reason=f"repair of {file}",
            seconds=LEASE_SECONDS,
        )
        try:
            if not await self._index.lock(lease, wait=LOCK_WAIT):
                raise Locked("is locked by others", file, "see `sectorfs storage locks`")
            yield _HeldLock(self._index, lease.token)
        finally:
            with trio.move_on_after(self._deadline, shield=True), suppress(SectorFSError):
                await self._index.release(lease.token)

    # --- notes ---

    @asynccontextmanager
    async def _noted(self, writer: _Writer) -> AsyncIterator[None]:
        """Have the repo know, over power cuts, that a file is written to in the block."""
        where = self._root / f"{secrets.token_hex(8)}.json"
        data = msgspec.json.encode(writer.note)
        what = f"note a repair of {writer.note.path}"
        await self._lane.finish(partial(_write_note, where, data), what=what)
        try:
            yield
        finally:
            # After a failure, too, or a later change of the file would be taken for ours.
            with trio.move_on_after(self._deadline, shield=True):
                await writer.sync()
                await self._lane.finish(partial(os.unlink, where), what="forget a repair")

    async def recover(self) -> None:
        """Put back times of files whose repair was cut short; before their paths are attached."""
        try:
            notes = await self._lane.run(self._read_notes, what="read notes of repairs")
        except SectorFSError as exc:
            log.error("unfinished repairs cannot be looked for: %s", exc)
            return
        for where, note in notes.items():
            lane = Lane(os.path.dirname(note.path), deadline=RECOVERY_SECONDS)
            try:
                await lane.run(partial(_put_back, note), what=f"recover {note.path}")
                await self._lane.run(partial(os.unlink, where), what="forget a repair")
            except SectorFSError as exc:
                log.error("%s: an unfinished repair stays so: %s", note.path, exc)

    def _read_notes(self) -> dict[Path, Note]:
        found = {}
        for where in sorted(self._root.glob("*.json")):
            try:
                found[where] = msgspec.json.decode(where.read_bytes(), type=Note)
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                log.error("%s is malformed, and set aside: %s", where, exc)
                os.replace(where, where.with_suffix(".malformed"))
        return found


class _Written(msgspec.Struct):
    """What became of the bad blocks of a file."""

    blocks: list[int] = []
    failure: NoSource | None = None
    """Why others stay; the first of several reasons."""


class _HeldLock:
    """The lock of a sector while it is held."""

    def __init__(self, index: SectorIndex, token: str) -> None:
        self._index = index
        self._token = token
        self._renewed = trio.current_time()

    async def keep(self) -> None:
        """Renew it when it is time; `LeaseLost` when others may have changed the file."""
        if trio.current_time() - self._renewed > LEASE_SECONDS / 4:
            await self._index.renew(self._token)
            self._renewed = trio.current_time()


class _Writer:
    """A damaged file, open to be written to."""

    def __init__(self, note: Note, lane: Lane, descriptor: Descriptor) -> None:
        self.note = note
        self.lane = lane
        self._descriptor = descriptor

    @classmethod
    async def open(cls, name: str, lane: Lane, wanted: Wanted) -> _Writer:
        """`Stale` unless it is what was looked at."""

        def call() -> tuple[int, Note]:
            fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(fd)
            # By its real name: the repair goes on when a link to the disk was changed meanwhile.
            return fd, Note(
                path=os.path.realpath(name),
                inode=found.st_ino,
                size=found.st_size,
                mtime_ns=found.st_mtime_ns,
                noted_ns=time.time_ns(),
            )

        fd, note = await lane.run(call, what=f"open {name}", discard=lambda got: os.close(got[0]))
        writer = cls(note, lane, lane.descriptor(fd))
        if (note.size, note.mtime_ns) != (wanted.outline.size, wanted.mtime_ns):
            writer.close()
            raise Stale("changed before it was repaired", name)
        return writer

    async def write(self, block: int, data: bytes) -> None:
        """Replace a block, and leave the time as it was."""
        note = self.note

        def call() -> None:
            with self._descriptor as fd:
                found = os.fstat(fd)
                if (found.st_size, found.st_mtime_ns) != (note.size, note.mtime_ns):
                    raise Stale("changed while it was repaired", note.path)
                try:
                    done = 0
                    while done < len(data):
                        done += os.pwrite(fd, data[done:], block * BLOCK + done)
                finally:
                    os.utime(fd, ns=(found.st_atime_ns, note.mtime_ns))

        await self.lane.finish(call, what=f"repair {note.path}")

    async def sync(self) -> None:
        """Have all of it on the disk."""

        def call() -> None:
            with self._descriptor as fd:
                os.fsync(fd)

        await self.lane.finish(call, what=f"sync {self.note.path}")

    def close(self) -> None:
        """Close once the last thread that writes has left."""
        self._descriptor.close()


async def _check(name: str, lane: Lane, blocks: Sequence[int], wanted: Wanted) -> None:
    """Read what was written from the disk; `SourceFailed` when it is not what it was to be."""
    outline = wanted.outline
    medium = await Medium.open(name, lane)
    try:
        for block in blocks:
            length = min(BLOCK, outline.size - block * BLOCK)
            found = (await medium.hashes(block * BLOCK, length)).blocks
            if found != outline.blocks[HASH * block : HASH * (block + 1)]:
                raise SourceFailed(f"block {block} is damaged again", name, "check the disk")
        if (medium.size, medium.mtime_ns) != (outline.size, wanted.mtime_ns):
            raise Stale("changed while it was repaired", name)
    finally:
        medium.close()


def _write_note(where: Path, data: bytes) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(str(where), data, mode=0o600)


def _put_back(note: Note) -> None:
    """Give a file its time, if it is the one that was written to. Blocks."""
    try:
        fd = os.open(note.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        found = os.fstat(fd)
        ours = (found.st_ino, found.st_size) == (note.inode, note.size)
        age_ns = found.st_mtime_ns - note.noted_ns
        if ours and -SLACK_NS < age_ns < LONGEST_NS:
            log.warning("%s: a repair was cut short; its time is put back", note.path)
            os.utime(fd, ns=(found.st_atime_ns, note.mtime_ns))
            os.fsync(fd)
    finally:
        os.close(fd)
