"""Getting what proves a file: once for all who wait, from the next when one lies or has none."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sectorfs.errors import NoProof, NotFound, SectorFSError, Unreachable, WrongBytes
from sectorfs.stores.manifest import BLOCK, LEAF, Manifest, Outline, leaf_hashes
from sectorfs.stores.prover import Piece, Prover, Proving, Subject
from sectorfs.stores.rolls import Roll, make_roll
from sectorfs.stores.sources import PeerSource
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID

SIZE = 4 * BLOCK + 5 * LEAF + 3
DATA = random.Random(5).randbytes(SIZE)
MADE = Manifest.of_leaves(SIZE, leaf_hashes(DATA))
LIE = Manifest.of_leaves(SIZE, leaf_hashes(bytes(SIZE)))
FILE = SectorFile(FileType.SEALED, SectorID(1000, 7))
CACHE = SectorFile(FileType.CACHE, SectorID(1000, 7))
A, B = (PeerSource(StorageID(name), f"http://{name}/remote") for name in "ab")
ROLL = make_roll([("p_aux", SIZE, MADE.digest), ("t_aux", 3, bytes(32))])
MEMBERS = (MemberFacts("p_aux", SIZE, 1), MemberFacts("t_aux", 3, 1))


class Peers:
    """Sources of manifests; implements `prover.Manifests`."""

    def __init__(self) -> None:
        self.made = {A: MADE, B: MADE}
        self.rolls = {A: ROLL, B: ROLL}
        self.failures: dict[PeerSource, SectorFSError] = {}
        self.asked: list[tuple[str, PeerSource]] = []
        self.gate: trio.Event | None = None
        self.wrong: list[PeerSource] = []
        self.proving = Proving()

    async def _answer(self, what: str, source: PeerSource) -> None:
        self.asked.append((what, source))
        if self.gate is not None:
            await self.gate.wait()
        await trio.lowlevel.checkpoint()
        if source in self.failures:
            raise self.failures[source]

    async def roll(self, source: PeerSource, digest: bytes) -> Roll:
        await self._answer("roll", source)
        return self.rolls[source]

    async def outline(self, source: PeerSource, size: int, digest: bytes) -> Outline:
        await self._answer("outline", source)
        return self.made[source].outline

    async def leaves(self, source: PeerSource, outline: Outline, blocks: range) -> bytes:
        await self._answer(f"leaves {blocks.start}-{blocks.stop}", source)
        return b"".join(self.made[source].leaves_of(block) for block in blocks)

    def prover(self, *sources: PeerSource, member: str | None = None) -> Prover:
        file = FILE if member is None else CACHE
        facts = Facts(SIZE, 1, None, MADE.digest)
        if member is not None:
            facts = Facts(SIZE + 3, 1, MEMBERS, ROLL.digest)
        return Prover(
            Subject(file, member, facts, SIZE),
            self.proving,
            self,
            sources=lambda: sources or (A, B),
            failed=lambda source, cause: self.wrong.append(source),
        )


def piece(start: int, end: int, *, data: bytes | None = None, told: bytes = b"") -> Piece:
    return Piece(start, end, DATA[start:end] if data is None else data, told)


async def passed(prover: Prover, *pieces: Piece, source: PeerSource = A) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    with trio.fail_after(10):
        await prover.pass_on(source, pieces, found.__setitem__)
    return found


async def test_leaf_hashes_that_came_with_the_bytes_are_not_asked_for() -> None:
    peers = Peers()
    prover = peers.prover()
    await passed(prover, piece(LEAF, 2 * LEAF, told=MADE.leaves_of(0)))
    assert peers.asked == [("outline", A)]
    await passed(prover, piece(5 * LEAF, 6 * LEAF))
    await passed(prover, piece(BLOCK, 3 * BLOCK))
    assert peers.asked == [("outline", A)]


async def test_what_did_not_come_is_asked_for_at_once_of_him_who_gave_the_bytes() -> None:
    peers = Peers()
    prover = peers.prover()
    await passed(prover, piece(LEAF, BLOCK + LEAF), piece(2 * BLOCK, 2 * BLOCK + LEAF), source=B)
    assert peers.asked == [("outline", A), ("leaves 0-3", B)]


async def test_wrong_parts_are_kept_back_and_right_ones_handed_on() -> None:
    peers = Peers()
    prover = peers.prover()
    bad = bytearray(DATA[: 3 * BLOCK])
    bad[BLOCK + 7] ^= 1
    found: dict[int, bytes] = {}
    pieces = [piece(0, 3 * BLOCK, data=bytes(bad)), piece(4 * BLOCK, SIZE)]
    with pytest.raises(WrongBytes, match=r"http://a/remote: gave wrong bytes .* 1048576-2097151"):
        await prover.pass_on(A, pieces, found.__setitem__)
    assert found == {
        0: DATA[:BLOCK],
        2 * BLOCK: DATA[2 * BLOCK : 3 * BLOCK],
        4 * BLOCK: DATA[4 * BLOCK :],
    }


async def test_wrong_hashes_that_came_with_bytes_are_the_fault_of_their_giver() -> None:
    peers = Peers()
    with pytest.raises(WrongBytes, match="http://b/remote: gave wrong hashes for block 0"):
        await passed(peers.prover(), piece(0, LEAF, told=LIE.leaves_of(0)), source=B)


@pytest.mark.parametrize("what", ["outline", "leaves", "roll"])
async def test_who_lies_is_told_of_and_the_next_is_asked(what: str) -> None:
    peers = Peers()
    if what == "outline":
        peers.made[A] = LIE
    elif what == "leaves":
        prover = peers.prover()
        await prover.parts(None, [piece(0, BLOCK)])
        peers.made[A] = LIE
        assert await passed(prover, piece(LEAF, 2 * LEAF)) == {LEAF: DATA[LEAF : 2 * LEAF]}
    else:
        peers.rolls[A] = make_roll([("p_aux", SIZE, LIE.digest), ("t_aux", 3, bytes(32))])
        assert await passed(peers.prover(member="p_aux"), piece(0, BLOCK)) == {0: DATA[:BLOCK]}
    if what == "outline":
        assert await passed(peers.prover(), piece(0, BLOCK)) == {0: DATA[:BLOCK]}
    assert peers.wrong == [A]


async def test_a_roll_of_other_sizes_is_a_lie_too() -> None:
    peers = Peers()
    other = make_roll([("p_aux", SIZE + 1, MADE.digest), ("t_aux", 3, bytes(32))])
    prover = peers.prover(A, member="p_aux")
    peers.rolls[A] = other
    object.__setattr__(prover.subject, "digest", other.digest)
    with pytest.raises(NoProof):
        await prover.own_digest()
    assert peers.wrong == [A]


async def test_a_roll_is_asked_for_once_for_all_files_of_a_directory() -> None:
    peers = Peers()
    assert await peers.prover(member="p_aux").own_digest() == MADE.digest
    assert await peers.prover(member="t_aux").own_digest() == bytes(32)
    assert peers.asked == [("roll", A)]


async def test_when_nobody_has_it_the_error_says_why_of_each() -> None:
    peers = Peers()
    peers.failures = {
        A: NotFound("there is no manifest of it yet", "a"),
        B: Unreachable("away", "b"),
    }
    with pytest.raises(NoProof, match="no manifest of it yet; b: away") as caught:
        await passed(peers.prover(), piece(0, LEAF))
    assert caught.value.failed == peers.failures
    assert peers.wrong == []
    del peers.failures[B]
    assert await passed(peers.prover(), piece(0, LEAF)) == {0: DATA[:LEAF]}


async def test_those_who_wait_are_served_by_one_question() -> None:
    peers = Peers()
    prover = peers.prover()
    peers.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for block in range(4):
            nursery.start_soon(passed, prover, piece(block * BLOCK, (block + 1) * BLOCK))
        await wait_all_tasks_blocked()
        peers.gate.set()
    assert peers.asked == [("outline", A)]


async def test_those_who_wait_hear_of_one_failure() -> None:
    peers = Peers()
    peers.failures = {A: Unreachable("silent", "a"), B: Unreachable("silent", "b")}
    prover = peers.prover()
    peers.gate = trio.Event()
    heard = 0

    async def one() -> None:
        nonlocal heard
        with pytest.raises(NoProof):
            await passed(prover, piece(0, LEAF))
        heard += 1

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
        await wait_all_tasks_blocked()
        peers.gate.set()
    assert heard == 5
    assert peers.asked == [("outline", A), ("outline", B)]


async def test_who_waits_takes_over_from_one_who_leaves() -> None:
    peers = Peers()
    prover = peers.prover()
    peers.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        leaving = trio.CancelScope()

        async def leaves() -> None:
            with leaving:
                await passed(prover, piece(0, LEAF))

        nursery.start_soon(leaves)
        await wait_all_tasks_blocked()
        nursery.start_soon(passed, prover, piece(0, LEAF))
        await wait_all_tasks_blocked()
        leaving.cancel()
        await wait_all_tasks_blocked()
        peers.gate.set()
    assert peers.asked[:2] == [("outline", A)] * 2


async def test_what_was_forgotten_is_asked_for_again() -> None:
    peers = Peers()
    prover = peers.prover()
    await passed(prover, piece(LEAF, 2 * LEAF))
    assert prover.proof is not None
    prover.proof.forget()
    await passed(prover, piece(LEAF, 2 * LEAF))
    assert peers.asked == [("outline", A), ("leaves 0-1", A)] * 2


async def test_the_manifest_of_a_copy_is_what_came_and_what_is_asked_for() -> None:
    peers = Peers()
    prover = peers.prover()
    prover.keep_all()
    await passed(prover, piece(BLOCK, 2 * BLOCK))
    async with prover.sieve(A, (2 * BLOCK, 3 * BLOCK), b"") as sieve:
        assert sieve(memoryview(DATA)[2 * BLOCK : 3 * BLOCK]) == BLOCK
    peers.asked.clear()
    assert (await prover.manifest()).encode() == MADE.encode()
    assert peers.asked == [("leaves 0-1", A), ("leaves 3-5", A)]


async def test_much_is_hashed_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    peers, threads = Peers(), list[str]()
    run = peers.proving._threads.run

    async def counted(call: Callable[[], object], *, what: str) -> object:
        threads.append(what)
        return await run(call, what=what)

    monkeypatch.setattr(peers.proving._threads, "run", counted)
    prover = peers.prover()
    await passed(prover, piece(0, LEAF))
    assert not threads
    await passed(prover, piece(0, 2 * BLOCK))
    assert threads == ["hash what came"]


async def test_what_is_known_stays_for_who_opens_the_file_again() -> None:
    peers = Peers()
    prover = peers.prover()
    prover.keep_all()
    await passed(prover, piece(0, LEAF))
    prover.close()
    again = peers.prover()
    await passed(again, piece(LEAF, 2 * LEAF))
    assert again.proof is prover.proof
    assert again.proof is not None
    assert not again.proof.keeps_all
    assert peers.asked == [("outline", A), ("leaves 0-1", A)]


async def test_who_has_no_manifest_is_not_asked_first_each_time() -> None:
    peers = Peers()
    peers.failures = {A: NotFound("does not know manifests", "a")}
    prover = peers.prover()
    for block in range(3):
        await passed(prover, piece(block * BLOCK, block * BLOCK + LEAF))
    assert peers.asked.count(("outline", A)) == 1
    assert [what for what, source in peers.asked if source == A] == ["outline"]
    peers.failures = {B: NotFound("lost it", "b")}
    await passed(prover, piece(3 * BLOCK, 3 * BLOCK + LEAF))
    assert peers.asked[-2:] == [("leaves 3-4", B), ("leaves 3-4", A)]
