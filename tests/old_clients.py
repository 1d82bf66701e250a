"""Nodes of lotus and Curio as clients of ours: what they send, and what they insist on.

Written from the formats, over plain sockets, with nothing of ours in it. A client refuses what the
original refuses (`Refused` says what it would have logged), and takes whatever that takes. It keeps
its connections as Go's pool does: those whose answer was read to the end.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from tests.old_peers import OldPeer
from tests.old_tar import FINALIZED, KNOWN, TarRefused, extract

_PATIENCE = 30.0
_PIECE = 1 << 20


class Refused(Exception):
    """The original returns an error here."""


@dataclass(frozen=True)
class Era:
    """What distinguishes the clients."""

    name: str
    types: tuple[str, ...]
    keeps: bool
    """Whether storages that are to stay are named when it deletes."""
    allow: Mapping[str, int] | None
    """The only files it takes out of a tar."""
    modern: bool
    """Whether it reads ranges and asks what is allocated."""


_FIRST = ("unsealed", "sealed", "cache")
_SNAP = (*_FIRST, "update", "update-cache")

FIRST = Era("sector-storage", _FIRST, keeps=False, allow=None, modern=False)
LOTUS = Era("lotus", _SNAP, keeps=True, allow=None, modern=True)
CURIO = Era("curio", (*_SNAP, "piece", "key"), keeps=True, allow=KNOWN, modern=True)
ERAS = (FIRST, LOTUS, CURIO)


# --- HTTP as Go speaks it ---


def spell_request(
    method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
) -> bytes:
    """A request in the order in which Go's client writes it."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [f"{method} {target} HTTP/1.1", f"Host: {parts.netloc}"]
    lines.append(f"User-Agent: {headers.get('User-Agent', 'Go-http-client/1.1')}")
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    lines += [f"{name}: {headers[name]}" for name in sorted(headers) if name != "User-Agent"]
    if "Accept-Encoding" not in headers and "Range" not in headers and method != "HEAD":
        lines.append("Accept-Encoding: gzip")
    return "\r\n".join((*lines, "", "")).encode() + (body or b"")


@dataclass
class Answer:
    """An answer whose body is read as it comes."""

    status: int
    headers: dict[str, str]
    read: Callable[[int], bytes]
    """Up to so many bytes of the body, none at its end."""

    def all(self) -> bytes:
        """The rest of the body."""
        return b"".join(iter(lambda: self.read(_PIECE), b""))


class GoClient:
    """Go's default HTTP client with a token."""

    def __init__(self, token: str) -> None:
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.connections = 0
        """How many were opened."""
        self._idle: dict[tuple[str, int], list[socket.socket]] = {}

    def close(self) -> None:
        """Close what is kept."""
        for kept in self._idle.values():
            while kept:
                kept.pop().close()

    @contextmanager
    def do(
        self, method: str, url: str, headers: Mapping[str, str] = {}, body: bytes | None = None
    ) -> Iterator[Answer]:
        """Ask, and read what is wanted of the answer in the block."""
        parts = urlsplit(url)
        assert parts.scheme == "http"
        where = (parts.hostname or "", parts.port or 80)
        connection = self._connect(where)
        ended = _Ended()
        keep = False
        try:
            connection.sendall(spell_request(method, url, {**self.headers, **headers}, body))
            answer = _answer(connection, method, ended)
            yield answer
            keep = ended.is_set and answer.headers.get("connection", "").lower() != "close"
        finally:
            if keep:
                self._idle.setdefault(where, []).append(connection)
            else:
                connection.close()

    def _connect(self, where: tuple[str, int]) -> socket.socket:
        if kept := self._idle.get(where):
            return kept.pop()
        self.connections += 1
        return socket.create_connection(where, _PATIENCE)


class _Ended:
    """Whether an answer was read to its end."""

    is_set = False


def _answer(connection: socket.socket, method: str, ended: _Ended) -> Answer:
    head, rest = b"", b""
    while b"\r\n\r\n" not in head:
        piece = connection.recv(65536)
        if not piece:
            raise Refused("EOF")
        head += piece
    head, _, rest = head.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, status = first.partition(" ")
    if version not in ("HTTP/1.1", "HTTP/1.0") or not status[:3].isdigit() or status[3:4] != " ":
        raise Refused(f"malformed HTTP response {first!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise Refused(f"malformed MIME header line {line!r}")
        headers[name.lower()] = value.strip()
    code = int(status[:3])
    without = method == "HEAD" or code in (204, 304)
    body = _Body(connection, rest, {} if without else headers, ended, empty=without)
    return Answer(code, headers, body.read)


class _Body:
    """A body by its length, in chunks, or to the end of the connection."""

    def __init__(
        self,
        connection: socket.socket,
        rest: bytes,
        headers: Mapping[str, str],
        ended: _Ended,
        *,
        empty: bool,
    ) -> None:
        self._connection = connection
        self._rest = rest
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        length = headers.get("content-length")
        self._left = None if length is None or self._chunked else int(length)
        if empty:
            self._left = 0
        self._chunk = 0
        self._ended = ended
        ended.is_set = self._left == 0

    def read(self, size: int) -> bytes:
        if self._ended.is_set:
            return b""
        if self._chunked:
            size = min(size, self._chunk or self._next_chunk())
        elif self._left is not None:
            size = min(size, self._left)
        data = self._take(size) if size else b""
        if self._chunked:
            self._chunk -= len(data)
            if not self._chunk and data and self._line():
                raise Refused("malformed chunked encoding")
        elif self._left is not None:
            if not data:
                raise Refused("unexpected EOF")
            self._left -= len(data)
            self._ended.is_set = not self._left
        return data

    def _next_chunk(self) -> int:
        self._chunk = int(self._line().partition(b";")[0], 16)
        if not self._chunk:
            while self._line():
                pass
            self._ended.is_set = True
        return self._chunk

    def _line(self) -> bytes:
        while b"\r\n" not in self._rest:
            piece = self._connection.recv(65536)
            if not piece:
                raise Refused("unexpected EOF")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\r\n")
        return line

    def _take(self, size: int) -> bytes:
        data = self._rest[:size] or self._connection.recv(min(size, _PIECE))
        self._rest = self._rest[size:]
        return data


def media_type(value: str) -> str:
    """What Go's parser makes of a Content-Type; parameters are read and dropped."""
    kind, _, parameters = value.partition(";")
    kind = kind.strip().lower()
    if not kind or any(c in '()<>@,:"[]?= ' for c in kind) or kind.count("/") > 1:
        raise Refused(f"parse media type: {value!r}")
    if parameters.strip() and any("=" not in one for one in parameters.split(";") if one.strip()):
        raise Refused(f"parse media type: invalid media parameter in {value!r}")
    return kind


def join_url(base: str, *names: str) -> str:
    """Path elements behind a base URL, cleaned as Go's ``path.Join`` does; a query stays."""
    parts = urlsplit(base)
    path = "/" + "/".join(name for name in "/".join((parts.path, *names)).split("/") if name)
    return urlunsplit(parts._replace(path=path))


# --- what a fetch client does ---


@dataclass
class FetchClient:
    """The remote store of one era: asks sector URLs, as ``StorageFindSector`` gives them."""

    era: Era
    http: GoClient

    def fetch(self, url: str, out: Path) -> None:
        """A whole sector file to where nothing is afterwards but it."""
        with self.http.do("GET", url) as answer:
            self._take(answer, out, self.era.allow)

    def fetch_minimal(self, url: str, out: Path) -> None:
        """The finalized part of a cache directory; Curio only."""
        with self.http.do("GET", f"{url}?mincache=true") as answer:
            self._take(answer, out, FINALIZED)

    def _take(self, answer: Answer, out: Path, allow: Mapping[str, int] | None) -> None:
        if answer.status != 200:
            raise Refused(f"non-200 code: {answer.status}")
        kind = media_type(answer.headers.get("content-type", ""))
        _remove(out)
        if kind == "application/x-tar":
            try:
                extract(answer.read, out, allow)
            except TarRefused as exc:
                raise Refused(str(exc)) from exc
        elif kind == "application/octet-stream":
            with out.open("wb") as file:
                while piece := answer.read(_PIECE):
                    file.write(piece)
        else:
            raise Refused(f"unknown content type: {kind!r}")

    @contextmanager
    def read(self, url: str, offset: int, size: int) -> Iterator[Callable[[int], bytes]]:
        """A range, of which as much is read as is wanted."""
        wanted = {"Range": f"bytes={offset}-{offset + size - 1}"}
        if not size:
            wanted = {"Range": f"bytes={offset}-"} if offset else {}
        with self.http.do("GET", url, wanted) as answer:
            if answer.status not in (200, 206):
                raise Refused(f"non-200 code: {answer.status}")
            yield answer.read

    def allocated(self, url: str, proof: int, offset: int, size: int) -> bool:
        """Whether an unpadded range of an unsealed sector is there."""
        with self.http.do("GET", f"{url}/{proof}/allocated/{offset}/{size}") as answer:
            if answer.status not in (200, 416):
                raise Refused(f"unexpected http response: {answer.status}")
            return answer.status == 200

    def delete(self, url: str, keep: list[str] | None = None) -> None:
        """Delete a sector file there, but from the storages in `keep`."""
        if keep is not None and self.era.keeps:
            url = f"{url}?keep={'.'.join(keep)}"
        with self.http.do("DELETE", url) as answer:
            if answer.status != 200:
                raise Refused(f"non-200 code: {answer.status}")
            answer.all()

    def stat(self, base: str, storage: str) -> dict[str, int] | None:
        """Space of a storage; None where it is not."""
        with self.http.do("GET", join_url(base, "stat", storage)) as answer:
            if answer.status == 404:
                return None
            if answer.status != 200:
                raise Refused(f"fsstat: got http {answer.status}")
            found = json.loads(answer.all())
        names = ["Capacity", "Available", "Reserved"]
        if self.era.modern:
            names += ["FSAvailable", "Max", "Used"]
        for name in names:
            if type(found.get(name, 0)) is not int:
                raise Refused(f"decoding fsstat: {name} is not an int64")
        return {name: found.get(name, 0) for name in names}

    def prove(self, base: str, kind: str, question: object) -> bytes | None:
        """A vanilla proof; None from a node that says it has not got the sector."""
        body = json.dumps(question, separators=(",", ":")).encode()
        kinds = {"Content-Type": "application/json"}
        with self.http.do("POST", f"{base}/vanilla/{kind}", kinds, body) as answer:
            if answer.status == 404:
                return None
            if answer.status != 200:
                raise Refused(f"non-200 code: {answer.status}: {answer.all()!r}")
            return answer.all()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- the Index over JSON-RPC ---


@dataclass
class GoRpc:
    """A go-jsonrpc client over HTTP, as lotus nodes reach their miner's index."""

    url: str
    http: GoClient
    last_id: int = 0

    def call(self, method: str, *params: object) -> Any:
        """The result; `Refused` with the message of an error."""
        self.last_id += 1
        request = {
            "jsonrpc": "2.0",
            "id": self.last_id,
            "method": f"Filecoin.{method}",
            "params": list(params),
            "meta": {"SpanContext": "AAAAAAAAAAAAAAAAAAAAAAAAAQAAAAAAAAAAAgA="},
        }
        body = json.dumps(request, separators=(",", ":")).encode()
        kinds = {"Content-Type": "application/json"}
        with self.http.do("POST", self.url, kinds, body) as answer:
            try:
                found = json.loads(answer.all())
            except ValueError as exc:
                raise Refused(f"http status {answer.status} unmarshaling response") from exc
        error = found.get("error")
        if error is not None:
            if type(error["code"]) is not int or type(error["message"]) is not str:
                raise Refused("unmarshaling response: error object")
            raise Refused(error["message"])
        if found.get("id") != self.last_id or type(found["id"]) is not int:
            raise Refused("request and response id didn't match")
        return found.get("result")


FILE_TYPES = {"unsealed": 1, "sealed": 2, "cache": 4, "update": 8, "update-cache": 16}
FILE_TYPES |= {"piece": 32, "key": 64}


def sector_id(name: str) -> dict[str, int]:
    """``s-t01000-7`` as the Index is asked for it."""
    miner, number = name.removeprefix("s-t0").split("-")
    return {"Miner": int(miner), "Number": int(number)}


@dataclass
class Mover:
    """Another program's node as it acts: brings files to a path of its own, and tells the Index."""

    peer: OldPeer
    """Its server, and its path."""
    index: GoRpc
    client: FetchClient
    refused: list[str] = field(default_factory=list)
    """What it would have logged as a warning."""

    def find(self, name: str, *, fetch: bool = False) -> list[dict[str, Any]]:
        """Who has ``sealed/s-t01000-7``, the lowest weight first, as whole files are asked for."""
        kind, _, sector = name.partition("/")
        params = (sector_id(sector), FILE_TYPES[kind], 0, fetch)
        return sorted(
            self.index.call("StorageFindSector", *params) or [], key=lambda row: row["Weight"]
        )

    def acquire(self, name: str, *, move: bool) -> None:
        """Fetch a file to its path, declare it there and, to move it, delete it at the source."""
        self._acquire(self.peer.root, self.peer.storage, name, move=move)

    def acquire_into(self, path: Path, storage: str, name: str) -> None:
        """Move a file to a path that it shares with others."""
        self._acquire(path, storage, name, move=True)

    def _acquire(self, path: Path, storage: str, name: str, *, move: bool) -> None:
        kind, _, sector = name.partition("/")
        dest = path / name
        temporary = path / kind / "fetching" / sector
        temporary.parent.mkdir(parents=True, exist_ok=True)
        tried = []
        for row in self.find(name):
            for url in row["URLs"]:
                _remove(dest)
                try:
                    self.client.fetch(url, temporary)
                except (Refused, OSError) as exc:
                    tried.append(f"fetch error {url}: {exc}")
                    continue
                os.rename(temporary, dest)
                self.peer.redeclare()
                params = (storage, sector_id(sector), FILE_TYPES[kind], move)
                self.index.call("StorageDeclareSector", *params)
                if move:
                    self._delete(url, storage)
                return
        raise Refused(f"failed to acquire {name} from remote: {tried}")

    def _delete(self, url: str, storage: str) -> None:
        try:
            self.client.delete(url, [storage])
        except Refused as exc:
            self.refused.append(str(exc))
