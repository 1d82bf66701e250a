"""Gets what proves one remote file from whoever has it, as its bytes come.

Any source may give a manifest, whichever gives the bytes: all of it is proved by the digest that
the Index keeps. Most answers carry the leaf hashes of the blocks that they touch; what they lack is
asked for by itself. The files of a directory are proved through its *roll*, a list of their digests
that the digest of the directory proves.

A source that gives wrong hashes is told of (`failed`) like one that gives wrong bytes, and the next
is asked. `NoProof` when nobody has them.
"""

from __future__ import annotations

import logging
import math
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import msgspec
import trio

from sectorfs.errors import NoProof, SectorFSError, WrongBytes
from sectorfs.metrics import PROVED_BYTES
from sectorfs.stores.lanes import Lane
from sectorfs.stores.manifest import Manifest, Outline, edge_blocks, leaf_hashes
from sectorfs.stores.proof import Part, PartSieve, Proof, ProofMemory
from sectorfs.stores.rolls import Roll
from sectorfs.stores.sources import PeerSource
from sectorfs.types import Facts, SectorFile

log = logging.getLogger(__name__)

T = TypeVar("T")

ON_LOOP = 256 << 10
"""Bytes that are hashed in less time than a thread takes to be had."""
ROLLS = 1024
"""Directories whose rolls are remembered."""

WITHOUT_SECONDS = 10.0
"""For so long a source that had no manifest is asked for one after the others."""
AT_ONCE = 512
"""Blocks whose leaf hashes are asked for at once."""

Span = tuple[int, int]


class Piece(msgspec.Struct, frozen=True):
    """Bytes of a file, as a source gave them."""

    start: int
    end: int
    data: bytes
    told: bytes
    """Leaf hashes that came with them: those of `edge_blocks`, or none."""


class Manifests(Protocol):
    """Asks sources for what proves one remote file."""

    async def roll(self, source: PeerSource, digest: bytes) -> Roll:
        """Of the directory with this digest that the file is in."""

    async def outline(self, source: PeerSource, size: int, digest: bytes) -> Outline:
        """The hashes of the file's blocks, which are of this digest."""

    async def leaves(self, source: PeerSource, outline: Outline, blocks: range) -> bytes:
        """The leaf hashes of some of its blocks."""


class Came(Protocol):
    """Takes bytes that are proved."""

    def __call__(self, offset: int, data: bytes, /) -> object:
        """They belong at `offset`."""


class Proving:
    """What the provers of a node share."""

    def __init__(self) -> None:
        self.memory = ProofMemory()
        self._rolls: OrderedDict[tuple[SectorFile, bytes], Roll] = OrderedDict()
        # In a lane only for the bound: the processor always answers.
        self._threads = Lane("hashing", deadline=math.inf, width=os.cpu_count() or 1)

    def roll(self, file: SectorFile, digest: bytes) -> Roll | None:
        """What is known of a directory with this digest."""
        found = self._rolls.get((file, digest))
        if found is not None:
            self._rolls.move_to_end((file, digest))
        return found

    def learn(self, file: SectorFile, digest: bytes, roll: Roll) -> None:
        """Remember a roll that was proved."""
        self._rolls[file, digest] = roll
        while len(self._rolls) > ROLLS:
            self._rolls.popitem(last=False)

    async def hash(self, parts: Sequence[memoryview]) -> list[bytes]:
        """The leaf hashes of several parts of a file."""
        if sum(map(len, parts)) <= ON_LOOP:
            await trio.lowlevel.checkpoint()
            return [leaf_hashes(part) for part in parts]
        return await self._threads.run(
            lambda: [leaf_hashes(part) for part in parts], what="hash what came"
        )


class Subject:
    """Which content is to be proved: a regular file, or one file of a directory."""

    def __init__(self, file: SectorFile, member: str | None, facts: Facts, size: int) -> None:
        self.file = file
        self.member = member
        self.digest = facts.digest
        """Of the whole sector file."""
        self.facts = facts
        self.size = size
        self.name = f"{file}/{member}" if member else str(file)


class Prover:
    """Proves one content; everybody who has it open shares this."""

    def __init__(
        self,
        subject: Subject,
        proving: Proving,
        manifests: Manifests,
        *,
        sources: Callable[[], Sequence[PeerSource]],
        failed: Callable[[PeerSource, SectorFSError], object],
    ) -> None:
        self.subject = subject
        self._proving = proving
        self._manifests = manifests
        self._sources = sources
        self._failed = failed
        self._proof: Proof | None = None  # None until the file's own digest is known
        self._keeps_all = False
        self._asking = trio.Lock()
        self._without: dict[PeerSource, float] = {}  # when sources gave no manifest
        self._failures = 0
        self._failure: NoProof | None = None

    @property
    def proof(self) -> Proof | None:
        """What is known; None while the file's own digest is not."""
        return self._proof

    def keep_all(self) -> None:
        """A copy is made: keep every hash that comes, for its manifest."""
        self._keeps_all = True
        if self._proof is not None:
            self._proof.keeps_all = True

    def close(self) -> None:
        """Nobody reads the file any more; what is known of it stays for the next time."""
        if self._proof is not None and self._keeps_all:
            self._proof.relax()

    # --- what came ---

    async def pass_on(self, source: PeerSource, pieces: Sequence[Piece], came: Came) -> None:
        """Hand on what is good of pieces of a file; `WrongBytes` when not all of it was."""
        wanted = await self.parts(source, pieces)
        views = [
            memoryview(piece.data)[part.start - piece.start : part.end - piece.start]
            for piece, parts in zip(pieces, wanted, strict=True)
            for part in parts
        ]
        hashes = iter(await self._proving.hash(views))
        wrong: Part | None = None
        for piece, parts in zip(pieces, wanted, strict=True):
            bad = []
            for part in parts:
                found = next(hashes)
                if part.fits(found):
                    self._gather(part.told(found))
                else:
                    bad.append(part)
            PROVED_BYTES.inc(sum(part.size for part in parts if part not in bad))
            wrong = wrong or next(iter(bad), None)
            _hand_on(piece, [part for part in parts if part not in bad] if bad else None, came)
        if wrong is not None:
            raise wrong.wrong(self.subject.name, source.url)

    @asynccontextmanager
    async def sieve(self, source: PeerSource, span: Span, told: bytes) -> AsyncIterator[PartSieve]:
        """What lets only good bytes of a span through; `told` are leaf hashes that came before."""
        (parts,) = await self.parts(source, [Piece(*span, b"", told)])
        sieve = PartSieve(parts, self.subject.name, source.url)
        try:
            yield sieve
        finally:
            PROVED_BYTES.inc(sieve.passed)
            self._gather(sieve.gathered)

    async def parts(self, source: PeerSource | None, pieces: Sequence[Piece]) -> list[list[Part]]:
        """What pieces that a source gave must be."""
        while True:
            proof = await self._ready()
            for piece in pieces:
                if piece.told and proof.lacking(piece.start, piece.end):
                    edges = edge_blocks(proof.size, piece.start, piece.end)
                    proof.take_leaves(edges, piece.told, source.url if source is not None else "")
            lacking = {block for one in pieces for block in proof.lacking(one.start, one.end)}
            if not lacking and proof.outline is not None:
                return [proof.parts(one.start, one.end) for one in pieces]
            for blocks in _runs(sorted(lacking)):
                await self._find_leaves(source, blocks)

    def _gather(self, leaves: Iterable[tuple[int, bytes]]) -> None:
        if self._proof is not None:
            self._proof.gathered(leaves)

    # --- the whole ---

    async def own_digest(self) -> bytes:
        """The digest of this very file."""
        subject = self.subject
        if subject.member is None:
            await trio.lowlevel.checkpoint()
            return subject.digest
        entry = (await self.roll()).entry(subject.member)
        assert entry is not None  # `_ask_roll` saw it
        return entry.digest

    async def roll(self) -> Roll:
        """What all files of the directory must be."""
        subject = self.subject
        roll = self._proving.roll(subject.file, subject.digest)
        if roll is None:
            roll = await self._from_any(self._ask_roll)
            self._proving.learn(subject.file, subject.digest, roll)
        return roll

    async def manifest(self) -> Manifest:
        """The whole manifest; what is lacking of it is asked for."""
        self.keep_all()
        while True:
            proof = await self._ready()
            unknown = proof.unknown()
            if not unknown and (made := proof.manifest()) is not None:
                return made
            for blocks in _runs(unknown):
                for first in range(blocks.start, blocks.stop, AT_ONCE):
                    await self._find_leaves(None, range(first, min(blocks.stop, first + AT_ONCE)))

    async def warm(self) -> None:
        """Get what every read will need, while the first bytes come; whoever needs it hears why."""
        try:
            await self._ready()
        except SectorFSError as exc:
            log.debug("%s: %s", self.subject.name, exc)

    # --- what proves it ---

    async def _ready(self) -> Proof:
        """The proof with its outline; whoever waits with another hears what that one hears."""
        proof = self._proof
        if proof is not None and proof.outline is not None:
            await trio.lowlevel.checkpoint()
            return proof
        failures = self._failures
        async with self._asking:
            if failures != self._failures and self._failure is not None:
                raise self._failure
            try:
                return await self._find_outline()
            except NoProof as exc:
                self._failures += 1
                self._failure = exc
                raise

    async def _find_outline(self) -> Proof:
        subject = self.subject
        if self._proof is None:
            digest = await self.own_digest()
            self._proof = self._proving.memory.of(subject.name, subject.size, digest)
            self._proof.keeps_all |= self._keeps_all
        proof = self._proof

        async def ask(source: PeerSource) -> None:
            outline = await self._manifests.outline(source, proof.size, proof.digest)
            proof.take_outline(outline, source.url)

        if proof.outline is None:
            await self._from_any(ask)
        return proof

    async def _ask_roll(self, source: PeerSource) -> Roll:
        subject = self.subject
        roll = await self._manifests.roll(source, subject.digest)
        sizes = {entry.name: entry.size for entry in roll.entries}
        if roll.digest != subject.digest or sizes != _sizes(subject.facts):
            raise WrongBytes(f"gave the digests of other files as {subject.file}", source.url)
        return roll

    async def _find_leaves(self, first: PeerSource | None, blocks: range) -> None:
        proof = await self._ready()

        async def ask(source: PeerSource) -> None:
            outline = proof.outline
            if outline is not None:  # else it was forgotten meanwhile, and is got anew
                leaves = await self._manifests.leaves(source, outline, blocks)
                proof.take_leaves(blocks, leaves, source.url)

        await self._from_any(ask, first=first)

    async def _from_any(
        self, ask: Callable[[PeerSource], Awaitable[T]], *, first: PeerSource | None = None
    ) -> T:
        """The answer of the first source that has one that is right."""
        causes: dict[PeerSource, SectorFSError] = {}
        for source in self._givers(first):
            try:
                found = await ask(source)
            except WrongBytes as exc:
                causes[source] = exc
                self._failed(source, exc)
            except SectorFSError as exc:
                causes[source] = exc
                log.debug("%s: no manifest from %s: %s", self.subject.name, source.url, exc)
            else:
                self._without.pop(source, None)
                return found
            self._without[source] = trio.current_time()
        raise NoProof("nobody has its manifest", self.subject.name, causes)

    def _givers(self, first: PeerSource | None) -> list[PeerSource]:
        """Whom to ask; those last that had none just now, as nodes of other programs never have."""
        since = trio.current_time() - WITHOUT_SECONDS
        return sorted(
            self._sources(),
            key=lambda one: (self._without.get(one, -math.inf) > since, one != first),
        )


def _sizes(facts: Facts) -> dict[str, int]:
    return {member.name: member.size for member in facts.members or ()}


def _runs(blocks: Sequence[int]) -> list[range]:
    """Ascending numbers as ranges of those that follow each other."""
    runs: list[range] = []
    for block in blocks:
        if runs and runs[-1].stop == block:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs


def _hand_on(piece: Piece, good: Sequence[Part] | None, came: Came) -> None:
    """Give what is good of a piece; None for all of it."""
    if good is None:
        came(piece.start, piece.data)
        return
    for part in good:
        came(part.start, piece.data[part.start - piece.start : part.end - piece.start])
