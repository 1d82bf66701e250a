"""An answer's body: into memory through h11, or into a file past it.

A whole sector is up to 64 GiB, so `Response.save` reads straight from the socket into one buffer
and from there into the file, in a thread that leaves as soon as the socket is empty: a peer that
stalls holds no thread. h11 sees only the header and a body without a known length.
"""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal

import h11
import trio

from sectorfs.errors import SourceFailed, TimedOut, TooLarge, Unreachable
from sectorfs.metrics import FETCHED_BYTES
from sectorfs.wire.duplicates import Duplicate
from sectorfs.wire.messages import Runner
from sectorfs.wire.pace import Pace

HEADER_LIMIT = 32 * 1024

_BUFFER = 1024 * 1024
_PIECE = 256 * 1024
_HOP = 8 * 1024 * 1024
_HOP_SECONDS = 0.5
_NO_BODY = frozenset({204, 304})

Progress = Callable[[int], object]


class _Stop(enum.Enum):
    HOP = enum.auto()
    EMPTY = enum.auto()
    END = enum.auto()
    BROKEN = enum.auto()


def header_size(event: h11.Response) -> int:
    """Bytes of a response's header, about."""
    return sum(len(name) + len(value) + 4 for name, value in event.headers)


class Response:
    """An answer whose header has come; usable until its ``async with`` block ends."""

    def __init__(
        self,
        stream: trio.SocketStream,
        http: h11.Connection,
        head: h11.Response,
        *,
        url: str,
        method: str,
        progress: float,
        first_byte: float,
    ) -> None:
        self.url = url
        """Without the query."""
        self.status = head.status_code
        self.headers: Mapping[str, str] = _headers(head)
        """By lower-case name; a repeated header's values are joined with commas."""
        self.first_byte = first_byte
        """Seconds from the start of the request to the first byte of the answer."""
        self._stream = stream
        self._http = http
        self._pace = Pace(progress)
        self._empty = method == "HEAD" or self.status in _NO_BODY
        self._keep = head.http_version >= b"1.1" and "close" not in _tokens(
            self.headers.get("connection", "")
        )
        self._state: Literal["new", "reading", "done", "raw", "raw done", "detached"] = "new"

    @property
    def length(self) -> int | None:
        """Content-Length; for HEAD that of the GET."""
        if "transfer-encoding" in self.headers:
            return None
        text = self.headers.get("content-length")
        return int(text) if text is not None else None  # h11 has checked it

    async def read(self, limit: int) -> bytes:
        """The whole body; `TooLarge` beyond `limit` bytes."""
        self._begin()
        if not self._empty and self.length is not None and self.length > limit:
            raise TooLarge(f"a body of {self.length} bytes, more than {limit}", self.url)
        parts: list[bytes] = []
        size = 0
        while (piece := await self._piece()) is not None:
            size += len(piece)
            if size > limit:
                raise TooLarge(f"a body of more than {limit} bytes", self.url)
            parts.append(piece)
        return b"".join(parts)

    async def piece(self) -> bytes | None:
        """The next bytes of a body that is taken as it comes, or None at its end."""
        if self._state == "new":
            self._begin()
        if self._empty or self._state == "done":
            return None
        return await self._piece()

    async def save(
        self,
        descriptor: AbstractContextManager[int],
        *,
        offset: int,
        length: int,
        run: Runner,
        progress: Progress | None = None,
    ) -> int:
        """Write the body to a file at `offset`; it must be exactly `length` bytes.

        `run` must not give a call up because it is cancelled (`Lane.finish`). `SourceFailed`
        naming both numbers for a body of another length; errors of the disk are `run`'s.
        """
        self._begin()
        if not self._empty and self.length is not None and self.length != length:
            raise SourceFailed(f"sends {self.length} bytes instead of {length}", self.url)
        sink = _Sink(descriptor, offset, length, run, progress)
        if self._empty or self.length is None:
            await self._save_pieces(sink)
        else:
            await self._save_raw(sink)
        return sink.done

    def finish(self) -> bool:
        """Whether the connection is clean for another request; drops what little is unread."""
        if self._state in ("raw", "raw done"):
            return self._keep and self._state == "raw done"
        try:
            while self._state != "done":
                event = self._http.next_event()
                if isinstance(event, h11.EndOfMessage):
                    self._state = "done"
                elif not isinstance(event, h11.Data):
                    return False
        except h11.RemoteProtocolError:
            return False
        return self._keep and not self._http.trailing_data[0]

    def detach(self) -> None:
        """The block has ended: the connection belongs to somebody else now."""
        self._state = "detached"

    def _begin(self) -> None:
        assert self._state == "new", "a body is read once, inside its block"
        self._state = "reading"

    async def _piece(self) -> bytes | None:
        """The next piece of the body through h11, or None at its end."""
        start = trio.current_time()
        try:
            with trio.fail_after(self._pace.patience()):
                while (event := self._http.next_event()) is h11.NEED_DATA:
                    self._http.receive_data(await self._stream.receive_some(_PIECE))
        except trio.TooSlowError as exc:
            raise self._stalled() from exc
        except (h11.RemoteProtocolError, trio.BrokenResourceError) as exc:
            raise Unreachable(f"the body broke off: {str(exc)[:200]}", self.url) from exc
        if isinstance(event, h11.Data):
            self._pace.moved(len(event.data), waited=trio.current_time() - start)
            return bytes(event.data)
        self._state = "done"
        return None

    def _stalled(self) -> TimedOut:
        return TimedOut("the body stalled", self.url)

    async def _save_pieces(self, sink: _Sink) -> None:
        held = bytearray()
        while (piece := await self._piece()) is not None:
            held += piece
            if sink.done + len(held) > sink.length:
                raise SourceFailed(
                    f"sends more than {sink.done + len(held) - 1} bytes instead of {sink.length}",
                    self.url,
                )
            if len(held) >= _BUFFER:
                await sink.write(held)
                held = bytearray()
        await sink.write(held)
        if sink.done != sink.length:
            raise SourceFailed(f"sent {sink.done} bytes instead of {sink.length}", self.url)

    async def _save_raw(self, sink: _Sink) -> None:
        self._state = "raw"
        early = self._http.trailing_data[0]
        extra = len(early) > sink.length
        await sink.write(early[: sink.length])
        source = Duplicate(self._stream.socket)
        try:
            await self._pull_all(sink, source)
        except BaseException:
            source.end()
            raise
        finally:
            source.close()
        if not extra:
            self._state = "raw done"

    async def _pull_all(self, sink: _Sink, source: Duplicate) -> None:
        buffer = memoryview(bytearray(min(_BUFFER, max(1, sink.length - sink.done))))
        while sink.done < sink.length:
            waited = await self._wait_readable()
            count, stop = await sink.pull(source, buffer)
            self._pace.moved(count, waited=waited)
            if stop in (_Stop.END, _Stop.BROKEN):
                raise SourceFailed(
                    f"the body ended after {sink.done} of {sink.length} bytes", self.url
                )

    async def _wait_readable(self) -> float:
        """Wait for bytes or an end; the seconds it took."""
        start = trio.current_time()
        try:
            with trio.fail_after(self._pace.patience()):
                await trio.lowlevel.wait_readable(self._stream.socket)
        except trio.TooSlowError as exc:
            raise self._stalled() from exc
        return trio.current_time() - start


class _Sink:
    """The file end of `Response.save`."""

    def __init__(
        self,
        descriptor: AbstractContextManager[int],
        offset: int,
        length: int,
        run: Runner,
        progress: Progress | None,
    ) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self.length = length
        self._run = run
        self._progress = progress
        self.done = 0
        """Bytes in the file."""

    async def write(self, data: bytes | bytearray) -> None:
        """Append bytes that are in memory already."""
        if data:
            await self._run(partial(self._put, memoryview(data), self.done), what="write")
            self._moved(len(data))

    async def pull(self, source: Duplicate, buffer: memoryview) -> tuple[int, _Stop]:
        """Move what the socket holds into the file, in a thread."""
        call = partial(self._drain, source, buffer, self.done)
        count, stop = await self._run(call, what="write")
        self._moved(count)
        return count, stop

    def _moved(self, count: int) -> None:
        self.done += count
        FETCHED_BYTES.inc(count)
        if self._progress is not None:
            self._progress(self.done)

    def _put(self, data: memoryview, done: int) -> None:
        with self._descriptor as fd:
            _write_all(fd, data, self._offset + done)

    def _drain(self, source: Duplicate, buffer: memoryview, done: int) -> tuple[int, _Stop]:
        moved, stop = 0, _Stop.HOP
        end = time.monotonic() + _HOP_SECONDS
        goal = min(self.length - done, _HOP)
        with source as sock, self._descriptor as fd:
            while stop is _Stop.HOP and moved < goal and time.monotonic() < end:
                filled, stop = _fill(sock, buffer[: goal - moved])
                _write_all(fd, buffer[:filled], self._offset + done + moved)
                moved += filled
        return moved, stop


def _fill(sock: int, buffer: memoryview) -> tuple[int, _Stop]:
    """Receive until the buffer is full or the socket has no more."""
    filled = 0
    while filled < len(buffer):
        try:
            count = os.readv(sock, [buffer[filled:]])
        except BlockingIOError:
            return filled, _Stop.EMPTY
        except OSError:
            return filled, _Stop.BROKEN
        if count == 0:
            return filled, _Stop.END
        filled += count
    return filled, _Stop.HOP


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _headers(head: h11.Response) -> dict[str, str]:
    headers: dict[str, str] = {}
    for raw_name, raw_value in head.headers:
        name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _tokens(value: str) -> set[str]:
    return {token.strip().lower() for token in value.split(",")}
