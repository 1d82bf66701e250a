"""Padding both ways: the format's vectors, every way to compute it, streams, ranges, bad input."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.errors import BadInput, BadRange
from sectorfs.stores import fr32, fr32_integers
from sectorfs.stores.fr32 import Padder, Unpadder, Window, window, windows

STORES = Path(fr32.__file__).parent

COUNTS = [0, 1, 2, 3, 127, 128, 255, 256, 257, 511, 513, 1000]


def defined(data: bytes) -> bytes:
    """The definition, chunk by chunk: a number of 1016 bits cut into four of 254."""
    out = bytearray()
    for at in range(0, len(data), 127):
        number = int.from_bytes(data[at : at + 127], "little")
        for k in range(4):
            out += (number >> 254 * k & (1 << 254) - 1).to_bytes(32, "little")
    return bytes(out)


def random_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def native() -> tuple[Callable[..., None], Callable[..., int]]:
    from sectorfs.stores import _fr32

    return _fr32.pad, _fr32.unpad


@pytest.fixture(params=["native", "integers"])
def way(request: pytest.FixtureRequest) -> tuple[Callable[..., None], Callable[..., int]]:
    """Both functions of one implementation."""
    if request.param == "native":
        return native()
    return fr32_integers.pad, fr32_integers.unpad


def test_the_native_module_is_built_and_used() -> None:
    """It is optional for users; here `make setup` has a compiler, so its absence is a fault."""
    pad, unpad = native()
    assert fr32._pad is pad
    assert fr32._unpad is unpad


def test_everything_works_without_the_native_module() -> None:
    script = """
import sys
sys.modules["sectorfs.stores._fr32"] = None
from sectorfs.stores import fr32, fr32_integers
assert fr32._pad is fr32_integers.pad
data = bytes(range(127)) * 3
assert fr32.unpad(fr32.pad(data)) == data
"""
    subprocess.run([sys.executable, "-c", script], cwd=STORES.parent.parent, check=True)


def test_the_native_module_compiles_without_a_warning() -> None:
    include = sysconfig.get_paths()["include"]
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wshadow"]
    result = subprocess.run(
        [*command, "-isystem", include, "-S", "-o", os.devnull, str(STORES / "_fr32.c")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_ones_show_where_the_two_bits_are() -> None:
    assert fr32.pad(b"\xff" * 127) == (b"\xff" * 31 + b"\x3f") * 4


def test_the_vector_of_ascending_bytes() -> None:
    digest = hashlib.sha256(fr32.pad(bytes(range(127)))).hexdigest()
    assert digest == "2d3a3726a51ee49729e39ae5a3095cb24ff3e4ec73fc696fcca19de4ab01cc0f"


@pytest.mark.parametrize("count", COUNTS)
def test_every_way_is_the_definition(
    way: tuple[Callable[..., None], Callable[..., int]], count: int
) -> None:
    pad, unpad = way
    data = random_bytes(127 * count, count)
    out = bytearray(128 * count)
    pad(data, out)
    assert out == defined(data)
    back = bytearray(127 * count)
    assert unpad(out, back) == -1
    assert back == data


def test_every_single_bit_lands_where_it_should(
    way: tuple[Callable[..., None], Callable[..., int]],
) -> None:
    pad, unpad = way
    for bit in range(1016):
        data = (1 << bit).to_bytes(127, "little")
        out, back = bytearray(128), bytearray(127)
        pad(data, out)
        limb, place = divmod(bit, 254)
        assert int.from_bytes(out, "little") == 1 << (256 * limb + place)
        assert unpad(out, back) == -1
        assert back == data


@pytest.mark.parametrize("count", [1, 2, 256, 257, 600])
@pytest.mark.parametrize("bit", [0x40, 0x80])
def test_a_set_top_bit_is_found_where_it_is(
    way: tuple[Callable[..., None], Callable[..., int]], count: int, bit: int
) -> None:
    _, unpad = way
    good = defined(random_bytes(127 * count))
    for at in {31, 63, 95, 127, 128 * count - 33, 128 * count - 1}:
        bad = bytearray(good)
        bad[at] |= bit
        bad[-1] |= bit  # the first one is told, not the last
        assert unpad(bad, bytearray(127 * count)) == at


def test_unpadding_tells_what_and_where() -> None:
    data = bytearray(128 * 3)
    data[128 + 63] = 0x80
    with pytest.raises(BadInput, match=r"^s-t01000-7: not fr32.* byte 1191 is set"):
        fr32.unpad(data, thing="s-t01000-7", offset=1000)


@pytest.mark.parametrize("size", [1, 126, 128, 127 * 5 + 1])
def test_padding_takes_whole_chunks_only(size: int) -> None:
    with pytest.raises(BadInput, match=f"{size} bytes to pad"):
        fr32.pad(bytes(size))


@pytest.mark.parametrize("size", [1, 127, 129, 128 * 5 + 1])
def test_unpadding_takes_whole_chunks_only(size: int) -> None:
    with pytest.raises(BadInput, match=f"{size} bytes to unpad"):
        fr32.unpad(bytes(size))


def test_the_native_module_guards_its_memory() -> None:
    pad, unpad = native()
    for call, one, other in ((pad, 127, 128), (unpad, 128, 127)):
        for source, target in ((one - 1, other), (one + 1, 2 * other), (2 * one, 2 * other - 1)):
            with pytest.raises(ValueError, match=f"{source} bytes in, {target} bytes out"):
                call(bytes(source), bytearray(target))
        with pytest.raises(TypeError):
            call(bytes(one), bytes(other))
        with pytest.raises(TypeError):
            call("text", bytearray(other))
        with pytest.raises(TypeError):
            call(bytes(one))


def test_any_buffer_will_do() -> None:
    data = random_bytes(127 * 40)
    for shape in (bytearray(data), memoryview(data), memoryview(bytearray(data)).cast("H")):
        assert fr32.pad(shape) == defined(data)
    padded = memoryview(defined(data)).cast("Q")
    assert fr32.unpad(padded) == data


def test_sizes() -> None:
    assert [fr32.padded(size) for size in (0, 1, 126, 127, 128, 254, 1016)] == [
        *(0, 1, 126, 128, 129, 256, 1024),
    ]
    assert [fr32.unpadded(size) for size in (0, 127, 128, 256, 2048, 32 << 30)] == [
        *(0, 127, 127, 254, 2032, 34091302912),
    ]


@given(st.integers(0, 2**62))
def test_a_padded_size_tells_the_unpadded_one(size: int) -> None:
    assert fr32.unpadded(fr32.padded(size)) == size


def test_sizes_of_pieces() -> None:
    for power in range(7, 63):
        assert fr32.check_padded_piece(1 << power) == 1 << power
        assert fr32.check_unpadded_piece(127 << (power - 7)) == 127 << (power - 7)
    for size in (-128, -1, 0, 1, 64, 127, 129, 384, 1 << 63, 1 << 200):
        with pytest.raises(BadInput, match="not the size of a padded piece"):
            fr32.check_padded_piece(size)
    for size in (-127, 0, 1, 126, 128, 381, 127 << 56, 127 << 200):
        with pytest.raises(BadInput, match="not the size of an unpadded piece"):
            fr32.check_unpadded_piece(size)


def test_the_smallest_piece_for_a_payload() -> None:
    cases = {1: 128, 127: 128, 128: 256, 254: 256, 255: 512, 508: 512, 509: 1024, 1017: 2048}
    assert {payload: fr32.piece_size(payload) for payload in cases} == cases
    assert fr32.piece_size(127 << 55) == fr32.MAX_PIECE
    for payload in (-1, 0, (127 << 55) + 1):
        with pytest.raises(BadInput, match="no piece holds so many bytes"):
            fr32.piece_size(payload)


def parts(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.integers(0, 20), st.lists(st.integers(0, 10_000)), st.integers())
def test_streams_do_not_care_how_they_are_cut(count: int, cuts: list[int], seed: int) -> None:
    data = random_bytes(127 * count, seed)
    padder, unpadder = Padder(), Unpadder()
    padded = b"".join(padder.update(part) for part in parts(data, cuts))
    padder.finish()
    assert padded == defined(data)
    unpadded = b"".join(unpadder.update(part) for part in parts(padded, cuts))
    unpadder.finish()
    assert unpadded == data


def test_streams_end_with_a_whole_chunk() -> None:
    padder = Padder()
    padder.update(bytes(127 + 5))
    with pytest.raises(BadInput, match="end 5 bytes into a chunk of 127"):
        padder.finish()
    unpadder = Unpadder(thing="sealed")
    unpadder.update(bytes(100))
    with pytest.raises(BadInput, match="sealed: the data end 100 bytes into a chunk of 128"):
        unpadder.finish()


def test_a_stream_tells_where_it_is_damaged() -> None:
    unpadder = Unpadder(thing="unsealed", offset=2048)
    bad = bytearray(128 * 4)
    bad[128 * 3 + 31] = 0x40
    unpadder.update(bad[:300])
    with pytest.raises(BadInput, match=f"byte {2048 + 128 * 3 + 31} is set"):
        unpadder.update(bad[300:])


def test_a_stream_keeps_its_own_bytes() -> None:
    """A caller that reads into one buffer again and again may do so."""
    padder, buffer = Padder(), bytearray(b"\x01" * 100)
    padder.update(buffer)
    buffer[:] = b"\x02" * 100
    assert padder.update(buffer[:27]) == defined(b"\x01" * 100 + b"\x02" * 27)


UNPADDED = random_bytes(127 * 6)
PADDED = defined(UNPADDED)


def read(one: Window) -> bytes:
    """What a store does: read the padded bytes, cut."""
    assert one.offset % 128 == one.length % 128 == 0
    return bytes(one.cut(PADDED[one.offset : one.offset + one.length]))


def test_every_window_of_some_chunks() -> None:
    for start in range(len(UNPADDED)):
        for stop in {start, start + 1, start + 126, start + 127, start + 128, len(UNPADDED)}:
            if stop <= len(UNPADDED):
                assert read(window(start, stop)) == UNPADDED[start:stop]


def test_a_window_reads_no_more_than_it_must() -> None:
    assert window(0, 127) == Window(0, 128, 0, 127)
    assert window(126, 128) == Window(0, 256, 126, 2)
    assert window(127, 254) == Window(128, 128, 0, 127)
    assert window(200, 200) == Window(128, 0, 0, 0)


@given(st.integers(0, 762), st.integers(0, 762), st.integers(0, 1000))
def test_windows_follow_each_other(one: int, other: int, step: int) -> None:
    start, stop = sorted((one, other))
    several = list(windows(start, stop, step=step))
    assert b"".join(map(read, several)) == UNPADDED[start:stop]
    assert all(part.length <= max(step, 128) for part in several)
    whole = window(start, stop)
    if several:  # nothing is read twice
        assert sum(part.length for part in several) == whole.length


def test_windows_of_a_whole_sector_are_a_matter_of_arithmetic() -> None:
    size = fr32.unpadded(64 << 30)
    assert window(size - 1, size) == Window((64 << 30) - 128, 128, 126, 1)
    first = next(windows(5, size, step=1 << 20))
    assert (first.offset, first.length, first.size) == (0, 1 << 20, 127 * 8192 - 5)


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 1 << 63)])
def test_ranges_that_are_none(start: int, stop: int) -> None:
    with pytest.raises(BadRange, match=f"{start} to {stop}: no range"):
        window(start, stop)
    with pytest.raises(BadRange):
        next(windows(start, stop, step=1024))


def test_a_short_read_is_no_window() -> None:
    with pytest.raises(BadInput, match="unsealed: 255 of 256 padded bytes"):
        window(0, 254).cut(PADDED[:255], thing="unsealed")
    with pytest.raises(BadInput, match="512 of 256"):
        window(0, 254).cut(memoryview(PADDED[:512]).cast("Q"))


def test_a_damaged_window_tells_the_place_in_the_file() -> None:
    one = window(300, 400)
    damaged = bytearray(PADDED[one.offset : one.offset + one.length])
    damaged[95] |= 0x80
    with pytest.raises(BadInput, match=f"unsealed: not fr32.*byte {one.offset + 95} "):
        one.cut(damaged, thing="unsealed")
