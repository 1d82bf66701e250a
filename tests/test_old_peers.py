"""The stand-ins for nodes of other programs are as strict as what they stand for."""

from __future__ import annotations

import http.client
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sectorfs.wire import tokens
from tests.archive_fixtures import COMPLETE, FINALIZED, write_directory
from tests.cluster_fixtures import noise, put
from tests.old_peers import ERAS, Era, OldPeer, ends_after, old_peers

SECRET = bytes(range(32))
ADMIN = tokens.sign(tokens.Secret(SECRET), ("admin",))
READ = tokens.sign(tokens.Secret(SECRET), ("read",))
SEALED = noise("sealed", 2048)
FULL = bytes.fromhex("04100203000000")
"""Trailer of an unsealed file of 2 KiB that is there as a whole."""
HALF = bytes.fromhex("04100103000000")
TIME = "Sun, 13 Sep 2020 12:26:40 GMT"
TIME_NS = 1_600_000_000 * 10**9


@pytest.fixture(params=ERAS)
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OldPeer]:
    root = tmp_path / "node"
    put(root / "sealed/s-t01000-7", SEALED, TIME_NS)
    put(root / "unsealed/s-t01000-7", bytes(2048) + FULL, TIME_NS)
    put(root / "unsealed/s-t01000-8", bytes(2048) + HALF, TIME_NS)
    put(root / "update/s-t01000-7", SEALED, TIME_NS)
    put(root / "key/s-t01000-7", SEALED, TIME_NS)
    write_directory(root / "cache/s-t01000-7", COMPLETE)
    with old_peers(tmp_path, {"node": request.param}, secret=SECRET) as peers:
        yield peers["node"]


Answer = tuple[int, dict[str, str], bytes]


def ask(
    peer: OldPeer, path: str, *, method: str = "GET", token: str = ADMIN, **more: str
) -> Answer:
    connection = http.client.HTTPConnection(urlsplit(peer.url).netloc, timeout=20)
    headers = {name.replace("_", "-"): value for name, value in more.items()}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        connection.request(method, f"/remote/{path}", headers=headers)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, response.read()
    finally:
        connection.close()


def of(peer: OldPeer, **by_era: object) -> object:
    return by_era[peer.era.replace("-", "_")]


def test_only_admin_may_ask(peer: OldPeer) -> None:
    status, _, body = ask(peer, "sealed/s-t01000-7", token="")
    assert (status, body) == (401, b'{"Error": "unauthorized: missing admin permission"}\n')
    assert ask(peer, "sealed/s-t01000-7", token=READ)[0] == 401
    assert ask(peer, "sealed/s-t01000-7", token="x.y.z")[::2] == (401, b"")
    assert ask(peer, "sealed/s-t01000-7", token="", Authorization=f"Basic {ADMIN}")[::2] == (
        401,
        b"",
    )
    assert ask(peer, f"sealed/s-t01000-7?token={ADMIN}", token="")[::2] == (200, SEALED)


def test_every_problem_is_500_without_a_word(peer: OldPeer) -> None:
    for path in ("sealed/s-t01000-9", "sealed/nothing", "other/s-t01000-7", "piece/s-t00-1"):
        assert ask(peer, path)[::2] == (500, b"")
    assert ask(peer, "sealed/s-t01000-7", method="HEAD")[::2] == (405, b"")
    assert ask(peer, "sealed/s-t01000-7", method="POST")[0] == 405
    assert ask(peer, "cache/s-t01000-7/files")[0] == 404
    assert ask(peer, "sealed/s-t01000-7.tmp")[::2] == (200, SEALED)  # as Sscanf reads it


def test_types_by_era(peer: OldPeer) -> None:
    known = [
        name for name in ("sealed", "update", "key") if ask(peer, f"{name}/s-t01000-7")[0] == 200
    ]
    want = {"sector-storage": 1, "lotus": 2, "curio": 3}
    assert len(known) == want[peer.era]


def test_files_as_gos_file_server_sends_them_and_the_first_era_not(peer: OldPeer) -> None:
    status, headers, body = ask(peer, "sealed/s-t01000-7")
    assert (status, headers["content-type"], body) == (200, "application/octet-stream", SEALED)
    if peer.era == "sector-storage":
        assert "content-length" not in headers
        assert headers["transfer-encoding"] == "chunked"
        assert ask(peer, "sealed/s-t01000-7", Range="bytes=0-0")[::2] == (200, SEALED)
        return
    assert headers["last-modified"] == TIME
    assert "etag" not in headers
    status, headers, body = ask(peer, "sealed/s-t01000-7", Range="bytes=3-9")
    assert (status, headers["content-range"], body) == (206, "bytes 3-9/2048", SEALED[3:10])
    status, headers, body = ask(peer, "sealed/s-t01000-7", Range="bytes=4000-")
    assert (status, headers["content-range"]) == (416, "bytes */2048")
    assert body == b"invalid range: failed to overlap\n"
    assert ask(peer, "sealed/s-t01000-7", Range="bytes=9-3")[::2] == (416, b"invalid range\n")
    assert ask(peer, "sealed/s-t01000-7", If_Modified_Since=TIME)[::2] == (304, b"")
    status, headers, body = ask(peer, "sealed/s-t01000-7", Range="bytes=0-1,9-10")
    assert headers["content-type"].startswith("multipart/byteranges; boundary=")
    assert len(body) == int(headers["content-length"])
    assert body.count(b"Content-Range: bytes ") == 2
    old = "Sun, 13 Sep 2020 12:26:39 GMT"
    for since, wanted in ((TIME, 206), (old, 200), ('"an-etag"', 200)):
        assert ask(peer, "sealed/s-t01000-7", Range="bytes=0-1", If_Range=since)[0] == wanted


def test_directories_as_tar(peer: OldPeer) -> None:
    status, headers, body = ask(peer, "cache/s-t01000-7")
    assert (status, headers["content-type"]) == (200, "application/x-tar")
    closed = body.endswith(bytes(1024))
    assert closed is (peer.era == "curio")
    with tarfile.open(fileobj=io.BytesIO(body + bytes(2048))) as archive:
        found = {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]
    lost = {"sc-02-data-tree-c.dat"} if closed else set()
    assert found == {name: data for name, data in COMPLETE.items() if name not in lost}
    assert list(found) == sorted(found)
    minimal = ask(peer, "cache/s-t01000-7?mincache")[2]
    assert (len(minimal) < len(body)) is closed
    ranged = ask(peer, "cache/s-t01000-7", Range="bytes=0-0")[0]
    assert ranged == of(peer, sector_storage=200, lotus=500, curio=500)


def test_whether_a_range_is_unsealed(peer: OldPeer) -> None:
    def allocated(number: int, proof: int, offset: int, size: int) -> int:
        return ask(peer, f"unsealed/s-t01000-{number}/{proof}/allocated/{offset}/{size}")[0]

    if peer.era == "sector-storage":
        assert allocated(7, 0, 0, 2032) == 404
        return
    assert [allocated(7, 0, 0, 2032), allocated(8, 0, 0, 2032), allocated(8, 0, 0, 1016)] == [
        200,
        416,
        200,
    ]
    assert [allocated(7, 20, 0, 127), allocated(7, 1, 0, 127), allocated(9, 0, 0, 127)] == [500] * 3


def test_space_and_removal(peer: OldPeer) -> None:
    status, headers, body = ask(peer, f"stat/{peer.storage}")
    assert (status, headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert (b"FSAvailable" in body) is (peer.era != "sector-storage")
    assert ask(peer, "stat/another")[::2] == (404, b"")
    keep = f"sealed/s-t01000-7?keep=another.{peer.storage}"
    kept = ask(peer, keep, method="DELETE")[0] == 200 and (peer.root / "sealed/s-t01000-7").exists()
    assert kept is (peer.era != "sector-storage")  # which knows no list of what to keep
    assert ask(peer, "unsealed/s-t01000-7", method="DELETE")[0] == 200
    assert not (peer.root / "unsealed/s-t01000-7").exists()
    assert ask(peer, "unsealed/s-t01000-7", method="DELETE")[0] == 500


def test_proofs_and_stash(peer: OldPeer) -> None:
    post = {name: ask(peer, f"vanilla/{name}", method="POST")[0] for name in ("single", "snap")}
    assert post == of(
        peer,
        sector_storage={"single": 405, "snap": 405},
        lotus={"single": 500, "snap": 405},
        curio={"single": 500, "snap": 500},
    )
    one = "0f0e0d0c-0b0a-4908-8706-050403020100"
    (peer.root / "stash").mkdir()
    put(peer.root / f"stash/{one}.tmp", b"stashed")
    first = of(peer, sector_storage=500, lotus=500, curio=200)
    assert ask(peer, f"stash/{one}")[0] == first
    assert ask(peer, f"stash/{one}")[0] == 500
    assert ask(peer, "stash/none")[0] == of(peer, sector_storage=500, lotus=500, curio=400)


def test_a_failing_disk_ends_a_body_without_a_word(peer: OldPeer) -> None:
    peer.fault = ends_after(1000)
    if peer.era == "sector-storage":
        assert ask(peer, "sealed/s-t01000-7")[::2] == (200, SEALED[:1000])
    else:
        with pytest.raises(http.client.IncompleteRead):
            ask(peer, "sealed/s-t01000-7")
    assert len(ask(peer, "cache/s-t01000-7")[2]) == 1000


@pytest.mark.parametrize("era", ERAS)
def test_odd_names_end_a_scan(tmp_path: Path, era: Era) -> None:
    write_directory(tmp_path / "node/cache/s-t01000-7", FINALIZED)
    os.makedirs(tmp_path / "node/sealed/lost+found")
    with pytest.raises(ValueError, match="parse sector id"), old_peers(tmp_path, {"node": era}):
        pass
