"""Which declaration says what a file is, and which may serve its bytes."""

from __future__ import annotations

import pytest

from sectorfs.index.content import eligible, exact, present_facts, same_mtime
from sectorfs.index.protocol import Declaration
from sectorfs.types import Facts, MemberFacts
from tests.index_fixtures import digested, held

S = 10**9
OLD, NEW = Facts(10, 5 * S), Facts(20, 9 * S)
NEW_1, NEW_2 = digested(NEW, 1), digested(NEW, 2)


def one(storage: str, facts: Facts | None, *, primary: bool = True) -> Declaration:
    return held(storage, 1, primary=primary, facts=facts)


@pytest.mark.parametrize(
    ("declarations", "expected"),
    [
        ([], None),
        ([one("a", None)], None),
        ([one("a", OLD), one("b", NEW)], NEW),
        ([one("a", NEW), one("b", OLD)], NEW),
        ([one("a", OLD), one("b", NEW, primary=False)], OLD),
        ([one("b", NEW, primary=False), one("a", OLD)], OLD),
        ([one("a", None), one("b", NEW, primary=False)], NEW),
        ([one("a", OLD, primary=False), one("b", NEW, primary=False)], NEW),
        ([one("b", Facts(2, 5 * S)), one("a", Facts(1, 5 * S))], Facts(1, 5 * S)),
        ([one("a", Facts(1, 5 * S)), one("b", Facts(2, 5 * S))], Facts(1, 5 * S)),
        ([one("a", NEW_1), one("b", OLD)], NEW_1),
        ([one("a", NEW), one("b", NEW_1)], NEW_1),
        ([one("a", NEW), one("b", NEW_1, primary=False)], NEW_1),
        ([one("c", NEW_2, primary=False), one("a", NEW), one("b", NEW_1)], NEW_1),
        ([one("c", NEW_2, primary=False), one("b", NEW_1, primary=False), one("a", NEW)], NEW_1),
        ([one("a", NEW), one("b", digested(OLD, 1))], NEW),
        ([one("a", NEW), one("b", digested(Facts(20, 8 * S), 1), primary=False)], NEW),
        (
            [one("a", Facts(20, 9 * S + 7)), one("b", NEW_1, primary=False)],
            digested(Facts(20, 9 * S + 7), 1),
        ),
        ([one("a", None), one("b", NEW_1, primary=False)], NEW_1),
    ],
)
def test_present_facts(declarations: list[Declaration], expected: Facts | None) -> None:
    assert present_facts(declarations) == expected


@pytest.mark.parametrize(
    ("declarations", "storages"),
    [
        ([], ""),
        ([one("a", None), one("b", None, primary=False)], "ab"),
        ([one("a", NEW), one("b", OLD)], "a"),
        ([one("a", NEW), one("b", Facts(20, 1))], "ab"),
        ([one("a", NEW), one("b", Facts(20, 1), primary=False)], "a"),
        ([one("a", NEW), one("b", NEW, primary=False)], "ab"),
        ([one("a", NEW), one("b", Facts(21, 9 * S), primary=False)], "a"),
        ([one("a", Facts(20, 9 * S + 7)), one("b", NEW, primary=False)], "ab"),
        ([one("a", NEW), one("b", None, primary=False), one("c", None)], "abc"),
        ([one("a", NEW_1), one("b", NEW_1), one("c", NEW_1, primary=False)], "abc"),
        ([one("a", NEW_1), one("b", NEW_2), one("c", NEW_2, primary=False)], "a"),
        ([one("a", NEW_1), one("b", NEW), one("c", NEW, primary=False)], "abc"),
        ([one("a", NEW), one("b", NEW_1), one("c", NEW_2, primary=False)], "ab"),
        ([one("a", NEW_1), one("b", digested(Facts(20, 1), 1)), one("c", Facts(20, 1))], "abc"),
        ([one("a", NEW_1), one("b", digested(Facts(20, 1), 2))], "a"),
    ],
)
def test_eligible(declarations: list[Declaration], storages: str) -> None:
    assert "".join(found.storage for found in eligible(declarations)) == storages


@pytest.mark.parametrize(
    ("facts", "expected"),
    [(NEW, True), (Facts(20, 9 * S + 1), True), (Facts(21, 9 * S), False), (None, False)],
)
def test_exact(facts: Facts | None, expected: bool) -> None:
    assert exact(one("a", facts, primary=False), NEW) is expected
    assert exact(one("a", facts, primary=False), NEW_1) is expected
    if facts is not None:
        assert exact(one("a", digested(facts, 1), primary=False), NEW_1) is expected
        assert not exact(one("a", digested(facts, 2), primary=False), NEW_1)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ((MemberFacts("a", 4, 7), MemberFacts("b", 6, 8)), True),
        ((MemberFacts("a", 4, 7), MemberFacts("b", 6, 9)), False),
        ((MemberFacts("a", 5, 7), MemberFacts("b", 5, 8)), False),
        ((MemberFacts("a", 4, 7), MemberFacts("c", 6, 8)), False),
        ((MemberFacts("a", 10, 7),), False),
        (None, False),
    ],
)
def test_a_directory_is_exact_when_each_of_its_files_is(
    members: tuple[MemberFacts, ...] | None, expected: bool
) -> None:
    wanted = Facts(10, S, (MemberFacts("a", 4, 7), MemberFacts("b", 6, 8)))
    assert exact(one("a", Facts(10, S, members), primary=False), wanted) is expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (5 * S + 1, 5 * S + 1, True),
        (5 * S, 5 * S + 999_999_999, True),
        (5 * S, 6 * S, False),
        (5 * S, 4 * S + 999_999_999, False),
        (5 * S + 1, 5 * S + 2, False),
        (-S, -S + 5, True),
        (-S, -S - 5, False),
    ],
)
def test_same_mtime(first: int, second: int, expected: bool) -> None:
    assert same_mtime(first, second) is expected
    assert same_mtime(second, first) is expected
