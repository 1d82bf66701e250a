"""The client half of the peer protocol: space, facts, whole files and ranges from other nodes.

Every answer is checked before it is believed (`answers`). What a peer
cannot give or says wrongly is an error of the family that names the URL, so that the caller can go
on to the next source. lotus and Curio nodes have neither HEAD nor listings; the size of a file is
then read off a range of one byte, and a directory comes as one tar stream (`archives`).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from functools import partial
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec
import trio

from sectorfs.errors import (
    BadInput,
    NoRanges,
    NotFound,
    Refused,
    SectorFSError,
    SourceFailed,
    TimedOut,
    WrongBytes,
)
from sectorfs.index.protocol import FsStat
from sectorfs.metrics import FETCHED_BYTES, SOURCE_FAILURES
from sectorfs.stores.answers import (
    LEAVES_HEADER,
    MTIME_HEADER,
    Version,
    content_range,
    deliver_parts,
    error_text,
    expect_octets,
    expect_ranges,
    expect_status,
    expect_time,
    expect_type,
    listed_facts,
    mtime_of,
    span_version,
    told_leaves,
    told_space,
)
from sectorfs.stores.manifest import Outline, leaves_at, outline_size
from sectorfs.stores.node_kinds import NodeKind, NodeKinds
from sectorfs.stores.rolls import LIMIT as ROLL_LIMIT
from sectorfs.stores.rolls import Roll, decode_roll
from sectorfs.stores.tar_writer import CONTENT_TYPE
from sectorfs.types import (
    Facts,
    SectorFile,
    StorageID,
)
from sectorfs.wire.client import Client
from sectorfs.wire.messages import Runner
from sectorfs.wire.response import Response
from sectorfs.wire.sink import Sieve

EXPECT_HEADER = "sectorfs-expect"
"""``<size>-<mtime in ns>`` in a request to remove a file: what is to be removed, and nothing else.
Sent to our nodes and passed over by others."""

MOVED_HEADER = "sectorfs-moved-to"
"""The storage that a file was moved to, in a request to remove it where it was; likewise."""

_WITH_LEAVES = ((LEAVES_HEADER, "1"),)
_REMOVE_SECONDS = 300.0
_STAT_LIMIT = 64 * 1024
_LISTING_LIMIT = 16 * 1024 * 1024
_MAX_PEERS = 4096
_SETTLE_SECONDS = 60.0
_PART_OVERHEAD = 4096


class Latency(msgspec.Struct, frozen=True):
    """A moving average of seconds to the first byte; old samples fade with time and number."""

    seconds: float
    at: float
    """When the last sample was taken."""

    def seen(self, seconds: float, *, now: float) -> Latency:
        """The average with one more sample."""
        weight = max(0.2, 1 - math.exp(-(now - self.at) / _SETTLE_SECONDS))
        return Latency(self.seconds + weight * (seconds - self.seconds), now)


class Told(msgspec.Struct, frozen=True):
    """What a node tells of a sector file."""

    facts: Facts
    by_ours: bool
    """By a node that runs this program: one of another drops nothing from this Index."""


class PeerClient:
    """Asks other nodes for what they hold. Base URLs are as in the Index: ``http://h:p/remote``."""

    def __init__(self, client: Client, *, clock: Callable[[], float] = trio.current_time) -> None:
        self._client = client
        self._clock = clock
        self._latency: dict[str, Latency] = {}
        self._kinds = NodeKinds(MTIME_HEADER)

    def kind(self, base_url: str) -> NodeKind | None:
        """What kind of node a peer is; None before it gave anything."""
        return self._kinds.of(_peer(base_url))

    def latency(self, base_url: str) -> float:
        """Usual seconds to the first byte of an answer; 0 while nothing is known."""
        known = self._latency.get(_peer(base_url))
        return known.seconds if known else 0.0

    async def stat(self, base_url: str, storage: StorageID) -> FsStat:
        """Space of a storage that this peer serves."""
        async with self._ask("GET", _join(base_url, "stat", storage)) as response:
            await expect_status(response, 200)
            return told_space(response, await response.read(_STAT_LIMIT))

    async def facts(self, base_url: str, file: SectorFile) -> Facts:
        """Size and time of a file, and of each file in a sector directory."""
        return (await self.told(base_url, file)).facts

    async def told(self, base_url: str, file: SectorFile) -> Told:
        """`facts`, and whether it is a node of ours that tells them."""
        url = _file_url(base_url, file)
        if file.file_type.is_directory:
            return Told(await self._listing(_join(url, "files")), by_ours=True)
        if self.kind(base_url) in (NodeKind.RANGES, NodeKind.WHOLE):
            return await self._told_by_range(url)
        async with self._ask("HEAD", url) as response:
            if response.status != 405:
                await expect_status(response, 200)
                if response.length is None:
                    raise SourceFailed("HEAD gives no length", response.url)
                return _of_answer(response, response.length)
        return await self._told_by_range(url)

    async def _told_by_range(self, url: str) -> Told:
        """For nodes without HEAD: the total stands in the answer to a range of one byte.

        `NoRanges` from those that give files whole only, and no lengths with them.
        """
        async with self._ask("GET", url, (("range", "bytes=0-0"),)) as response:
            if response.status == 200:  # of an empty file, or ranges are passed over
                expect_octets(response)
                if response.length is None:
                    raise NoRanges("sends files whole, and does not say how long", response.url)
                return _of_answer(response, response.length)
            if response.status != 416:
                await expect_status(response, 206)
            _, total = content_range(response)
            if total is None:
                raise SourceFailed("names no total size", response.url)
            return _of_answer(response, total)

    async def _listing(self, url: str) -> Facts:
        async with self._ask("GET", url) as response:
            await expect_status(response, 200)
            return listed_facts(response, await response.read(_LISTING_LIMIT))

    async def fetch(
        self,
        base_url: str,
        file: SectorFile,
        member: str | None,
        descriptor: AbstractContextManager[int],
        *,
        size: int,
        mtime_ns: int | None,
        run: Runner,
        progress: Callable[[int], object] | None = None,
        sieve: Sieve | None = None,
    ) -> None:
        """Write a whole file of `size` bytes to the start of `descriptor`.

        `mtime_ns` is what the source declared, None when it did not: a node of ours that has
        another content by now, or gives another copy, is told by its time. `run` is a
        `Lane.finish`: writes are never given up half way.
        """
        try:
            url = _file_url(base_url, file, member)
            async with self._ask("GET", url, bulk=True) as response:
                await expect_status(response, 200)
                expect_octets(response)
                expect_time(response, mtime_ns)
                await response.save(
                    descriptor, offset=0, length=size, run=run, progress=progress, sieve=sieve
                )
        except SectorFSError:
            SOURCE_FAILURES.inc()
            raise

    async def fetch_unmeasured(
        self,
        base_url: str,
        file: SectorFile,
        descriptor: AbstractContextManager[int],
        *,
        limit: int,
        run: Runner,
        progress: Callable[[int], object] | None = None,
    ) -> Facts:
        """As `fetch`, of a file whose length only its end tells: size and time of what came.

        Nodes that do not say the length end a body that they could not read to its end as if it
        were whole: what came is to be judged by its length.
        """
        try:
            async with self._ask("GET", _file_url(base_url, file), bulk=True) as response:
                await expect_status(response, 200)
                expect_octets(response)
                size = await response.save_all(descriptor, limit=limit, run=run, progress=progress)
                return Facts(size, mtime_of(response))
        except SectorFSError:
            SOURCE_FAILURES.inc()
            raise

    async def read(
        self, base_url: str, file: SectorFile, member: str | None, offset: int, size: int
    ) -> bytes:
        """Exactly the bytes from `offset` to `offset + size`, which must lie in the file."""
        if size <= 0:
            return b""
        last = offset + size - 1
        url = _file_url(base_url, file, member)
        async with self._ask("GET", url, (("range", f"bytes={offset}-{last}"),)) as response:
            await expect_status(response, 206)
            expect_octets(response)
            span, _ = content_range(response)
            if span != (offset, last):
                raise SourceFailed(f"sends another range than {offset}-{last}", response.url)
            data = await response.read(size)
            if len(data) != size:
                raise SourceFailed(f"sent {len(data)} bytes instead of {size}", response.url)
        self._received(url, size)
        return data

    async def ranges(
        self,
        base_url: str,
        file: SectorFile,
        member: str | None,
        spans: Sequence[tuple[int, int]],
        *,
        expect: Version | None,
        leaves: bool,
        deliver: Callable[[int, bytes, bytes], object],
    ) -> Version:
        """Give `deliver` the bytes of each span (start, end), all in one request.

        With `leaves` it is asked for leaf hashes too, and gives `deliver` those that came: of the
        span's `edge_blocks`, or none. `Stale` when the peer gives another version than `expect`, as
        far as either tells; `NoRanges` when it gives files whole only.
        """
        text = ",".join(f"{start}-{end - 1}" for start, end in spans)
        url = _file_url(base_url, file, member)
        headers = (("range", f"bytes={text}"), *(_WITH_LEAVES if leaves else ()))
        async with self._ask("GET", url, headers) as response:
            await expect_ranges(response)
            wanted = sum(end - start for start, end in spans)
            if len(spans) == 1:
                version = span_version(response, spans[0], expect)
                data = await response.read(wanted)
                if len(data) != wanted:
                    raise SourceFailed(f"sent {len(data)} bytes instead of {wanted}", response.url)
                self._received(url, wanted)
                deliver(spans[0][0], data, told_leaves(response.headers))
                return version
            body = await response.read(wanted + _PART_OVERHEAD * (len(spans) + 1))
            self._received(url, wanted)
            return deliver_parts(response, body, spans, expect, deliver)

    async def receive(
        self,
        base_url: str,
        file: SectorFile,
        member: str | None,
        span: tuple[int, int],
        descriptor: AbstractContextManager[int],
        *,
        expect: Version | None,
        run: Runner,
        past_cache: bool = False,
        progress: Callable[[int], object] | None = None,
        sieve: Callable[[bytes], AbstractAsyncContextManager[Sieve]] | None = None,
    ) -> Version:
        """Write a span to its place in `descriptor`; else as `ranges` and `fetch`.

        With a `sieve`, which is made of the leaf hashes that came, only what that lets through;
        `past_cache` as `Response.save`.
        """
        start, end = span
        url = _file_url(base_url, file, member)
        headers = (("range", f"bytes={start}-{end - 1}"), *(_WITH_LEAVES if sieve else ()))
        async with self._ask("GET", url, headers, bulk=True) as response:
            await expect_ranges(response)
            version = span_version(response, span, expect)
            save = partial(
                response.save,
                descriptor,
                offset=start,
                length=end - start,
                run=run,
                past_cache=past_cache,
                progress=progress,
            )
            if sieve is None:
                await save()
            else:
                async with sieve(told_leaves(response.headers)) as made:
                    await save(sieve=made)
            return version

    async def manifest(
        self,
        base_url: str,
        file: SectorFile,
        member: str | None,
        span: tuple[int, int],
    ) -> bytes:
        """Bytes of the encoded manifest of a file; proved by nothing yet."""
        start, end = span
        url = _manifest_url(base_url, file, member)
        async with self._ask("GET", url, (("range", f"bytes={start}-{end - 1}"),)) as response:
            await expect_ranges(response)
            span_version(response, span, None)
            data = await response.read(end - start)
        if len(data) != end - start:
            raise SourceFailed(f"sent {len(data)} bytes of a manifest", url)
        return data

    async def outline(
        self,
        base_url: str,
        file: SectorFile,
        member: str | None,
        *,
        size: int,
        digest: bytes,
    ) -> Outline:
        """The block hashes of a file of this size, proved by its digest."""
        data = await self.manifest(base_url, file, member, (0, outline_size(size)))
        with _proving(_manifest_url(base_url, file, member)):
            outline = Outline.decode(data)
        if (outline.size, outline.digest) != (size, digest):
            raise WrongBytes(
                "has a manifest of another content", _manifest_url(base_url, file, member)
            )
        return outline

    async def leaves(
        self,
        base_url: str,
        file: SectorFile,
        member: str | None,
        outline: Outline,
        blocks: range,
    ) -> bytes:
        """The leaf hashes of some blocks in a row, each proved by its block's hash."""
        spans = [leaves_at(outline.size, block) for block in (blocks[0], blocks[-1])]
        span = spans[0][0], sum(spans[1])
        data = await self.manifest(base_url, file, member, span)
        at = 0
        for block in blocks:
            length = leaves_at(outline.size, block)[1]
            if not outline.check_leaves(block, data[at : at + length]):
                url = _manifest_url(base_url, file, member)
                raise WrongBytes(f"has leaf hashes that do not make block {block}", url)
            at += length
        return data

    async def roll(self, base_url: str, file: SectorFile, *, digest: bytes) -> Roll:
        """Sizes and digests of the files of a directory, proved by its digest."""
        url = _manifest_url(base_url, file, None)
        async with self._ask("GET", url) as response:
            await expect_status(response, 200)
            data = await response.read(ROLL_LIMIT)
        with _proving(url):
            return decode_roll(data, digest)

    @asynccontextmanager
    async def archive(
        self, base_url: str, file: SectorFile, *, minimal: bool
    ) -> AsyncIterator[Response]:
        """A sector directory as a tar stream, from a node that has no listings.

        One of our own has them, so that what was not found there is not there: `NotFound`.
        """
        url = _file_url(base_url, file)
        url += _minimal(url) if minimal else ""
        async with self._ask("GET", url, bulk=True) as response:
            await expect_status(response, 200)
            if MTIME_HEADER in response.headers:
                raise NotFound("the peer does not have a file of it", response.url)
            expect_type(response, CONTENT_TYPE)
            yield response

    async def allocated(
        self, base_url: str, file: SectorFile, *, seal_proof: int, offset: int, size: int
    ) -> bool:
        """Whether an *unpadded* range of an unsealed file is there."""
        names = (str(seal_proof), "allocated", str(offset), str(size))
        async with self._ask("GET", _join(_file_url(base_url, file), *names)) as response:
            if response.status == 416:
                return False
            await expect_status(response, 200)
            return True

    async def remove(
        self,
        base_url: str,
        file: SectorFile,
        *,
        keep: Iterable[StorageID],
        expected: Facts | None = None,
        moved_to: StorageID | None = None,
        force: bool = False,
    ) -> None:
        """Have a node remove a file from all its storages but those to keep.

        `NotFound` when it has none, `Refused` when the last primary copy would go without `force`,
        when there lies something else than `expected`, or when it is itself moving the file.
        """
        query = f"keep={'.'.join(keep)}" + ("&force=true" if force else "")
        url = _file_url(base_url, file)
        url += ("&" if "?" in url else "?") + query
        headers: tuple[tuple[str, str], ...] = ()
        if expected is not None:
            headers += ((EXPECT_HEADER, f"{expected.size}-{expected.mtime_ns}"),)
        if moved_to is not None:
            headers += ((MOVED_HEADER, moved_to),)
        async with self._client.request(
            "DELETE", url, headers, patience=_REMOVE_SECONDS
        ) as response:
            if response.status == 409:
                raise Refused(f"the peer keeps it{await error_text(response)}", response.url)
            await expect_status(response, 200)

    @asynccontextmanager
    async def _ask(
        self,
        method: str,
        url: str,
        headers: tuple[tuple[str, str], ...] = (),
        *,
        bulk: bool = False,
    ) -> AsyncIterator[Response]:
        start = self._clock()
        try:
            async with self._client.request(method, url, headers) as response:
                self._observe(url, response.first_byte)
                ranged = any(name == "range" for name, _ in headers)
                self._kinds.saw(_peer(url), method, response, ranged=ranged)
                if bulk:
                    response.throttle = self._client.rates.of(_peer(url))
                yield response
        except TimedOut:
            self._observe(url, self._clock() - start)
            raise

    def _received(self, url: str, count: int) -> None:
        """Count what came for readers, who wait for no turn."""
        FETCHED_BYTES.inc(count)
        throttle = self._client.rates.of(_peer(url))
        if throttle is not None:
            throttle.charge(count)

    def _observe(self, url: str, seconds: float) -> None:
        """Count the time one answer took, or the time waited in vain."""
        now = self._clock()
        peer = _peer(url)
        known = self._latency.pop(peer, None)
        while len(self._latency) >= _MAX_PEERS:
            del self._latency[next(iter(self._latency))]
        self._latency[peer] = known.seen(seconds, now=now) if known else Latency(seconds, now)


def _peer(url: str) -> str:
    return urlsplit(url).netloc


def _join(base_url: str, *names: str) -> str:
    """A URL below a base; the base's query stays, as other implementations join theirs."""
    parts = urlsplit(base_url)
    path = "/".join((parts.path.rstrip("/"), *(quote(name, safe="") for name in names)))
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def _file_url(base_url: str, file: SectorFile, member: str | None = None) -> str:
    names = (file.file_type.dir_name, file.sector.name)
    if member is None:
        return _join(base_url, *names)
    return _join(base_url, *names, "files", member)


def _manifest_url(base_url: str, file: SectorFile, member: str | None) -> str:
    names = (file.file_type.dir_name, file.sector.name, "manifest")
    return _join(base_url, *names, *(() if member is None else (member,)))


@contextmanager
def _proving(url: str) -> Iterator[None]:
    """What a peer sent to prove its bytes by, and proves nothing, is that peer's failure."""
    try:
        yield
    except BadInput as exc:
        raise WrongBytes(f"{exc.thing}: {exc.what}", url) from exc


def _minimal(url: str) -> str:
    return "&mincache=true" if urlsplit(url).query else "?mincache=true"


def _of_answer(response: Response, size: int) -> Told:
    return Told(Facts(size, mtime_of(response)), by_ours=MTIME_HEADER in response.headers)
