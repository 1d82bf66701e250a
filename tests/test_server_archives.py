"""Sector directories sent as tar, and several ranges of a file in one answer."""

from __future__ import annotations

import email
import email.policy
import io
import os
import tarfile
from collections.abc import Container
from pathlib import Path

import pytest
import trio

from sectorfs.errors import NotFound
from sectorfs.stores.directories import OpenDirectory
from sectorfs.stores.lanes import Lane
from sectorfs.stores.layout import FULL
from sectorfs.stores.protocol import OpenFile
from sectorfs.types import FileType, SectorFile, SectorID
from sectorfs.wire.messages import LateFile, PartedBody, Reply, Request
from tests.archive_fixtures import COMPLETE, FINALIZED, READ, served, write_directory
from tests.local_fixtures import make_path, make_store, switched_index
from tests.tar_fixtures import read
from tests.wire_fixtures import (
    FolderFiles,
    fds_return_to,
    file_body,
    open_fds,
    raw,
    running,
    wait_until,
)

CACHE = "/remote/cache/s-t01000-7"
SEALED = "/remote/sealed/s-t01000-7"


def contents(body: bytes) -> dict[str, bytes]:
    """Files of a tar as Python reads them."""
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        found = {}
        for member in archive:
            opened = archive.extractfile(member)
            assert opened is not None
            found[member.name] = opened.read()
        return found


# Directories


async def test_a_directory_comes_as_a_closed_tar_of_known_length(tmp_path: Path) -> None:
    known = {name: data for name, data in COMPLETE.items() if name in FULL}
    write_directory(tmp_path / "cache/s-t01000-7", known)
    before = open_fds()
    async with served(FolderFiles(tmp_path)) as node:
        answer = await node.ask(CACHE)
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/x-tar"
        assert answer.headers["content-length"] == str(len(answer.body))
        assert contents(answer.body) == known
        assert list(contents(answer.body)) == sorted(known)
        _, ending = read([answer.body])
        assert not ending.unterminated
        head = await node.ask(CACHE, method="HEAD")
        assert (head.status, head.body) == (200, b"")
        del head.headers["date"], answer.headers["date"]
        assert head.headers == answer.headers
        assert (await node.ask(CACHE)).body == answer.body
    await fds_return_to(before)


@pytest.mark.parametrize("query", ["?mincache", "?mincache=", "?mincache=true", "?x=1&mincache=0"])
async def test_the_minimal_cache(tmp_path: Path, query: str) -> None:
    write_directory(tmp_path / "cache/s-t01000-7", {**COMPLETE, "batch.json": b"{}"})
    async with served(FolderFiles(tmp_path)) as node:
        assert contents((await node.ask(CACHE + query)).body) == FINALIZED


async def test_what_other_programs_refuse_travels_on_demand(tmp_path: Path) -> None:
    """They give a whole fetch up at the first name that they do not know."""
    files = {**COMPLETE, "odd.name": b"odd", "batch.json": b"{}"}
    write_directory(tmp_path / "cache/s-t01000-7", files)
    async with served(FolderFiles(tmp_path)) as node:
        plain = await node.ask(CACHE)
        assert files.keys() - contents(plain.body).keys() == {"sc-02-data-tree-c.dat", "odd.name"}
        everything = await node.ask(CACHE + "?all")
        assert contents(everything.body) == files
        assert everything.headers["etag"] != plain.headers["etag"]


async def test_everything_flat_and_regular_travels_and_nothing_else(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "cache/s-t01000-7", {**COMPLETE, "odd.name": b"odd"})
    (directory / "sub").mkdir()
    (directory / "sub/p_aux").write_bytes(b"x")
    (directory / "p_aux.tmp").write_bytes(b"x")
    os.mkfifo(directory / "fifo")
    async with served(FolderFiles(tmp_path)) as node:
        answer = await node.ask(CACHE + "?all")
        assert contents(answer.body) == {**COMPLETE, "odd.name": b"odd"}


async def test_an_empty_directory_and_an_empty_file(tmp_path: Path) -> None:
    write_directory(tmp_path / "cache/s-t01000-7", {})
    write_directory(tmp_path / "cache/s-t01000-8", {"p_aux": b"", "t_aux": b"t"})
    async with served(FolderFiles(tmp_path)) as node:
        assert (await node.ask(CACHE)).body == bytes(1024)
        answer = await node.ask("/remote/cache/s-t01000-8")
        assert contents(answer.body) == {"p_aux": b"", "t_aux": b"t"}


@pytest.mark.parametrize("text", ["bytes=0-0", "bytes=0-", "bytes=9-1", "x", ""])
async def test_a_part_of_a_directory_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    write_directory(tmp_path / "cache/s-t01000-7", FINALIZED)
    before = open_fds()
    async with served(FolderFiles(tmp_path)) as node:
        answer = await node.ask(CACHE, ("Range", text))
        assert answer.status == 416
        assert f"{CACHE}/files" in answer.body.decode()
        assert answer.body.count(b"\n") == 1
        assert (await node.ask(CACHE, ("Range", text), method="HEAD")).status == 200
    await fds_return_to(before)


async def test_a_directory_that_is_known_is_not_sent_again(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "cache/s-t01000-7", FINALIZED)
    before = open_fds()
    async with served(FolderFiles(tmp_path)) as node:
        tag = (await node.ask(CACHE)).headers["etag"]
        minimal = (await node.ask(CACHE + "?mincache")).headers["etag"]
        assert minimal == tag  # the same files make the same stream
        answer = await node.ask(CACHE, ("If-None-Match", f'"x", {tag}'))
        assert (answer.status, answer.body) == (304, b"")
        assert (await node.ask(CACHE, ("If-Match", '"x"'))).status == 412
        os.utime(directory / "p_aux", ns=(1, 1))
        assert (await node.ask(CACHE, ("If-None-Match", tag))).status == 200
    await fds_return_to(before)


async def test_directories_that_are_not_here(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/s-t01000-9").write_bytes(b"a file")
    async with served(FolderFiles(tmp_path)) as node:
        for number in (8, 9):
            answer = await node.ask(f"/remote/cache/s-t01000-{number}")
            assert answer.status == 404
            assert answer.body.count(b"\n") == 1


class Meddling(FolderFiles):
    """Does something to a directory when its second file is about to be opened."""

    def __init__(self, root: Path, change: str) -> None:
        super().__init__(root)
        self.change = change

    async def open_directory(
        self, file: SectorFile, *, only: Container[str] | None
    ) -> OpenDirectory:
        inner = await super().open_directory(file, only=only)
        return _Meddled(
            **{name: getattr(inner, name) for name in inner.__struct_fields__}, change=self.change
        )


class _Meddled(OpenDirectory, frozen=True, kw_only=True):
    change: str

    async def open_member(self, name: str) -> OpenFile:
        if name != self.members[0].name:
            path = Path(self.path) / name
            if self.change == "vanishes":
                path.unlink(missing_ok=True)
            elif self.change == "shrinks":
                os.truncate(path, 1)
            elif self.change == "grows":
                with path.open("ab") as stream:
                    stream.write(b"more")
            elif self.change == "changes":
                path.write_bytes(path.read_bytes())
            elif self.change == "becomes a link":
                path.unlink()
                path.symlink_to("p_aux")
            elif self.change == "becomes a FIFO":
                path.unlink()
                os.mkfifo(path)
            opened = await super().open_member(name)
            if self.change == "shrinks later":
                os.truncate(path, 1)
            return opened
        return await super().open_member(name)


@pytest.mark.parametrize(
    "change",
    [
        "vanishes",
        "shrinks",
        "shrinks later",
        "grows",
        "changes",
        "becomes a link",
        "becomes a FIFO",
    ],
)
async def test_a_file_that_changes_ends_the_connection(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_directory(tmp_path / "cache/s-t01000-7", FINALIZED)
    before = open_fds()
    async with served(Meddling(tmp_path, change)) as node, raw(node.port) as client:
        await client.send(
            f"GET {CACHE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {READ}\r\n\r\n"
        )
        data = b""
        with trio.fail_after(10):
            while piece := await client.stream.receive_some():
                data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        assert b"200 OK" in head
        first = FINALIZED["p_aux"]
        assert body[512 : 512 + len(first)] == first
        assert b"t" * 100 not in body
    await fds_return_to(before)
    assert "reply broken off" in caplog.text
    assert str(directory) in caplog.text or change == "shrinks later"


async def test_a_directory_replaced_meanwhile_is_sent_as_it_was(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "cache/s-t01000-7", FINALIZED)

    class Replacing(FolderFiles):
        async def open_directory(
            self, file: SectorFile, *, only: Container[str] | None
        ) -> OpenDirectory:
            opened = await super().open_directory(file, only=only)
            os.rename(directory, tmp_path / "old")
            write_directory(directory, {"p_aux": b"other"})
            return opened

    async with served(Replacing(tmp_path)) as node:
        assert contents((await node.ask(CACHE)).body) == FINALIZED


async def test_a_client_that_goes_away_leaves_nothing_open(tmp_path: Path) -> None:
    big = {"p_aux": b"p", "sc-02-data-layer-1.dat": bytes(64 << 20), "t_aux": b"t"}
    write_directory(tmp_path / "cache/s-t01000-7", big)
    before = open_fds()
    async with served(FolderFiles(tmp_path)) as node:
        async with raw(node.port) as client:
            await client.send(
                f"GET {CACHE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {READ}\r\n\r\n"
            )
            assert await client.stream.receive_some()
            assert any("layer-1" in name for name in await _opened("layer-1"))
        await wait_until(lambda: not any(str(tmp_path) in name for name in open_fds()))
    await fds_return_to(before)


async def _opened(name: str) -> set[str]:
    await wait_until(lambda: any(name in entry for entry in open_fds()))
    return open_fds()


async def test_a_real_store_sends_its_directories(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    make_path(path)
    directory = write_directory(path / "cache/s-t01000-7", FINALIZED)
    async with switched_index(tmp_path) as index:
        store = make_store(index)
        await store.attach(str(path))
        async with served(store) as node:
            assert contents((await node.ask(CACHE)).body) == FINALIZED
            assert (await node.ask("/remote/update-cache/s-t01000-7")).status == 404
            os.rename(directory, tmp_path / "elsewhere")
            assert (await node.ask(CACHE)).status == 404
            (path / "sectorstore.json").unlink()
            assert (await node.ask(CACHE)).status == 404
        with pytest.raises(NotFound, match="not a directory"):
            await store.open_directory(SectorFile(FileType.SEALED, SectorID(1000, 7)), only=None)


async def test_a_directory_whose_disk_is_gone_is_not_an_absent_one(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    storage = make_path(path)
    directory = write_directory(path / "cache/s-t01000-7", FINALIZED)
    async with switched_index(tmp_path) as index:
        store = make_store(index, holders=lambda file: (storage,))
        await store.attach(str(path))
        os.rename(directory, tmp_path / "elsewhere")
        async with served(store) as node:
            assert (await node.ask(CACHE)).status == 404
            (path / "sectorstore.json").unlink()
            assert (await node.ask(CACHE)).status == 503


# Bodies in parts


async def test_a_part_of_another_length_ends_the_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    lane = Lane("disk", deadline=5)
    closed: list[str] = []

    async def handler(request: Request) -> Reply:
        async def opened() -> object:
            await trio.lowlevel.checkpoint()
            return file_body(tmp_path / "file", lane, length=4)

        parts = [b"begin ", LateFile(5, opened)]  # type: ignore[arg-type]  # a FileBody it is
        return Reply(200, (), PartedBody(parts, close=lambda: closed.append("once")))

    before = open_fds()
    async with running(handler) as port, raw(port) as client:
        await client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(Exception, match="without sending complete message body"):
            await client.answer()
    assert closed == ["once"]
    assert "4 bytes instead of the 5 promised" in caplog.text
    await fds_return_to(before)


# Several ranges


def multipart(headers: dict[str, str], body: bytes) -> list[tuple[str, bytes]]:
    """Content-Range and bytes of each part, as Python's own parser sees them."""
    head = f"content-type: {headers['content-type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    parts = []
    for part in message.iter_parts():  # type: ignore[attr-defined]  # of the policy's class
        assert part.get_content_type() == "application/octet-stream"
        parts.append((part["content-range"], part.get_payload(decode=False)))
    return [(extent, payload.encode("ascii")) for extent, payload in parts]


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("bytes=0-0,2-2", [(0, 1), (2, 1)]),
        ("bytes=900-999,0-9", [(900, 100), (0, 10)]),
        ("bytes=0-9, 5-14 ,-5", [(0, 10), (5, 10), (995, 5)]),
        ("bytes=0-1,5000-,3-4", [(0, 2), (3, 2)]),
        ("bytes=" + ",".join(f"{at}-{at}" for at in range(64)), [(at, 1) for at in range(64)]),
    ],
)
async def test_several_ranges(tmp_path: Path, text: str, spans: list[tuple[int, int]]) -> None:
    (tmp_path / "sealed").mkdir()
    data = bytes(range(33, 126)) * 11
    data = data[:1000]
    (tmp_path / "sealed/s-t01000-7").write_bytes(data)
    before = open_fds()
    async with served(FolderFiles(tmp_path)) as node:
        answer = await node.ask(SEALED, ("Range", text))
        assert answer.status == 206
        assert answer.headers["content-length"] == str(len(answer.body))
        assert "content-range" not in answer.headers
        assert "etag" in answer.headers
        assert multipart(answer.headers, answer.body) == [
            (f"bytes {at}-{at + size - 1}/1000", data[at : at + size]) for at, size in spans
        ]
        head = await node.ask(SEALED, ("Range", text), method="HEAD")
        assert (head.status, head.headers["content-length"]) == (200, "1000")
    await fds_return_to(before)


@pytest.mark.parametrize(
    "text",
    [
        "bytes=" + ",".join(f"{at}-{at}" for at in range(65)),
        "bytes=0-,0-",
        "bytes=0-999,0-0",
        "bytes=1000-,2000-",
        "bytes=0-0,9-1",
        "bytes=0-0,x",
    ],
)
async def test_ranges_that_ask_too_much_are_416(tmp_path: Path, text: str) -> None:
    (tmp_path / "sealed").mkdir()
    (tmp_path / "sealed/s-t01000-7").write_bytes(bytes(1000))
    before = open_fds()
    async with served(FolderFiles(tmp_path)) as node:
        answer = await node.ask(SEALED, ("Range", text))
        assert (answer.status, answer.headers["content-range"]) == (416, "bytes */1000")
        assert b"range" in answer.body
    await fds_return_to(before)


async def test_several_ranges_if_the_content_is_still_the_same(tmp_path: Path) -> None:
    (tmp_path / "sealed").mkdir()
    path = tmp_path / "sealed/s-t01000-7"
    path.write_bytes(bytes(1000))
    several = ("Range", "bytes=0-0,2-2")
    async with served(FolderFiles(tmp_path)) as node:
        known = (await node.ask(SEALED, method="HEAD")).headers
        for validator in (known["etag"], known["last-modified"]):
            assert (await node.ask(SEALED, several, ("If-Range", validator))).status == 206
            assert (await node.ask(SEALED, several, ("If-Match", known["etag"]))).status == 206
        path.write_bytes(bytes(999))
        os.utime(path, ns=(0, 0))
        for validator in (known["etag"], known["last-modified"], f"W/{known['etag']}"):
            answer = await node.ask(SEALED, several, ("If-Range", validator))
            assert (answer.status, len(answer.body)) == (200, 999)


async def test_a_file_that_shrinks_between_ranges_ends_the_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sealed").mkdir()
    path = tmp_path / "sealed/s-t01000-7"
    path.write_bytes(bytes(1_000_000))

    class Shrinking(FolderFiles):
        async def open_file(self, file: SectorFile, member: str | None = None) -> OpenFile:
            opened = await super().open_file(file, member)
            os.truncate(path, 500_000)
            return opened

    before = open_fds()
    async with served(Shrinking(tmp_path)) as node:
        with pytest.raises(Exception, match="broke off"):
            await node.ask(SEALED, ("Range", "bytes=0-299999,900000-900099"))
    await fds_return_to(before)
    assert "the file ended after 0 of 100 bytes" in caplog.text
