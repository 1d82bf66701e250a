"""An HTTP/1.1 server on trio streams: `sendfile` moves the bytes of files.

A request that came at once and has no body is parsed by `heads`; h11 gets every other one, and has
the last word on what is wrong with it. One task per connection, one request at a time on it.
Everything a client does has a limit in bytes and in time (`messages.Limits`); a client beyond one
is answered in a line where that is possible and cut off. Cancelling `serve` closes every
connection.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import NoReturn

import h11
import trio

from sectorfs.errors import BadInput, SectorFSError, TooLarge
from sectorfs.metrics import HTTP_SENT_BYTES
from sectorfs.wire import heads
from sectorfs.wire.messages import (
    FileBody,
    HeaderTooLarge,
    Limits,
    PartedBody,
    Reply,
    Request,
    RequestTimedOut,
    error_reply,
    parse_target,
    text_reply,
)
from sectorfs.wire.pace import Pace
from sectorfs.wire.sendfile import ClientGone, send_bytes, send_file, send_parts

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Reply]]

_PIECE = 16 * 1024
_BODY_PIECE = 256 * 1024
_LINGER_BYTES = 4 * 1024 * 1024
_OVERFLOW = 64
"""Connections beyond the limit that are told so; more are closed without a word."""


async def serve(
    handler: Handler,
    listeners: Sequence[trio.SocketListener],
    *,
    limits: Limits,
    task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Answer requests with `handler` until cancelled; owns and closes the listeners."""
    await trio.serve_listeners(
        _Server(handler, limits).converse, list(listeners), task_status=task_status
    )


class _Server:
    def __init__(self, handler: Handler, limits: Limits) -> None:
        self._handler = handler
        self._limits = limits
        self._open = 0

    async def converse(self, stream: trio.SocketStream) -> None:
        """Serve one connection; nothing that happens on it reaches another."""
        self._open += 1
        try:
            connection = _Connection(stream, self._handler, self._limits)
            if self._open <= self._limits.connections:
                await connection.run()
            elif self._open <= self._limits.connections + _OVERFLOW:
                await connection.turn_away()
        except (ClientGone, trio.BrokenResourceError, ConnectionError) as exc:
            log.debug("connection ended: %s", exc)
        except SectorFSError as exc:
            log.warning("reply broken off: %s", exc)
        except Exception:
            log.exception("connection failed")
        finally:
            self._open -= 1


class _Connection:
    def __init__(self, stream: trio.SocketStream, handler: Handler, limits: Limits) -> None:
        self._stream = stream
        self._handler = handler
        self._limits = limits
        self._early = b""  # came already, and is not yet parsed
        self._http: h11.Connection | None = None  # of a request that `heads` does not take
        self._peer = _peer_address(stream)
        self._body_left = False  # the client still has a body to send, or is sending it

    async def run(self) -> None:
        """Answer one request after the other until either side wants no more."""
        wait = self._limits.header_time
        for left in reversed(range(self._limits.requests)):
            try:
                head = await self._next_request(wait)
            except SectorFSError as exc:
                await self._send(error_reply(exc), close=True)
                break
            if head is None:
                return
            if not await self._answer(head, close=left == 0 or not head.keep):
                break
            if self._http is not None:
                if self._http.their_state is not h11.DONE:
                    break
                self._early, self._http = self._http.trailing_data[0], None
            wait = self._limits.idle
        await self._linger()

    async def turn_away(self) -> None:
        """Tell a client over the limit to come back."""
        reply = text_reply(503, "too many connections", headers=(("retry-after", "1"),))
        await self._send(reply, close=True)
        await self._linger()

    async def _next_request(self, wait: float) -> heads.RequestHead | None:
        """The next request's header; None when the client is done or silent for `wait` s."""
        if not self._early:
            with trio.move_on_after(wait) as scope:
                self._early = await self._stream.receive_some(_PIECE)
            if scope.cancelled_caught:
                return None
        return self._plain() or await self._unusual()

    def _plain(self) -> heads.RequestHead | None:
        end = self._early.find(heads.END) + len(heads.END)
        if not len(heads.END) <= end <= self._limits.header_bytes:
            return None
        head = heads.parse_request(self._early[:end])
        if head is not None:
            self._early, self._body_left = self._early[end:], False
        return head

    async def _unusual(self) -> heads.RequestHead | None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.header_bytes)
        http.receive_data(self._early)
        self._early, self._http = b"", http
        try:
            with trio.fail_after(self._limits.header_time):
                return await self._header(http)
        except trio.TooSlowError as exc:
            raise RequestTimedOut("the header came too slowly", self._peer) from exc
        except h11.RemoteProtocolError as exc:
            if exc.error_status_hint == 431:
                raise self._header_too_large() from exc
            raise BadInput(f"not HTTP: {str(exc)[:200]}", self._peer) from exc

    async def _header(self, http: h11.Connection) -> heads.RequestHead | None:
        while (event := http.next_event()) is h11.NEED_DATA:
            http.receive_data(await self._stream.receive_some(_PIECE))
        if not isinstance(event, h11.Request):
            return None
        size = len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
        if size > self._limits.header_bytes:
            raise self._header_too_large()
        headers: dict[str, str] = {}
        for name, value in event.headers:
            heads.add_header(headers, name.decode("ascii"), value.decode("latin-1"))
        self._body_left = not headers.keys().isdisjoint({"content-length", "transfer-encoding"})
        if not self._body_left:
            http.next_event()  # EndOfMessage
        return heads.RequestHead(
            event.method.decode("ascii"),
            event.target.decode("latin-1"),
            headers,
            event.http_version >= b"1.1" and heads.wants_keeping(headers),
        )

    def _header_too_large(self) -> HeaderTooLarge:
        limit = self._limits.header_bytes
        return HeaderTooLarge(f"a header of more than {limit} bytes", self._peer)

    async def _answer(self, head: heads.RequestHead, *, close: bool) -> bool:
        """Answer a request; whether the connection goes on."""
        accept = head.headers.get("accept", "")
        try:
            reply = await self._handler(self._request(head))
        except SectorFSError as exc:
            reply = error_reply(exc, accept)
        except Exception:
            log.exception("%s failed", head.method)
            reply = text_reply(500, "internal error")
        close = close or self._body_left
        await self._send(reply, head_only=head.method == "HEAD", close=close)
        return not close

    def _request(self, head: heads.RequestHead) -> Request:
        segments, query = parse_target(head.target)
        return Request(
            method=head.method,
            segments=segments,
            query=query,
            headers=head.headers,
            peer=self._peer,
            read_body=self._read_body,
            gone=self._gone,
        )

    async def _gone(self) -> None:
        """Return when the client left. One that sent more, asks next or still its body, is here."""
        with suppress(OSError):
            if self._body_left or await self._stream.socket.recv(1, socket.MSG_PEEK):
                await trio.sleep_forever()

    async def _read_body(self, limit: int) -> bytes:
        limit = min(limit, self._limits.body_bytes)
        parts: list[bytes] = []
        size = 0
        pace = Pace(self._limits.body_progress)
        while self._body_left:
            piece = await self._body_piece(pace)
            if piece is None:
                self._body_left = False
                break
            size += len(piece)
            if size > limit:
                raise TooLarge(f"a body of more than {limit} bytes", self._peer)
            parts.append(piece)
        return b"".join(parts)

    async def _body_piece(self, pace: Pace) -> bytes | None:
        """The next piece of the body, or None at its end."""
        assert self._http is not None, "heads takes no request with a body"
        start = trio.current_time()
        try:
            with trio.fail_after(pace.patience()):
                while (event := self._http.next_event()) is h11.NEED_DATA:
                    if self._http.they_are_waiting_for_100_continue:
                        go_on = h11.InformationalResponse(status_code=100, headers=[])
                        await self._write(self._http.send(go_on) or b"")
                    self._http.receive_data(await self._stream.receive_some(_BODY_PIECE))
        except trio.TooSlowError as exc:
            raise RequestTimedOut("the body came too slowly", self._peer) from exc
        except h11.RemoteProtocolError as exc:
            raise BadInput(f"bad body: {str(exc)[:200]}", self._peer) from exc
        except trio.BrokenResourceError as exc:
            raise BadInput("the connection broke in mid body", self._peer) from exc
        if not isinstance(event, h11.Data):
            return None
        pace.moved(len(event.data), waited=trio.current_time() - start)
        return bytes(event.data)

    async def _send(self, reply: Reply, *, head_only: bool = False, close: bool) -> None:
        try:
            head = _head(reply, close=close)
            if head_only or reply.status in heads.NO_BODY:
                await self._write(head)
            elif isinstance(reply.body, FileBody | PartedBody):
                await self._write(head)
                await self._send_body(reply.body)
            else:
                data = reply.body or b""
                await self._write(head + data)
                HTTP_SENT_BYTES.inc(len(data))
        finally:
            reply.close()

    async def _send_body(self, body: FileBody | PartedBody) -> None:
        sock, progress = self._stream.socket, self._limits.write_progress
        if isinstance(body, FileBody):
            await send_file(sock, body, progress=progress)
        else:
            await send_parts(sock, body, progress=progress)

    async def _write(self, data: bytes) -> None:
        await send_bytes(self._stream.socket, data, progress=self._limits.write_progress)

    async def _linger(self) -> None:
        """Let the client read the last reply: closing over unread bytes would reset it away."""
        with trio.move_on_after(self._limits.linger):
            self._stream.socket.shutdown(socket.SHUT_WR)
            left = _LINGER_BYTES
            while left > 0 and (data := await self._stream.receive_some(_BODY_PIECE)):
                left -= len(data)


def _head(reply: Reply, *, close: bool) -> bytes:
    headers = [("date", heads.date_now()), *reply.headers]
    if reply.status not in heads.NO_BODY:
        headers.append(("content-length", str(reply.length)))
    if close:
        headers.append(("connection", "close"))
    return heads.spell_response(reply.status, headers)


def _peer_address(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return "unknown"  # gone already
