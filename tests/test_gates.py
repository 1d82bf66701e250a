"""Places by priority: readers first, the last ones never for bulk, none lost by cancellation."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from sectorfs.stores.gates import Gate, Priority

READ, AHEAD, FILL, SCRUB = Priority.READ, Priority.AHEAD, Priority.FILL, Priority.SCRUB


class Users:
    """Tasks that take a place each and give it back when told."""

    def __init__(self, gate: Gate, nursery: trio.Nursery) -> None:
        self.gate = gate
        self.nursery = nursery
        self.inside: list[str] = []
        self._leave: dict[str, trio.Event] = {}
        self._scopes: dict[str, trio.CancelScope] = {}

    async def come(self, name: str, priority: Priority) -> None:
        self._leave[name] = trio.Event()
        self._scopes[name] = trio.CancelScope()
        self.nursery.start_soon(self._stay, name, priority)
        await wait_all_tasks_blocked()

    async def _stay(self, name: str, priority: Priority) -> None:
        with self._scopes[name]:
            async with self.gate.place(priority):
                self.inside.append(name)
                try:
                    await self._leave[name].wait()
                finally:
                    self.inside.remove(name)

    async def go(self, name: str) -> None:
        self._leave[name].set()
        await wait_all_tasks_blocked()

    async def cancel(self, name: str) -> None:
        self._scopes[name].cancel()
        await wait_all_tasks_blocked()


async def test_the_more_wanted_goes_first(nursery: trio.Nursery) -> None:
    users = Users(Gate(1), nursery)
    await users.come("first", SCRUB)
    for name, priority in (("s", SCRUB), ("f", FILL), ("r1", READ), ("a", AHEAD), ("r2", READ)):
        await users.come(name, priority)
    order = []
    for _ in range(6):
        (inside,) = users.inside
        order.append(inside)
        await users.go(inside)
    assert order == ["first", "r1", "r2", "a", "f", "s"]
    assert users.gate.taken == 0


async def test_the_last_places_are_for_readers(nursery: trio.Nursery) -> None:
    users = Users(Gate(3, reserved=1), nursery)
    for name in ("a", "b", "c"):
        await users.come(name, FILL)
    assert users.inside == ["a", "b"]
    await users.come("reader", READ)
    assert users.inside == ["a", "b", "reader"]
    await users.go("reader")
    assert users.inside == ["a", "b"]
    await users.go("a")
    assert users.inside == ["b", "c"]


async def test_a_waiting_reader_keeps_nobody_from_a_place_he_cannot_use(
    nursery: trio.Nursery,
) -> None:
    users = Users(Gate(2, reserved=1), nursery)
    await users.come("r1", READ)
    await users.come("r2", READ)
    await users.come("f", FILL)
    await users.go("r1")
    assert users.inside == ["r2"]  # one place is free, and kept
    await users.go("r2")
    assert users.inside == ["f"]


async def test_the_cancelled_leave_nothing(nursery: trio.Nursery) -> None:
    users = Users(Gate(1), nursery)
    await users.come("inside", READ)
    await users.come("waits", READ)
    await users.come("next", FILL)
    assert users.gate.waiting == 2
    await users.cancel("waits")
    assert users.gate.waiting == 1
    await users.cancel("inside")
    assert users.inside == ["next"]
    await users.go("next")
    assert (users.gate.taken, users.gate.waiting) == (0, 0)


async def test_cancelled_in_the_moment_of_admission(nursery: trio.Nursery) -> None:
    gate = Gate(1)
    users = Users(gate, nursery)
    await users.come("inside", READ)
    await users.come("waits", READ)
    users._leave["inside"].set()
    users._scopes["waits"].cancel()
    await wait_all_tasks_blocked()
    assert (gate.taken, gate.waiting, users.inside) == (0, 0, [])
    with trio.fail_after(5):
        async with gate.place(SCRUB):
            assert gate.taken == 1


@given(
    st.integers(1, 4).flatmap(lambda width: st.tuples(st.just(width), st.integers(0, width - 1))),
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from(list(Priority))), max_size=30),
)
def test_never_too_many(widths: tuple[int, int], steps: list[tuple[int, Priority]]) -> None:
    width, reserved = widths

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            users = Users(Gate(width, reserved=reserved), nursery)
            known: dict[str, Priority] = {}
            for number, (which, priority) in enumerate(steps):
                names = list(known)
                if which < 4 or not names:
                    known[str(number)] = priority
                    await users.come(str(number), priority)
                else:
                    name = names[number % len(names)]
                    del known[name]
                    leaves = which < 6 and name in users.inside
                    await (users.go(name) if leaves else users.cancel(name))
                inside = [known[name] for name in users.inside if name in known]
                background = [one for one in inside if one is not READ]
                assert users.gate.taken == len(users.inside) <= width
                assert len(background) <= width - reserved
                waiting = [one for name, one in known.items() if name not in users.inside]
                assert users.gate.waiting == len(waiting)
                if READ in waiting:
                    assert len(users.inside) == width
                elif waiting:
                    assert len(users.inside) >= width - reserved
            nursery.cancel_scope.cancel()

    trio.run(run)


@pytest.mark.parametrize("reserved", [-1, 2, 3])
def test_somebody_must_be_let_in(reserved: int) -> None:
    with pytest.raises(AssertionError):
        Gate(2, reserved=reserved)
