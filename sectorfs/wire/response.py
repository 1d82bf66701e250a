"""An answer's body: into memory, or into a file past Python's objects.

A whole sector is up to 64 GiB, so `Response.save` reads straight from the socket into one buffer
and from there into the file (`sink`), in a thread that leaves soon after the socket is empty: a
peer that stalls holds no thread. h11 sees only unusual headers and bodies without a known length
(`heads`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Literal

import h11
import trio

from sectorfs.errors import SourceFailed, TimedOut, TooLarge, Unreachable
from sectorfs.wire import heads
from sectorfs.wire.duplicates import Duplicate
from sectorfs.wire.messages import Runner
from sectorfs.wire.pace import Pace
from sectorfs.wire.rates import Throttle
from sectorfs.wire.sink import BUFFER, HOP, Progress, Sieve, Sink, Stop

HEADER_LIMIT = 32 * 1024

_PIECE = 256 * 1024


async def receive(stream: trio.SocketStream, size: int) -> bytes:
    """The next bytes, nothing at the end; with a third of the steps of `receive_some`."""
    sock = stream.socket
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            return os.read(sock.fileno(), size)
        except BlockingIOError:
            continue
        except OSError as exc:
            raise trio.BrokenResourceError(f"socket connection broken: {exc}") from exc


class Response:
    """An answer whose header has come; usable until its ``async with`` block ends."""

    def __init__(
        self,
        stream: trio.SocketStream,
        head: heads.ResponseHead,
        *,
        early: bytes,
        http: h11.Connection | None,
        url: str,
        method: str,
        progress: float,
        first_byte: float,
    ) -> None:
        """`early` is what came with the header; without `http` the body's length is known."""
        self.url = url
        """Without the query."""
        self.status = head.status
        self.headers: Mapping[str, str] = head.headers
        """By lower-case name; a repeated header's values are joined with commas."""
        self.first_byte = first_byte
        """Seconds from the start of the request to the first byte of the answer."""
        self.token_hint = ""
        """What helps when the token was refused."""
        self.throttle: Throttle | None = None
        """What bounds the speed of `save` and `piece`; `read` is for readers, who never wait."""
        self._stream = stream
        self._early = early
        self._http = http
        self._left = head.length or 0
        self._pace = Pace(progress)
        self._empty = method == "HEAD" or self.status in heads.NO_BODY
        self._keep = head.keep
        self._state: Literal["new", "reading", "done", "raw", "raw done", "detached"] = "new"

    @property
    def length(self) -> int | None:
        """Content-Length; for HEAD that of the GET."""
        if "transfer-encoding" in self.headers:
            return None
        text = self.headers.get("content-length")
        return int(text) if text is not None else None  # it was checked with the header

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
        return await self._bulk_piece()

    async def save(
        self,
        descriptor: AbstractContextManager[int],
        *,
        offset: int,
        length: int,
        run: Runner,
        past_cache: bool = False,
        progress: Progress | None = None,
        sieve: Sieve | None = None,
    ) -> int:
        """Write the body to a file at `offset`; it must be exactly `length` bytes.

        `progress` is told how many bytes are in the file, and nothing that `sieve` holds back gets
        there. `run` must not give a call up because it is cancelled (`Lane.finish`). `SourceFailed`
        naming both numbers for a body of another length; errors of the disk are `run`'s.
        `past_cache`: nobody will read it soon, so past the page cache, where the file system lets.
        """
        self._begin()
        if not self._empty and self.length is not None and self.length != length:
            raise SourceFailed(f"sends {self.length} bytes instead of {length}", self.url)
        sink = Sink(descriptor, offset, length, run, progress, sieve, past_cache=past_cache)
        if self._empty or self.length is None:
            await self._save_pieces(sink)
            if sink.came != length:
                raise SourceFailed(f"sent {sink.came} bytes instead of {length}", self.url)
        else:
            await self._save_raw(sink)
        return sink.done

    async def save_all(
        self,
        descriptor: AbstractContextManager[int],
        *,
        limit: int,
        run: Runner,
        progress: Progress | None = None,
    ) -> int:
        """Write a body to the start of a file that only its own end tells the length of.

        Returns the length; `SourceFailed` beyond `limit` bytes. The rest is as of `save`.
        """
        self._begin()
        sink = Sink(descriptor, 0, limit, run, progress, None)
        await self._save_pieces(sink)
        return sink.done

    def finish(self) -> bool:
        """Whether the connection is clean for another request; drops what little is unread."""
        if self._state in ("raw", "raw done"):
            return self._keep and self._state == "raw done"
        if self._http is None:
            return self._keep and len(self._early) == self._left
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

    async def _bulk_piece(self) -> bytes | None:
        """The next piece, when there is a turn for it."""
        if self.throttle is None:
            return await self._piece()
        allowed, count = await self.throttle.turn(), 0
        try:
            piece = await self._piece()
            count = len(piece or b"")
            return piece
        finally:
            self.throttle.charge(count - allowed)

    async def _piece(self) -> bytes | None:
        """The next piece of the body, or None at its end."""
        if self._http is None:
            return await self._plain_piece()
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                start = trio.current_time()
                self._http.receive_data(await self._receive(_PIECE))
                # Whatever came: what stands between the chunks is no progress.
                self._pace.moved(0, waited=trio.current_time() - start)
        except h11.RemoteProtocolError as exc:
            raise self._broken(str(exc)) from exc
        if isinstance(event, h11.Data):
            self._pace.moved(len(event.data), waited=0)
            return bytes(event.data)
        self._state = "done"
        return None

    async def _plain_piece(self) -> bytes | None:
        if not self._left:
            self._state = "done"
            return None
        piece, self._early = self._early[: self._left], self._early[self._left :]
        if not piece:
            start = trio.current_time()
            piece = await self._receive(min(_PIECE, self._left))
            if not piece:
                raise self._broken(f"{self._left} bytes are missing")
            self._pace.moved(len(piece), waited=trio.current_time() - start)
        self._left -= len(piece)
        return piece

    async def _receive(self, size: int) -> bytes:
        try:
            with trio.fail_after(self._pace.patience()):
                return await receive(self._stream, size)
        except trio.TooSlowError as exc:
            raise self._stalled() from exc
        except trio.BrokenResourceError as exc:
            raise self._broken(str(exc)) from exc

    def _broken(self, reason: str) -> Unreachable:
        return Unreachable(f"the body broke off: {reason[:200]}", self.url)

    def _stalled(self) -> TimedOut:
        return TimedOut("the body stalled", self.url)

    async def _save_pieces(self, sink: Sink) -> None:
        held = bytearray()
        while (piece := await self._bulk_piece()) is not None:
            held += piece
            if sink.came + len(held) > sink.length:
                raise SourceFailed(
                    f"sends more than {sink.came + len(held) - 1} bytes instead of {sink.length}",
                    self.url,
                )
            if len(held) >= BUFFER:
                await sink.write(held)
                held = bytearray()
        await sink.write(held)

    async def _save_raw(self, sink: Sink) -> None:
        self._state = "raw"
        early = self._early if self._http is None else self._http.trailing_data[0]
        extra = len(early) > sink.length
        if self.throttle is not None:
            self.throttle.charge(len(early))
        await sink.begin(early[: sink.length])
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

    async def _pull_all(self, sink: Sink, source: Duplicate) -> None:
        held = sink.came > 0  # what came with the header waits for nothing
        while sink.came < sink.length:
            waited = 0.0 if held else await self._wait_readable()
            held = False
            count, stop = await self._pull(sink, source)
            self._pace.moved(count, waited=waited)
            if stop in (Stop.END, Stop.BROKEN):
                raise SourceFailed(
                    f"the body ended after {sink.came} of {sink.length} bytes", self.url
                )

    async def _pull(self, sink: Sink, source: Duplicate) -> tuple[int, Stop]:
        if self.throttle is None:
            return await sink.pull(source, HOP)
        allowed, count = await self.throttle.turn(), 0
        try:
            count, stop = await sink.pull(source, allowed)
            return count, stop
        finally:
            self.throttle.charge(count - allowed)

    async def _wait_readable(self) -> float:
        """Wait for bytes or an end; the seconds it took."""
        start = trio.current_time()
        try:
            with trio.fail_after(self._pace.patience()):
                await trio.lowlevel.wait_readable(self._stream.socket)
        except trio.TooSlowError as exc:
            raise self._stalled() from exc
        return trio.current_time() - start
