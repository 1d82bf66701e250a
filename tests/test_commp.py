"""Piece commitments: known ones, an independent slow computation, every method, joining, CIDs."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import random
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectorfs.errors import BadInput
from sectorfs.stores import commp, fr32
from sectorfs.stores.commp import (
    BLOCK,
    METHODS,
    PaddedHasher,
    Piece,
    PieceHasher,
    Trees,
    combine,
    commit,
    roots,
    zero_commitment,
)
from sectorfs.stores.piece_cids import check_commitment, parse_piece_cid, piece_cid

MIB, GIB = 1 << 20, 1 << 30

# Payload size, padded size, CID as lotus computes it: zeros, and bytes 0xCC.
ZEROS = {
    (96, 128): "baga6ea4seaqdomn3tgwgrh3g532zopskstnbrd2n3sxfqbze7rxt7vqn7veigmy",
    (127, 128): "baga6ea4seaqdomn3tgwgrh3g532zopskstnbrd2n3sxfqbze7rxt7vqn7veigmy",
    (253, 256): "baga6ea4seaqgiktap34inmaex4wbs6cghlq5i2j2yd2bb2zndn5ep7ralzphkdy",
    (384, 512): "baga6ea4seaqfpirydiugkk7up5v666wkm6n6jlw6lby2wxht5mwaqekerdfykjq",
    (1016, 1024): "baga6ea4seaqb66wjlfkrbye6uqoemcyxmqylwmrm235uclwfpsyx3ge2imidoly",
    (1017, 2048): "baga6ea4seaqpy7usqklokfx2vxuynmupslkeutzexe2uqurdg5vhtebhxqmpqmy",
}
BYTES_CC = {
    (96, 128): "baga6ea4seaqhwcjhi4krhl3ht6dewnwevkpxbepxy7p7onwgz65t52typbsysby",
    (126, 128): "baga6ea4seaqapbh46gdnszvb7fcinevsy5bzg3b4higkh7groptswf6zas6jamy",
    (127, 128): "baga6ea4seaqmfldjtozgne6adk7eve2vdxte7vzlivae7nzsbrawobo546zkijq",
    (192, 256): "baga6ea4seaqkx7m2s6r4zahtlbwrs5ryvemkclwfp7nijopdd5swpdnxzjf7wkq",
    (253, 256): "baga6ea4seaql6ldbyafhiecr36xba5tufreyo4km2ts3lfknhl2zogp3aztxijy",
    (254, 256): "baga6ea4seaqkixbzz75uys2pcjbrbdilgjhmum72qm4xphrwav2iyel5oat4aka",
    (255, 512): "baga6ea4seaqg7celu5y2iwbi2ra5koygvotxtzr5lj6vzvxi6gfub6mpa6niwpi",
    (508, 512): "baga6ea4seaqb6ckbupixkhwp7thgb52f4en222boppajkqk7gaomkpof3lh4cei",
    (509, 1024): "baga6ea4seaqdzbeaexq6gpbqh2tlnbz5mm5neap2kejsketkogzd6x2dx7dzkii",
    (1016, 1024): "baga6ea4seaqjxgfdkdu37aryhg7bqqiwizj5f6ugasftgeocabwnj4cxkgisaoq",
    (1017, 2048): "baga6ea4seaqf3n5ob5qonkwnxfcbjzftsagbnrjfzualqvzhcylz46b7sgz6wmi",
    (1024, 2048): "baga6ea4seaqdlpnhgsndrgjeu4p46hahlsr4lybg6du4d56ooppdpxhcofxeuoi",
}
# The same of a chain: a greeting, and then again and again SHA-512 of all before.
CHAIN = {
    (65, 128): "baga6ea4seaqcdb7sudl53yirirwpggyqu26jblb3bswdr4z4oztihiwblt7lapy",
    (127, 128): "baga6ea4seaqi5sarmoaw6knhezceliqmebrzptkrsbtcstua3uuyau4yv53syjy",
    (255, 512): "baga6ea4seaqennorahxkvpg45fe2ur6k6gcffwc5wtp2ucgez5itacte662m4ba",
    (1015, 1024): "baga6ea4seaqm3u4yllogiaghpbfpvigpc576kaumxyikdnyexvwgrgygq3h36hq",
    (1880, 2048): "baga6ea4seaqhjj7i52uz7ipekhrwketrod5jz4pdudmtog5aw25ixr6666rh4bq",
    (48890, 65536): "baga6ea4seaqb6zn6xia4lwkatvweaexirjspa2tmovi2pzo27ucnzufdbmlfoii",
}
# Sector f01392893:139074 of the main network, 32 GiB: its CommD, and its deals in order.
SECTOR_CID = "baga6ea4seaqiw3gbmstmexb7sqwkc5r23o3i7zcyx5kr76pfobpykes3af62kca"
SECTOR_DEALS = [
    ("baga6ea4seaqknzm22isnhsxt2s4dnw45kfywmhenngqq3nc7jvecakoca6ksyhy", 256 * MIB),
    ("baga6ea4seaqnq6o5wuewdpviyoafno4rdpqnokz6ghvg2iyeyfbqxgcwdlj2egi", 1024 * MIB),
    ("baga6ea4seaqpixk4ifbkzato3huzycj6ty6gllqwanhdpsvxikawyl5bg2h44mq", 512 * MIB),
    ("baga6ea4seaqaxwe5dy6nt3ko5tngtmzvpqxqikw5mdwfjqgaxfwtzenc6bgzajq", 512 * MIB),
    ("baga6ea4seaqpy33nbesa4d6ot2ygeuy43y4t7amc4izt52mlotqenwcmn2kyaai", 1024 * MIB),
    ("baga6ea4seaqphvv4x2s2v7ykgc3ugs2kkltbdeg7icxstklkrgqvv72m2v3i2aa", 256 * MIB),
    ("baga6ea4seaqf5u55znk6jwhdsrhe37emzhmehiyvjxpsww274f6fiy3h4yctady", 512 * MIB),
    ("baga6ea4seaqa3qbabsbmvk5er6rhsjzt74beplzgulthamm22jue4zgqcuszofi", 1024 * MIB),
    ("baga6ea4seaqiekvf623muj6jpxg6vsqaikyw3r4ob5u7363z7zcaixqvfqsc2ji", 256 * MIB),
    ("baga6ea4seaqhsewv65z2d4m5o4vo65vl5o6z4bcegdvgnusvlt7rao44gro36pi", 512 * MIB),
]


def chain(size: int) -> bytes:
    out = b"hello world"
    while len(out) < size:
        out += hashlib.sha512(out).digest()
    return out[:size]


def random_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def slow_root(padded: bytes) -> bytes:
    """The tree by its definition, from the top."""
    if len(padded) == 32:
        return padded
    half = len(padded) // 2
    digest = bytearray(hashlib.sha256(slow_root(padded[:half]) + slow_root(padded[half:])).digest())
    digest[31] &= 0b00111111
    return bytes(digest)


def slow_padding(data: bytes) -> bytes:
    """Bit by bit: two zeros after every 254 bits, low bits first."""
    bits = "".join(f"{byte:08b}"[::-1] for byte in data)
    padded = "".join(bits[at : at + 254].ljust(256, "0") for at in range(0, len(bits), 254))
    return int(padded[::-1] or "0", 2).to_bytes(len(padded) // 8, "little")


def slow_commit(payload: bytes) -> Piece:
    size = 127
    while size < len(payload):
        size *= 2
    padded = slow_padding(payload.ljust(size, b"\0"))
    return Piece(slow_root(padded), len(padded))


def test_the_native_module_is_built_and_used() -> None:
    """It is optional for users; here `make setup` has a compiler, so its absence is a fault."""
    assert METHODS[-2:] == ("portable", "hashlib")


def test_the_native_module_compiles_without_a_warning() -> None:
    source = Path(commp.__file__).with_name("_commp.c")
    include = sysconfig.get_paths()["include"]
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wshadow"]
    result = subprocess.run(
        [*command, "-isystem", include, "-S", "-o", os.devnull, str(source)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_everything_works_without_the_native_module() -> None:
    script = """
import sys
sys.modules["sectorfs.stores._commp"] = None
from sectorfs.stores import commp
assert commp.METHODS == ("hashlib",)
print(commp.commit(bytes(1017)).cid)
"""
    root = Path(commp.__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == ZEROS[1017, 2048]


@pytest.mark.parametrize(("sizes", "cid"), ZEROS.items())
def test_known_pieces_of_zeros(sizes: tuple[int, int], cid: str) -> None:
    payload, size = sizes
    assert commit(bytes(payload)) == Piece(parse_piece_cid(cid), size)
    assert piece_cid(zero_commitment(size)) == cid


@pytest.mark.parametrize(("sizes", "cid"), BYTES_CC.items())
def test_known_pieces_of_one_byte(sizes: tuple[int, int], cid: str) -> None:
    payload, size = sizes
    piece = commit(b"\xcc" * payload)
    assert (piece.cid, piece.size) == (cid, size)


@pytest.mark.parametrize(("sizes", "cid"), CHAIN.items())
def test_known_pieces_of_a_chain(sizes: tuple[int, int], cid: str) -> None:
    payload, size = sizes
    piece = commit(chain(payload))
    assert (piece.cid, piece.size) == (cid, size)


def test_the_commitment_of_a_sector_on_the_chain() -> None:
    deals = [Piece(parse_piece_cid(cid), size) for cid, size in SECTOR_DEALS]
    assert combine(deals, 32 * GIB).cid == SECTOR_CID


def test_zero_commitments() -> None:
    """The recurrence; 35 sizes from 128 bytes to 2 TiB are in use."""
    assert zero_commitment(128).hex() == (
        "3731bb99ac689f66eef5973e4a94da188f4ddcae580724fc6f3fd60dfd488333"
    )
    assert zero_commitment(2048).hex().startswith("fc7e9282")
    assert zero_commitment(2048).hex().endswith("18f833")
    node = bytes(32)
    for power in range(6, 42):
        node = slow_root(node + node)
        if power >= 7:
            assert zero_commitment(1 << power) == node
    assert len(zero_commitment(fr32.MAX_PIECE)) == 32
    for size in (0, 64, 129, 1 << 63):
        with pytest.raises(BadInput, match="not the size of a padded piece"):
            zero_commitment(size)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [1 << power for power in range(7, 15)])
def test_every_method_is_the_definition(method: str, block: int) -> None:
    for count in (0, 1, 2, 3):
        data = random_bytes(block * count, block + count)
        expected = b"".join(slow_root(data[at : at + block]) for at in range(0, len(data), block))
        assert roots(data, block, method=method) == expected


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_extreme_words(method: str) -> None:
    for byte in (0x00, 0x01, 0x7F, 0x80, 0xFF):
        data = bytes((byte,)) * 4096
        assert roots(data, 4096, method=method) == slow_root(data)


@pytest.mark.parametrize("method", METHODS)
def test_methods_agree_on_data_at_any_address(method: str) -> None:
    data = random_bytes(8192 + 64)
    for shift in (0, 1, 3, 31, 33, 63):
        part = memoryview(data)[shift : shift + 8192]
        assert roots(part, 2048, method=method) == roots(bytes(part), 2048, method="hashlib")


def test_roots_refuses_what_is_no_tree() -> None:
    for block in (0, 32, 64, 96, 129):
        with pytest.raises(BadInput, match="not the size of a padded piece"):
            roots(bytes(128), block)
    with pytest.raises(BadInput, match="192 bytes to hash are no multiple of 128"):
        roots(bytes(192), 128)
    with pytest.raises(BadInput, match="abacus: no such method"):
        roots(bytes(128), 128, method="abacus")


def test_the_native_module_guards_its_memory() -> None:
    from sectorfs.stores import _commp

    for size, block in ((128, 0), (128, -64), (128, 32), (192, 96), (100, 64)):
        with pytest.raises(ValueError, match=f"{size} bytes in blocks of {block}"):
            _commp.roots(bytes(size), block, "portable")
    with pytest.raises(ValueError, match="no method abacus"):
        _commp.roots(bytes(128), 128, "abacus")
    with pytest.raises(TypeError):
        _commp.roots("text", 128, "portable")
    with pytest.raises(MemoryError):
        _commp.roots(b"", 1 << 62, "portable")


def test_others_run_while_a_native_method_works() -> None:
    """A thread that waits for the interpreter gets it long before one long call ends."""
    data = bytes(32 * MIB)
    begun = threading.Event()
    times: list[float] = []

    def hash_all() -> None:
        times.append(time.monotonic())
        begun.set()
        roots(data, BLOCK, method="portable")
        times.append(time.monotonic())

    thread = threading.Thread(target=hash_all)
    thread.start()
    begun.wait()
    meanwhile = time.monotonic()
    thread.join()
    start, end = times
    assert meanwhile - start < (end - start) / 2


def parts(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.integers(1, 3000), st.integers())
def test_payloads_of_any_size_are_the_definition(size: int, seed: int) -> None:
    payload = random_bytes(size, seed)
    assert commit(payload) == slow_commit(payload)


@given(st.integers(1, 5000), st.lists(st.integers(0, 10_000)), st.integers())
def test_streams_do_not_care_how_they_are_cut(size: int, cuts: list[int], seed: int) -> None:
    payload = random_bytes(size, seed)
    hasher = PieceHasher()
    for part in parts(payload, cuts):
        hasher.update(part)
    assert hasher.size == size
    assert hasher.finish() == commit(payload)


BIG = random_bytes(9 * BLOCK + 12_345)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, len(BIG)), max_size=6), st.integers(0, len(BIG)))
def test_padded_streams_across_blocks(cuts: list[int], size: int) -> None:
    data = BIG[:size] or b"\x01"
    hasher = PaddedHasher()
    for part in parts(data, cuts):
        hasher.update(part)
    assert hasher.size == len(data)
    whole = 1 << max(7, (len(data) - 1).bit_length())
    padded = data.ljust(whole, b"\0")
    assert hasher.finish() == Piece(roots(padded, whole), whole)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 700_000), min_size=1, max_size=8))
def test_bytes_may_be_written_in_place(counts: list[int]) -> None:
    hasher, at = PaddedHasher(), 0
    for count in counts:
        part = BIG[at : at + min(count, len(hasher.room))]
        hasher.room[: len(part)] = part
        hasher.advance(len(part))
        at += len(part)
    whole = 1 << max(7, (at - 1).bit_length())
    assert hasher.finish() == Piece(roots(BIG[:at].ljust(whole, b"\0"), whole), whole)


def test_no_more_is_taken_than_there_was_room_for() -> None:
    hasher = PaddedHasher()
    hasher.advance(100)
    for count in (-1, len(hasher.room) + 1):
        with pytest.raises(BadInput, match=f"{count} bytes in a room of {len(hasher.room)}"):
            hasher.advance(count)


def test_a_long_payload_goes_through_in_steps() -> None:
    payload = random_bytes(127 * 8192 * 2 + 77)
    size = fr32.piece_size(len(payload))
    padded = fr32.pad(payload.ljust(fr32.unpadded(size), b"\0"))
    assert commit(payload) == Piece(roots(padded, size), size)


def test_a_piece_may_be_larger_than_its_data() -> None:
    payload = chain(1880)
    padded = fr32.pad(payload.ljust(fr32.unpadded(MIB), b"\0"))
    assert commit(payload, MIB) == Piece(roots(padded, MIB), MIB)
    assert commit(bytes(5), 64 * GIB) == Piece(zero_commitment(64 * GIB), 64 * GIB)


def test_pieces_that_cannot_be() -> None:
    with pytest.raises(BadInput, match="an empty piece has no commitment"):
        commit(b"")
    with pytest.raises(BadInput, match="an empty piece"):
        PaddedHasher().finish(2048)
    with pytest.raises(BadInput, match="256 padded bytes do not fit into a piece of 128"):
        commit(bytes(128), 128)
    with pytest.raises(BadInput, match="not the size of a padded piece"):
        commit(bytes(128), 1000)
    hasher = PaddedHasher()
    hasher.update(bytes(BLOCK + 1))
    with pytest.raises(BadInput, match=f"{BLOCK + 1} padded bytes do not fit"):
        hasher.finish(BLOCK)


@given(st.lists(st.integers(0, 5), max_size=12), st.integers())
def test_joined_pieces_are_the_whole(powers: list[int], seed: int) -> None:
    """CommD equals the commitment of the bytes laid out with zeros before each piece."""
    laid, pieces = b"", []
    for i, power in enumerate(powers):
        size = 128 << power
        data = random_bytes(size, seed + i)
        laid = laid.ljust(-(-len(laid) // size) * size, b"\0") + data
        pieces.append(Piece(roots(data, size), size))
    sector = 128 << 10
    assert combine(pieces, sector) == Piece(roots(laid.ljust(sector, b"\0"), sector), sector)


def test_an_empty_sector_is_zeros() -> None:
    assert combine([], 32 * GIB) == Piece(zero_commitment(32 * GIB), 32 * GIB)


def test_trees_that_do_not_fit() -> None:
    small, large = (Piece(zero_commitment(size), size) for size in (128, 256))
    trees = Trees()
    trees.join(small)
    with pytest.raises(BadInput, match="256 bytes cannot begin at 128"):
        trees.join(large)
    trees.align(256)
    trees.join(large)
    assert trees.size == 512
    with pytest.raises(BadInput, match="512 padded bytes do not fit into a piece of 256"):
        trees.finish(256)
    with pytest.raises(BadInput, match="not the size"):
        trees.join(Piece(bytes(32), 100))
    with pytest.raises(BadInput, match="not the size"):
        trees.align(100)
    with pytest.raises(BadInput, match="not the size"):
        trees.finish(100)
    with pytest.raises(BadInput, match="not a piece commitment"):
        trees.join(Piece(bytes(31), 128))


@given(st.binary(min_size=32, max_size=32).map(lambda node: node[:31] + bytes((node[31] & 63,))))
def test_cids_both_ways(commitment: bytes) -> None:
    text = piece_cid(commitment)
    assert len(text) == 64
    assert text.startswith("baga6ea4seaq")
    assert parse_piece_cid(text) == commitment


@pytest.mark.parametrize("commitment", [b"", bytes(31), bytes(33), b"\xff" * 32, bytes(31) + b"@"])
def test_what_is_no_commitment(commitment: bytes) -> None:
    with pytest.raises(BadInput, match="not a piece commitment"):
        check_commitment(commitment)
    with pytest.raises(BadInput, match="not a piece commitment"):
        piece_cid(commitment)


def spelled(data: bytes) -> str:
    return "b" + base64.b32encode(data).decode().rstrip("=").lower()


GOOD = SECTOR_CID


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not the CID of a piece"),
        (GOOD[:-1], "not the CID of a piece"),
        (GOOD + "a", "not the CID of a piece"),
        ("z" + GOOD[1:], "not the CID of a piece"),
        (GOOD[:-1] + "é", "not the CID of a piece"),
        (
            "bafy2bzacec3dyxgqfbjekvnbin6uhcel7adis576346bi3tahp64bhijeiymy",
            "not the CID of a piece",
        ),
        (GOOD[:-1] + "1", "not base32"),
        (GOOD[:30] + "=" + GOOD[31:], "not base32"),
        (GOOD[:-1] + "b", "not the canonical spelling"),
        ("b" + GOOD[1:].upper(), "not the canonical spelling"),
        (spelled(bytes.fromhex("0182e203922020") + bytes(32)), "something else than a piece"),
        (spelled(bytes.fromhex("0181e203931020") + bytes(32)), "something else than a piece"),
        (spelled(bytes.fromhex("0181e203922020") + b"\xff" * 32), "not a piece commitment"),
    ],
)
def test_texts_that_are_no_piece(text: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        parse_piece_cid(text)
