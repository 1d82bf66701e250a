"""What is proved of a content, piece by piece, and what is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectorfs.errors import WrongBytes
from sectorfs.stores import proof as proof_module
from sectorfs.stores.manifest import BLOCK, HASH, LEAF, Manifest, edge_blocks, leaf_hashes
from sectorfs.stores.proof import Part, PartSieve, Proof, ProofMemory, Tally

SIZE = 5 * BLOCK + 3 * LEAF + 11
DATA = random.Random(3).randbytes(SIZE)
MADE = Manifest.of_leaves(SIZE, leaf_hashes(DATA))
OTHER = Manifest.of_leaves(SIZE, leaf_hashes(bytes(SIZE)))
LEAVES = SIZE // LEAF + 1

spans = (
    st.tuples(st.integers(0, LEAVES), st.integers(0, LEAVES))
    .map(lambda pair: (min(pair) * LEAF, min(SIZE, max(pair) * LEAF)))
    .filter(lambda span: span[0] < span[1])
)


def known(name: str = "f", *, memory: ProofMemory | None = None) -> Proof:
    made = Proof(name, SIZE, MADE.digest, memory or ProofMemory())
    made.take_outline(MADE.outline, "a")
    return made


def with_edges(proof: Proof, start: int, end: int) -> list[Part]:
    blocks = proof.lacking(start, end)
    assert blocks == [one for one in edge_blocks(SIZE, start, end) if one in blocks]
    proof.take_leaves(blocks, b"".join(map(MADE.leaves_of, blocks)), "a")
    assert proof.lacking(start, end) == []
    return proof.parts(start, end)


def test_an_outline_of_another_content_is_refused() -> None:
    made = Proof("f", SIZE, MADE.digest, ProofMemory())
    short = Manifest.of_leaves(10, leaf_hashes(b"x" * 10))
    for other in (OTHER, short):
        with pytest.raises(WrongBytes, match="b: gave the manifest of another content"):
            made.take_outline(other.outline, "b")
    assert made.outline is None
    assert made.held == 0


@pytest.mark.parametrize(
    "leaves",
    [
        OTHER.leaves_of(2),
        MADE.leaves_of(3),
        MADE.leaves_of(2)[:-1],
        MADE.leaves_of(2)[:-HASH],
        b"",
    ],
)
def test_leaf_hashes_that_do_not_make_their_block_are_refused(leaves: bytes) -> None:
    made = known()
    with pytest.raises(WrongBytes, match="b: gave wrong hashes for block 2 of f"):
        made.take_leaves([2], leaves, "b")
    assert made.lacking(2 * BLOCK, 2 * BLOCK + LEAF) == [2]


@given(spans)
def test_whole_blocks_need_no_leaf_hashes_and_parts_cover_the_range(span: tuple[int, int]) -> None:
    start, end = span
    parts = with_edges(known(), start, end)
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert (parts[0].start, parts[-1].end) == (start, end)
    for part in parts:
        assert part.fits(leaf_hashes(DATA[part.start : part.end]))
        whole = part.start % BLOCK == 0 and part.end in (part.start + BLOCK, SIZE)
        assert whole or part.leaves is not None


@given(spans, st.data())
def test_any_flipped_bit_is_seen(span: tuple[int, int], data: st.DataObject) -> None:
    start, end = span
    parts = with_edges(known(), start, end)
    bad = bytearray(DATA[start:end])
    bit = data.draw(st.integers(0, 8 * len(bad) - 1))
    bad[bit // 8] ^= 1 << bit % 8
    place = start + bit // 8
    for part in parts:
        hashes = leaf_hashes(bytes(bad[part.start - start : part.end - start]))
        assert part.fits(hashes) == (not part.start <= place < part.end)


def through(sieve: PartSieve | Tally, data: bytes, sizes: list[int]) -> bytes:
    """What a sieve lets through of bytes that come in pieces of these sizes, then in one."""
    came, passed, held = 0, b"", b""
    for size in [*sizes, len(data)]:
        held += data[came : came + size]
        came += size
        while held and (count := sieve(memoryview(held))):
            passed, held = passed + held[:count], held[count:]
    return passed


pieces = st.lists(st.integers(1, BLOCK), max_size=8)


@settings(max_examples=40)
@given(spans, pieces)
def test_a_sieve_lets_all_that_is_right_through(span: tuple[int, int], sizes: list[int]) -> None:
    start, end = span
    made = known()
    made.keeps_all = True
    sieve = PartSieve(with_edges(made, start, end), "f", "b")
    assert through(sieve, DATA[start:end], sizes) == DATA[start:end]
    assert sieve.passed == end - start
    made.gathered(sieve.gathered)
    touched = set(range(start // BLOCK, -(-end // BLOCK)))
    assert touched.isdisjoint(made.unknown())


@settings(max_examples=40)
@given(spans, pieces, st.data())
def test_a_sieve_lets_nothing_that_is_wrong_through(
    span: tuple[int, int], sizes: list[int], data: st.DataObject
) -> None:
    start, end = span
    sieve = PartSieve(with_edges(known(), start, end), "f", "b")
    bad = bytearray(DATA[start:end])
    place = data.draw(st.integers(0, len(bad) - 1))
    bad[place] ^= 0x10
    with pytest.raises(WrongBytes, match="b: gave wrong bytes of f: "):
        through(sieve, bytes(bad), sizes)
    assert start + sieve.passed <= start + place
    assert place - sieve.passed < BLOCK, "what was right before it is not lost"


@settings(max_examples=40)
@given(pieces)
def test_a_tally_makes_the_manifest_of_what_came(sizes: list[int]) -> None:
    tally = Tally(SIZE)
    assert through(tally, DATA, sizes) == DATA
    assert tally.manifest().encode() == MADE.encode()


@pytest.mark.parametrize("size", [0, 1, LEAF, BLOCK])
def test_a_tally_of_any_size(size: int) -> None:
    tally = Tally(size)
    assert through(tally, DATA[:size], []) == DATA[:size]
    assert tally.manifest().digest == Manifest.of_leaves(size, leaf_hashes(DATA[:size])).digest


def test_the_manifest_is_whole_once_every_block_is_known() -> None:
    made = known()
    made.keeps_all = True
    assert made.unknown() == [0, 1, 2, 3, 4, 5]
    assert made.manifest() is None
    made.take_leaves([5, 0], MADE.leaves_of(5) + MADE.leaves_of(0), "a")
    made.gathered((block, MADE.leaves_of(block)) for block in (1, 2, 3, 4))
    found = made.manifest()
    assert found is not None
    assert found.encode() == MADE.encode()


def test_only_the_last_leaf_hashes_are_kept_where_no_copy_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proof_module, "RECENT", 2)
    made = known()
    for block in range(4):
        made.take_leaves([block], MADE.leaves_of(block), "a")
    made.gathered([(4, MADE.leaves_of(4))])
    assert made.unknown() == [0, 1, 4, 5]


def test_what_was_not_used_for_longest_is_forgotten() -> None:
    one = len(MADE.outline.blocks)
    memory = ProofMemory(limit=2 * one)
    first, second = known("e", memory=memory), known("f", memory=memory)
    assert memory.used == 2 * one
    memory.uses(first)
    third = known("g", memory=memory)
    assert [proof.outline is not None for proof in (first, second, third)] == [True, False, True]
    assert memory.used == 2 * one
    second.take_outline(MADE.outline, "a")
    assert [proof.outline is not None for proof in (first, second, third)] == [False, True, True]
    assert memory.of("g", SIZE, MADE.digest) is third
    assert memory.of("e", SIZE, MADE.digest) is not first


def test_one_that_is_larger_than_the_memory_is_kept_alone() -> None:
    memory = ProofMemory(limit=1)
    first = known("e", memory=memory)
    assert first.outline is not None
    second = known("f", memory=memory)
    assert (first.outline, second.outline is not None) == (None, True)


def test_two_that_were_begun_for_one_content_go_one_after_the_other() -> None:
    one = len(MADE.outline.blocks)
    memory = ProofMemory(limit=one)
    first, second = (memory.of("f", SIZE, MADE.digest) for _ in range(2))
    for proof in (first, second, first):
        proof.take_outline(MADE.outline, "a")
        assert memory.used == one
    assert memory.of("f", SIZE, MADE.digest) is first
