"""Manifests: vectors that other programs can be held to, and that nothing false is believed."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.errors import BadInput
from sectorfs.stores import manifest
from sectorfs.stores.manifest import BLOCK, HASH, HEADER, LEAF, Manifest, Outline

SIZES = st.sampled_from(
    [0, 1, LEAF - 1, LEAF, LEAF + 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + LEAF + 7]
)
BLOCK_CONTEXT = "sectorfs 2026-11 block: hashes of its leaves"
FILE_CONTEXT = "sectorfs 2026-11 file: size, hashes of its blocks"
DIRECTORY_CONTEXT = "sectorfs 2026-11 directory: names, sizes, digests"


def content(size: int) -> bytes:
    pattern = bytes(at * 7 % 251 for at in range(251))
    return (pattern * (size // 251 + 1))[:size]


def made(size: int) -> Manifest:
    return Manifest.of_leaves(size, manifest.leaf_hashes(content(size)))


# A change of any of these breaks every manifest and digest that was ever stored.
@pytest.mark.parametrize(
    ("size", "digest"),
    [
        (0, "b6092e0e00da29f77f649a5d8071a9696d480808ff28bdfea434901f249b7f3e"),
        (1, "cfcb9eb368e13d8dc1b35a3b3feef762b4692a2e9f23599672114a444c76bc2c"),
        (LEAF, "2d018292693d20609af98f1d200828cc0e9d1d5db4428174abdf646d4d04a396"),
        (LEAF + 1, "6af38d08f181827407f05674ebf15df47b1c05ec333bad67ebe47d8bd69b786d"),
        (BLOCK, "a094521b3bc0d962a120b54792de6b11eff6d62f6560a4a5d2c0b8a99a9b0a1c"),
        (BLOCK + 1, "159dfb4fc875b21c7015ad19c27e61f6f7b512cabcb9ac0cb59df4f7d6dfec9c"),
    ],
)
def test_digests_never_change(size: int, digest: str) -> None:
    assert made(size).digest.hex() == digest


def test_the_digest_of_a_directory_never_changes() -> None:
    files = [("p_aux", 64, bytes(32)), ("t_aux", 3, bytes(32))]
    digest = "cc6ec4d5f3e56b8cf97accd633bd884a0576d649b012087988f0cc7294c23ae4"
    assert manifest.directory_digest(files).hex() == digest
    assert manifest.directory_digest(reversed(files)).hex() == digest


def test_hashes_are_what_the_format_says() -> None:
    size = BLOCK + LEAF + 5
    data = content(size)
    leaves = [blake3(data[at : at + LEAF]).digest() for at in range(0, size, LEAF)]
    blocks = [
        blake3(b"".join(part), derive_key_context=BLOCK_CONTEXT).digest()
        for part in (leaves[:16], leaves[16:])
    ]
    digest = blake3(
        struct.pack("<Q", size) + b"".join(blocks), derive_key_context=FILE_CONTEXT
    ).digest()
    header = struct.pack("<8sIIQ32s8x", b"sfs-mft\0", 1, LEAF, size, digest)
    assert made(size).encode() == header + b"".join(blocks) + b"".join(leaves)
    entry = struct.pack("<HQ32s", 5, size, digest) + b"p_aux"
    assert (
        manifest.directory_digest([("p_aux", size, digest)])
        == blake3(entry, derive_key_context=DIRECTORY_CONTEXT).digest()
    )


@given(SIZES)
def test_parts_of_the_encoded_form_are_where_they_are_said_to_be(size: int) -> None:
    whole = made(size)
    encoded = whole.encode()
    assert len(encoded) == manifest.encoded_size(size)
    assert Manifest.decode(encoded).encode() == encoded
    outline = Outline.decode(encoded[: manifest.outline_size(size)])
    assert (outline.size, outline.digest) == (size, whole.digest)
    assert outline.encode() == encoded[: manifest.outline_size(size)]
    for block in range(manifest.block_count(size)):
        at = manifest.block_at(block)
        start, length = manifest.leaves_at(size, block)
        leaves = encoded[start : start + length]
        assert leaves == whole.leaves_of(block)
        assert encoded[at : at + HASH] == manifest.block_hash(leaves)
        assert outline.check_leaves(block, leaves)
        part = content(size)[block * BLOCK : (block + 1) * BLOCK]
        assert manifest.leaf_hashes(memoryview(part)) == leaves


@given(SIZES, st.data())
def test_one_flipped_bit_is_never_believed(size: int, data: st.DataObject) -> None:
    encoded = bytearray(made(size).encode())
    bit = data.draw(st.integers(0, 8 * len(encoded) - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadInput):
        Manifest.decode(encoded)
    outline = encoded[: manifest.outline_size(size)]
    if bit < 8 * len(outline):
        with pytest.raises(BadInput):
            Outline.decode(outline)


@given(SIZES, st.data())
def test_no_other_length_is_believed(size: int, data: st.DataObject) -> None:
    encoded = made(size).encode()
    length = data.draw(st.integers(0, len(encoded) + 100).filter(lambda n: n != len(encoded)))
    with pytest.raises(BadInput):
        Manifest.decode((encoded + bytes(100))[:length])
    if length != manifest.outline_size(size):
        with pytest.raises(BadInput):
            Outline.decode((encoded + bytes(100))[:length])


@pytest.mark.parametrize("claimed", [0, LEAF, BLOCK + 1, 3 * BLOCK, 1 << 62, (1 << 64) - 1])
def test_a_header_that_lies_about_the_size_is_refused(claimed: int) -> None:
    encoded = bytearray(made(2 * BLOCK).encode())
    struct.pack_into("<Q", encoded, 16, claimed)
    with pytest.raises(BadInput):
        Manifest.decode(encoded)


@pytest.fixture(params=[True, False], ids=["native", "library"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without the native module, where there is one."""
    if request.param and not manifest.NATIVE:
        pytest.skip("not built, or not for this processor")
    monkeypatch.setattr(manifest, "NATIVE", request.param)
    return bool(request.param)


@pytest.mark.parametrize("size", [0, 1, LEAF, 2 * LEAF, 2 * LEAF + 1, BLOCK, 3 * BLOCK - 1])
def test_leaves_of_buffers_and_files_are_those_of_the_library(
    tmp_path: Path, native: bool, size: int
) -> None:
    data = os.urandom(size)
    wanted = b"".join(blake3(data[at : at + LEAF]).digest() for at in range(0, size, LEAF))
    assert manifest.leaf_hashes(data) == wanted
    assert manifest.leaf_hashes(memoryview(bytearray(b"x" + data))[1:]) == wanted
    (tmp_path / "f").write_bytes(bytes(LEAF) + data)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        assert manifest.file_hashes(fd, LEAF, size) == wanted
        # What is not there is not made up, nor is a leaf that is cut off.
        whole = wanted[: 32 * (size // LEAF)]
        assert manifest.file_hashes(fd, LEAF, size + 1) == whole
        assert manifest.file_hashes(fd, LEAF, size + 5 * BLOCK) == whole
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        manifest.file_hashes(fd, 0, 3 * LEAF)


def test_the_native_module_refuses_what_is_not_its_work() -> None:
    native = pytest.importorskip("sectorfs.stores._leaves")
    if not native.AVAILABLE:
        with pytest.raises(NotImplementedError):
            native.leaf_hashes(bytes(LEAF))
        return
    assert native.leaf_hashes(b"") == b""
    for bad in (bytes(LEAF - 1), bytes(LEAF + 1)):
        with pytest.raises(ValueError, match="whole leaves"):
            native.leaf_hashes(bad)
    with pytest.raises(TypeError):
        native.leaf_hashes("text")
    for offset, leaves in ((-1, 1), (0, -1), (0, 1 << 60)):
        with pytest.raises(ValueError, match="no part"):
            native.hash_file(0, offset, leaves)


def test_the_size_is_part_of_what_is_proved() -> None:
    one, other = made(LEAF), made(2 * LEAF)
    assert Manifest.of_leaves(LEAF - 1, one.leaves).digest != one.digest
    with pytest.raises(BadInput):
        Manifest(LEAF, other.blocks, other.leaves)
    with pytest.raises(BadInput):
        Manifest(2 * LEAF, one.blocks, other.leaves)
    with pytest.raises(BadInput):
        Outline(BLOCK, other.blocks * 2)
    with pytest.raises(BadInput):
        Outline(-1, b"")


def test_leaves_of_another_block_or_file_are_refused() -> None:
    whole, other = made(2 * BLOCK + LEAF), made(2 * BLOCK + LEAF + 1)
    outline = whole.outline
    assert outline.check_leaves(2, whole.leaves_of(2))
    assert not outline.check_leaves(2, other.leaves_of(2))
    assert not outline.check_leaves(2, whole.leaves_of(2) * 2)
    assert not outline.check_leaves(0, whole.leaves_of(2))
    assert not outline.check_leaves(0, b"")
    assert not outline.check_leaves(3, b"")
    assert not outline.check_leaves(-1, whole.leaves_of(2))


def test_a_leaf_cannot_pass_for_a_block_nor_a_block_for_a_file() -> None:
    leaves = made(BLOCK).leaves
    assert manifest.block_hash(leaves) != manifest.leaf_hashes(leaves)
    assert blake3(struct.pack("<Q", BLOCK) + manifest.block_hash(leaves)).digest() != (
        made(BLOCK).digest
    )


def test_a_directory_without_a_digest_of_every_file_has_none() -> None:
    with pytest.raises(BadInput):
        manifest.directory_digest([("p_aux", 64, b"")])


def test_headers_of_other_things_are_refused() -> None:
    header = made(1).encode()[:HEADER]
    assert manifest.parse_header(header) == (1, made(1).digest)
    for bad in (header[:-1], b"\0" * HEADER, header[:-1] + b"\1", header[:8] + b"\2" + header[9:]):
        with pytest.raises(BadInput):
            manifest.parse_header(bad)


@given(SIZES, st.data())
def test_edges_are_the_blocks_touched_and_not_covered(size: int, data: st.DataObject) -> None:
    near = [at + by for at in range(0, size + BLOCK, BLOCK) for by in (-1, 0, 1)]
    spots = st.one_of(st.integers(0, size + 10), st.sampled_from([at for at in near if at >= 0]))
    start, end = sorted((data.draw(spots), data.draw(spots)))
    wanted = []
    for block in range(manifest.block_count(size)):
        low, high = block * BLOCK, min(size, (block + 1) * BLOCK)
        if max(start, low) < min(end, high) and not (start <= low and end >= high):
            wanted.append(block)
    assert list(manifest.edge_blocks(size, start, end)) == wanted
