"""The column of digests beside a list, and the memory it does not take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sectorfs.index.digests import Digests

ONE = st.sampled_from([b"", b"", b"\1" * 32, b"\0" * 31 + b"\2"])
SOME = st.lists(ONE, max_size=6)


class Beside(RuleBasedStateMachine):
    """Whatever is done to it, it says what a list would."""

    def __init__(self) -> None:
        super().__init__()
        self.column = Digests()
        self.model: list[bytes] = []

    @rule(data=st.data(), digest=ONE)
    def insert(self, data: st.DataObject, digest: bytes) -> None:
        position = data.draw(st.integers(0, len(self.model)))
        self.column.insert(position, digest)
        self.model.insert(position, digest)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), digest=ONE)
    def put(self, data: st.DataObject, digest: bytes) -> None:
        position = data.draw(st.integers(0, len(self.model) - 1))
        self.column.put(position, digest)
        self.model[position] = digest

    @rule(data=st.data())
    def take_out(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(self.model)))
        end = data.draw(st.integers(start, len(self.model)))
        del self.column[start:end]
        del self.model[start:end]

    @rule(digests=SOME)
    def extend(self, digests: list[bytes]) -> None:
        self.column.extend(Digests.of(digests))
        self.model += digests

    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(self.model)))
        end = data.draw(st.integers(start, len(self.model)))
        part = self.column.part(start, end)
        assert [*part] == self.model[start:end]
        part.extend(Digests.of([b"\7" * 32]))  # a copy

    @invariant()
    def it_is_the_list(self) -> None:
        assert [*self.column] == self.model
        assert len(self.column) == len(self.model)
        assert self.column == Digests.of(self.model)
        assert self.column != Digests.of([*self.model, b""])
        assert bool(self.column.known) == any(self.model)
        assert len(self.column.known) in (0, 32 * len(self.model))


TestBeside = Beside.TestCase


@given(digests=st.lists(st.none() | ONE, max_size=6))
def test_none_is_one_that_is_not_known(digests: list[bytes | None]) -> None:
    column = Digests.of(digests)
    assert [*column] == [one or b"" for one in digests]
    assert Digests(len(digests), column.known) == column
    assert Digests(len(digests), bytes(column.known)) == column


def test_it_is_equal_to_nothing_else() -> None:
    assert Digests() != []
    assert Digests.of([b"\1" * 32]) != Digests.of([b"\2" * 32])
