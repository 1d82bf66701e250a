"""Locks with leases: what both indexes keep, restarts and clocks, and holding one for a block."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from sectorfs.errors import BadInput, DiskFull, LeaseLost, Locked, Refused, Unreachable
from sectorfs.index import checks, leases
from sectorfs.index.lease_table import LeaseTable
from sectorfs.index.leases import Held, Leases
from sectorfs.index.lessor import Lessor
from sectorfs.index.lock_rpc import lock_methods
from sectorfs.index.protocol import Lease, LeaseStatus, SectorIndex, SectorLocks
from sectorfs.index.rpc import RpcIndex
from sectorfs.index.sqlite import SqliteIndex
from sectorfs.types import FileType
from sectorfs.wire.jsonrpc import Dispatcher
from tests.index_fixtures import ADMIN, RPC_URL, Clock, lease, open_index, sector

S, C = FileType.SEALED, FileType.CACHE
A = lease("a", write=S)
B = lease("b", write=S)


@pytest.fixture(params=["sqlite", "rpc"])
async def index(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SectorIndex]:
    async with open_index(tmp_path / "index.db", over_rpc=request.param == "rpc") as opened:
        yield opened


class Asked:
    """A question under way, and what came of it."""

    def __init__(self, index: SectorIndex, wanted: Lease, wait: float) -> None:
        self._ask = (index, wanted, wait)
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.granted: bool | None = None
        self.failure: Exception | None = None

    async def run(self) -> None:
        index, wanted, wait = self._ask
        with self.scope:
            try:
                self.granted = await index.lock(wanted, wait=wait)
            except (LeaseLost, Unreachable) as exc:
                self.failure = exc
        self.done.set()


@pytest.fixture
async def asking(index: SectorIndex) -> AsyncIterator[Callable[[Lease, float], Asked]]:
    """Asks in the background."""
    async with trio.open_nursery() as nursery:

        def ask(wanted: Lease, wait: float = 100) -> Asked:
            asked = Asked(index, wanted, wait)
            nursery.start_soon(asked.run)
            return asked

        yield ask
        nursery.cancel_scope.cancel()


Ask = Callable[..., Asked]


async def owners(index: SectorLocks) -> list[str]:
    """Who holds something, and who waits."""
    return [
        one.owner if one.expires_in is not None else f"{one.owner} waits"
        for one in await index.leases()
    ]


# What every index keeps


async def test_a_lock_excludes_others_until_it_is_released(index: SectorIndex) -> None:
    assert await index.lock(A)
    assert not await index.lock(B)
    assert await index.lock(lease("other sector", 8, write=S))
    assert await index.lock(lease("other type", write=C))
    await index.release(A.token)
    assert await index.lock(B)


async def test_types_that_nobody_declared_are_locked(index: SectorIndex) -> None:
    assert await index.sector(sector(7)) == []
    assert await index.lock(lease("a", read=FileType.KEY))
    assert not await index.lock(lease("b", write=FileType.KEY))


async def test_lock_and_release_six_times(index: SectorIndex) -> None:
    for number in range(6):
        wanted = lease("a", write=S) if number % 2 else lease("a", read=S)
        assert await index.lock(wanted)
        await index.release(wanted.token)
    assert await index.leases() == []


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        (lease("a", read=S), lease("b", write=S)),
        (lease("a", write=S), lease("b", read=S)),
        (lease("a", write=S), lease("b", write=S)),
    ],
)
async def test_the_second_waits_for_the_first(
    index: SectorIndex, asking: Ask, held: Lease, wanted: Lease
) -> None:
    await index.lock(held)
    asked = asking(wanted)
    await wait_all_tasks_blocked()
    assert asked.granted is None
    await index.release(held.token)
    await asked.done.wait()
    assert asked.granted
    assert await owners(index) == ["b"]


async def test_a_writer_waits_for_every_reader(index: SectorIndex, asking: Ask) -> None:
    for name in "xy":
        await index.lock(lease(name, read=S))
    asked = asking(A)
    for name in "xy":
        await wait_all_tasks_blocked()
        assert asked.granted is None
        await index.release(lease(name).token)
    await asked.done.wait()
    assert asked.granted


async def test_readers_who_come_later_wait_behind_a_writer(index: SectorIndex, asking: Ask) -> None:
    await index.lock(lease("reader", read=S))
    writer = asking(A)
    await wait_all_tasks_blocked()
    late = asking(lease("late", read=S))
    await wait_all_tasks_blocked()
    assert late.granted is None
    await index.release(lease("reader").token)
    await writer.done.wait()
    assert (writer.granted, late.granted) == (True, None)
    await index.release(A.token)
    await late.done.wait()
    assert late.granted


async def test_who_waits_is_woken_at_expiry(
    index: SectorIndex, asking: Ask, mock_clock: trio.testing.MockClock
) -> None:
    await index.lock(A)
    asked = asking(B)
    await wait_all_tasks_blocked()
    mock_clock.jump(59)
    await wait_all_tasks_blocked()
    assert asked.granted is None
    mock_clock.jump(2)
    await asked.done.wait()
    assert asked.granted
    with pytest.raises(LeaseLost, match="has ended"):
        await index.renew(A.token)


async def test_a_lease_that_is_renewed_does_not_end(
    index: SectorIndex, mock_clock: trio.testing.MockClock
) -> None:
    await index.lock(A)
    for _ in range(5):
        mock_clock.jump(50)
        await index.renew(A.token)
        assert not await index.lock(B)
    mock_clock.jump(60)
    assert await index.lock(B)


async def test_a_wait_ends_in_time_and_keeps_its_place_for_the_next(
    index: SectorIndex, asking: Ask, mock_clock: trio.testing.MockClock
) -> None:
    await index.lock(lease("reader", read=S))
    first = asking(A, 10)
    await wait_all_tasks_blocked()
    late = asking(lease("late", read=S))
    await wait_all_tasks_blocked()
    mock_clock.jump(10)
    await first.done.wait()
    assert first.granted is False
    again = asking(A, 10)
    await wait_all_tasks_blocked()
    await index.release(lease("reader").token)
    await again.done.wait()
    assert (again.granted, late.granted) == (True, None)


async def test_a_place_nobody_comes_back_to_is_lost(
    index: SectorIndex, asking: Ask, mock_clock: trio.testing.MockClock
) -> None:
    await index.lock(lease("reader", read=S))
    gone = asking(A, 10)
    await wait_all_tasks_blocked()
    late = asking(lease("late", read=S))
    await wait_all_tasks_blocked()
    mock_clock.jump(10)
    await gone.done.wait()
    await wait_all_tasks_blocked()
    assert late.granted is None
    mock_clock.jump(5)
    await late.done.wait()
    assert late.granted


async def test_a_cancelled_wait_leaves_nothing_behind(index: SectorIndex, asking: Ask) -> None:
    await index.lock(lease("reader", read=S))
    writer = asking(A)
    await wait_all_tasks_blocked()
    late = asking(lease("late", read=S))
    await wait_all_tasks_blocked()
    assert await owners(index) == ["reader", "a waits", "late waits"]
    writer.scope.cancel()
    await late.done.wait()
    assert late.granted
    assert await owners(index) == ["reader", "late"]


async def test_the_time_is_minded_whoever_waits_first(
    index: SectorIndex, asking: Ask, mock_clock: trio.testing.MockClock
) -> None:
    """The one who waits behind is blocked by what ends first, which came last."""
    await index.lock(lease("long", write=S, seconds=600))
    first = asking(A, 300)
    await wait_all_tasks_blocked()
    await index.lock(lease("short", read=C, seconds=20))
    second = asking(lease("b", write=C), 300)
    await wait_all_tasks_blocked()
    mock_clock.jump(20)
    await second.done.wait()
    assert (first.granted, second.granted) == (None, True)


async def test_the_time_is_minded_by_the_next_when_the_first_leaves(
    index: SectorIndex, asking: Ask, mock_clock: trio.testing.MockClock
) -> None:
    await index.lock(lease("reader", read=S, seconds=60))
    asked = []
    for name in "xyz":
        asked.append(asking(lease(name, write=S)))
        await wait_all_tasks_blocked()
    asked[0].scope.cancel()
    await asked[0].done.wait()
    await index.release(lease("y").token)
    await asked[1].done.wait()
    await wait_all_tasks_blocked()
    mock_clock.jump(60)
    await asked[2].done.wait()
    assert asked[2].granted


async def test_one_question_asked_twice_is_answered_twice(index: SectorIndex, asking: Ask) -> None:
    await index.lock(A)
    asked = [asking(B), asking(B)]
    await wait_all_tasks_blocked()
    asked[0].scope.cancel()
    await asked[0].done.wait()
    await wait_all_tasks_blocked()
    again = asking(B)
    await wait_all_tasks_blocked()
    await index.release(A.token)
    await asked[1].done.wait()
    await again.done.wait()
    assert (asked[1].granted, again.granted) == (True, True)
    assert await owners(index) == ["b"]


async def test_releasing_ends_a_wait(index: SectorIndex, asking: Ask) -> None:
    await index.lock(A)
    asked = asking(B)
    await wait_all_tasks_blocked()
    await index.release(B.token)
    await asked.done.wait()
    assert isinstance(asked.failure, LeaseLost)
    assert await owners(index) == ["a"]


async def test_releasing_twice_or_what_never_was_is_fine(index: SectorIndex) -> None:
    await index.lock(A)
    for token in (A.token, A.token, "0123456789abcdef"):
        await index.release(token)
    assert await index.leases() == []


async def test_a_question_whose_answer_was_lost_is_asked_again(
    index: SectorIndex, mock_clock: trio.testing.MockClock
) -> None:
    assert await index.lock(A)
    mock_clock.jump(59)
    assert await index.lock(A)
    mock_clock.jump(59)
    assert await owners(index) == ["a"]
    with pytest.raises(BadInput, match="token of another lease"):
        await index.lock(lease("a", write=C))


async def test_others_see_who_and_why_and_no_token(
    index: SectorIndex, asking: Ask, mock_clock: trio.testing.MockClock
) -> None:
    await index.lock(lease("a", read=S | C, write=S))
    asking(B)
    await wait_all_tasks_blocked()
    mock_clock.jump(10)
    held, waiting = await index.leases()
    since = Clock().ns
    assert held == LeaseStatus(
        lock=lease("a", read=S | C, write=S).lock,
        owner="a",
        reason="a test",
        since_ns=since,
        expires_in=50,
    )
    assert waiting == LeaseStatus(
        lock=B.lock, owner="b", reason="a test", since_ns=since, expires_in=None
    )


@pytest.mark.parametrize(
    "bad",
    [
        lease("a"),
        lease("a", write=128),
        lease("a", read=-1),
        lease("a", -1, write=S),
        lease("a", 2**63, write=S),
        lease("a", write=S, seconds=0.5),
        lease("a", write=S, seconds=601),
        lease("a", write=S, seconds=float("nan")),
        lease("", write=S),
        lease("a\nb", write=S),
        lease("x" * 201, write=S),
    ],
)
async def test_impossible_leases_are_refused(index: SectorIndex, bad: Lease) -> None:
    with pytest.raises(BadInput):
        await index.lock(bad)
    assert await index.leases() == []


async def test_bad_tokens_and_waits_are_refused_and_tokens_not_shown(index: SectorIndex) -> None:
    for token in ("", "short", "x" * 65, "0123456789abcde\n", "ä" * 20):
        for call in (index.renew, index.release):
            with pytest.raises(BadInput) as caught:
                await call(token)
            assert not token or token not in str(caught.value)
    for wait in (-1, float("nan")):
        with pytest.raises(BadInput, match="cannot wait"):
            await index.lock(A, wait=wait)


# Restarts, clocks, disks


async def test_a_restart_honours_every_lease_for_its_full_time(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "index.db"
    clock = Clock()
    async with open_index(path, clock=clock) as index:
        await index.lock(lease("gone", 1, write=S))
        await index.lock(A)
        await index.lock(lease("b", write=C))
        await index.release(lease("b").token)
        mock_clock.jump(50)
        granted_ns = clock.ns
    clock.ns += 10**9
    async with open_index(path, clock=clock) as index:
        assert await owners(index) == ["gone", "a"]
        assert (await index.leases())[1].since_ns == granted_ns
        assert not await index.lock(B)
        mock_clock.jump(50)
        await index.renew(A.token)  # its holder lives, the other does not
        mock_clock.jump(50)
        assert await owners(index) == ["a"]
        await index.lock(lease("b", write=C))
    async with open_index(path, clock=clock) as index:
        assert await owners(index) == ["a", "b"]


async def test_a_step_of_the_wall_clock_changes_nothing(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    clock = Clock()
    async with open_index(tmp_path / "index.db", clock=clock) as index:
        await index.lock(A)
        for years in (10, -20):
            clock.ns += years * 365 * 86400 * 10**9
            assert not await index.lock(B)
            (status,) = await index.leases()
            assert status.expires_in == 60
        mock_clock.jump(60)
        assert await index.lock(B)


async def test_renewing_writes_nothing(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with SqliteIndex.open(tmp_path / "index.db", cutoff=50) as index:
        await index.lock(A)
        written: list[object] = []
        index._write = written.append  # type: ignore[assignment,method-assign]  # would fail
        await index.renew(A.token)
        assert written == []


async def test_locks_are_no_changes_to_follow(index: SectorIndex) -> None:
    before = await index.snapshot()
    await index.lock(A)
    await index.release(A.token)
    assert await index.snapshot() == before


async def test_a_lease_that_cannot_be_recorded_is_not_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock
) -> None:
    async with SqliteIndex.open(tmp_path / "index.db", cutoff=50) as index:

        async def full(change: object) -> None:
            raise DiskFull("the disk of the Index is full", "index.db")

        with monkeypatch.context() as patch:
            patch.setattr(index, "_write", full)
            with pytest.raises(DiskFull):
                await index.lock(A)
        assert await index.lock(B)


async def test_a_lease_that_ends_while_it_is_recorded_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "index.db"
    async with SqliteIndex.open(path, cutoff=50) as index:
        write = index._write

        async def slow(change: Callable[[sqlite3.Connection], None]) -> None:
            await write(change)
            mock_clock.jump(61)

        with monkeypatch.context() as patch:
            patch.setattr(index, "_write", slow)
            with pytest.raises(LeaseLost, match="before it was recorded"):
                await index.lock(A)
        assert await index.lock(B)
    async with open_index(path) as index:
        assert await owners(index) == ["b"]


async def test_cancelled_before_it_is_recorded_nobody_holds_it(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "index.db"
    async with SqliteIndex.open(path, cutoff=50) as index:
        async with trio.open_nursery() as nursery:
            async with index._turn:  # the writer is busy
                nursery.start_soon(index.lock, A)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await wait_all_tasks_blocked()
        assert await index.lock(B)
    async with open_index(path) as reopened:
        assert await owners(reopened) == ["b"]


async def test_closing_ends_waits(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        async with open_index(tmp_path / "index.db") as index:
            await index.lock(A)
            asked = Asked(index, B, 100)
            nursery.start_soon(asked.run)
            await wait_all_tasks_blocked()
        await asked.done.wait()
    assert isinstance(asked.failure, Unreachable)


async def test_a_crowd_is_not_woken_for_every_one_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    grant = LeaseTable.grant

    def counted(*args: Any) -> bool:
        nonlocal looks
        looks += 1
        return grant(*args)

    async def record(granted: Lease | None, now_ns: int, ended: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(LeaseTable, "grant", counted)
    lessor = Lessor(record, Clock())
    await lessor.lock(A)

    async def work(number: int) -> None:
        wanted = lease(f"writer {number}", write=S)
        assert await lessor.lock(wanted, wait=100)
        await lessor.release(wanted.token)

    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(work, number)
        await wait_all_tasks_blocked()
        await lessor.release(A.token)
    assert looks <= 5 * 200


# For the length of a block


class Network:
    """What lies between a holder and its Index: answers on its own, and can fail."""

    def __init__(self, locks: SectorLocks, nursery: trio.Nursery) -> None:
        self._dispatch = Dispatcher(lock_methods(locks))
        self._nursery = nursery
        self.away: set[str] = set()
        """Methods whose questions fail."""
        self.mute: set[str] = set()
        """Methods whose answers never come."""
        self.asked: list[str] = []

    async def post(self, body: bytes, patience: float) -> tuple[int, bytes]:
        """As on a wire, the server goes on when the client is gone."""
        method = next(
            name for name in ("RenewLock", "ReleaseLock", "Lock") if name.encode() in body
        )
        self.asked.append(method)
        await trio.lowlevel.checkpoint()
        if method in self.away:
            raise Unreachable("cannot connect", RPC_URL)
        answered = trio.Event()
        answer: list[tuple[int, bytes]] = []

        async def work() -> None:
            answer.append(await self._dispatch(body, ADMIN))
            answered.set()

        self._nursery.start_soon(work)
        if method in self.mute:
            await trio.sleep_forever()
        await answered.wait()
        return answer[0]


class Holder:
    """A node that takes locks of an Index over a network."""

    def __init__(self, index: SectorLocks, network: Network) -> None:
        self.index = index
        self.network = network
        self.leases = Leases(RpcIndex(RPC_URL, network.post), owner="holder")

    @asynccontextmanager
    async def holding(self, wait: float = 0) -> AsyncIterator[Held]:
        async with self.leases.held(sector(7), write=S, reason="a test", wait=wait) as held:
            yield held


@pytest.fixture
async def holder() -> AsyncIterator[Holder]:
    """Without a disk, so that nothing happens but on the loop."""

    async def record(granted: Lease | None, now_ns: int, ended: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        index = Lessor(record, Clock())
        yield Holder(index, Network(index, nursery))
        nursery.cancel_scope.cancel()


async def test_a_block_holds_its_lock_and_gives_it_back(holder: Holder) -> None:
    async with holder.holding() as held:
        held.check()
        (status,) = await holder.index.leases()
        assert (status.owner, status.reason, status.lock.write) == ("holder", "a test", S)
        assert not await holder.index.lock(B)
    assert await holder.index.leases() == []


async def test_a_block_is_renewed_for_as_long_as_it_lasts(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    async with holder.holding() as held:
        for count in range(1, 8):
            mock_clock.jump(20)
            await wait_all_tasks_blocked()
            held.check()
            assert holder.network.asked.count("RenewLock") == count
        assert await owners(holder.index) == ["holder"]


async def test_a_lock_that_others_have_is_refused_and_leaves_nothing(holder: Holder) -> None:
    await holder.index.lock(A)
    with pytest.raises(Locked, match="storage locks"):
        async with holder.holding():
            raise AssertionError("was held")
    assert await owners(holder.index) == ["a"]


async def test_a_wait_for_a_lock_ends_refused_and_leaves_nothing(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    await holder.index.lock(lease("a", write=S, seconds=600))
    refused = trio.Event()

    async def work() -> None:
        with pytest.raises(Locked):
            async with holder.holding(wait=40):
                raise AssertionError("was held")
        refused.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        for _ in range(4):
            await wait_all_tasks_blocked()
            assert not refused.is_set()
            mock_clock.jump(10)
    assert await owners(holder.index) == ["a"]


async def test_a_wait_is_granted_when_the_lock_is_free(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    await holder.index.lock(A)
    granted = trio.Event()

    async def work() -> None:
        async with holder.holding(wait=1000) as held:
            held.check()
            granted.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        for _ in range(5):
            await wait_all_tasks_blocked()
            mock_clock.jump(11)
            await holder.index.renew(A.token)
        await wait_all_tasks_blocked()
        await holder.index.release(A.token)
        await granted.wait()
    assert await owners(holder.index) == []


async def test_blocks_that_wait_come_before_those_that_come_later(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    reader = lease("reader", read=S)
    await holder.index.lock(reader)
    order: list[str] = []

    async def work(name: str, **types: int) -> None:
        async with holder.leases.held(sector(7), **types, reason=name, wait=100):
            order.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(work, "writer", write=S))
        await wait_all_tasks_blocked()
        nursery.start_soon(partial(work, "late", read=S))
        for _ in range(3):
            await wait_all_tasks_blocked()
            mock_clock.jump(1)
        assert order == []
        await holder.index.release(reader.token)
    assert order == ["writer", "late"]


@pytest.mark.parametrize("waits", [True, False])
async def test_a_cancelled_block_leaves_nothing_at_the_index(holder: Holder, waits: bool) -> None:
    if waits:
        await holder.index.lock(A)
    reached = trio.Event()

    async def work() -> None:
        async with holder.holding(wait=100):
            reached.set()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await wait_all_tasks_blocked()
        assert reached.is_set() is not waits
        nursery.cancel_scope.cancel()
    await holder.index.release(A.token)
    assert await holder.index.lock(B)


async def test_a_grant_whose_answer_never_came_is_taken_back(holder: Holder) -> None:
    holder.network.mute.add("Lock")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(holder.holding().__aenter__)
        await wait_all_tasks_blocked()
        assert await owners(holder.index) == ["holder"]
        nursery.cancel_scope.cancel()
    assert await owners(holder.index) == []


async def test_a_grant_of_a_holder_that_died_expires(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    holder.network.mute |= {"Lock"}
    holder.network.away |= {"ReleaseLock"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(holder.holding().__aenter__)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert await owners(holder.index) == ["holder"]
    mock_clock.jump(60)
    assert await owners(holder.index) == []


async def test_what_a_block_raises_is_raised(holder: Holder) -> None:
    with pytest.raises(Refused, match="its own"):
        async with holder.holding():
            raise Refused("its own")
    assert await holder.index.leases() == []


@pytest.mark.parametrize("how", ["away", "mute"])
async def test_a_block_that_cannot_be_renewed_ends_before_another_is_granted(
    holder: Holder, mock_clock: trio.testing.MockClock, how: str
) -> None:
    getattr(holder.network, how).add("RenewLock")
    ended_at: list[float] = []
    start = trio.current_time()

    async def hold() -> None:
        async with holder.holding():
            try:
                await trio.sleep_forever()
            finally:
                ended_at.append(trio.current_time() - start)

    async def work() -> None:
        with pytest.raises(LeaseLost, match="not renewed in time"):
            await hold()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        for _ in range(60):
            await wait_all_tasks_blocked()
            if ended_at:
                break
            assert not await holder.index.lock(B)
            mock_clock.jump(1)
    assert 50 <= ended_at[0] < 60


async def test_an_index_that_was_away_for_a_while_costs_nothing(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    holder.network.away.add("RenewLock")
    async with holder.holding() as held:
        for _ in range(40):
            await wait_all_tasks_blocked()
            mock_clock.jump(1)
        holder.network.away.clear()
        tried = holder.network.asked.count("RenewLock")
        assert tried > 10
        mock_clock.jump(1)
        await wait_all_tasks_blocked()
        assert holder.network.asked.count("RenewLock") == tried + 1
        mock_clock.jump(15)
        held.check()
    assert await owners(holder.index) == []


async def test_a_lease_the_index_does_not_know_ends_the_block(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    async def hold() -> None:
        async with holder.holding() as held:
            await holder.index.release(held.lease.token)
            mock_clock.jump(20)
            await trio.sleep_forever()

    with pytest.raises(LeaseLost, match="has ended") as caught:
        await hold()
    assert isinstance(caught.value.__cause__, LeaseLost)


async def test_a_block_that_did_not_notice_is_told_at_its_end(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    async with AsyncExitStack() as stack:
        held = await stack.enter_async_context(holder.holding())
        mock_clock.jump(55)  # as if the process had been stopped
        with pytest.raises(LeaseLost, match="not renewed in time"):
            held.check()
        with pytest.raises(LeaseLost):
            await stack.aclose()
    with pytest.raises(LeaseLost):
        async with holder.holding():
            mock_clock.jump(55)


async def test_a_block_that_fails_because_its_lease_was_lost_says_so(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    async def fail() -> None:
        async with holder.holding() as held:
            held.lose("is gone")
            raise Refused("the file changed")

    with pytest.raises(LeaseLost) as caught:
        await fail()
    assert isinstance(caught.value.__cause__, Refused)


async def test_an_index_that_is_away_when_a_lock_is_wanted_is_asked_again(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    holder.network.away.add("Lock")
    with pytest.raises(Unreachable):
        async with holder.holding():
            raise AssertionError("was held")
    granted = trio.Event()

    async def work() -> None:
        async with holder.holding(wait=100):
            granted.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        for _ in range(5):
            await wait_all_tasks_blocked()
            mock_clock.jump(1)
        assert not granted.is_set()
        holder.network.away.clear()
        await wait_all_tasks_blocked()
        mock_clock.jump(1)
        await granted.wait()


async def test_an_index_that_stays_away_is_said_so_and_not_that_it_is_locked(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    holder.network.away.add("Lock")
    failed = trio.Event()

    async def work() -> None:
        with pytest.raises(Unreachable):
            async with holder.holding(wait=5):
                raise AssertionError("was held")
        failed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        for _ in range(10):
            await wait_all_tasks_blocked()
            mock_clock.jump(1)
        await failed.wait()


async def test_a_lock_that_cannot_be_given_back_is_told(
    holder: Holder, caplog: pytest.LogCaptureFixture, mock_clock: trio.testing.MockClock
) -> None:
    async with holder.holding():
        holder.network.away.add("ReleaseLock")
    assert "s-t01000-7 stays locked until the lease expires" in caplog.text
    caplog.clear()
    mock_clock.jump(60)
    holder.network.away.clear()
    holder.network.mute.add("ReleaseLock")

    async def work() -> None:
        async with holder.holding():
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await wait_all_tasks_blocked()
        mock_clock.jump(leases.RELEASE_SECONDS)
    assert "no answer" in caplog.text


async def test_a_lock_that_is_given_back_slowly_was_held_to_the_end(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    holder.network.away.add("RenewLock")
    holder.network.mute.add("ReleaseLock")

    async def work() -> None:
        async with holder.holding() as held:
            await trio.sleep_until(held.until - 1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        for _ in range(60):
            await wait_all_tasks_blocked()
            mock_clock.jump(1)


async def test_questions_that_wait_do_not_take_every_connection(
    holder: Holder, mock_clock: trio.testing.MockClock
) -> None:
    for number in range(40):
        await holder.index.lock(lease(f"a {number}", number, write=S, seconds=600))
    held: list[int] = []

    async def work(number: int) -> None:
        async with holder.leases.held(sector(number), write=S, reason="x", wait=1000):
            held.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(work, number)
        await wait_all_tasks_blocked()
        mock_clock.jump(1)
        await wait_all_tasks_blocked()
        before = len(holder.network.asked)
        assert before == 40 + leases.POLLS
        await holder.index.release(lease("a 39").token)
        for _ in range(20):
            await wait_all_tasks_blocked()
            mock_clock.jump(leases.POLL_SECONDS)
        assert held == [39]
        nursery.cancel_scope.cancel()


def test_a_lease_lasts_longer_than_a_wait_for_it() -> None:
    assert leases.POLL_SECONDS <= leases.LEASE_SECONDS / 4
    assert leases.LEASE_SECONDS <= checks.MAX_LEASE
