"""Proves what an earlier run left of a partial file while nobody told the digest of its content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from sectorfs.stores.blocks import BLOCK, PartialFile
from sectorfs.stores.manifest import leaf_hashes
from sectorfs.stores.prover import Piece, Prover

AT_ONCE = 4 << 20
"""Bytes that are read and hashed at a time."""


async def reprove(
    kept: PartialFile, prover: Prover, *, saved: Callable[[int, int], object]
) -> None:
    """Tell `saved` what of the doubtful bytes is right; the rest comes again as if it never had."""
    for spans in _batches(kept.doubtful):
        pieces = [Piece(start, end, b"", b"") for start, end in spans]
        parts = [part for found in await prover.parts(None, pieces) for part in found]
        hashes = await kept.look([(part.start, part.end) for part in parts], leaf_hashes)
        for part, found in zip(parts, hashes, strict=True):
            if part.fits(found):
                saved(part.start, part.end)
    await kept.adopt()


def _batches(spans: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The same bytes by whole blocks as far as may be, `AT_ONCE` of them at a time at most."""
    batch: list[tuple[int, int]] = []
    size = 0
    for start, end in _steps(spans):
        if batch and size + end - start > AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append((start, end))
        size += end - start
    if batch:
        yield batch


def _steps(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, end in spans:
        while start < end:
            stop = min(end, (start // BLOCK + 1) * BLOCK)
            yield start, stop
            start = stop
