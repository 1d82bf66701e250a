"""JSON-RPC 2.0 over HTTP bodies, both ends, without any HTTP: bytes in, status and bytes out.

Framing as lotus nodes speak it: positional parameters whose count must match, an application error
is HTTP 200 with code 1. Unlike there, what a client did wrong is never a 5xx. Our errors travel
with ``data: {kind, what, thing, hint}``, so that the other end raises the same leaf of
`SectorFSError` again; a foreign client reads the message.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import msgspec
import trio

from sectorfs import errors
from sectorfs.errors import (
    Forbidden,
    NoSource,
    Refused,
    SectorFSError,
    Unauthorized,
    Unreachable,
    Unsupported,
)
from sectorfs.wire.messages import Gone

log = logging.getLogger(__name__)

T = TypeVar("T")

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603

MAX_BATCH = 1000
"""Requests in one body."""

_STATUS = {
    PARSE_ERROR: 400,
    INVALID_REQUEST: 400,
    METHOD_NOT_FOUND: 404,
    INVALID_PARAMS: 400,
    INTERNAL_ERROR: 500,
}
_AWAY = frozenset({502, 503, 504})
"""What stands before a server says while that is away, or a server with too much to do."""
# Everything the decoder raises for bytes of a stranger; deep nesting is a RecursionError.
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_ABSENT = msgspec.Raw(b"null")
"""A key that is absent reads like null; `Raw` cannot be optional in any other way."""

RequestID = int | float | str | None


class NotJsonRpc(Unreachable):
    """Somebody answered, who does not speak JSON-RPC: it is the address that is wrong."""


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """One callable of the server."""

    name: str
    permission: str
    params: tuple[Any, ...] = ()
    """Type of each positional parameter, as msgspec understands it."""
    optional: int = 0
    """How many of the last ones older callers leave out."""
    handler: Callable[..., Awaitable[object]]
    waits: bool = False
    """It mostly waits, and is cancelled when its client is gone. A change goes on to its end."""


class ErrorData(msgspec.Struct, frozen=True):
    """Our addition to an error object: the leaf and its parts."""

    kind: str = ""
    what: str = ""
    thing: str = ""
    hint: str = ""


class ErrorObject(msgspec.Struct, frozen=True, omit_defaults=True):
    """The ``error`` of an answer."""

    code: int
    message: str
    data: ErrorData | msgspec.UnsetType = msgspec.UNSET


class _Request(msgspec.Struct):
    method: str
    jsonrpc: str = "2.0"
    params: msgspec.Raw = _ABSENT
    id: RequestID | msgspec.UnsetType = msgspec.UNSET


class _Result(msgspec.Struct):
    id: RequestID
    result: object
    jsonrpc: str = "2.0"


class _Failure(msgspec.Struct):
    id: RequestID
    error: ErrorObject
    jsonrpc: str = "2.0"


class _Answer(msgspec.Struct):
    """An answer as a client reads it: `data` may be anything from a foreign server."""

    id: object = msgspec.UNSET
    result: msgspec.Raw = _ABSENT
    error: msgspec.Raw = _ABSENT


class _ForeignError(msgspec.Struct):
    code: int = 0
    message: str = ""
    data: msgspec.Raw = _ABSENT


class _Asked(msgspec.Struct, frozen=True):
    """Who asks."""

    permissions: frozenset[str]
    gone: Gone


class Dispatcher:
    """A table of methods as one callable: body and permissions in, status and body out."""

    def __init__(self, methods: Iterable[Method]) -> None:
        self._methods: dict[str, Method] = {}
        for method in methods:
            assert method.name not in self._methods, method.name
            self._methods[method.name] = method

    async def __call__(
        self, body: bytes, permissions: frozenset[str], *, gone: Gone = trio.sleep_forever
    ) -> tuple[int, bytes]:
        """Answer a body; its batch is worked through in order. The bytes may be empty."""
        asked = _Asked(permissions, gone)
        text = body.strip()
        if not text:
            return _only(_failure(None, INVALID_REQUEST, "empty body"))
        try:
            if text[:1] != b"[":
                answer = await self._one(msgspec.json.decode(text, type=msgspec.Raw), asked)
                return (200, b"") if answer is None else _only(answer)
            batch = msgspec.json.decode(text, type=list[msgspec.Raw])
        except _MALFORMED:
            return _only(_failure(None, PARSE_ERROR, "not JSON"))
        if not 1 <= len(batch) <= MAX_BATCH:
            message = f"a batch has 1 to {MAX_BATCH} requests, this one {len(batch)}"
            return _only(_failure(None, INVALID_REQUEST, message))
        answers = [await self._one(raw, asked) for raw in batch]
        wanted = [answer for answer in answers if answer is not None]
        return 200, msgspec.json.encode(wanted) if wanted else b""

    async def _one(self, raw: msgspec.Raw, asked: _Asked) -> _Result | _Failure | None:
        """The answer to one request, None to a notification."""
        try:
            request = msgspec.json.decode(raw, type=_Request)
        except _MALFORMED as exc:
            return _failure(None, INVALID_REQUEST, f"not a request: {exc}")
        if request.jsonrpc != "2.0":
            return _failure(_id(request), INVALID_REQUEST, "not JSON-RPC 2.0")
        answer = await self._answer(request, asked)
        return None if request.id is msgspec.UNSET else answer

    async def _answer(self, request: _Request, asked: _Asked) -> _Result | _Failure:
        method = self._methods.get(request.method)
        if method is None:
            name = request.method[:200]
            return _failure(_id(request), METHOD_NOT_FOUND, f"method '{name}' not found")
        if not asked.permissions & {method.permission, "admin"}:
            return _refusal(request, method)
        try:
            params = _params(method, request.params)
        except _BadParams as exc:
            return _failure(_id(request), INVALID_PARAMS, str(exc))
        call = partial(_call, request, method, params)
        if not method.waits:
            return await call()
        gone = _failure(_id(request), INTERNAL_ERROR, "the client is gone")
        return await _unless(asked.gone, call, otherwise=gone)


class _BadParams(Exception):
    """Parameters do not fit a method; becomes an error object at once."""


def _params(method: Method, raw: msgspec.Raw) -> list[object]:
    try:
        values = msgspec.json.decode(raw, type=list[msgspec.Raw] | None) or []
    except _MALFORMED as exc:
        raise _BadParams("parameters must be an array") from exc
    if not 0 <= len(method.params) - len(values) <= method.optional:
        raise _BadParams(
            f"wrong param count (method '{method.name}'): {len(values)} != {len(method.params)}"
        )
    params = []
    for number, (value, kind) in enumerate(zip(values, method.params, strict=False)):
        try:
            params.append(msgspec.json.decode(value, type=kind))
        except _MALFORMED as exc:
            raise _BadParams(f"parameter {number} of '{method.name}': {exc}") from exc
    return params


async def _call(request: _Request, method: Method, params: list[object]) -> _Result | _Failure:
    try:
        return _Result(id=_id(request), result=await method.handler(*params))
    except SectorFSError as exc:
        return _Failure(id=_id(request), error=error_object(exc))
    except Exception:  # the boundary of a request: a bug in a handler must not end the server
        log.exception("%s failed", method.name)
        return _failure(_id(request), INTERNAL_ERROR, f"internal error in '{method.name}'")


async def _unless(gone: Gone, call: Callable[[], Awaitable[T]], *, otherwise: T) -> T:
    """The result of a call that raises nothing; `otherwise` when `gone` returns before it does."""
    results = [otherwise]

    async def watch() -> None:
        await gone()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        results.append(await call())
        nursery.cancel_scope.cancel()
    return results[-1]


def _refusal(request: _Request, method: Method) -> _Failure:
    message = f"missing permission to invoke '{method.name}' (need '{method.permission}')"
    return _Failure(id=_id(request), error=error_object(Forbidden(message)))


def _id(request: _Request) -> RequestID:
    return None if isinstance(request.id, msgspec.UnsetType) else request.id


def _failure(request_id: RequestID, code: int, message: str) -> _Failure:
    return _Failure(id=request_id, error=ErrorObject(code, message))


def _only(answer: _Result | _Failure) -> tuple[int, bytes]:
    """Status and body of an answer that is not part of a batch."""
    status = 200
    if isinstance(answer, _Failure):
        status = _STATUS.get(answer.error.code, 200)
        if answer.error.data and answer.error.data.kind == Forbidden.__name__:
            status = Forbidden.status
    return status, msgspec.json.encode(answer)


def error_object(exc: SectorFSError) -> ErrorObject:
    """A deliberate error as it travels."""
    data = ErrorData(_kind(exc), exc.what, exc.thing, exc.hint)
    return ErrorObject(exc.rpc_code, str(exc), data)


def _kind(exc: SectorFSError) -> str:
    """The name of its kind that the other side knows too: errors of a module have one above."""
    names = [kind.__name__ for kind in type(exc).__mro__]
    return next((name for name in names if name in _KINDS), names[0])


# `NoSource` is built from its causes, which do not travel.
_KINDS: Mapping[str, type[SectorFSError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type)
    and issubclass(kind, SectorFSError)
    and kind is not SectorFSError
    and not issubclass(kind, NoSource)
}


def encode_request(request_id: int, method: str, params: object) -> bytes:
    """The body of one request."""
    return msgspec.json.encode(
        {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
    )


def decode_answer(status: int, body: bytes, *, request_id: int, result: Any, url: str) -> Any:
    """The result in an answer as msgspec type `result`; raises the error it carries.

    `Unauthorized` and `Forbidden` for refused tokens; `Unreachable` for anything that is not the
    answer to this request in JSON-RPC: a web page, another id, a result of another shape.
    """
    if status == 401:
        raise Unauthorized(
            "the token is not accepted", url, "copy the secret file from the index node"
        )
    try:
        answer = msgspec.json.decode(body, type=_Answer)
    except _MALFORMED as exc:
        raise _no_answer(status, url) from exc
    if bytes(answer.error) != b"null":
        raise _carried(answer.error, status, url)
    if status != 200 or answer.id != request_id or type(answer.id) is not int:
        raise _no_answer(status, url)
    try:
        return msgspec.json.decode(answer.result, type=result)
    except _MALFORMED as exc:
        raise NotJsonRpc(f"answered something else than asked: {exc}", url) from exc


def _no_answer(status: int, url: str) -> SectorFSError:
    if status == 403:
        return Forbidden("the token lacks the permission", url, "use an admin token")
    kind = Unreachable if status in _AWAY else NotJsonRpc
    return kind(
        f"does not answer in JSON-RPC (HTTP {status})", url, "check index.url and what runs there"
    )


def _carried(raw: msgspec.Raw, status: int, url: str) -> SectorFSError:
    """The exception that an error object stands for."""
    try:
        error = msgspec.json.decode(raw, type=_ForeignError)
    except _MALFORMED:
        return _no_answer(status, url)
    try:
        data = msgspec.json.decode(error.data, type=ErrorData)
    except _MALFORMED:
        data = ErrorData()
    kind = _KINDS.get(data.kind)
    if kind is not None:
        return kind(data.what or error.message, data.thing, data.hint)
    if status >= 500 or error.code == INTERNAL_ERROR:
        return Unreachable(f"the server failed: {error.message[:500]}", url, "see its log")
    if error.code == METHOD_NOT_FOUND:
        return Unsupported(error.message[:500], url, "update sectorfs there")
    return Refused(error.message[:500] or f"error {error.code}", url)
