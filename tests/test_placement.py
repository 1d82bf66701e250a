"""Truth tables of placement: every rule alone, and all of them together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from index_fixtures import held, info, sector

from sectorfs.errors import BadInput
from sectorfs.index import placement
from sectorfs.index.protocol import FsStat, PathType, StorageStatus
from sectorfs.types import FileType, SectorID, file_types

KIB, MIB, GIB = 2**10, 2**20, 2**30
CUTOFF = 50.0
SEALED, CACHE, PIECE = FileType.SEALED, FileType.CACHE, FileType.PIECE


def status(
    storage: str = "a", *, available: int = 100, age: float = 0, error: str = "", **fields: object
) -> StorageStatus:
    return StorageStatus(
        info=info(storage, **fields),
        stat=FsStat(capacity=available, available=available),
        error=error,
        last_heartbeat_ns=0,
        heartbeat_age=age,
    )


# Space

ROWS = {
    10: (2048, 8388608, 536870912, 34359738368, 68719476736),
    141: (28876, 118279372, 7569879859, 484472310988, 968944621977),
    21: (4300, 17616076, 1127428915, 72155450572, 144310901145),
    111: (22732, 93113548, 5959267123, 381393095884, 762786191769),
    11: (2252, 9227468, 590558003, 37795712204, 75591424409),
    2: (409, 1677721, 107374182, 6871947673, 13743895347),
    1: (204, 838860, 53687091, 3435973836, 6871947673),
}
SIZES = (2 * KIB, 8 * MIB, 512 * MIB, 32 * GIB, 64 * GIB)
TABLES: dict[PathType, dict[FileType, int]] = {
    "sealing": {
        FileType.UNSEALED: 10,
        FileType.SEALED: 10,
        FileType.CACHE: 141,
        FileType.UPDATE: 10,
        FileType.UPDATE_CACHE: 21,
        FileType.PIECE: 10,
        FileType.KEY: 111,
    },
    "storage": {
        FileType.UNSEALED: 10,
        FileType.SEALED: 10,
        FileType.CACHE: 1,
        FileType.UPDATE: 10,
        FileType.UPDATE_CACHE: 1,
        FileType.PIECE: 10,
        FileType.KEY: 10,
    },
}


@pytest.mark.parametrize("count", ROWS)
def test_tenths_are_rounded_down(count: int) -> None:
    assert tuple(placement.tenths(count, size) for size in SIZES) == ROWS[count]


@pytest.mark.parametrize("path_type", TABLES)
@pytest.mark.parametrize("file_type", FileType)
def test_space_of_every_type(file_type: FileType, path_type: PathType) -> None:
    for size, expected in zip(SIZES, ROWS[TABLES[path_type][file_type]], strict=True):
        assert placement.space_needed([file_type], size, path_type=path_type) == expected


@pytest.mark.parametrize("path_type", TABLES)
def test_space_of_every_mask_is_the_sum_of_what_each_type_rounds_to(path_type: PathType) -> None:
    for mask in range(1, 128):
        types = file_types(mask)
        expected = sum(ROWS[TABLES[path_type][one]][0] for one in types)
        assert placement.space_needed(types, 2 * KIB, path_type=path_type) == expected


def test_no_size_needs_no_space() -> None:
    assert placement.space_needed(tuple(FileType), 0, path_type="sealing") == 0


@pytest.mark.parametrize(
    "size", [-1, 2**63, 2**64, 1 << 20_000], ids=["negative", "63 bits", "64 bits", "long"]
)
def test_sector_sizes_beyond_63_bits_are_refused(size: int) -> None:
    with pytest.raises(BadInput, match="sector size"):
        placement.space_needed([SEALED], size, path_type="storage")


def test_needs_beyond_63_bits_are_refused() -> None:
    largest = 2**63 - 1
    assert placement.space_needed([SEALED], largest, path_type="storage") == largest
    with pytest.raises(BadInput, match="space needed"):
        placement.space_needed([SEALED, FileType.UNSEALED], largest, path_type="storage")
    with pytest.raises(BadInput, match="space needed"):
        placement.space_needed([CACHE], 2**62, path_type="sealing")


# Type filter


@pytest.mark.parametrize(
    ("allow", "deny"),
    list(
        itertools.product(
            [(), ("sealed",), ("cache",), ("seeled",), ("sealed", "cache"), ("seeled", "sealed")],
            [(), ("sealed",), ("cache",), ("seeled",), ("sealed", "cache"), ("seeled", "sealed")],
        )
    ),
)
def test_type_filter(allow: tuple[str, ...], deny: tuple[str, ...]) -> None:
    filtered = info("a", allow_types=allow, deny_types=deny)
    for file_type in FileType:
        denied = (bool(allow) and file_type.dir_name not in allow) or file_type.dir_name in deny
        assert placement.allows_type(filtered, file_type) is not denied


@pytest.mark.parametrize("allow", [("seeled",), ("Sealed",), ("sealed ",), ("2",), ("s", "c")])
def test_an_allow_list_of_typing_errors_denies_every_type(allow: tuple[str, ...]) -> None:
    filtered = info("a", allow_types=allow)
    assert not any(placement.allows_type(filtered, file_type) for file_type in FileType)


def test_a_deny_list_of_typing_errors_denies_nothing() -> None:
    filtered = info("a", deny_types=("seeled",))
    assert all(placement.allows_type(filtered, file_type) for file_type in FileType)


# Miner filter


@pytest.mark.parametrize(
    ("address", "miner"),
    [
        ("t01000", 1000),
        ("f01000", 1000),
        ("t00", 0),
        ("f001000", 1000),
        ("t09223372036854775807", 2**63 - 1),
    ],
)
def test_addresses_that_parse(address: str, miner: int) -> None:
    assert placement.parse_miner(address) == miner


BAD_ADDRESSES = [
    "",
    "t0",
    "1000",
    "t1000",
    "x01000",
    "T01000",
    " t01000",
    "t01000\n",
    "t0-5",
    "t0١",
    "t09223372036854775808",
    "t0" + "9" * 5000,
    "f1abjxfbp274xpdqcpuaykwkfb43omjotacm2p3za",
]


@pytest.mark.parametrize("address", BAD_ADDRESSES)
def test_addresses_that_do_not_parse(address: str) -> None:
    with pytest.raises(ValueError, match="not a miner's address"):
        placement.parse_miner(address)


@pytest.mark.parametrize(
    ("allow", "deny", "allowed"),
    [
        ((), (), True),
        ((), ("t01000",), False),
        ((), ("t01001",), True),
        ((), ("bad",), True),
        ((), ("bad", "t01000"), False),
        (("t01000",), (), True),
        (("f01000",), (), True),
        (("t01000",), ("f01000",), False),
        (("t01000",), ("t01001",), True),
        (("t01000",), ("bad",), True),
        (("t01001",), (), False),
        (("t01001",), ("t01000",), False),
        (("t01001",), ("bad",), False),
        (("bad",), (), False),
        (("bad",), ("bad",), False),
        (("bad", "t01000"), (), True),
        (("bad", "t01000"), ("t01000",), False),
    ],
)
def test_miner_filter(allow: tuple[str, ...], deny: tuple[str, ...], allowed: bool) -> None:
    filtered = info("a", allow_miners=allow, deny_miners=deny)
    assert placement.allows_miner(filtered, 1000) is allowed


@pytest.mark.parametrize("allow", [(), ("t01000",), ("bad",)])
@pytest.mark.parametrize("deny", [(), ("t01000",), ("t00",)])
def test_pieces_pass_every_miner_filter(allow: tuple[str, ...], deny: tuple[str, ...]) -> None:
    assert placement.allows_miner(info("a", allow_miners=allow, deny_miners=deny), 0)


def test_odd_entries_are_told_by_field() -> None:
    filtered = info(
        "a",
        allow_types=("sealed", "seeled"),
        deny_types=("cash",),
        allow_miners=("t01000", "x" * 200),
        deny_miners=("t1", "f02"),
    )
    assert placement.odd_filters(filtered) == (
        "allow_types 'seeled'",
        "deny_types 'cash'",
        f"allow_miners '{'x' * 80}'",
        "deny_miners 't1'",
    )
    assert placement.odd_filters(info("a", allow_types=("key",), deny_miners=("f02",))) == ()


# One file on one storage


@pytest.mark.parametrize(
    ("can_seal", "can_store", "path_type", "allow", "miners"),
    list(
        itertools.product(
            [False, True],
            [False, True],
            TABLES,
            [(), ("sealed",), ("cache",)],
            [(), ("t01",), ("t02",)],
        )
    ),
)
def test_accepts(
    can_seal: bool,
    can_store: bool,
    path_type: PathType,
    allow: tuple[str, ...],
    miners: tuple[str, ...],
) -> None:
    storage = info(
        "a", can_seal=can_seal, can_store=can_store, allow_types=allow, allow_miners=miners
    )
    purpose = can_seal if path_type == "sealing" else can_store
    assert placement.fits(storage, path_type) is purpose
    expected = purpose and "cache" not in allow and "t02" not in miners
    assert placement.accepts(storage, SEALED, path_type=path_type, miner=1) is expected


# Best allocation


def names(statuses: Iterable[StorageStatus], **changes: object) -> list[str]:
    arguments: dict[str, object] = {"path_type": "storage", "miner": 1000, "cutoff": CUTOFF}
    size = changes.pop("sector_size", 100)
    types = changes.pop("types", (SEALED,))
    storages = placement.best_alloc(statuses, types, size, **{**arguments, **changes})
    return [storage.storage for storage in storages]


FLAWS = {
    "purpose": {"can_store": False, "can_seal": True},
    "room": {"available": 99},
    "age": {"age": 50.001},
    "error": {"error": "gone"},
    "denied": {"deny_miners": ("t01000",)},
    "not allowed": {"allow_miners": ("t01001",)},
}


@pytest.mark.parametrize("count", range(len(FLAWS) + 1))
def test_best_alloc_takes_only_what_has_no_flaw(count: int) -> None:
    for chosen in itertools.combinations(FLAWS, count):
        fields = {"can_store": True, "age": 50, "allow_miners": ("bad", "f01000")}
        for flaw in chosen:
            fields |= FLAWS[flaw]
        assert names([status(**fields)]) == ([] if chosen else ["a"])


def test_best_alloc_leaves_type_filters_and_groups_to_the_caller() -> None:
    fields = {"can_store": True, "allow_types": ("cache",), "deny_types": ("sealed",)}
    assert names([status(**fields, groups=("x",), allow_to=("y",))]) == ["a"]


def test_best_alloc_needs_room_for_all_types_by_the_table_of_the_purpose() -> None:
    path = status(can_store=True, can_seal=True, available=111)
    both = (SEALED, CACHE)
    assert names([path], types=both) == ["a"]
    assert names([path], types=both, path_type="sealing") == []
    assert names([path], types=both, sector_size=101) == ["a"]
    assert names([path], types=both, sector_size=102) == []


def test_best_alloc_places_pieces_whatever_the_miner_filter() -> None:
    path = status(can_store=True, allow_miners=("t01001",))
    assert names([path], types=(PIECE,), miner=0) == ["a"]


def test_best_alloc_multiplies_without_overflow_or_rounding() -> None:
    huge = 2**63 - 1
    paths = [
        status("a", can_store=True, available=huge - 1, weight=huge),
        status("b", can_store=True, available=huge, weight=huge),
        status("c", can_store=True, available=2**32, weight=2**32),
    ]
    assert names(paths) == ["b", "a", "c"]
    # As floats the products would be equal, and the larger room would win.
    paths = [
        status("a", can_store=True, available=2**62 + 1, weight=2**62 - 1),
        status("b", can_store=True, available=2**62, weight=2**62),
    ]
    assert names(paths) == ["b", "a"]


def test_equals_are_ordered_alike_on_every_node() -> None:
    paths = [
        status("d", can_store=True, available=100, weight=4),
        status("c", can_store=True, available=200, weight=2),
        status("b", can_store=True, available=400, weight=1),
        status("a", can_store=True, available=200, weight=2),
        status("f", can_store=True, available=300, weight=0),
        status("e", can_store=True, available=400, weight=0),
    ]
    for order in itertools.permutations(paths):
        assert names(order) == ["b", "a", "c", "d", "e", "f"]


@given(
    st.lists(
        st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1)), min_size=1, max_size=6
    )
)
def test_best_alloc_is_sorted_by_the_exact_product(rooms: list[tuple[int, int]]) -> None:
    paths = [
        status(f"s{index}", can_store=True, available=available, weight=weight)
        for index, (available, weight) in enumerate(rooms)
    ]
    chosen = [rooms[int(name[1:])] for name in names(paths, sector_size=0)]
    products = [available * weight for available, weight in chosen]
    assert len(products) == len(rooms)
    assert products == sorted(products, reverse=True)


def test_best_alloc_refuses_sizes_beyond_63_bits() -> None:
    with pytest.raises(BadInput):
        names([], sector_size=2**63)
    with pytest.raises(BadInput):
        names([], types=(CACHE,), path_type="sealing", sector_size=2**62)


# Who may fetch

FETCH_FLAWS = {
    "no scratch": {"can_seal": False, "can_store": True},
    "room": {"available": 1509},
    "age": {"age": 50.001},
    "error": {"error": "gone"},
    "types": {"deny_types": ("sealed", "cache")},
    "typos": {"allow_types": ("seeled",), "deny_types": ()},
    "miner": {"deny_miners": ("bad", "t01000")},
    "group": {"groups": ("z",)},
}


@pytest.mark.parametrize("count", range(len(FETCH_FLAWS) + 1))
def test_who_may_fetch_has_no_flaw(count: int) -> None:
    for chosen in itertools.combinations(FETCH_FLAWS, count):
        fields = {"can_seal": True, "available": 1510, "age": 50, "groups": ("x", "z")}
        fields |= {"deny_types": ("sealed",)}  # one of the two is enough
        for flaw in chosen:
            fields |= FETCH_FLAWS[flaw]
        rows = placement.fetchers(
            sector(7),
            (SEALED, CACHE),
            [status(**fields)],
            cutoff=CUTOFF,
            sector_size=100,
            groups={"x", "y"},
        )
        assert [row.info.storage for row in rows] == ([] if chosen else ["a"])


@pytest.mark.parametrize(
    ("allow_to", "groups"),
    [
        ([], frozenset()),
        ([()], None),
        ([("x",)], {"x"}),
        ([("x",), ()], None),
        ([(), ("x",)], None),
        ([("x",), ("y", "x")], {"x", "y"}),
    ],
)
def test_groups_of_the_holders(
    allow_to: list[tuple[str, ...]], groups: frozenset[str] | None
) -> None:
    holders = [info(f"h{index}", allow_to=one) for index, one in enumerate(allow_to)]
    assert placement.fetch_groups(holders) == groups


@pytest.mark.parametrize(
    ("gate", "groups", "passes"),
    [
        (None, (), True),
        (None, ("x",), True),
        ((), (), False),
        ((), ("x",), False),
        (("x",), (), False),
        (("x",), ("x",), True),
        (("x",), ("y",), False),
        (("x", "y"), ("y", "z"), True),
    ],
)
def test_group_gate(gate: tuple[str, ...] | None, groups: tuple[str, ...], passes: bool) -> None:
    candidate = status(can_seal=True, groups=groups)
    assert placement.may_fetch(candidate, (SEALED,), cutoff=CUTOFF, groups=gate) is passes


def test_fetchers_have_no_weight_and_a_total_order() -> None:
    others = [status(name, can_seal=True, weight=9) for name in ("c", "a", "B")]
    for order in itertools.permutations(others):
        rows = placement.fetchers(
            sector(7), (SEALED,), order, cutoff=CUTOFF, sector_size=0, groups=None
        )
        assert [(row.info.storage, row.weight, row.primary) for row in rows] == [
            ("B", 0, False),
            ("a", 0, False),
            ("c", 0, False),
        ]
        assert rows[0].urls == ("http://B:8480/remote/sealed/s-t01000-7",)


def test_pieces_are_fetched_whatever_the_miner_filter() -> None:
    rows = placement.fetchers(
        SectorID(0, 42),
        (PIECE,),
        [status(can_seal=True, allow_miners=("t01001",))],
        cutoff=CUTOFF,
        sector_size=0,
        groups=None,
    )
    assert rows[0].urls == ("http://a:8480/remote/piece/s-t00-42",)


def test_one_directory_under_two_urls_is_one_storage() -> None:
    shared = status(urls=("http://x:1/remote", "http://y:1/remote"), can_store=True, weight=5)
    (row,) = placement.found(sector(1), [held("a", 1)], [shared])
    assert row.urls == (
        "http://x:1/remote/sealed/s-t01000-1",
        "http://y:1/remote/sealed/s-t01000-1",
    )
    assert row.weight == 5
    assert names([shared]) == ["a"]
