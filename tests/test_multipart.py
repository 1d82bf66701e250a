"""Bodies of several ranges: what is well formed comes out, anything else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.wire.multipart import boundary_of, parts

SIZE = 1000
FILE = bytes(number % 251 for number in range(SIZE))


def body(spans: list[tuple[int, int]], *, boundary: str = "xyz", total: str = str(SIZE)) -> bytes:
    made = b""
    for start, end in spans:
        made += (
            f"\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\n"
            f"Content-Range: bytes {start}-{end - 1}/{total}\r\n\r\n"
        ).encode() + FILE[start:end]
    return made[2:] + f"\r\n--{boundary}--\r\n".encode()


@given(
    st.lists(
        st.tuples(st.integers(0, SIZE - 1), st.integers(1, 50)).map(
            lambda one: (one[0], min(SIZE, one[0] + one[1]))
        ),
        min_size=1,
        max_size=9,
    )
)
def test_what_goes_in_comes_out(spans: list[tuple[int, int]]) -> None:
    found = list(parts(body(spans), "xyz"))
    assert [(part.start, part.end) for part in found] == spans
    assert all(part.data == FILE[part.start : part.end] for part in found)
    assert {part.total for part in found} == {SIZE}


def test_bytes_that_look_like_a_boundary_are_bytes() -> None:
    made = b"--x\r\ncontent-range: bytes 0-8/*\r\n\r\n\r\n--x--\r\n\r\n--x--"
    (part,) = parts(made, "x")
    assert bytes(part.data) == b"\r\n--x--\r\n"
    assert part.total is None


GOOD = body([(0, 10), (20, 30)])


@given(st.integers(0, len(GOOD) - 1))
def test_a_body_cut_short_is_refused(length: int) -> None:
    if length == len(GOOD) - 2:
        return  # the last line break may be missing
    with pytest.raises(ValueError):  # noqa: PT011 - any of its messages
        list(parts(GOOD[:length], "xyz"))


@pytest.mark.parametrize(
    "spoilt",
    [
        b"",
        b"--other" + GOOD[5:],
        GOOD + b"more",
        GOOD.replace(b"Content-Range", b"Content-Size"),
        GOOD.replace(b"bytes 0-9/1000", b"bytes 9-0/1000"),
        GOOD.replace(b"bytes 0-9/1000", b"bytes 0-9/9"),
        GOOD.replace(b"bytes 0-9/1000", b"bytes */1000"),
        GOOD.replace(b"bytes 0-9/1000", b"bytes 0-99999999999999999999/*"),
        GOOD.replace(b"bytes 0-9/1000", b"bytes 0-8/1000"),
        GOOD.replace(b"bytes 0-9/1000", b"bytes 0-10/1000"),
        GOOD.replace(b"Content-Type", b"content-range: bytes 0-9/1000\r\nContent-Type", 1),
        GOOD.replace(b"Content-Type", b"X: " + b"x" * 5000 + b"\r\nContent-Type", 1),
    ],
)
def test_a_spoilt_body_is_refused(spoilt: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any of its messages
        list(parts(spoilt, "xyz"))


@pytest.mark.parametrize(
    ("text", "boundary"),
    [
        ("multipart/byteranges; boundary=abc", "abc"),
        ('Multipart/Byteranges;boundary="a:b"', "a:b"),
        ("multipart/byteranges", None),
        ("multipart/byteranges; boundary=", None),
        ("multipart/mixed; boundary=abc", None),
        ("application/octet-stream", None),
        ('multipart/byteranges; boundary="abc', None),
        ("multipart/byteranges; boundary=a b", None),
    ],
)
def test_boundaries(text: str, boundary: str | None) -> None:
    assert boundary_of(text) == boundary
