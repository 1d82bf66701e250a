"""Plain heads mean what h11 takes them for; all others are left to h11."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.wire import heads

NAMES = (
    "Host",
    "X-A",
    "x-a",
    "Range",
    "Content-Length",
    "Transfer-Encoding",
    "Connection",
    "Ex pect",
)
VALUES = st.one_of(
    st.sampled_from(
        ("x", "5", "5, 5", "007", "chunked", "close", "keep-alive, Close", "", "a  b\t")
    ),
    st.text("ab \t\r\n\0\x01\x7fé,:5", max_size=6),
)
LINES = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from((": ", ":", " : ", ":\t ", ";")), VALUES),
    max_size=4,
).map(lambda lines: "".join(f"{name}{colon}{value}\r\n" for name, colon, value in lines))
ASKED = st.sampled_from(
    (
        "GET /a%20b?x=1 HTTP/1.1",
        "HEAD * HTTP/1.1",
        "DELETE /a HTTP/1.1",
        "POST /a HTTP/1.1",
        "GET /a HTTP/1.0",
        "GET  /a HTTP/1.1",
        "GET /a\tb HTTP/1.1",
        "get /a HTTP/1.1",
        "CONNECT a:1 HTTP/1.1",
    )
)
ANSWERED = st.sampled_from(
    (
        "HTTP/1.1 200 OK",
        "HTTP/1.1 206",
        "HTTP/1.1 204 No Content",
        "HTTP/1.1 304 \xe9",
        "HTTP/1.1 100 Continue",
        "HTTP/1.0 200 OK",
        "HTTP/1.1 2000 OK",
        "HTTP/1.1 600 What",
    )
)


def fields(found: h11.Request | h11.Response) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in found.headers:
        heads.add_header(headers, name.decode(), value.decode("latin-1"))
    return headers


@given(ASKED, st.sampled_from(("", "Host: h\r\n")), LINES)
def test_a_plain_request_is_what_h11_takes_it_for(first: str, host: str, lines: str) -> None:
    data = f"{first}\r\n{host}{lines}\r\n".encode("latin-1")
    end = data.index(heads.END) + len(heads.END)
    plain = heads.parse_request(data[:end])
    if plain is not None:
        http = h11.Connection(h11.SERVER)
        http.receive_data(data[:end])
        found = http.next_event()
        assert isinstance(found, h11.Request)
        assert (plain.method, plain.target) == (found.method.decode(), found.target.decode())
        assert plain.headers == fields(found)
        assert isinstance(http.next_event(), h11.EndOfMessage)
        assert plain.keep == (http.their_state is h11.DONE)


@given(ANSWERED, LINES, st.sampled_from(("GET", "HEAD")))
def test_a_plain_answer_is_what_h11_takes_it_for(first: str, lines: str, method: str) -> None:
    data = f"{first}\r\n{lines}\r\n".encode("latin-1")
    end = data.index(heads.END) + len(heads.END)
    plain = heads.parse_response(data[:end], method)
    if plain is not None:
        http = h11.Connection(h11.CLIENT)
        http.send(h11.Request(method=method, target="/", headers=[("host", "h")]))
        http.send(h11.EndOfMessage())
        assert plain.length is not None
        http.receive_data(data[:end] + b"x" * min(plain.length, 10_000))
        found = http.next_event()
        assert isinstance(found, h11.Response)
        assert (plain.status, plain.headers) == (found.status_code, fields(found))
        if plain.length:
            assert isinstance(http.next_event(), h11.Data)
        assert isinstance(http.next_event(), h11.EndOfMessage)
        assert plain.keep == (http.their_state is h11.DONE)


PLAIN = "GET /a HTTP/1.1\r\nHost: h\r\nRange: bytes=0-1\r\n\r\n"


def test_the_requests_of_our_nodes_are_plain() -> None:
    spelled = heads.spell_request("GET", "/a", (("Host", "h"), ("Range", "bytes=0-1")))
    assert spelled == PLAIN.encode()
    head = heads.parse_request(spelled)
    assert head == heads.RequestHead("GET", "/a", {"host": "h", "range": "bytes=0-1"}, True)


def test_the_answers_of_our_nodes_are_plain() -> None:
    spelled = heads.spell_response(206, (("content-length", "5"), ("connection", "close")))
    assert spelled.startswith(b"HTTP/1.1 206 Partial Content\r\n")
    head = heads.parse_response(spelled, "GET")
    assert head is not None
    assert (head.status, head.length, head.keep) == (206, 5, False)


@pytest.mark.parametrize(
    "change",
    [
        ("HTTP/1.1", "HTTP/1.0"),
        ("HTTP/1.1\r\n", "HTTP/1.1\n"),
        ("Host: h\r\n", ""),
        ("Host: h\r\n", "Host: h\r\nHost: i\r\n"),
        ("Host: h\r\n", "Host: h\r\n folded\r\n"),
        ("Host: h\r\n", "Host: h\r\nContent-Length: 0\r\n"),
        ("Host: h\r\n", "Host: h\r\nTransfer-Encoding: chunked\r\n"),
        ("Host: h\r\n", "Host: h\r\nExpect: 100-continue\r\n"),
        ("Host: h\r\n", "Host: h\r\nUpgrade: h2c\r\n"),
        ("bytes=0-1", "bytes\0=0-1"),
        ("bytes=0-1", "bytes\r=0-1"),
        ("bytes=0-1", "bytes\n=0-1"),
        ("Range:", "Range :"),
        ("GET ", "POST "),
        ("GET /a", "GET"),
    ],
)
def test_requests_that_are_left_to_h11(change: tuple[str, str]) -> None:
    assert heads.parse_request(PLAIN.encode()) is not None
    assert heads.parse_request(PLAIN.replace(*change).encode()) is None


@pytest.mark.parametrize(
    "lines",
    [
        "HTTP/1.1 200 OK",
        "HTTP/1.1 200 OK\r\nContent-Length: 5, 5",
        "HTTP/1.1 200 OK\r\nContent-Length: +5",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
        "HTTP/1.1 100 Continue\r\nContent-Length: 5",
        "HTTP/1.0 200 OK\r\nContent-Length: 5",
    ],
)
def test_answers_that_are_left_to_h11(lines: str) -> None:
    assert heads.parse_response(f"{lines}\r\n\r\n".encode(), "GET") is None


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\n", "\0", " a", "a ", "€"])
def test_values_that_are_never_sent(value: str) -> None:
    assert heads.spell_request("GET", "/", (("x", value),)) is None
    with pytest.raises(ValueError, match="not headers"):
        heads.spell_response(200, (("x", value),))


@pytest.mark.parametrize(
    ("method", "target", "name"),
    [("GET x", "/", "x"), ("GET", "/a b", "x"), ("GET", "/\r\n", "x"), ("GET", "/é", "x")]
    + [("GET", "/", name) for name in ("", "a b", "a:", "é")],
)
def test_requests_that_are_never_sent(method: str, target: str, name: str) -> None:
    assert heads.spell_request(method, target, ((name, "v"),)) is None


def test_a_header_full_of_spaces_costs_no_time() -> None:
    data = b"GET /a HTTP/1.1\r\nHost: h\r\n" + b"x:" + b" " * 1_000_000 + b"\0\r\n\r\n"
    assert heads.parse_request(data) is None


def test_dates() -> None:
    assert heads.spell_date(0) == "Thu, 01 Jan 1970 00:00:00 GMT"
    assert heads.date_now().endswith(" GMT")
