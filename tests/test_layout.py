"""Sizes and names of sector files are those of the format."""

from __future__ import annotations

import pytest

from sectorfs.errors import BadInput
from sectorfs.stores import layout
from sectorfs.stores.layout import GIB, KIB, MIB, SECTOR_SIZES, Lengths
from sectorfs.stores.trailer import MAX_BITMAP
from sectorfs.types import FileType

S = 8 * MIB

# sector size: layers, bytes of a layer, tree-d, tree-c, tree-r-last, files of a tree
TREES = {
    2 * KIB: (2, 2048, 4064, 2336, 32, 1),
    8 * MIB: (2, 8388608, 16777184, 9586976, 18720, 1),
    512 * MIB: (2, 536870912, 1073741792, 613566752, 1198368, 1),
    32 * GIB: (11, 34359738368, 68719476704, 4908534048, 9586976, 8),
    64 * GIB: (11, 68719476736, 137438953440, 4908534048, 9586976, 16),
}


def tree(name: str, files: int) -> set[str]:
    if files == 1:
        return {f"sc-02-data-{name}.dat"}
    return {f"sc-02-data-{name}-{index}.dat" for index in range(files)}


@pytest.mark.parametrize("proof", range(20))
def test_seal_proofs_name_a_size(proof: int) -> None:
    assert layout.sector_size_of(proof) == list(TREES)[proof % 5]


@pytest.mark.parametrize("proof", [-1, 20, 2**63])
def test_unknown_seal_proofs_are_refused(proof: int) -> None:
    with pytest.raises(BadInput, match="unknown seal proof") as caught:
        layout.sector_size_of(proof)
    assert caught.value.thing == str(proof)


@pytest.mark.parametrize("size", TREES)
def test_a_complete_cache_has_every_file_of_its_size(size: int) -> None:
    layers, layer, tree_d, tree_c, tree_r_last, files = TREES[size]
    expected = {"p_aux": Lengths(64, 64), "t_aux": Lengths(1, 10240)}
    for index in range(1, layers + 1):
        expected[f"sc-02-data-layer-{index}.dat"] = Lengths(layer, layer)
    expected["sc-02-data-tree-d.dat"] = Lengths(tree_d, tree_d)
    expected |= dict.fromkeys(tree("tree-c", files), Lengths(tree_c, tree_c))
    expected |= dict.fromkeys(tree("tree-r-last", files), Lengths(tree_r_last, tree_r_last))
    assert layout.complete_cache(size) == expected
    assert list(layout.complete_cache(size)) == sorted(expected)


@pytest.mark.parametrize("size", TREES)
def test_a_finalized_cache_keeps_aux_files_and_tree_r_last(size: int) -> None:
    complete = layout.complete_cache(size)
    kept = {"p_aux", "t_aux"} | tree("tree-r-last", TREES[size][5])
    assert layout.finalized_cache(size) == {name: complete[name] for name in kept}
    assert list(layout.finalized_cache(size)) == sorted(kept)


@pytest.mark.parametrize("size", [0, 1, 2 * KIB - 1, 16 * GIB, -(2 * KIB)])
def test_only_sizes_of_sectors_have_a_cache(size: int) -> None:
    for files in (layout.complete_cache, layout.finalized_cache):
        with pytest.raises(BadInput, match="not the size of a sector"):
            files(size)


def test_lengths_include_both_ends() -> None:
    assert [size in Lengths(2, 4) for size in (1, 2, 4, 5)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("file_type", "fitting", "unfit"),
    [
        (FileType.SEALED, [S], [0, S - 1, S + 1, S + 4]),
        (FileType.UPDATE, [S], [0, S - 1, S + 1]),
        (FileType.KEY, [S], [0, S - 1, S + 1]),
        (
            FileType.UNSEALED,
            [S, S + 4, S + 9, S + 4 + MAX_BITMAP],
            [0, S - 1, S + 1, S + 3, S + 5 + MAX_BITMAP],
        ),
        (FileType.PIECE, [0, 127, S], [-1]),
        (FileType.CACHE, [], [0, S]),
        (FileType.UPDATE_CACHE, [], [0, S]),
    ],
)
def test_whole_files_have_the_size_of_their_type(
    file_type: FileType, fitting: list[int], unfit: list[int]
) -> None:
    for size in fitting:
        assert layout.file_fits(file_type, size, sector_size=S), size
    for size in unfit:
        assert not layout.file_fits(file_type, size, sector_size=S), size


def test_the_full_list_is_the_one_peers_have() -> None:
    expected = {
        "p_aux": 64,
        "t_aux": 10240,
        "sc-02-data-tree-r-last.dat": 10_000_000,
        "sc-02-data-tree-d.dat": 139586437120,
        "snap-vproof.json": 20_000_000,
        "batch.json": 10_000,
        "commit-phase1-output": 20_000_000,
    }
    expected |= {f"sc-02-data-tree-r-last-{i}.dat": 10_000_000 for i in range(16)}
    expected |= {f"sc-02-data-layer-{i}.dat": 69793218560 for i in range(1, 12)}
    expected |= {f"sc-02-data-tree-c-{i}.dat": 5368709120 for i in range(16)}
    assert expected == layout.FULL


def test_the_minimal_list_is_what_proving_needs() -> None:
    kept = [name for name in layout.FULL if "tree-r-last" in name]
    assert set(layout.MINIMAL) == {*kept, "p_aux", "t_aux", "snap-vproof.json"}
    assert all(layout.FULL[name] == cap for name, cap in layout.MINIMAL.items())


def test_only_our_own_nodes_send_tree_c_of_small_sectors() -> None:
    extra = {"sc-02-data-tree-c.dat": 5 * GIB}
    assert {**layout.FULL, **extra} == layout.FULL_OURS
    assert "sc-02-data-tree-c.dat" not in layout.FULL


@pytest.mark.parametrize("size", SECTOR_SIZES)
def test_every_file_of_a_cache_travels_between_our_nodes(size: int) -> None:
    for name, lengths in layout.complete_cache(size).items():
        assert lengths.high <= layout.FULL_OURS[name], name
    for name, lengths in layout.finalized_cache(size).items():
        assert lengths.high <= layout.MINIMAL[name], name


def test_lists_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        layout.FULL["x"] = 1  # type: ignore[index]  # that it fails is the test
