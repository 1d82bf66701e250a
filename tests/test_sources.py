"""The ranking of sources: a truth table, and its order is total."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.index.protocol import Declaration, FsStat, StorageInfo, StorageStatus
from sectorfs.stores.sources import LATENCY_STEP, LocalSource, PeerSource, View, rank, sharing
from sectorfs.types import Facts, FileType, SectorFile, SectorID, StorageID

FILE = SectorFile(FileType.SEALED, SectorID(1000, 7))
OWN = "http://own/remote"
FACTS = Facts(10, 5_000_000_001)
OLDER = Facts(10, 4_000_000_001)
OTHER = Facts(11, 5_000_000_001)


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A storage that declares the file, and what the node knows of it."""

    name: str
    urls: tuple[str, ...] | None = None
    here: bool = False
    weight: int = 10
    healthy: bool = True
    latency: float = 0.0
    failing: bool = False
    barred: bool = False
    primary: bool = True
    facts: Facts | None = FACTS

    @property
    def all_urls(self) -> tuple[str, ...]:
        return (f"http://{self.name}/remote",) if self.urls is None else self.urls


def view_of(*held: Held) -> View:
    by_name = {StorageID(one.name): one for one in held}
    # A URL belongs to a node, and several storages: what is known of it does not depend on order.
    by_url = {url: one for _, one in sorted(by_name.items()) for url in one.all_urls}
    return View(
        here=frozenset(name for name, one in by_name.items() if one.here),
        own_urls=frozenset((OWN,)),
        storage=lambda storage: status(by_name[storage]) if storage in by_name else None,
        healthy=lambda storage: by_name[storage].healthy,
        latency=lambda url: by_url[url].latency,
        failing=lambda url: by_url[url].failing,
        barred=lambda file, source: by_url[source.url].barred,
    )


def ranked(*held: Held) -> tuple[list[str], list[str]]:
    """Names of the local sources (``+`` when shared) and hosts of the peers, best first."""
    local, peers = rank([declared(one) for one in held], view_of(*held))
    assert all(isinstance(source, LocalSource) for source in local)
    assert all(isinstance(source, PeerSource) for source in peers)
    return (
        [f"{source.storage}{'+' * source.shared}" for source in local],
        [source.url.removeprefix("http://").removesuffix("/remote") for source in peers],
    )


def declared(one: Held) -> Declaration:
    return Declaration(FILE, StorageID(one.name), one.primary, one.facts)


def status(one: Held) -> StorageStatus:
    info = StorageInfo(storage=StorageID(one.name), urls=one.all_urls, weight=one.weight)
    return StorageStatus(info=info, stat=FsStat(), error="", last_heartbeat_ns=0, heartbeat_age=0.0)


A = Held(name="a")
LOCAL = Held(name="l", urls=(OWN,), here=True)
SHARED = Held(name="s", urls=("http://s/remote", OWN), here=True)


@pytest.mark.parametrize(
    ("held", "local", "peers"),
    [
        pytest.param([], [], [], id="nothing"),
        pytest.param([LOCAL], ["l"], [], id="a local path"),
        pytest.param([SHARED], ["s+"], ["s"], id="a shared path is also a peer's"),
        pytest.param([SHARED, LOCAL], ["l", "s+"], ["s"], id="local before shared"),
        pytest.param([A], [], ["a"], id="a peer"),
        pytest.param([LOCAL, A], ["l"], ["a"], id="a local path and a peer"),
        pytest.param(
            [msgspec.structs.replace(LOCAL, here=False)], [], [], id="ours and not here: no source"
        ),
        pytest.param(
            [msgspec.structs.replace(SHARED, here=False)], [], ["s"], id="ours, away, shared"
        ),
        pytest.param([Held(name="a", urls=())], [], [], id="without a URL"),
        pytest.param(
            [Held(name="a", urls=("http://y/remote", "http://x/remote"))],
            [],
            ["x", "y"],
            id="two URLs of one storage",
        ),
    ],
)
def test_kinds_of_sources(held: list[Held], local: list[str], peers: list[str]) -> None:
    for order in itertools.permutations(held):
        assert ranked(*order) == (local, peers)


RULES: list[dict[str, object]] = [
    {"barred": True},
    {"failing": True},
    {"healthy": False},
    {"facts": OLDER},
    {"latency": LATENCY_STEP},
    {"weight": 9},
]
"""One violation of each rule, the weightiest first."""
SAYS = Held(name="z", urls=())
"""Tells what the file is, and serves nothing."""


@pytest.mark.parametrize("worse", RULES)
def test_one_difference_decides(worse: dict[str, object]) -> None:
    """Not even the name, by which equal sources are ordered, helps the worse one."""
    bad = msgspec.structs.replace(Held(name="a"), **worse)
    for order in itertools.permutations((bad, Held(name="b"), SAYS)):
        assert ranked(*order)[1] == ["b", "a"]


def test_equal_sources_come_by_name() -> None:
    assert ranked(Held(name="b"), Held(name="a")) == ([], ["a", "b"])


@pytest.mark.parametrize("above", range(len(RULES) - 1))
def test_a_rule_beats_all_rules_below_it(above: int) -> None:
    bad_above = msgspec.structs.replace(Held(name="a"), **RULES[above])
    below = {key: value for rule in RULES[above + 1 :] for key, value in rule.items()}
    bad_below = msgspec.structs.replace(Held(name="b"), **below)
    assert ranked(bad_above, bad_below, SAYS)[1] == ["b", "a"]


def test_latency_within_a_step_does_not_beat_weight() -> None:
    quick = Held(name="a", latency=LATENCY_STEP * 0.1, weight=1)
    heavy = Held(name="b", latency=LATENCY_STEP * 0.9, weight=2)
    assert ranked(quick, heavy)[1] == ["b", "a"]


@pytest.mark.parametrize(
    ("facts", "primary", "serves"),
    [
        (FACTS, True, True),
        (FACTS, False, True),
        (Facts(10, 5_000_000_000), False, True),
        (OLDER, True, True),
        (OLDER, False, False),
        (OTHER, True, False),
        (OTHER, False, False),
        (None, True, True),
        (None, False, True),
    ],
)
@pytest.mark.parametrize("here", [False, True])
def test_another_content_is_no_source(
    facts: Facts | None, primary: bool, serves: bool, here: bool
) -> None:
    """The newest primary says what the file is; a copy of something else is never read."""
    urls = (OWN,) if here else None
    one = Held(name="a", urls=urls, here=here, facts=facts, primary=primary)
    if facts is not None and facts.size == 11 and primary:
        # Of two primaries with one time the lower id would win: make this the later one.
        one = msgspec.structs.replace(one, facts=Facts(11, 4_000_000_001))
    found = ranked(one, SAYS)[0 if here else 1]
    assert found == (["a"] if serves else [])


def test_storage_that_the_catalog_does_not_know_is_read_where_it_is_here() -> None:
    view = View(
        here=frozenset((StorageID("l"),)),
        own_urls=frozenset((OWN,)),
        storage=lambda _: None,
        healthy=lambda _: False,
        latency=lambda _: 0.0,
        failing=lambda _: False,
        barred=lambda file, source: False,
    )
    both = [declared(LOCAL), declared(A)]
    assert rank(both, view) == ([LocalSource(StorageID("l"), False)], [])


holders = st.lists(
    st.builds(
        Held,
        name=st.sampled_from("abcdef"),
        urls=st.one_of(
            st.none(),
            st.lists(st.sampled_from([OWN, "http://x/remote", "http://y/remote"]), unique=True).map(
                tuple
            ),
        ),
        here=st.booleans(),
        weight=st.integers(0, 2),
        healthy=st.booleans(),
        latency=st.sampled_from([0.0, 0.001, 0.006]),
        failing=st.booleans(),
        barred=st.booleans(),
        primary=st.booleans(),
        facts=st.sampled_from([None, FACTS, OLDER, OTHER]),
    ),
    unique_by=lambda held: held.name,
    max_size=5,
)


@given(holders, st.randoms())
def test_order_is_total(held: Sequence[Held], random: object) -> None:
    """However the declarations come, every reader of a node takes the same source."""
    shuffled = list(held)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # Hypothesis gives a random.Random
    assert ranked(*held) == ranked(*shuffled)
    local, peers = ranked(*held)
    assert "own" not in peers
    assert {name.rstrip("+") for name in local} <= {one.name for one in held if one.here}


def test_only_what_is_well_and_surely_alike_shares_a_file() -> None:
    held = (
        Held(name="first"),
        Held(name="copy", primary=False),
        Held(name="ill", healthy=False),
        Held(name="failing", failing=True),
        Held(name="other", facts=Facts(FACTS.size, FACTS.mtime_ns - 10**9)),
        Held(name="untold", facts=None),
        Held(name="own", urls=(OWN,)),
    )
    found = sharing([declared(one) for one in held], view_of(*held))
    assert {source.storage for source in found} == {"first", "copy"}
    assert {source.url for source in found} == {"http://first/remote", "http://copy/remote"}
