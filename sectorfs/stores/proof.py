"""What the bytes of one content must be: as much of its manifest as is here, all proved. Pure.

The digest proves the outline, the outline the leaf hashes of a block, and these its bytes. What
does not fit is refused here, whoever gave it, so that nothing wrong is ever asked of.

Outlines and leaf hashes are small beside what they prove, but a node may have thousands of files
open: those that were not used for longest are forgotten, and asked for again if need be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from sectorfs.errors import WrongBytes
from sectorfs.stores.manifest import (
    BLOCK,
    HASH,
    LEAF,
    Manifest,
    Outline,
    block_count,
    block_hash,
    edge_blocks,
    leaf_count,
    leaf_hashes,
    leaves_at,
)

RECENT = 1024
"""Blocks of a file whose leaf hashes are kept while no copy of it is made: half a MiB."""
NODE_MEMORY = 256 << 20
"""Bytes of outlines and leaf hashes on a node."""

_LEAVES = BLOCK // LEAF


class ProofMemory:
    """The proofs of a node, bounded: whoever opens a file again finds what was known of it."""

    def __init__(self, limit: int = NODE_MEMORY) -> None:
        self._limit = limit
        self._proofs: dict[tuple[str, bytes], Proof] = {}
        self._held: dict[Proof, int] = {}  # not used for longest first
        self.used = 0
        """Bytes."""

    def of(self, name: str, size: int, digest: bytes) -> Proof:
        """What is known of a content, which may be nothing yet."""
        found = self._proofs.get((name, digest))
        return found if found is not None else Proof(name, size, digest, self)

    def uses(self, proof: Proof) -> None:
        """Count what a proof holds now, and let others go when it is too much."""
        self._proofs.setdefault(proof.key, proof)
        self.used += proof.held - self._held.pop(proof, 0)
        self._held[proof] = proof.held
        while self.used > self._limit and len(self._held) > 1:
            oldest = next(iter(self._held))
            self.used -= self._held.pop(oldest)
            if self._proofs.get(oldest.key) is oldest:
                del self._proofs[oldest.key]
            oldest.forget()


class Part(msgspec.Struct, frozen=True):
    """What the bytes of a block, or of some leaves of it, must be."""

    start: int
    end: int
    block: bytes
    """Hash of the block."""
    leaves: bytes | None
    """Hashes of these leaves; None where the block's own hash tells, of which all is here."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    def fits(self, hashes: bytes) -> bool:
        """Whether bytes with these leaf hashes are right."""
        if self.leaves is not None:
            return hashes == self.leaves
        return block_hash(hashes) == self.block

    def told(self, hashes: bytes) -> list[tuple[int, bytes]]:
        """What bytes that fit tell of their block: its leaf hashes, where it was not known."""
        return [(self.start // BLOCK, hashes)] if self.leaves is None else []

    def wrong(self, name: str, giver: str) -> WrongBytes:
        """The error for bytes that do not fit."""
        return WrongBytes(f"gave wrong bytes of {name}: {self.start}-{self.end - 1}", giver)


class Proof:
    """What is known of the manifest with one digest."""

    def __init__(self, name: str, size: int, digest: bytes, memory: ProofMemory) -> None:
        self.name = name
        self.size = size
        self.digest = digest
        self.keeps_all = False
        """A copy is made: its manifest is wanted in the end."""
        self.outline: Outline | None = None
        """The hashes of its blocks; None while they are not known."""
        self._memory = memory
        self._leaves: dict[int, bytes] = {}  # of blocks, those that came first in front

    @property
    def key(self) -> tuple[str, bytes]:
        """Which content of which file."""
        return self.name, self.digest

    @property
    def held(self) -> int:
        """Bytes of hashes."""
        blocks = len(self.outline.blocks) if self.outline is not None else 0
        return blocks + len(self._leaves) * HASH * _LEAVES

    def take_outline(self, outline: Outline, giver: str) -> None:
        """Learn the hashes of all blocks; `WrongBytes` when they are of another content."""
        if (outline.size, outline.digest) != (self.size, self.digest):
            raise WrongBytes(f"gave the manifest of another content as that of {self.name}", giver)
        self.outline = outline
        self._memory.uses(self)

    def lacking(self, start: int, end: int) -> list[int]:
        """The blocks whose leaf hashes must be known to prove a range of whole leaves."""
        edges = edge_blocks(self.size, start, end)
        return [block for block in edges if block not in self._leaves]

    def unknown(self) -> list[int]:
        """The blocks whose leaf hashes are still lacking in the manifest."""
        return [block for block in range(block_count(self.size)) if block not in self._leaves]

    def take_leaves(self, blocks: Sequence[int], leaves: bytes, giver: str) -> None:
        """Learn the leaf hashes of blocks, one after the other; `WrongBytes` as above."""
        assert self.outline is not None
        at = 0
        for block in blocks:
            _, length = leaves_at(self.size, block)
            part = leaves[at : at + length]
            at += length
            if not self.outline.check_leaves(block, part):
                raise WrongBytes(f"gave wrong hashes for block {block} of {self.name}", giver)
            self._leaves.setdefault(block, part)
        self._settle()

    def gathered(self, leaves: Iterable[tuple[int, bytes]]) -> None:
        """Keep leaf hashes that were found in proving blocks, where a copy is made."""
        if self.keeps_all:
            for block, hashes in leaves:
                self._leaves.setdefault(block, hashes)
            self._settle()

    def parts(self, start: int, end: int) -> list[Part]:
        """What the bytes of a range must be, for which nothing is lacking."""
        assert self.outline is not None
        found = []
        for block in range(start // BLOCK, -(-end // BLOCK)):
            low, high = max(start, block * BLOCK), min(end, (block + 1) * BLOCK)
            leaves = self._leaves.get(block)
            if leaves is not None:
                skip = (low - block * BLOCK) // LEAF
                leaves = leaves[HASH * skip : HASH * (skip + leaf_count(high - low))]
            wanted = self.outline.blocks[HASH * block : HASH * (block + 1)]
            found.append(Part(low, high, wanted, leaves))
        return found

    def manifest(self) -> Manifest | None:
        """The whole manifest, when all of it is here."""
        if self.outline is None or len(self._leaves) < block_count(self.size):
            return None
        leaves = b"".join([self._leaves[block] for block in range(block_count(self.size))])
        return Manifest(self.size, self.outline.blocks, leaves)

    def relax(self) -> None:
        """No copy is made any more."""
        self.keeps_all = False
        if self._leaves:
            self._settle()

    def forget(self) -> None:
        """Let go of what can be asked for again."""
        self.outline = None
        self._leaves.clear()

    def _settle(self) -> None:
        while len(self._leaves) > RECENT and not self.keeps_all:
            del self._leaves[next(iter(self._leaves))]
        self._memory.uses(self)


class PartSieve:
    """Lets through what proves to be right of a range, part after part; a `Sieve` of `wire`."""

    def __init__(self, parts: Sequence[Part], name: str, giver: str) -> None:
        self._parts = deque(parts)
        self._name = name
        self._giver = giver
        self.gathered: list[tuple[int, bytes]] = []
        """Leaf hashes of the blocks that came whole."""
        self.passed = 0
        """Bytes let through."""

    def __call__(self, view: memoryview) -> int:
        """How many of the next bytes are good; `WrongBytes` when the first part is not."""
        passed = 0
        while self._parts and len(view) - passed >= self._parts[0].size:
            part = self._parts[0]
            hashes = leaf_hashes(view[passed : passed + part.size])
            if not part.fits(hashes):
                if not passed:
                    raise part.wrong(self._name, self._giver)
                break
            self._parts.popleft()
            self.gathered += part.told(hashes)
            passed += part.size
        self.passed += passed
        return passed


class Tally:
    """Gathers the leaf hashes of a file that comes from its start to its end; a `Sieve` as well."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._done = 0
        self._hashes: list[bytes] = []

    def __call__(self, view: memoryview) -> int:
        """Take the next bytes, as far as they are whole leaves."""
        ready = _whole(view, self._size - self._done)
        self.add(leaf_hashes(view[:ready]), ready)
        return ready

    def add(self, hashes: bytes, count: int) -> None:
        """The next bytes have these leaf hashes."""
        self._hashes.append(hashes)
        self._done += count

    def manifest(self) -> Manifest:
        """Of all that came, which must be all there is."""
        return Manifest.of_leaves(self._size, b"".join(self._hashes))


def _whole(view: memoryview, left: int) -> int:
    """Bytes of it that are whole leaves; the last of all may be short."""
    return len(view) if len(view) >= left else len(view) // LEAF * LEAF
