"""Manifests, rolls and leaf hashes, served by a node and asked for by another."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sectorfs.errors import NotFound, SectorFSError, WrongBytes
from sectorfs.server.routes import make_handler
from sectorfs.stores import manifest
from sectorfs.stores.answers import LEAVES_HEADER
from sectorfs.stores.manifest import BLOCK, HEADER, LEAF, Manifest
from sectorfs.stores.manifest_store import Key, ManifestStore
from sectorfs.stores.rolls import make_roll
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import FileType, SectorFile, SectorID
from sectorfs.wire.client import Client
from sectorfs.wire.multipart import boundary_of, parts
from sectorfs.wire.tokens import Secret, sign
from tests.test_transfer import answer, asking
from tests.wire_fixtures import PATIENT, FolderFiles, fds_return_to, open_fds, running

SECRET = Secret(bytes(range(32)))
SEALED = SectorFile(FileType.SEALED, SectorID(1000, 7))
CACHE = SectorFile(FileType.CACHE, SectorID(1000, 7))
SIZE = 3 * BLOCK + LEAF + 5
MEMBERS = {"p_aux": b"p" * 64, "t_aux": b"t" * 10, "empty": b""}


class Served:
    """A node with a few files, and another that asks it."""

    def __init__(self, root: Path, client: Client) -> None:
        self.root = root
        self.data = os.urandom(SIZE)
        self.files = FolderFiles(root / "path")
        self.store = ManifestStore(root / "manifests", deadline=5)
        self.client = client
        self.peers = PeerClient(client)
        self.missed: list[SectorFile] = []
        self.base = ""
        for file, data in ((SEALED, {"": self.data}), (CACHE, MEMBERS)):
            place = root / "path" / str(file)
            for name, content in data.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(content)

    def key(self, file: SectorFile = SEALED, member: str | None = None) -> Key:
        found = (self.root / "path" / str(file) / (member or "")).stat()
        return Key(self.files.storage, file, member, found.st_size, found.st_mtime_ns)

    async def hash(self, file: SectorFile = SEALED, member: str | None = None) -> Manifest:
        data = (self.root / "path" / str(file) / (member or "")).read_bytes()
        made = Manifest.of_leaves(len(data), manifest.leaf_hashes(data))
        await self.store.save(self.key(file, member), made)
        return made

    async def get(self, path: str, *headers: tuple[str, str], method: str = "GET") -> Any:
        async with self.client.request(method, f"{self.base}/{path}", headers) as response:
            return response.status, dict(response.headers), await response.read(1 << 24)


@asynccontextmanager
async def served(root: Path) -> AsyncIterator[Served]:
    before = open_fds()
    async with Client(PATIENT, token=sign(SECRET, ("read",))) as client:
        it = Served(root, client)
        handler = make_handler(
            it.files,
            secret=SECRET,
            rpc=no_rpc,
            health=dict,
            status=str,
            deadline=5,
            manifests=it.store,
            missed=it.missed.append,
        )
        async with running(handler) as port:
            it.base = f"http://127.0.0.1:{port}/remote"
            yield it
        it.store.close()
    await fds_return_to(before)


async def no_rpc(*args: object, **others: object) -> tuple[int, bytes]:
    return 404, b""


async def test_a_manifest_is_served_whole_and_in_parts(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        made = await it.hash()
        status, headers, body = await it.get("sealed/s-t01000-7/manifest")
        assert (status, body) == (200, made.encode())
        assert headers["sectorfs-mtime-ns"] == str(it.key().mtime_ns)
        assert headers["content-type"] == "application/octet-stream"
        status, headers, _ = await it.get("sealed/s-t01000-7/manifest", method="HEAD")
        assert (status, headers["content-length"]) == (200, str(manifest.encoded_size(SIZE)))
        status, _, body = await it.get("sealed/s-t01000-7/manifest", ("range", "bytes=64-95"))
        assert (status, body) == (206, made.blocks[:32])


async def test_a_client_gets_what_is_proved(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        made = await it.hash()
        outline = await it.peers.outline(it.base, SEALED, None, size=SIZE, digest=made.digest)
        assert outline.blocks == made.blocks
        for blocks in (range(4), range(1, 3), range(3, 4)):
            found = await it.peers.leaves(it.base, SEALED, None, outline, blocks)
            assert found == b"".join(made.leaves_of(block) for block in blocks)
        for name in MEMBERS:
            await it.hash(CACHE, name)
        digests = [(name, len(data), _digest(data)) for name, data in MEMBERS.items()]
        wanted = make_roll(digests)
        roll = await it.peers.roll(it.base, CACHE, digest=wanted.digest)
        assert roll == wanted
        entry = roll.entry("p_aux")
        assert entry is not None
        found = await it.peers.outline(it.base, CACHE, "p_aux", size=64, digest=entry.digest)
        assert found.digest == entry.digest
        empty = await it.peers.outline(it.base, CACHE, "empty", size=0, digest=_digest(b""))
        assert empty.blocks == b""


def _digest(data: bytes) -> bytes:
    return Manifest.of_leaves(len(data), manifest.leaf_hashes(data)).digest


async def test_what_has_no_manifest_yet_is_not_found_and_told(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        for path in (
            "sealed/s-t01000-7/manifest",
            "cache/s-t01000-7/manifest",
            "cache/s-t01000-7/manifest/p_aux",
        ):
            status, _, body = await it.get(path)
            assert (status, b"no manifest of it yet" in body) == (404, True)
        assert it.missed == [SEALED, CACHE, CACHE]
        await it.hash(CACHE, "p_aux")  # the others have none
        assert (await it.get("cache/s-t01000-7/manifest"))[0] == 404
        for path in (
            "sealed/s-t01000-8/manifest",
            "sealed/s-t01000-7/manifest/p_aux",
            "cache/s-t01000-7/manifest/none",
            "cache/s-t01000-7/manifest/p.tmp",
        ):
            assert (await it.get(path))[0] == 404
        assert len(it.missed) == 4


async def test_a_file_that_changed_has_no_manifest(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        made = await it.hash()
        path = tmp_path / "path" / str(SEALED)
        path.write_bytes(os.urandom(SIZE))
        os.utime(path, ns=(0, it.key().mtime_ns + 1))
        with pytest.raises(NotFound):
            await it.peers.outline(it.base, SEALED, None, size=SIZE, digest=made.digest)
        _, headers, _ = await ranged(it, "bytes=0-9")
        assert LEAVES_HEADER not in headers


async def ranged(it: Served, spans: str, wish: str = "1") -> Any:
    return await it.get("sealed/s-t01000-7", ("range", spans), (LEAVES_HEADER, wish))


async def test_leaf_hashes_come_beside_a_small_range(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        made = await it.hash()
        for first, last, blocks in (
            (0, LEAF - 1, (0,)),
            (BLOCK - LEAF, BLOCK + LEAF - 1, (0, 1)),
            (3 * BLOCK, SIZE - 1, ()),
            (3 * BLOCK, 9 * BLOCK, ()),
            (3 * BLOCK + LEAF, SIZE + 100, (3,)),
        ):
            status, headers, body = await ranged(it, f"bytes={first}-{min(last, first + 200_000)}")
            assert (status, body) == (206, it.data[first : min(last, first + 200_000) + 1])
            found = base64.b64decode(headers.get(LEAVES_HEADER, ""))
            assert found == b"".join(made.leaves_of(block) for block in blocks)
        assert LEAVES_HEADER not in (await ranged(it, "bytes=0-9", wish="0"))[1]


async def test_leaf_hashes_come_in_each_part(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        made = await it.hash()
        beyond = f"{9 * BLOCK}-{9 * BLOCK}"
        inner = f"{BLOCK + 10}-{BLOCK + 19}"
        spans = f"bytes=0-{LEAF - 1},{3 * BLOCK}-{SIZE - 1},{inner},{beyond}"
        status, headers, body = await ranged(it, spans)
        boundary = boundary_of(headers["content-type"])
        assert status == 206
        assert boundary is not None
        found = list(parts(body, boundary))
        leaves = [base64.b64decode(one.headers.get(LEAVES_HEADER, "")) for one in found]
        assert leaves == [made.leaves_of(0), b"", made.leaves_of(1)]
        assert [bytes(one.data) for one in found] == [
            it.data[:LEAF],
            it.data[3 * BLOCK :],
            it.data[BLOCK + 10 : BLOCK + 20],
        ]


async def test_without_a_manifest_the_bytes_come_alone(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        for _ in range(2):
            status, headers, body = await ranged(it, "bytes=0-9")
            assert (status, body) == (206, it.data[:10])
            assert LEAVES_HEADER not in headers
        made = await it.hash()  # from now on it has one
        _, headers, _ = await ranged(it, "bytes=0-9")
        assert base64.b64decode(headers[LEAVES_HEADER]) == made.leaves_of(0)


async def test_a_manifest_disk_that_fails_holds_no_bytes_back(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        await it.hash()
        name = tmp_path / "manifests" / it.key().name
        name.unlink()
        name.symlink_to(name)  # ELOOP
        status, headers, body = await ranged(it, "bytes=0-9")
        assert (status, body) == (206, it.data[:10])
        assert LEAVES_HEADER not in headers
        assert (await it.get("sealed/s-t01000-7/manifest"))[0] == 500


# Peers that lie


def encoded(size: int = 2 * BLOCK, change: Callable[[bytearray], object] | None = None) -> bytes:
    data = bytearray(Manifest.of_leaves(size, manifest.leaf_hashes(bytes(size))).encode())
    if change is not None:
        change(data)
    return bytes(data)


GOOD = Manifest.decode(encoded())
OUTLINE = manifest.outline_size(2 * BLOCK)


def flip(at: int) -> Callable[[bytearray], object]:
    return lambda data: data.__setitem__(at, data[at] ^ 1)


def range_of(data: bytes, first: int, last: int, total: int) -> bytes:
    return answer(206, data[first : last + 1], f"Content-Range: bytes {first}-{last}/{total}")


@pytest.mark.parametrize(
    "lie",
    [
        flip(0),
        flip(8),
        flip(12),
        flip(16),
        flip(24),
        flip(63),
        flip(HEADER),
        flip(OUTLINE - 1),
        lambda data: data.__setitem__(slice(None), encoded(2 * BLOCK + 1)),
        lambda data: data.__setitem__(slice(None), bytes(len(data))),
    ],
)
async def test_an_outline_that_is_not_the_digests_is_refused(lie: Any) -> None:
    data = encoded(change=lie)
    async with asking(range_of(data, 0, OUTLINE - 1, len(data))) as (client, base):
        with pytest.raises(WrongBytes):
            await client.outline(base, SEALED, None, size=2 * BLOCK, digest=GOOD.digest)


@pytest.mark.parametrize(
    "said",
    [
        answer(200, encoded()),
        answer(206, encoded()[: OUTLINE - 1], f"Content-Range: bytes 0-{OUTLINE - 1}/9999"),
        answer(206, encoded()[: OUTLINE + 1], f"Content-Range: bytes 0-{OUTLINE}/9999"),
        answer(206, encoded()[:OUTLINE]),
        answer(416),
        answer(404),
        answer(500),
    ],
)
async def test_an_outline_of_another_length_is_refused(said: bytes) -> None:
    async with asking(said) as (client, base):
        with pytest.raises(SectorFSError):
            await client.outline(base, SEALED, None, size=2 * BLOCK, digest=GOOD.digest)


@pytest.mark.parametrize("bad", [0, 31, 32 * 16, 32 * 31])
async def test_leaf_hashes_that_do_not_make_their_block_are_refused(bad: int) -> None:
    data = encoded(change=flip(OUTLINE + bad))
    total = len(data)
    async with asking(range_of(data, OUTLINE, total - 1, total)) as (client, base):
        with pytest.raises(WrongBytes, match=f"block {bad // 512}"):
            await client.leaves(base, SEALED, None, GOOD.outline, range(2))


ROLL = make_roll([("p_aux", 64, bytes(31) + b"1"), ("t_aux", 10, bytes(31) + b"2")])


def rolled(**change: Any) -> bytes:
    shape = json.loads(ROLL.encode())
    shape["Files"][0].update(change)
    return json.dumps(shape).encode()


@pytest.mark.parametrize(
    "said",
    [
        b"{}",
        b"[]",
        b"\xff",
        rolled(Name="../p_aux"),
        rolled(Name="t_aux"),
        rolled(Name="q_aux"),
        rolled(Size=65),
        rolled(Size=-1),
        rolled(Size=2**63),
        rolled(Digest="00" * 32),
        rolled(Digest="zz" * 32),
        rolled(Digest="00"),
        make_roll([("p_aux", 64, bytes(31) + b"1")]).encode(),
    ],
)
async def test_a_roll_that_is_not_the_digests_is_refused(said: bytes) -> None:
    async with asking(answer(200, said, kind="application/json")) as (client, base):
        with pytest.raises(WrongBytes):
            await client.roll(base, CACHE, digest=ROLL.digest)
    async with asking(answer(200, ROLL.encode(), kind="application/json")) as (client, base):
        assert await client.roll(base, CACHE, digest=ROLL.digest) == ROLL
