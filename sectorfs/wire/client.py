"""An HTTP/1.1 client with a pool per peer, and a deadline for everything a peer may not do.

At most `per_peer` requests run at a time against one host and port; the rest wait. A connection
goes back to the pool only after its answer was read to the end; in every other case, cancellation
included, it is closed. Redirects are not followed: peers are named by the Index, not by each other.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import TracebackType
from urllib.parse import urlsplit

import h11
import msgspec
import trio

from sectorfs.config import TimeoutsConfig
from sectorfs.errors import BadInput, Refused, TimedOut, Unreachable
from sectorfs.wire import heads
from sectorfs.wire.credentials import SECRET_HINT, Credentials
from sectorfs.wire.rates import Rates
from sectorfs.wire.response import HEADER_LIMIT, Response, receive

IDLE_SECONDS = 30.0
"""A kept connection is dropped after so long: well before the other side's own limit."""

_PIECE = 256 * 1024
_MAX_INFORMATIONAL = 16
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})

Headers = Sequence[tuple[str, str]]


class _StaleConnection(Exception):
    """A kept connection turned out closed before a byte of the answer."""


class Target(msgspec.Struct, frozen=True):
    """The parts of a URL that a request needs."""

    host: str
    port: int
    path: str
    """Path and query, as sent."""
    name: str
    """The URL without its query, which may hold a token: what messages show."""

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == 80 else f"{host}:{self.port}"


def parse_target_url(url: str) -> Target:
    """Take an ``http://`` URL apart; `BadInput` for any other."""
    name = url.partition("?")[0].partition("#")[0]
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise BadInput(f"not a URL: {exc}", name) from exc
    if parts.scheme != "http" or not parts.hostname or parts.username is not None or port == 0:
        raise BadInput("not a URL this client can ask", name, "http://host:port/path")
    path = parts.path or "/"
    return Target(
        parts.hostname, port or 80, f"{path}?{parts.query}" if parts.query else path, name
    )


class _Link:
    """One connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.idle_since = 0.0

    def close(self) -> None:
        self.stream.socket.close()

    def usable(self, now: float) -> bool:
        """Young enough, and neither closed by the other side nor holding bytes nobody asked for."""
        if now - self.idle_since > IDLE_SECONDS:
            return False
        return not readable_now(self.stream)


def readable_now(stream: trio.SocketStream) -> bool:
    """Whether bytes, an end or an error wait on the socket."""
    poll = select.poll()
    poll.register(stream.socket.fileno(), select.POLLIN)
    return bool(poll.poll(0))


class _Peer:
    def __init__(self, parallel: int) -> None:
        self.slots = trio.Semaphore(parallel)
        self.idle: deque[_Link] = deque()
        self.users = 0
        """Requests that run or wait."""

    def take(self, now: float) -> _Link | None:
        """The most recent kept connection that still works."""
        while self.idle:
            link = self.idle.pop()
            if link.usable(now):
                return link
            link.close()
        return None

    def expire(self, now: float) -> None:
        while self.idle and now - self.idle[0].idle_since > IDLE_SECONDS:
            self.idle.popleft().close()


class Client:
    """Asks peers; leave it with `async with` (or `close`) to drop the kept connections."""

    def __init__(
        self,
        timeouts: TimeoutsConfig,
        *,
        token: str | Callable[[], str] | Credentials | None = None,
        per_peer: int = 16,
        rates: Rates | None = None,
    ) -> None:
        self.rates = rates or Rates()
        """How fast bodies may come, for those who read them."""
        self._timeouts = timeouts
        self._token = token
        self._per_peer = per_peer
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._closed = False

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop kept connections and refuse further requests; running ones end by themselves."""
        self._closed = True
        for peer in self._peers.values():
            while peer.idle:
                peer.idle.pop().close()

    async def keep_tidy(self) -> None:
        """Close connections nobody used for a while; runs until cancelled."""
        while True:
            await trio.sleep(IDLE_SECONDS)
            self._expire()

    def busy(self, url: str) -> int:
        """Requests to this URL's peer that run or wait now."""
        target = parse_target_url(url)
        peer = self._peers.get((target.host, target.port))
        return peer.users if peer else 0

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        headers: Headers = (),
        body: bytes = b"",
        patience: float = 0.0,
    ) -> AsyncIterator[Response]:
        """Send a request; the answer's header is there when the block begins.

        `patience` is added to the wait for the first byte, for answers that are late on purpose.
        `TimedOut` and `Unreachable` name the URL without its query.
        """
        target = parse_target_url(url)
        async with self._slot(target) as peer:
            token = self._token_for(target, headers)
            question = partial(self._ask, peer, target, method, headers, body, patience)
            link, response = await question(token)
            other = self._another_token(target, token) if response.status == 401 else None
            if other is not None:
                link.close()
                link, response = await question(other)
            response.token_hint = self.token_hint
            reusable = False
            try:
                yield response
                reusable = response.finish()
            finally:
                response.detach()
                if reusable and not self._closed:
                    link.idle_since = trio.current_time()
                    peer.idle.append(link)
                else:
                    link.close()

    @property
    def token_hint(self) -> str:
        """What helps when a peer refuses the token."""
        return self._token.hint if isinstance(self._token, Credentials) else SECRET_HINT

    async def post(
        self, url: str, body: bytes, *, patience: float = 0.0, limit: int
    ) -> tuple[int, bytes]:
        """POST a JSON body; the answer's status and body."""
        kind = (("content-type", "application/json"),)
        async with self.request("POST", url, kind, body, patience) as response:
            return response.status, await response.read(limit)

    @asynccontextmanager
    async def _slot(self, target: Target) -> AsyncIterator[_Peer]:
        if self._closed:
            raise Refused("the client is closed", target.name)
        self._expire()
        key = (target.host, target.port)
        peer = self._peers.setdefault(key, _Peer(self._per_peer))
        peer.users += 1
        try:
            async with peer.slots:
                yield peer
        finally:
            peer.users -= 1

    def _expire(self) -> None:
        now = trio.current_time()
        for key, peer in list(self._peers.items()):
            peer.expire(now)
            if not peer.idle and not peer.users:
                del self._peers[key]

    async def _ask(
        self,
        peer: _Peer,
        target: Target,
        method: str,
        headers: Headers,
        body: bytes,
        patience: float,
        token: str | None,
    ) -> tuple[_Link, Response]:
        request = self._encode(target, method, headers, body, token)
        link = peer.take(trio.current_time())
        if link is not None:
            try:
                return link, await self._converse(link, target, method, request, patience)
            except _StaleConnection as exc:
                if method not in _IDEMPOTENT:
                    raise Unreachable("the connection was closed", target.name) from exc
        link = await self._connect(target)
        try:
            return link, await self._converse(link, target, method, request, patience)
        except _StaleConnection as exc:
            raise Unreachable("closed the connection without an answer", target.name) from exc

    def _token_for(self, target: Target, headers: Headers) -> str | None:
        if any(name.lower() == "authorization" for name, _ in headers):
            return None
        if isinstance(self._token, Credentials):
            return self._token.token(target.authority)
        return self._token() if callable(self._token) else self._token

    def _another_token(self, target: Target, refused: str | None) -> str | None:
        if refused is None or not isinstance(self._token, Credentials):
            return None
        return self._token.refused(target.authority, refused)

    def _encode(
        self, target: Target, method: str, headers: Headers, body: bytes, token: str | None
    ) -> bytes:
        fields = [("host", target.authority), ("user-agent", "sectorfs"), *headers]
        if token:
            fields.append(("authorization", f"Bearer {token.strip()}"))  # files end in a newline
        if body or method in ("POST", "PUT", "PATCH"):
            fields.append(("content-length", str(len(body))))
        head = heads.spell_request(method, target.path, fields)
        if head is None:
            raise BadInput("not a request that HTTP can carry", target.name)
        return head + body

    async def _connect(self, target: Target) -> _Link:
        try:
            with trio.fail_after(self._timeouts.connect):
                return _Link(await trio.open_tcp_stream(target.host, target.port))
        except trio.TooSlowError as exc:
            raise TimedOut(
                f"no connection within {self._timeouts.connect:g} s", target.name
            ) from exc
        # ValueError: a host name that cannot be encoded for DNS
        except (OSError, ValueError) as exc:
            raise Unreachable(f"cannot connect: {_reason(exc)}", target.name) from exc

    async def _converse(
        self, link: _Link, target: Target, method: str, request: bytes, patience: float
    ) -> Response:
        start = trio.current_time()
        try:
            await self._write(link, target, request)
            early = await self._first_bytes(link, target, patience)
            first_byte = trio.current_time() - start
            head, early, http = await self._head(link, target, method, early)
        except BaseException:
            link.close()
            raise
        return Response(
            link.stream,
            head,
            early=early,
            http=http,
            url=target.name,
            method=method,
            progress=self._timeouts.progress,
            first_byte=first_byte,
        )

    async def _write(self, link: _Link, target: Target, request: bytes) -> None:
        """Send everything, or what the peer takes: it may close early and have answered before."""
        view = memoryview(request)
        with suppress(OSError):  # it comes back below, where it is waited for
            view = view[os.write(link.stream.socket.fileno(), view) :]
        try:
            for offset in range(0, len(view), _PIECE):
                with trio.fail_after(self._timeouts.progress):
                    await link.stream.send_all(view[offset : offset + _PIECE])
        except trio.TooSlowError as exc:
            raise TimedOut(
                f"took nothing of the request for {self._timeouts.progress:g} s", target.name
            ) from exc
        except trio.BrokenResourceError:
            return

    async def _first_bytes(self, link: _Link, target: Target, patience: float) -> bytes:
        wait = self._timeouts.first_byte + patience
        try:
            with trio.fail_after(wait):
                data = await receive(link.stream, _PIECE)
        except trio.TooSlowError as exc:
            raise TimedOut(f"no answer within {wait:g} s", target.name) from exc
        except trio.BrokenResourceError as exc:
            raise _StaleConnection from exc
        if not data:
            raise _StaleConnection
        return data

    async def _head(
        self, link: _Link, target: Target, method: str, early: bytes
    ) -> tuple[heads.ResponseHead, bytes, h11.Connection | None]:
        """The header, what came after it, and who reads a body without a length."""
        end = early.find(heads.END) + len(heads.END)
        if len(heads.END) <= end <= HEADER_LIMIT:
            head = heads.parse_response(early[:end], method)
            if head is not None:
                return head, early[end:], None
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEADER_LIMIT)
        http.send(h11.Request(method=method, target="/", headers=[("host", "")]))
        http.send(h11.EndOfMessage())
        http.receive_data(early)
        wait = self._timeouts.first_byte
        try:
            with trio.fail_after(wait):
                return await self._unusual_head(link, target, http), b"", http
        except trio.TooSlowError as exc:
            raise TimedOut(f"no whole header within {wait:g} s", target.name) from exc
        except (h11.RemoteProtocolError, trio.BrokenResourceError) as exc:
            raise Unreachable(f"no HTTP answer: {str(exc)[:200]}", target.name) from exc

    async def _unusual_head(
        self, link: _Link, target: Target, http: h11.Connection
    ) -> heads.ResponseHead:
        informational = 0
        while not isinstance(event := http.next_event(), h11.Response):
            if event is h11.NEED_DATA:
                http.receive_data(await receive(link.stream, _PIECE))
            elif isinstance(event, h11.InformationalResponse):
                informational += 1
                if informational > _MAX_INFORMATIONAL:
                    raise Unreachable("nothing but interim answers", target.name)
            else:
                raise Unreachable("closed in mid header", target.name)
        if sum(len(name) + len(value) + 4 for name, value in event.headers) > HEADER_LIMIT:
            raise Unreachable(f"a header of more than {HEADER_LIMIT} bytes", target.name)
        headers: dict[str, str] = {}
        for name, value in event.headers:
            heads.add_header(headers, name.decode("ascii"), value.decode("latin-1"))
        keep = event.http_version >= b"1.1" and heads.wants_keeping(headers)
        return heads.ResponseHead(event.status_code, headers, keep, None)


def _reason(exc: OSError | ValueError) -> str:
    """What the operating system said; trio wraps one cause per address tried."""
    cause: BaseException | None = exc
    if isinstance(exc, OSError) and exc.strerror is None:
        cause = exc.__cause__ or exc
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, OSError) and cause.strerror:
        return str(cause.strerror)
    return str(cause)
