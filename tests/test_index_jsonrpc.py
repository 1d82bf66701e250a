"""JSON-RPC framing: garbage in, proper error objects out; our errors arrive as themselves."""

from __future__ import annotations

import json
import logging
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from sectorfs import errors
from sectorfs.errors import (
    BadInput,
    Forbidden,
    NoSource,
    NotFound,
    Refused,
    SectorFSError,
    Unauthorized,
    Unreachable,
    Unsupported,
)
from sectorfs.wire.jsonrpc import MAX_BATCH, Dispatcher, Method, decode_answer, encode_request

ADMIN = frozenset({"admin"})
URL = "http://index:8480/rpc/v0"


class Point(msgspec.Struct):
    x: int


async def add(one: int, other: int) -> int:
    return one + other


async def get_x(point: Point) -> int:
    return point.x


async def nothing() -> None:
    return None


async def refuse(kind: str) -> None:
    raise vars(errors)[kind]("cannot", "thing", "try this")


async def crash() -> None:
    raise RuntimeError("secret detail")


DISPATCH = Dispatcher(
    [
        Method(name="T.Add", permission="read", params=(int, int), handler=add),
        Method(name="T.X", permission="read", params=(Point,), handler=get_x),
        Method(name="T.Nothing", permission="admin", handler=nothing),
        Method(name="T.Refuse", permission="read", params=(str,), handler=refuse),
        Method(name="T.Crash", permission="read", handler=crash),
    ]
)


async def call(body: bytes, permissions: frozenset[str] = ADMIN) -> tuple[int, Any]:
    status, answer = await DISPATCH(body, permissions)
    return status, json.loads(answer) if answer else None


def request(method: str, *params: object, **fields: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params), **fields}


async def ask(method: str, *params: object, permissions: frozenset[str] = ADMIN) -> Any:
    return await call(json.dumps(request(method, *params)).encode(), permissions)


async def test_result() -> None:
    assert await ask("T.Add", 2, 3) == (200, {"jsonrpc": "2.0", "id": 1, "result": 5})


async def test_method_without_result_answers_null() -> None:
    assert await ask("T.Nothing") == (200, {"jsonrpc": "2.0", "id": 1, "result": None})


@pytest.mark.parametrize("request_id", [0, -1, 7, 2**40, "text", None, 1.5])
async def test_id_comes_back_as_it_was(request_id: object) -> None:
    body = json.dumps(request("T.Nothing", id=request_id)).encode()
    assert (await call(body))[1]["id"] == request_id


@pytest.mark.parametrize("fields", [{"params": None}, {"params": []}])
async def test_no_parameters_may_be_null_or_empty(fields: dict[str, object]) -> None:
    assert (await call(json.dumps(request("T.Nothing", **fields)).encode()))[0] == 200


async def test_parameters_and_version_may_be_missing() -> None:
    assert (await call(b'{"id":1,"method":"T.Nothing"}'))[1]["result"] is None


async def test_unknown_keys_are_tolerated() -> None:
    assert (await ask("T.X", {"x": 4, "y": 5}))[1]["result"] == 4
    assert (await call(b'{"id":1,"method":"T.Nothing","Meta":{"a":[1]}}'))[0] == 200


async def test_notification_is_run_and_not_answered() -> None:
    body = request("T.Crash")
    del body["id"]
    logging.disable()
    try:
        assert await call(json.dumps(body).encode()) == (200, None)
        assert await call(json.dumps([body, body]).encode()) == (200, None)
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, -32600),
        (b" \r\n\t ", 400, -32600),
        (b"<html>", 400, -32700),
        (b"{", 400, -32700),
        (b"[", 400, -32700),
        (b'{"method":"T.Add"} x', 400, -32700),
        (b"\xff\xfe", 400, -32700),
        (b"\x00", 400, -32700),
        (b"[" * 100_000, 400, -32700),
        (b'{"a":' * 100_000, 400, -32700),
        (b"null", 400, -32600),
        (b"5", 400, -32600),
        (b'"T.Add"', 400, -32600),
        (b'"\xff"', 400, -32600),
        (b"{}", 400, -32600),
        (b"[]", 400, -32600),
        (b'{"id":1,"method":7}', 400, -32600),
        (b'{"id":{},"method":"T.Add"}', 400, -32600),
        (b'{"id":1,"method":"\xff"}', 400, -32600),
        (b'{"id":1,"method":"\\ud800"}', 400, -32700),
        (b'{"jsonrpc":"1.0","id":1,"method":"T.Nothing"}', 400, -32600),
        (b'{"id":1,"method":"T.Missing"}', 404, -32601),
        (b'{"id":1,"method":"T.Add"}', 400, -32602),
        (b'{"id":1,"method":"T.Add","params":[1]}', 400, -32602),
        (b'{"id":1,"method":"T.Add","params":[1,2,3]}', 400, -32602),
        (b'{"id":1,"method":"T.Add","params":{"one":1,"other":2}}', 400, -32602),
        (b'{"id":1,"method":"T.Add","params":[1,"2"]}', 400, -32602),
        (b'{"id":1,"method":"T.Add","params":[1,2.5]}', 400, -32602),
        (b'{"id":1,"method":"T.Add","params":[1,1e999]}', 400, -32602),
        (b'{"id":1,"method":"T.X","params":[null]}', 400, -32602),
        (b'{"id":1,"method":"T.X","params":[{"y":1}]}', 400, -32602),
        (b'{"id":1,"method":"T.Refuse","params":["\xff"]}', 400, -32602),
    ],
)
async def test_bad_request(body: bytes, status: int, code: int) -> None:
    found, answer = await call(body)
    assert (found, answer["error"]["code"]) == (status, code)
    assert answer["error"]["message"]
    assert "result" not in answer


async def test_wrong_count_and_wrong_key_are_named() -> None:
    assert "1 != 2" in (await ask("T.Add", 1))[1]["error"]["message"]
    message = (await ask("T.X", {"x": "1"}))[1]["error"]["message"]
    assert "parameter 0" in message
    assert "$.x" in message


async def test_batch_of_garbage_answers_each_element() -> None:
    body = b'[1, null, "x", {}, [], {"id":9,"method":"T.Add","params":[1,1]}, {"method":5}]'
    status, answers = await call(body)
    assert status == 200
    assert [one.get("error", {}).get("code") for one in answers] == [-32600] * 5 + [None, -32600]
    assert answers[5] == {"jsonrpc": "2.0", "id": 9, "result": 2}


async def test_batch_is_bounded() -> None:
    status, answers = await call(json.dumps([request("T.Nothing")] * MAX_BATCH).encode())
    assert (status, len(answers)) == (200, MAX_BATCH)
    status, answer = await call(b"[" + b"1," * MAX_BATCH + b"1]")
    assert (status, answer["error"]["code"]) == (400, -32600)


@pytest.mark.parametrize(
    ("permissions", "method", "status"),
    [
        ({"admin"}, "T.Nothing", 200),
        ({"admin"}, "T.Add", 200),
        ({"read"}, "T.Add", 200),
        ({"read", "write", "sign"}, "T.Nothing", 403),
        (set(), "T.Add", 403),
    ],
)
async def test_permissions(permissions: set[str], method: str, status: int) -> None:
    params = (1, 2) if method == "T.Add" else ()
    found, answer = await ask(method, *params, permissions=frozenset(permissions))
    assert found == status
    if status == 403:
        need = "admin" if method == "T.Nothing" else "read"
        assert answer["error"]["code"] == 1
        message = f"missing permission to invoke '{method}' (need '{need}')"
        assert answer["error"]["message"] == message


async def test_parameters_are_not_judged_without_permission() -> None:
    assert (await ask("T.Add", "x", permissions=frozenset()))[0] == 403


async def test_crash_is_logged_and_told_without_internals(
    caplog: pytest.LogCaptureFixture,
) -> None:
    status, answer = await ask("T.Crash")
    assert (status, answer["error"]["code"]) == (500, -32603)
    assert "secret" not in json.dumps(answer)
    assert "secret detail" in caplog.text


async def test_deliberate_error_is_an_application_error() -> None:
    status, answer = await ask("T.Refuse", "NotFound")
    assert status == 200
    assert answer["error"] == {
        "code": 1,
        "message": "thing: cannot (try this)",
        "data": {"kind": "NotFound", "what": "cannot", "thing": "thing", "hint": "try this"},
    }


LEAVES = [
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type)
    and issubclass(kind, SectorFSError)
    and kind is not SectorFSError
    and not issubclass(kind, NoSource)
]


@pytest.mark.parametrize("name", LEAVES)
async def test_each_error_arrives_as_itself(name: str) -> None:
    status, body = await DISPATCH(encode_request(1, "T.Refuse", [name]), ADMIN)
    with pytest.raises(vars(errors)[name]) as caught:
        decode_answer(status, body, request_id=1, result=type(None), url=URL)
    error = caught.value
    assert type(error).__name__ == name
    assert (error.what, error.thing, error.hint) == ("cannot", "thing", "try this")


@pytest.mark.parametrize(
    ("status", "body", "kind", "text"),
    [
        (200, b"<html>Welcome</html>", Unreachable, "does not answer in JSON-RPC"),
        (404, b"<html>", Unreachable, "HTTP 404"),
        (502, b"bad gateway", Unreachable, "HTTP 502"),
        (200, b"", Unreachable, "JSON-RPC"),
        (200, b"[]", Unreachable, "JSON-RPC"),
        (200, b"[" * 100_000, Unreachable, "JSON-RPC"),
        (200, b"{}", Unreachable, "JSON-RPC"),
        (200, b'{"id":8,"result":5}', Unreachable, "JSON-RPC"),
        (200, b'{"id":"7","result":5}', Unreachable, "JSON-RPC"),
        (200, b'{"id":null,"result":5}', Unreachable, "JSON-RPC"),
        (500, b'{"id":7,"result":5}', Unreachable, "HTTP 500"),
        (200, b'{"id":7,"result":"x"}', Unreachable, "something else"),
        (200, b'{"id":7}', Unreachable, "something else"),
        (200, b'{"id":7,"error":5}', Unreachable, "JSON-RPC"),
        (200, b'{"id":7,"error":{"code":1,"message":"no luck"}}', Refused, "no luck"),
        (200, b'{"id":7,"error":{"code":1,"message":"m","data":[1]}}', Refused, "m"),
        (200, b'{"id":7,"error":{"code":1,"message":"m","data":{"kind":"X"}}}', Refused, "m"),
        (200, b'{"id":7,"error":{"code":2}}', Refused, "error 2"),
        (404, b'{"id":7,"error":{"code":-32601,"message":"no method"}}', Unsupported, "no method"),
        (200, b'{"id":7,"error":{"code":-32603,"message":"oops"}}', Unreachable, "oops"),
        (500, b'{"id":7,"error":{"code":-32601,"message":"oops"}}', Unreachable, "oops"),
        (401, b"", Unauthorized, "copy the secret file from the index node"),
        (401, b'{"id":7,"result":5}', Unauthorized, "secret"),
        (403, b"forbidden", Forbidden, "admin token"),
        (
            403,
            b'{"id":7,"error":{"code":1,"message":"m","data":{"kind":"Forbidden","what":"w"}}}',
            Forbidden,
            "w",
        ),
    ],
)
def test_what_is_no_good_answer(
    status: int, body: bytes, kind: type[SectorFSError], text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        decode_answer(status, body, request_id=7, result=int, url=URL)
    if not body.startswith(b'{"id":7,"error":{"code":1,"message":"m","data":{"kind":"F'):
        assert URL in str(caught.value)


def test_good_answers() -> None:
    body = b'{"jsonrpc":"2.0","id":7,"result":5,"error":null,"more":1}'
    assert decode_answer(200, body, request_id=7, result=int, url=URL) == 5
    assert decode_answer(200, b'{"id":7}', request_id=7, result=type(None), url=URL) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
REQUESTS = st.fixed_dictionaries(
    {"method": st.sampled_from(["T.Add", "T.X", "T.Nothing", "T.Missing"]) | JSON},
    optional={"id": JSON, "params": JSON, "jsonrpc": st.just("2.0") | JSON},
)


@settings(max_examples=300, deadline=None)
@given(
    st.binary()
    | JSON.map(lambda value: json.dumps(value).encode())
    | REQUESTS.map(lambda value: json.dumps(value).encode())
    | st.lists(REQUESTS | JSON).map(lambda value: json.dumps(value).encode())
)
def test_no_body_is_a_server_error(body: bytes) -> None:
    async def main() -> None:
        status, answer = await DISPATCH(body, ADMIN)
        assert status in (200, 400, 404)
        if answer:
            found = json.loads(answer)
            for one in found if isinstance(found, list) else [found]:
                assert ("result" in one) != ("error" in one)
                assert one.get("error", {}).get("code") != -32603

    trio.run(main)


@settings(max_examples=300, deadline=None)
@given(st.integers(100, 599), st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_answer_is_anything_but_an_error_of_ours(status: int, body: bytes) -> None:
    with pytest.raises(SectorFSError):
        decode_answer(status, body, request_id=7, result=Point, url=URL)


def test_two_methods_of_one_name_are_a_mistake() -> None:
    method = Method(name="T", permission="read", handler=nothing)
    with pytest.raises(AssertionError):
        Dispatcher([method, method])


async def test_cancelled_handler_is_not_swallowed() -> None:
    dispatch = Dispatcher([Method(name="T.Sleep", permission="read", handler=trio.sleep_forever)])
    with trio.move_on_after(0) as scope:
        await dispatch(encode_request(1, "T.Sleep", []), ADMIN)
    assert scope.cancelled_caught


def test_error_kinds_are_the_expected_ones() -> None:
    assert {"NotFound", "BadInput", "Unreachable", "Forbidden", "DiskFull"} <= set(LEAVES)
    assert issubclass(NotFound, SectorFSError)
    assert not issubclass(NotFound, BadInput)
