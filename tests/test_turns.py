"""Turns of sector files: one change at a time, and no moves that wait for each other for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.errors import Refused, SectorFSError
from sectorfs.stores.turns import MOMENT, Turn, Turns
from sectorfs.types import SectorFile, StorageID
from tests.moving_fixtures import CACHE, SEALED, Rig, clone, content, there, two_nodes

A, B, C = StorageID("a"), StorageID("b"), StorageID("c")


async def test_changes_of_one_file_come_one_after_the_other_in_order() -> None:
    turns, order = Turns(), list[int]()

    async def change(number: int, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        async with turns.of(SEALED):
            order.append(number)
            await trio.testing.wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        async with turns.of(SEALED):
            for number in range(5):
                await nursery.start(change, number)
                await trio.testing.wait_all_tasks_blocked()
            async with turns.of(CACHE):  # another file waits for nobody
                assert order == []
    assert order == [0, 1, 2, 3, 4]
    assert turns._lines == {}


async def test_whoever_is_cancelled_while_waiting_holds_up_nobody() -> None:
    turns = Turns()
    async with trio.open_nursery() as nursery:
        async with turns.of(SEALED):
            with trio.CancelScope() as scope:
                nursery.start_soon(_cancel_soon, scope)
                async with turns.of(SEALED):
                    raise AssertionError("got a turn that was held")
            assert scope.cancelled_caught
        async with turns.of(SEALED):
            pass
    assert turns._lines == {}


async def _cancel_soon(scope: trio.CancelScope) -> None:
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()


def turn(to: StorageID | None, *, asks: bool = False) -> Turn:
    made = Turn(to, lambda: None)
    made.asks = asks
    return made


@pytest.mark.parametrize(
    ("holder", "by", "refused"),
    [
        (turn(None), None, False),  # a removal, or a copy that is fetched: it ends by itself
        (turn(None), A, False),
        (turn(B), None, True),  # the destination of a move cannot lose the file
        (turn(B), A, False),  # not at once: it may soon be refused itself
        (turn(B), C, True),
        (turn(B, asks=True), None, True),
        (turn(B, asks=True), A, False),  # it is refused itself where it asks
        (turn(B, asks=True), B, True),
        (turn(B, asks=True), C, True),
    ],
)
def test_who_waits_and_who_is_refused(holder: Turn, by: StorageID | None, refused: bool) -> None:
    assert holder.refuses(by) is refused


@given(st.permutations(range(6)), st.integers(2, 6))
def test_no_ring_of_moves_waits_for_ever(order: list[int], length: int) -> None:
    """Each has its turn, and asks the next one: somebody is refused, and somebody is not."""
    ring = [turn(StorageID(f"storage-{number}"), asks=True) for number in order[:length]]
    asks = list(zip(ring, ring[1:] + ring[:1], strict=True))
    refused = [one for one, next_one in asks if next_one.refuses(one.to)]
    assert 0 < len(refused) < length


async def test_a_request_that_waits_is_refused_when_a_move_gets_the_turn() -> None:
    turns = Turns()
    refused = trio.Event()

    async def ask(by: StorageID) -> None:
        with pytest.raises(Refused, match="is being moved to b"):
            async with turns.asked(SEALED, by):
                raise AssertionError("got a turn that was held")
        refused.set()

    async def move() -> None:
        async with turns.of(SEALED, to=B):
            await refused.wait()

    async with trio.open_nursery() as nursery:
        async with turns.of(SEALED):
            nursery.start_soon(move)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask, A)
            await trio.testing.wait_all_tasks_blocked()
            assert not refused.is_set()
        with trio.fail_after(5):
            await refused.wait()
    assert turns._lines == {}


@pytest.mark.parametrize("asks", [True, False])
async def test_a_request_that_goes_first_waits_a_moment_for_a_move_to_ask(
    autojump_clock: trio.testing.MockClock, asks: bool
) -> None:
    """Refused at once it might refuse the other's request yet: then neither would be done."""
    turns, start, outcome = Turns(), trio.current_time(), list[object]()

    async def ask() -> None:
        try:
            async with turns.asked(SEALED, A):
                outcome.append("granted")
        except Refused as exc:
            outcome.append(exc)

    async with trio.open_nursery() as nursery:
        async with turns.of(SEALED, to=B) as held:
            nursery.start_soon(ask)
            await trio.sleep(MOMENT / 2)
            assert outcome == []
            if asks:
                held.ask()
                await trio.sleep(10 * MOMENT)
                assert outcome == []
            else:
                await trio.sleep(MOMENT)  # it copies for long
                assert isinstance(outcome[0], Refused)
                assert trio.current_time() - start <= 1.5 * MOMENT
    assert asks == (outcome == ["granted"])
    assert turns._lines == {}


async def test_a_request_waits_for_a_move_that_will_be_refused_elsewhere() -> None:
    turns = Turns()
    granted = trio.Event()

    async def ask() -> None:
        async with turns.asked(SEALED, A):
            granted.set()

    async with trio.open_nursery() as nursery:
        async with turns.of(SEALED, to=B) as held:
            held.ask()
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert not granted.is_set()
        with trio.fail_after(5):
            await granted.wait()


@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_opposite_moves_of_two_nodes_decide_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: SectorFile
) -> None:
    """Both have made sure of their own copy, and ask the other node to remove the other one."""
    async with two_nodes(tmp_path) as (here, away):
        copies = [await here.put("mine", file), away.path("theirs") / str(file)]
        whole = content(copies[0])
        copies[1].parent.mkdir(exist_ok=True)
        clone(*copies)
        await away.store.redeclare()
        ids = {**here.ids, **away.ids}
        here.ids.update(ids)
        asking = [trio.Event(), trio.Event()]
        for one, own, other in ((here, *asking), (away, *reversed(asking))):
            remove = one.mover._peers.remove

            async def removing(*arguments, own=own, other=other, remove=remove, **options):  # type: ignore[no-untyped-def]
                own.set()
                await other.wait()
                await remove(*arguments, **options)

            monkeypatch.setattr(one.mover._peers, "remove", removing)
        outcomes: dict[str, object] = {}

        async def move(parts: Rig, to: str, source: str) -> None:
            try:
                outcomes[to] = await parts.mover.move(file, ids[to], source=ids[source])
            except SectorFSError as exc:
                outcomes[to] = exc

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(move, here, "mine", "theirs")
                nursery.start_soon(move, away, "theirs", "mine")
        winner, loser = sorted(("mine", "theirs"), key=ids.__getitem__)
        assert isinstance(outcomes[loser], Refused)
        assert f"is being moved to {ids[winner]}" in str(outcomes[loser])
        assert not isinstance(outcomes[winner], Exception)
        assert await here.holders(file) == {winner: True}
        left = [path for path in copies if there(path)]
        assert [content(path) for path in left] == [whole]
        assert here.litter() == []
