"""What a sector file must have: names and lengths, by the size that most of its sector tells."""

from __future__ import annotations

import pytest

from sectorfs.stores import layout
from sectorfs.stores.expected import WHOLE, Lack, lacks, sector_size_among
from sectorfs.stores.layout import GIB, KIB, MIB, SECTOR_SIZES
from sectorfs.types import Facts, FileType, MemberFacts

LAYER = "sc-02-data-layer-{}.dat"
LAST = "sc-02-data-tree-r-last-{}.dat"


def sizes_of(files: dict[str, layout.Lengths]) -> dict[str, int]:
    return {name: lengths.high for name, lengths in files.items()}


def directory(sizes: dict[str, int]) -> Facts:
    members = tuple(MemberFacts(name, size, 1) for name, size in sorted(sizes.items()))
    return Facts(sum(sizes.values()), 1, members)


def told(file_type: FileType, sizes: dict[str, int], size: int | None) -> list[Lack]:
    return lacks(file_type, sizes, size, settled=True)


# --- the size of a sector ---


@pytest.mark.parametrize("size", SECTOR_SIZES)
@pytest.mark.parametrize("file_type", [FileType.SEALED, FileType.UPDATE, FileType.KEY])
def test_replicas_tell_the_size(file_type: FileType, size: int) -> None:
    assert sector_size_among({file_type: Facts(size, 1)}) == size
    assert sector_size_among({file_type: Facts(size - 1, 1)}) is None
    assert sector_size_among({file_type: Facts(size + 1, 1)}) is None


@pytest.mark.parametrize("size", SECTOR_SIZES)
def test_unsealed_files_tell_it_with_and_without_a_trailer(size: int) -> None:
    for more in (0, 4, 10):
        assert sector_size_among({FileType.UNSEALED: Facts(size + more, 1)}) == size
    assert sector_size_among({FileType.UNSEALED: Facts(1000, 1)}) is None


@pytest.mark.parametrize("size", SECTOR_SIZES)
def test_directories_tell_it(size: int) -> None:
    for files in (
        layout.finalized_cache(size),
        layout.labelled_cache(size),
        layout.complete_cache(size),
    ):
        assert sector_size_among({FileType.CACHE: directory(sizes_of(files))}) == size


def test_directories_that_lost_files_still_tell_it() -> None:
    large = sizes_of(layout.finalized_cache(64 * GIB))
    for index in (0, 3, 15):
        del large[LAST.format(index)]
    assert sector_size_among({FileType.CACHE: directory(large)}) == 64 * GIB
    small = sizes_of(layout.finalized_cache(32 * GIB))
    del small[LAST.format(2)]
    assert sector_size_among({FileType.CACHE: directory(small)}) == 32 * GIB


def test_what_most_files_tell_counts_and_of_equals_the_largest() -> None:
    cache = directory(sizes_of(layout.finalized_cache(8 * MIB)))
    cut = Facts(2 * KIB, 1)
    assert sector_size_among({FileType.SEALED: cut, FileType.CACHE: cache}) == 8 * MIB
    unsealed = Facts(2 * KIB, 1)
    votes = {FileType.SEALED: cut, FileType.CACHE: cache, FileType.UNSEALED: unsealed}
    assert sector_size_among(votes) == 2 * KIB


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {FileType.PIECE: Facts(2 * KIB, 1)},
        {FileType.CACHE: directory({})},
        {FileType.CACHE: directory({"p_aux": 64, "t_aux": 300})},
        {FileType.CACHE: directory({"odd": 2 * KIB})},
        {FileType.SEALED: Facts(0, 1)},
    ],
)
def test_nothing_tells_it(facts: dict[FileType, Facts]) -> None:
    assert sector_size_among(facts) is None


# --- regular files ---


@pytest.mark.parametrize("file_type", [FileType.SEALED, FileType.UPDATE, FileType.KEY])
def test_a_replica_is_exactly_its_sector(file_type: FileType) -> None:
    assert told(file_type, {WHOLE: 8 * MIB}, 8 * MIB) == []
    [short] = told(file_type, {WHOLE: 8 * MIB - 1}, 8 * MIB)
    assert (short.state, short.detail) == ("incomplete", "has 8388607 of 8388608 bytes")
    [long] = told(file_type, {WHOLE: 8 * MIB + 4}, 8 * MIB)
    assert (long.state, long.detail) == ("damaged", "has 4 bytes more than its sector")
    [odd] = told(file_type, {WHOLE: 1000}, None)
    assert odd.state == "incomplete"


def test_an_unsealed_file_may_have_a_trailer() -> None:
    for size in (8 * MIB, 8 * MIB + 4, 8 * MIB + 100):
        assert told(FileType.UNSEALED, {WHOLE: size}, 8 * MIB) == []
    assert told(FileType.UNSEALED, {WHOLE: 8 * MIB - 1}, 8 * MIB)[0].state == "incomplete"
    assert told(FileType.UNSEALED, {WHOLE: 8 * MIB + 3}, 8 * MIB)[0].state == "damaged"


def test_a_piece_has_any_length() -> None:
    assert told(FileType.PIECE, {WHOLE: 7}, None) == []
    assert told(FileType.PIECE, {WHOLE: 7}, 8 * MIB) == []


def test_nothing_is_expected_where_sectors_are_sealed() -> None:
    assert lacks(FileType.SEALED, {WHOLE: 7}, 8 * MIB, settled=False) == []
    assert lacks(FileType.CACHE, {}, 8 * MIB, settled=False) == []


# --- directories ---


@pytest.mark.parametrize("size", SECTOR_SIZES)
def test_every_step_of_sealing_is_whole(size: int) -> None:
    for files in (
        layout.finalized_cache(size),
        layout.labelled_cache(size),
        layout.complete_cache(size),
    ):
        assert told(FileType.CACHE, sizes_of(files), size) == []
    with_more = sizes_of(layout.finalized_cache(size)) | {"snap-vproof.json": 9, "odd": 3}
    assert told(FileType.UPDATE_CACHE, with_more, size) == []


@pytest.mark.parametrize("size", SECTOR_SIZES)
def test_every_file_of_a_finalized_directory_is_missed(size: int) -> None:
    whole = sizes_of(layout.finalized_cache(size))
    for name in whole:
        rest = {one: length for one, length in whole.items() if one != name}
        assert told(FileType.CACHE, rest, size) == [Lack(name, "incomplete", "is not there")]


def test_a_directory_with_trees_needs_all_of_them() -> None:
    whole = sizes_of(layout.complete_cache(32 * GIB))
    gone = {"sc-02-data-tree-c-3.dat", LAYER.format(11), "t_aux"}
    rest = {name: size for name, size in whole.items() if name not in gone}
    assert {lack.name for lack in told(FileType.CACHE, rest, 32 * GIB)} == gone


def test_labels_alone_need_no_trees_and_leftovers_are_fine() -> None:
    labels = sizes_of(layout.labelled_cache(32 * GIB))
    del labels[LAYER.format(4)]
    assert [lack.name for lack in told(FileType.CACHE, labels, 32 * GIB)] == [LAYER.format(4)]
    cleared = sizes_of(layout.finalized_cache(32 * GIB)) | {LAYER.format(9): 32 * GIB}
    assert told(FileType.CACHE, cleared, 32 * GIB) == []


def test_lengths_of_files_are_checked() -> None:
    whole = sizes_of(layout.finalized_cache(8 * MIB))
    found = told(FileType.CACHE, whole | {"p_aux": 63, "t_aux": 20_000}, 8 * MIB)
    assert [(one.name, one.state) for one in found] == [
        ("p_aux", "incomplete"),
        ("t_aux", "damaged"),
    ]
    [empty] = told(FileType.CACHE, whole | {"t_aux": 0}, 8 * MIB)
    assert empty == Lack("t_aux", "incomplete", "has 0 of 1 bytes")


def test_an_empty_directory_lacks_what_every_one_has() -> None:
    assert [lack.name for lack in told(FileType.CACHE, {}, None)] == ["p_aux", "t_aux"]
    assert "sc-02-data-tree-r-last.dat" in {lack.name for lack in told(FileType.CACHE, {}, 8 * MIB)}
