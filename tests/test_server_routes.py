"""Paths, permissions and answers of a node's HTTP server, over real sockets and files."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path

import msgspec
import pytest
import trio

from sectorfs.errors import BadRange, StorageUnavailable
from sectorfs.server.conditions import byte_ranges, precondition, validators
from sectorfs.server.files import EXCERPT
from sectorfs.server.routes import make_handler
from sectorfs.stores.protocol import OpenFile
from sectorfs.stores.regular import Excerpt, Spans
from sectorfs.types import Facts, SectorFile
from sectorfs.wire.client import Client
from sectorfs.wire.messages import Gone, Reply, Request
from sectorfs.wire.multipart import boundary_of, parts
from sectorfs.wire.server import Handler
from sectorfs.wire.tokens import Secret, sign
from tests.wire_fixtures import PATIENT, FolderFiles, fds_return_to, open_fds, running

SECRET = Secret(bytes(range(32)))
OTHER = Secret(bytes(32))
READ = sign(SECRET, ["read"])
SIZE = 5000
PATHS = (
    "/remote/sealed/s-t01000-7",
    "/remote/cache/s-t01000-7/files",
    "/remote/cache/s-t01000-7/files/p_aux",
    "/remote/stat/st-1",
)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


@dataclass
class Node:
    """A node's server without a node."""

    root: Path
    files: FolderFiles
    url: str = ""
    client: Client = field(default_factory=lambda: Client(PATIENT))
    calls: list[tuple[bytes, frozenset[str]]] = field(default_factory=list)

    async def ask(
        self,
        path: str,
        *headers: tuple[str, str],
        method: str = "GET",
        token: str = READ,
        body: bytes = b"",
    ) -> Answer:
        if token:
            headers = (*headers, ("Authorization", f"Bearer {token}"))
        async with self.client.request(method, self.url + path, headers, body) as response:
            data = await response.read(1 << 20)
            return Answer(response.status, dict(response.headers), data)

    async def rpc(
        self, body: bytes, permissions: frozenset[str], *, gone: Gone
    ) -> tuple[int, bytes]:
        self.calls.append((body, permissions))
        return (204, b"") if body == b"note" else (200, b'{"result":1}')

    def handler(self, deadline: float = 5) -> Handler:
        return make_handler(
            self.files,
            secret=SECRET,
            rpc=self.rpc,
            health=lambda: {"healthy": True},
            status=lambda: "sectorfs\n",
            deadline=deadline,
        )


def fill(root: Path) -> None:
    (root / "sealed").mkdir()
    (root / "sealed/s-t01000-7").write_bytes(os.urandom(SIZE))
    (root / "sealed/s-t01000-8").touch()
    (root / "cache/s-t01000-7").mkdir(parents=True)
    (root / "cache/s-t01000-7/p_aux").write_bytes(b"p" * 64)
    (root / "cache/s-t01000-7/t_aux").write_bytes(b"t" * 10)


@asynccontextmanager
async def node(root: Path, *, handler: Handler | None = None) -> AsyncIterator[Node]:
    fill(root)
    made = Node(root, FolderFiles(root))
    async with running(handler or made.handler()) as port, made.client:
        made.url = f"http://127.0.0.1:{port}"
        yield made


# Files


async def test_a_whole_file(tmp_path: Path) -> None:
    async with node(tmp_path) as it:
        path = tmp_path / "sealed/s-t01000-7"
        answer = await it.ask(PATHS[0])
        assert (answer.status, answer.body) == (200, path.read_bytes())
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["last-modified"] == formatdate(int(path.stat().st_mtime), usegmt=True)
        assert answer.headers["sectorfs-mtime-ns"] == str(path.stat().st_mtime_ns)
        head = await it.ask(PATHS[0], method="HEAD")
        assert (head.status, head.body) == (200, b"")
        del head.headers["date"], answer.headers["date"]
        assert head.headers == answer.headers


RANGES = [
    ("bytes=0-0", (0, 1)),
    ("bytes=0-9", (0, 10)),
    ("bytes=10-10", (10, 1)),
    ("bytes=4999-", (4999, 1)),
    ("bytes=0-", (0, SIZE)),
    ("bytes=-1", (4999, 1)),
    ("bytes=-5000", (0, SIZE)),
    ("bytes=-99999", (0, SIZE)),
    ("bytes=4990-99999", (4990, 10)),
    ("bytes=4990-" + "9" * 5000, (4990, 10)),
    ("bytes= 1-2", (1, 2)),
    ("BYTES=1-2", (1, 2)),
    ("bytes=1-2,", (1, 2)),
    ("bytes=9999-,1-2", (1, 2)),
    ("lines=1-2", None),
]
BAD_RANGES = [
    "bytes=9-1",
    "bytes=5000-",
    "bytes=5000-5001",
    "bytes=" + "9" * 5000 + "-",
    "bytes=-0",
    "bytes=-",
    "bytes=",
    "bytes=,",
    "bytes=x-y",
    "bytes=1-2x",
    "bytes=1",
    "bytes=--1",
    "bytes=+1-2",
    "bytes=0x1-2",
    "bytes=1 - 2",
    "bytes=0-0,9-1",
    "bytes=0-0,x",
    "bytes",
    "",
]


@pytest.mark.parametrize(("text", "expected"), RANGES)
async def test_ranges(tmp_path: Path, text: str, expected: tuple[int, int] | None) -> None:
    async with node(tmp_path) as it:
        data = (tmp_path / "sealed/s-t01000-7").read_bytes()
        answer = await it.ask(PATHS[0], ("Range", text))
        if expected is None:
            assert (answer.status, answer.body) == (200, data)
            return
        offset, length = expected
        assert (answer.status, answer.body) == (206, data[offset : offset + length])
        last = offset + length - 1
        assert answer.headers["content-range"] == f"bytes {offset}-{last}/{SIZE}"
        head = await it.ask(PATHS[0], ("Range", text), method="HEAD")
        assert (head.status, head.headers["content-length"]) == (200, str(SIZE))


@pytest.mark.parametrize("text", BAD_RANGES)
async def test_bad_ranges_are_416(tmp_path: Path, text: str) -> None:
    before = open_fds()
    async with node(tmp_path) as it:
        answer = await it.ask(PATHS[0], ("Range", text))
        assert answer.status == 416
        assert answer.headers["content-range"] == f"bytes */{SIZE}"
        assert "range" in answer.text
        assert (await it.ask(PATHS[0])).status == 200
    await fds_return_to(before)


@pytest.mark.parametrize("text", ["bytes=0-0", "bytes=-5", "bytes=0-"])
async def test_no_range_of_an_empty_file(tmp_path: Path, text: str) -> None:
    async with node(tmp_path) as it:
        answer = await it.ask("/remote/sealed/s-t01000-8", ("Range", text))
        assert (answer.status, answer.headers["content-range"]) == (416, "bytes */0")
        whole = await it.ask("/remote/sealed/s-t01000-8")
        assert (whole.status, whole.body) == (200, b"")


async def test_conditional_requests(tmp_path: Path) -> None:
    before = open_fds()
    async with node(tmp_path) as it:
        whole = await it.ask(PATHS[0])
        tag, date = whole.headers["etag"], whole.headers["last-modified"]
        answer = await it.ask(PATHS[0], ("If-None-Match", tag))
        assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", tag)
        assert (await it.ask(PATHS[0], ("If-Modified-Since", date))).status == 304
        assert (await it.ask(PATHS[0], ("If-Match", '"x"'))).status == 412
        one = ("Range", "bytes=0-0")
        assert (await it.ask(PATHS[0], one, ("If-Range", tag))).status == 206
        assert (await it.ask(PATHS[0], one, ("If-Range", '"x"'))).status == 200
        os.utime(tmp_path / "sealed/s-t01000-7", ns=(1, 10**18))
        assert (await it.ask(PATHS[0], ("If-None-Match", tag))).status == 200
        assert (await it.ask(PATHS[0], one, ("If-Range", tag))).status == 200
    await fds_return_to(before)


NOW = validators(inode=1, size=2, mtime_ns=10**18)
DATE, EARLIER, LATER = (formatdate(10**9 + shift, usegmt=True) for shift in (0, -1, 1))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"if-none-match": NOW.etag}, 304),
        ({"if-none-match": f'"a", W/{NOW.etag}'}, 304),
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": '"a"'}, None),
        ({"if-none-match": '"a"', "if-modified-since": DATE}, None),
        ({"if-none-match": "garbage"}, None),
        ({"if-modified-since": DATE}, 304),
        ({"if-modified-since": LATER}, 304),
        ({"if-modified-since": EARLIER}, None),
        ({"if-modified-since": "yesterday"}, None),
        ({"if-modified-since": "Mon, 99 Jan 99999 99:99:99 GMT"}, None),
        ({"if-match": NOW.etag}, None),
        ({"if-match": "*"}, None),
        ({"if-match": f"W/{NOW.etag}"}, 412),
        ({"if-match": '"a"'}, 412),
        ({"if-unmodified-since": DATE}, None),
        ({"if-unmodified-since": EARLIER}, 412),
        ({"if-unmodified-since": "x"}, None),
    ],
)
def test_preconditions(headers: dict[str, str], expected: int | None) -> None:
    assert precondition(headers, NOW) == expected


@pytest.mark.parametrize(
    ("condition", "counts"),
    [(NOW.etag, True), (f"W/{NOW.etag}", False), (DATE, True), (LATER, False), ("x", False)],
)
def test_if_range(condition: str, counts: bool) -> None:
    spans = byte_ranges({"range": "bytes=0-0", "if-range": condition}, NOW, 2)
    assert spans == (((0, 1),) if counts else None)


def test_times_that_cannot_be_spelled() -> None:
    for mtime_ns in (-1, 10**21):
        assert len(validators(inode=1, size=2, mtime_ns=mtime_ns).headers()) == 1


def test_digits_of_other_scripts_are_none() -> None:
    with pytest.raises(BadRange):
        byte_ranges({"range": "bytes=١-٢"}, NOW, 2)


# Directories, listings, space


async def test_a_directory_is_listed(tmp_path: Path) -> None:
    async with node(tmp_path) as it:
        listing = json.loads((await it.ask("/remote/cache/s-t01000-7/files")).body)
        members = [(f["Name"], f["Size"]) for f in listing["Files"]]
        assert (listing["Size"], members) == (74, [("p_aux", 64), ("t_aux", 10)])
        stat = (tmp_path / "cache/s-t01000-7/p_aux").stat()
        assert listing["Files"][0]["MtimeNs"] == stat.st_mtime_ns
        member = await it.ask("/remote/cache/s-t01000-7/files/p_aux", ("Range", "bytes=60-"))
        assert (member.status, member.body) == (206, b"pppp")
        head = await it.ask("/remote/cache/s-t01000-7/files", method="HEAD")
        assert (head.status, head.body) == (200, b"")


async def test_the_listing_of_a_file(tmp_path: Path) -> None:
    async with node(tmp_path) as it:
        listing = json.loads((await it.ask(PATHS[0] + "/files")).body)
        stat = (tmp_path / "sealed/s-t01000-7").stat()
        assert listing == {"Size": SIZE, "MtimeNs": stat.st_mtime_ns, "Files": None}


async def test_space(tmp_path: Path) -> None:
    async with node(tmp_path) as it:
        answer = await it.ask("/remote/stat/st-1")
        assert answer.body.endswith(b"}\n")
        assert json.loads(answer.body) == {
            "Capacity": 1000,
            "Available": 900,
            "FSAvailable": 950,
            "Reserved": 1,
            "Max": 2,
            "Used": 3,
        }
        assert (await it.ask("/remote/stat/st-2")).status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/remote",
        "/remote/",
        "/remote/sealed",
        "/remote/sealed/",
        "/remote//s-t01000-7",
        "/remote/sealed/s-t01000-9",
        "/remote/sealed/s-t01000-7.tmp",
        "/remote/sealed/s-t01000-07",
        "/remote/sealed/x",
        "/remote/sealed/" + "s" * 300,
        "/remote/SEALED/s-t01000-7",
        "/remote/fetching/s-t01000-7",
        "/remote/sealed/s-t01000-7/x",
        "/remote/sealed/s-t01000-7/files/p_aux",
        "/remote/cache/s-t01000-7/files/none",
        "/remote/cache/s-t01000-7/files/.hidden",
        "/remote/cache/s-t01000-7/files/" + "x" * 300,
        "/remote/cache/s-t01000-7/files/x.tmp",
        "/remote/cache/s-t01000-7/files/a/b",
        "/remote/cache/s-t01000-9/files",
        "/remote/stat/a.b",
        "/remote/stat/",
        "/remote/stat/st-1/x",
        "/nothing",
        "/rpc/v1",
        "/health/x",
    ],
)
async def test_what_is_not_here_is_404_and_named(tmp_path: Path, path: str) -> None:
    async with node(tmp_path) as it:
        answer = await it.ask(path)
        assert answer.status == 404
        assert len(answer.text) > 10
        assert answer.text.count("\n") == 1


@pytest.mark.parametrize("name", ["..", ".", "%2e%2e", "a%00b", "..%2f..%2fsecret", "%ff"])
async def test_names_that_are_no_names_are_400(tmp_path: Path, name: str) -> None:
    async with node(tmp_path) as it:
        for path in ("/remote/sealed/", "/remote/cache/s-t01000-7/files/", "/remote/stat/"):
            assert (await it.ask(path + name)).status == 400


# Permissions


@pytest.mark.parametrize("path", PATHS)
async def test_who_may_read(tmp_path: Path, path: str) -> None:
    async with node(tmp_path) as it:
        assert (await it.ask(path)).status == 200
        assert (await it.ask(path, token=sign(SECRET, ["admin"]))).status == 200
        assert (await it.ask(f"{path}?token={READ}", token="")).status == 200
        for token in (sign(SECRET, []), sign(SECRET, ["write", "sign"])):
            answer = await it.ask(path, token=token)
            assert answer.status == 403
            assert "read" in answer.text


REFUSED = [
    (),
    (("Authorization", "Bearer " + sign(OTHER, ["admin"])),),
    (("Authorization", "Bearer " + sign(SECRET, ["admin"], -1)),),
    (("Authorization", "Bearer"),),
    (("Authorization", "Bearer x"),),
    (("Authorization", READ),),
    (("Authorization", "Basic " + READ),),
    (("Authorization", ""),),
    (("Authorization", "Bearer " + READ), ("Authorization", "Bearer " + READ)),
]


@pytest.mark.parametrize("headers", REFUSED)
async def test_tokens_that_are_refused(
    tmp_path: Path, headers: tuple[tuple[str, str], ...]
) -> None:
    async with node(tmp_path) as it:
        for path, method in ((PATHS[0], "GET"), (PATHS[3], "HEAD"), ("/rpc/v0", "POST")):
            query = f"?token={READ}" if headers else ""  # a bad header is not outdone by a query
            answer = await it.ask(path + query, *headers, method=method, token="")
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert it.calls == []
        assert it.files.opened == []
        assert (await it.ask(PATHS[0] + "?token=x", token="")).status == 401


async def test_open_pages_need_nothing_on_loopback(tmp_path: Path) -> None:
    async with node(tmp_path) as it:
        assert (await it.ask("/", token="")).text == "sectorfs\n"
        assert json.loads((await it.ask("/health", token="")).body) == {"healthy": True}
        await it.ask(PATHS[0])
        metrics = await it.ask("/metrics", token="")
        assert 'sectorfs_http_requests_total{route="sector",status="200"}' in metrics.text
        assert metrics.headers["content-type"].startswith("text/plain")


async def no_body(limit: int) -> bytes:
    return b""


def from_afar(path: str, *, token: str = "") -> Request:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    segments = tuple(name for name in path.split("/") if name)
    return Request(
        method="GET",
        segments=segments,
        query={},
        headers=headers,
        peer="10.0.0.9",
        read_body=no_body,
    )


async def test_open_pages_off_loopback(tmp_path: Path) -> None:
    handle = Node(tmp_path, FolderFiles(tmp_path)).handler()
    for path in ("/", "/metrics"):
        assert (await handle(from_afar(path))).status == 401
        assert (await handle(from_afar(path, token=sign(SECRET, ["sign"])))).status == 403
        assert (await handle(from_afar(path, token=READ))).status == 200
    assert (await handle(from_afar("/health"))).status == 200


@pytest.mark.parametrize(
    ("path", "method", "allow"),
    [
        ("/", "POST", "GET, HEAD"),
        ("/health", "DELETE", "GET, HEAD"),
        ("/rpc/v0", "GET", "POST"),
        (PATHS[0], "DELETE", "GET, HEAD"),
        (PATHS[0], "PUT", "GET, HEAD"),
        (PATHS[0], "BREW", "GET, HEAD"),
        (PATHS[3], "POST", "GET, HEAD"),
    ],
)
async def test_wrong_methods(tmp_path: Path, path: str, method: str, allow: str) -> None:
    async with node(tmp_path) as it:
        answer = await it.ask(path, method=method)
        assert (answer.status, answer.headers["allow"]) == (405, allow)


async def test_rpc(tmp_path: Path) -> None:
    async with node(tmp_path) as it:
        answer = await it.ask("/rpc/v0", method="POST", body=b"{}")
        assert (answer.status, answer.body) == (200, b'{"result":1}')
        assert answer.headers["content-type"] == "application/json"
        none = sign(SECRET, [])
        assert (await it.ask("/rpc/v0", method="POST", body=b"note", token=none)).status == 204
        assert it.calls == [(b"{}", frozenset({"read"})), (b"note", frozenset())]


# Disks that fail


class HangingFiles(FolderFiles):
    """A storage path that does not answer."""

    async def open_file(self, file: SectorFile, member: str | None = None) -> OpenFile:
        await trio.sleep_forever()
        raise AssertionError

    async def excerpt(self, file: SectorFile, member: str | None, spans: Spans) -> Excerpt:
        await trio.sleep_forever()
        raise AssertionError

    async def listing(self, file: SectorFile) -> Facts:
        raise StorageUnavailable("the disk is gone", "/mnt/x", "mount it")


@pytest.mark.parametrize("more", [0, 64])
async def test_small_and_large_ranges_are_the_same(tmp_path: Path, more: int) -> None:
    async with node(tmp_path) as it:
        path = tmp_path / "sealed/s-t01000-7"
        path.write_bytes(data := os.urandom(EXCERPT + 1000))
        answer = await it.ask(PATHS[0], ("Range", f"bytes=5-{EXCERPT + 4 + more}"))
        assert (answer.status, answer.body) == (206, data[5 : EXCERPT + 5 + more])
        step = (EXCERPT - 64) // 8
        spans = [(n * step + n, (n + 1) * step + n) for n in range(8)]
        spans[0] = (0, step + more)
        text = ",".join(f"{start}-{end - 1}" for start, end in spans)
        answer = await it.ask(PATHS[0], ("Range", f"bytes={text},{len(data) + 5}-{len(data) + 5}"))
        boundary = boundary_of(answer.headers["content-type"])
        assert boundary is not None
        found = list(parts(answer.body, boundary))
        assert [(part.start, part.end) for part in found] == spans
        assert [bytes(part.data) for part in found] == [data[a:b] for a, b in spans]
        assert len(it.files.opened) == (2 if more else 0)


async def test_small_ranges_under_conditions(tmp_path: Path) -> None:
    async with node(tmp_path) as it:
        few = ("Range", "bytes=3-5")
        tag = (await it.ask(PATHS[0], few)).headers["etag"]
        assert (await it.ask(PATHS[0], few, ("If-Range", tag))).status == 206
        answer = await it.ask(PATHS[0], few, ("If-Range", '"other"'))
        assert (answer.status, len(answer.body)) == (200, SIZE)
        assert (await it.ask(PATHS[0], few, ("If-Match", '"other"'))).status == 412
        assert (await it.ask(PATHS[0], few, ("If-None-Match", tag))).status == 304
        assert (await it.ask(PATHS[0].replace("-7", "-9"), few)).status == 404


async def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    class Shrinking(FolderFiles):
        async def excerpt(self, file: SectorFile, member: str | None, spans: Spans) -> Excerpt:
            whole = await super().excerpt(file, member, spans)
            return msgspec.structs.replace(whole, pieces=(b"",))

    made = Node(tmp_path, Shrinking(tmp_path))
    async with node(tmp_path, handler=made.handler()) as it:
        answer = await it.ask(PATHS[0], ("Range", "bytes=3-5"))
        assert answer.status >= 500
        assert "ends within" in answer.text


async def test_a_disk_that_hangs_or_is_gone_is_503(tmp_path: Path) -> None:
    made = Node(tmp_path, HangingFiles(tmp_path))
    async with node(tmp_path, handler=made.handler(deadline=0.05)) as it:
        for headers in ((), (("Range", "bytes=0-9"),)):
            answer = await it.ask(PATHS[0], *headers)
            assert answer.status == 503
            assert "s-t01000-7" in answer.text
        answer = await it.ask(PATHS[1])
        assert (answer.status, answer.text) == (
            503,
            "/mnt/x: the disk is gone (mount it)\n",
        )
        assert (await it.ask("/health", token="")).status == 200


async def test_a_fault_of_ours_is_counted_and_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(FolderFiles):
        async def listing(self, file: SectorFile) -> Facts:
            raise RuntimeError("internal detail")

    made = Node(tmp_path, Faulty(tmp_path))
    async with node(tmp_path, handler=made.handler()) as it:
        answer = await it.ask(PATHS[1])
        assert (answer.status, answer.text) == (500, "internal error\n")
        metrics = await it.ask("/metrics")
        assert 'sectorfs_http_requests_total{route="listing",status="500"}' in metrics.text
    assert "internal detail" in caplog.text


async def test_no_file_stays_open(tmp_path: Path) -> None:
    before = open_fds()
    async with node(tmp_path) as it:
        for headers in ((), (("Range", "bytes=9-1"),), (("If-None-Match", "*"),)):
            for method in ("GET", "HEAD"):
                await it.ask(PATHS[0], *headers, method=method)
            await it.ask(PATHS[0], ("Range", "bytes=0-9"))
        assert len(it.files.opened) == 6
        for opened in it.files.opened:
            assert opened.descriptor.closed
    await fds_return_to(before)


async def test_a_reply_that_cannot_be_made_closes_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**identity: int) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("sectorfs.server.ranges.validators", fail)
    async with node(tmp_path) as it:
        assert (await it.ask(PATHS[0])).status == 500
        assert it.files.opened[0].descriptor.closed
    assert "broken" in caplog.text


async def test_a_reply_closes_its_file_when_nobody_sends_it(tmp_path: Path) -> None:
    fill(tmp_path)
    files = FolderFiles(tmp_path)
    request = from_afar(PATHS[0], token=READ)
    reply: Reply = await Node(tmp_path, files).handler()(request)
    assert not files.opened[0].descriptor.closed
    reply.close()
    reply.close()
    assert files.opened[0].descriptor.closed
