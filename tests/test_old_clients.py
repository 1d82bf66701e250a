"""The fetch clients of lotus and Curio against a node of ours, request by request, as they are."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sectorfs.wire import tokens
from sectorfs.wire.messages import Limits
from tests.cluster import Node, cluster
from tests.cluster_fixtures import OLD_NS, configure, noise, put, rescan
from tests.old_clients import (
    CURIO,
    ERAS,
    LOTUS,
    Era,
    FetchClient,
    GoClient,
    Refused,
    join_url,
    media_type,
    spell_request,
)
from tests.old_tar import KNOWN, headers

SECTOR = "s-t01000-7"
SIZE = 2048
PROOF = 5
"""Of sectors of 2 KiB."""
FINALIZED = {"p_aux": 64, "sc-02-data-tree-r-last.dat": 32, "t_aux": 317}
LAYERS = {"sc-02-data-layer-1.dat": SIZE, "sc-02-data-layer-2.dat": SIZE}
TREES = {"sc-02-data-tree-c.dat": 2336, "sc-02-data-tree-d.dat": 4064}
BESIDE = {"batch.json": 20, "commit-phase1-output": 3000}
ODD = {"syn-porep-vanilla-proofs.dat": 500}
CONTENTS: dict[str, dict[str, int]] = {
    "cache/s-t01000-7": FINALIZED,
    "cache/s-t01000-8": {**FINALIZED, **LAYERS, **TREES, **BESIDE, **ODD},
    "update-cache/s-t01000-7": {**FINALIZED, "snap-vproof.json": 90},
}
"""Files of directories with their sizes."""
REGULAR = {
    "unsealed/s-t01000-7": SIZE,
    "sealed/s-t01000-7": SIZE,
    "update/s-t01000-7": SIZE,
    "piece/s-t00-42": 127 * 9,
    "key/s-t01000-7": SIZE,
    "sealed/s-t01000-9": 3_000_000,
    "sealed/s-t01000-10": 0,
}
PARTIAL = "unsealed/s-t01000-8"
"""With a trailer that says: the first half is there."""
TRAILER = bytes.fromhex("04100103000000")


class Site:
    """A node, what it serves, and tokens for it."""

    def __init__(self, node: Node, disk: Path) -> None:
        self.node = node
        self.disk = disk
        api = node.repo.api()
        assert api is not None
        self.base = f"{api}/remote"
        self.rpc = f"{api}/rpc/v0"
        self.storage = next(
            one["storage"] for one in node.json("storage", "list") if one["path"] == str(disk)
        )
        self._clients: list[GoClient] = []

    def token(self, *permissions: str) -> str:
        return tokens.sign(self.node.repo.secret(create=False), permissions)

    def url(self, name: str) -> str:
        return join_url(self.base, name)

    def connect(self, token: str | None = None) -> GoClient:
        """A client with a node's own token, or another."""
        self._clients.append(GoClient(self.token("admin") if token is None else token))
        return self._clients[-1]

    def client(self, era: Era, token: str | None = None) -> FetchClient:
        return FetchClient(era, self.connect(token))

    def leave(self) -> None:
        """Close the connections of all clients."""
        while self._clients:
            self._clients.pop().close()

    def held(self, name: str) -> bytes | dict[str, bytes]:
        return found(self.disk / name)


def found(path: Path) -> bytes | dict[str, bytes]:
    """A file's bytes, or those of a directory's files by name."""
    if path.is_dir():
        return {entry.name: entry.read_bytes() for entry in sorted(path.iterdir())}
    return path.read_bytes()


def fill(disk: Path) -> None:
    for name, size in REGULAR.items():
        put(disk / name, noise(name, size))
    put(disk / PARTIAL, noise(PARTIAL, SIZE) + TRAILER)
    for name, members in CONTENTS.items():
        for member, size in members.items():
            put(disk / name / member, noise(f"{name}/{member}", size))
        (disk / name / "sub").mkdir()
        put(disk / name / "sub/p_aux", b"of no sector")
        os.utime(disk / name, ns=(OLD_NS, OLD_NS))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("old-clients")
    with cluster(root, "node") as (node,):
        configure(node)
        node.start()
        disk = node.disk()
        fill(disk)
        rescan(node)
        yield Site(node, disk)
        assert "Traceback" not in node.log()


@pytest.fixture(autouse=True)
def leave(site: Site) -> Iterator[None]:
    yield
    site.leave()


@pytest.fixture(params=ERAS, ids=lambda era: era.name)
def client(request: pytest.FixtureRequest, site: Site) -> FetchClient:
    return site.client(request.param)


# --- the bytes themselves ---


def test_requests_are_spelled_as_go_does() -> None:
    auth = {"Authorization": "Bearer x.y.z"}
    assert spell_request("GET", "http://10.0.0.5:8480/remote/sealed/s-t01000-7", auth) == (
        b"GET /remote/sealed/s-t01000-7 HTTP/1.1\r\n"
        b"Host: 10.0.0.5:8480\r\n"
        b"User-Agent: Go-http-client/1.1\r\n"
        b"Authorization: Bearer x.y.z\r\n"
        b"Accept-Encoding: gzip\r\n\r\n"
    )
    ranged = {**auth, "Range": "bytes=0-2047"}
    assert spell_request("GET", "http://h/remote/unsealed/s-t01000-7", ranged) == (
        b"GET /remote/unsealed/s-t01000-7 HTTP/1.1\r\n"
        b"Host: h\r\n"
        b"User-Agent: Go-http-client/1.1\r\n"
        b"Authorization: Bearer x.y.z\r\n"
        b"Range: bytes=0-2047\r\n\r\n"
    )
    kinds = {**auth, "Content-Type": "application/json"}
    assert spell_request("POST", "http://h/rpc/v0", kinds, b"{}") == (
        b"POST /rpc/v0 HTTP/1.1\r\n"
        b"Host: h\r\n"
        b"User-Agent: Go-http-client/1.1\r\n"
        b"Content-Length: 2\r\n"
        b"Authorization: Bearer x.y.z\r\n"
        b"Content-Type: application/json\r\n"
        b"Accept-Encoding: gzip\r\n\r\n{}"
    )
    gone = spell_request("DELETE", "http://h/remote/cache/s-t01000-7?keep=a.b", auth)
    assert gone.startswith(b"DELETE /remote/cache/s-t01000-7?keep=a.b HTTP/1.1\r\nHost: h\r\n")


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("http://h:1/remote", "http://h:1/remote/stat/x"),
        ("http://h:1/remote/", "http://h:1/remote/stat/x"),
        ("http://h:1//remote", "http://h:1/remote/stat/x"),
        ("http://h:1", "http://h:1/stat/x"),
        ("http://h:1/remote?a=b", "http://h:1/remote/stat/x?a=b"),
    ],
)
def test_urls_are_joined_as_go_does(base: str, url: str) -> None:
    assert join_url(base, "stat", "x") == url


@pytest.mark.parametrize("text", ["", ";", "a b", "application/x-tar; x", "a/b/c"])
def test_what_is_no_media_type_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="media"):
        media_type(text)


# --- whole files ---


def test_every_file_is_fetched(site: Site, client: FetchClient, tmp_path: Path) -> None:
    names = [name for name in REGULAR if name.split("/")[0] in client.era.types]
    for name in names:
        client.fetch(site.url(name), tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == site.held(name), name
    assert client.http.connections == 1


def test_directories_are_fetched_without_what_the_client_would_refuse(
    site: Site, client: FetchClient, tmp_path: Path
) -> None:
    names = [name for name in CONTENTS if name.split("/")[0] in client.era.types]
    for name in names:
        client.fetch(site.url(name), tmp_path / "out")
        known = [member for member in CONTENTS[name] if member in KNOWN]
        assert found(tmp_path / "out") == {
            member: (site.disk / name / member).read_bytes() for member in sorted(known)
        }
    assert client.http.connections == 1


def test_a_file_takes_the_place_of_a_directory(site: Site, tmp_path: Path) -> None:
    client = site.client(LOTUS)
    client.fetch(site.url("cache/s-t01000-7"), tmp_path / "out")
    client.fetch(site.url("sealed/s-t01000-7"), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == site.held("sealed/s-t01000-7")


def test_the_finalized_part_is_fetched(site: Site, tmp_path: Path) -> None:
    client = site.client(CURIO)
    for name in CONTENTS:
        client.fetch_minimal(site.url(name), tmp_path / "out")
        got = found(tmp_path / "out")
        assert isinstance(got, dict)
        assert got.keys() >= FINALIZED.keys()
        assert not got.keys() & {*LAYERS, *TREES, *BESIDE, *ODD}


def test_a_layer_beyond_8_gib_has_a_size_that_go_reads(site: Site) -> None:
    client = site.client(CURIO)
    layer = site.disk / "cache/s-t01000-11/sc-02-data-layer-1.dat"
    layer.parent.mkdir()
    with layer.open("wb") as stream:
        stream.truncate(32 << 30)
    with client.http.do("GET", site.url("cache/s-t01000-11")) as answer:
        first = next(headers(answer.read))
    assert (first.name, first.size) == (layer.name, 32 << 30)
    layer.unlink()
    layer.parent.rmdir()


def test_a_file_larger_than_it_can_be_is_sent_and_refused(site: Site, tmp_path: Path) -> None:
    put(site.disk / "cache/s-t01000-12/p_aux", bytes(65))
    client = site.client(CURIO)
    with pytest.raises(Refused, match="'p_aux' is bigger than expected"):
        client.fetch(site.url("cache/s-t01000-12"), tmp_path / "out")
    site.client(LOTUS).fetch(site.url("cache/s-t01000-12"), tmp_path / "out")
    assert found(tmp_path / "out") == {"p_aux": bytes(65)}
    (site.disk / "cache/s-t01000-12/p_aux").unlink()
    (site.disk / "cache/s-t01000-12").rmdir()


@pytest.mark.parametrize(
    "name",
    [
        "sealed/s-t01000-99",
        "cache/s-t01000-99",
        "sealed/s-f01000-7",
        "sealed/s-t01000-7.tmp",
        "sealed/fetching",
        "unknown/s-t01000-7",
        "stash/01234567-89ab-cdef-0123-456789abcdef",
    ],
)
def test_what_is_not_here_is_an_error_at_once(
    site: Site, client: FetchClient, tmp_path: Path, name: str
) -> None:
    with pytest.raises(Refused, match="non-200 code: 404"):
        client.fetch(site.url(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- ranges ---


@pytest.mark.parametrize("era", [LOTUS, CURIO], ids=lambda era: era.name)
@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 128), (128, 1024), (1024, 1024), (0, SIZE), (1024, 0), (0, 0), (1024, 4096), (2047, 9999)],
)
def test_ranges_are_read(site: Site, era: Era, offset: int, size: int) -> None:
    client = site.client(era)
    data = site.held("unsealed/s-t01000-7")
    assert isinstance(data, bytes)
    end = offset + size if size else SIZE
    with client.read(site.url("unsealed/s-t01000-7"), offset, size) as read:
        assert b"".join(iter(lambda: read(100), b"")) == data[offset:end]


def test_a_range_that_overshoots_is_left_when_the_reader_has_enough(site: Site) -> None:
    client = site.client(CURIO)
    data = site.held("sealed/s-t01000-9")
    assert isinstance(data, bytes)
    for offset in range(0, len(data), 300_000):
        # The end of the window is passed for its size.
        with client.read(site.url("sealed/s-t01000-9"), offset, offset + 128) as read:
            got = read(128)
            while len(got) < 128:
                got += read(128 - len(got))
            assert got == data[offset : offset + 128]
    client.fetch(site.url("sealed/s-t01000-7"), site.node.root / "after")


@pytest.mark.parametrize("name", ["unsealed/s-t01000-7", "cache/s-t01000-7"])
def test_a_range_outside_a_file_and_of_a_directory_is_an_error(site: Site, name: str) -> None:
    client = site.client(CURIO)
    with pytest.raises(Refused, match="non-200 code: 416"):
        with client.read(site.url(name), SIZE, 128):
            raise AssertionError("it was read")


# --- what is allocated ---


@pytest.mark.parametrize("era", [LOTUS, CURIO], ids=lambda era: era.name)
@pytest.mark.parametrize(
    ("name", "offset", "size", "there"),
    [
        (PARTIAL, 0, 1016, True),
        (PARTIAL, 0, 127, True),
        (PARTIAL, 889, 127, True),
        (PARTIAL, 0, 2032, False),
        (PARTIAL, 1016, 127, False),
        ("unsealed/s-t01000-7", 0, 2032, True),
        ("unsealed/s-t01000-7", 1905, 127, True),
    ],
)
def test_what_is_allocated(
    site: Site, era: Era, name: str, offset: int, size: int, there: bool
) -> None:
    client = site.client(era)
    for proof in (0, PROOF, 10, 15):
        assert client.allocated(site.url(name), proof, offset, size) is there
    assert client.http.connections == 1


@pytest.mark.parametrize(
    ("name", "proof"),
    [
        ("sealed/s-t01000-7", PROOF),
        ("unsealed/s-t01000-99", PROOF),
        ("unsealed/s-t01000-7", 20),
        ("unsealed/s-t01000-7", 8),
    ],
)
def test_whether_something_else_is_allocated_is_an_error(site: Site, name: str, proof: int) -> None:
    with pytest.raises(Refused, match="unexpected http response: 4"):
        site.client(CURIO).allocated(site.url(name), proof, 0, 127)


# --- space, proofs ---


@pytest.mark.parametrize("suffix", ["", "/"])
def test_the_space_of_a_storage(site: Site, client: FetchClient, suffix: str) -> None:
    found = client.stat(site.base + suffix, site.storage)
    assert found is not None
    assert found["Capacity"] >= found["Available"] > 0
    assert set(found) == (
        {"Capacity", "Available", "Reserved", "FSAvailable", "Max", "Used"}
        if client.era.modern
        else {"Capacity", "Available", "Reserved"}
    )


@pytest.mark.parametrize("storage", ["01234567-89ab-cdef-0123-456789abcdef", "x y", "a.b"])
def test_a_storage_of_another_node_is_not_found(
    site: Site, client: FetchClient, storage: str
) -> None:
    assert client.stat(site.base, storage.replace(" ", "%20")) is None


@pytest.mark.parametrize("kind", ["single", "porep", "snap"])
def test_proofs_are_for_another_node_to_make(site: Site, kind: str) -> None:
    client = site.client(CURIO)
    question = {
        "Miner": 1000,
        "Sector": {
            "SealProof": PROOF,
            "SectorNumber": 7,
            "SealedCID": {"/": "bagboea4b5abcatlxechwbp7kjpjguna6r6q7ejrhe6mdp3lf34pmswn27pkkiekz"},
            "Challenge": [1, 2],
            "Update": False,
        },
        "ProofType": PROOF,
    }
    assert client.prove(site.base, kind, question) is None
    client.fetch(site.url("sealed/s-t01000-7"), site.node.root / "after")


# --- who may ask ---


@pytest.mark.parametrize("allow", [("admin",), ("read", "write", "sign", "admin")])
def test_tokens_of_nodes_and_of_their_command_lines(
    site: Site, tmp_path: Path, allow: tuple[str, ...]
) -> None:
    client = site.client(CURIO, site.token(*allow))
    client.fetch(site.url("sealed/s-t01000-7"), tmp_path / "out")
    assert client.stat(site.base, site.storage)


def test_a_token_in_the_query(site: Site) -> None:
    client = site.connect("")
    url = site.url("sealed/s-t01000-7")
    with client.do("GET", f"{url}?token={site.token('admin')}") as answer:
        assert (answer.status, answer.all()) == (200, site.held("sealed/s-t01000-7"))
    cache = site.url("cache/s-t01000-7")
    with client.do("GET", f"{cache}?mincache&token={site.token('admin')}") as answer:
        assert answer.status == 200
        answer.all()
    assert client.connections == 1


@pytest.mark.parametrize(
    "token", ["", "nonsense", tokens.sign(tokens.Secret(bytes(32)), ["admin"])]
)
def test_others_are_told_401(site: Site, client: FetchClient, tmp_path: Path, token: str) -> None:
    other = site.client(client.era, token)
    with pytest.raises(Refused, match="non-200 code: 401"):
        other.fetch(site.url("sealed/s-t01000-7"), tmp_path / "out")
    with pytest.raises(Refused, match="non-200 code: 401"):
        other.delete(site.url("sealed/s-t01000-7"), ["x"])
    assert (site.disk / "sealed/s-t01000-7").exists()


# --- connections ---


def test_requests_one_after_the_other_keep_their_connection(site: Site, tmp_path: Path) -> None:
    client = site.client(CURIO)
    for number in range(50):
        client.fetch(site.url("sealed/s-t01000-7"), tmp_path / "out")
        client.fetch_minimal(site.url("cache/s-t01000-7"), tmp_path / "out")
        assert client.allocated(site.url(PARTIAL), PROOF, 0, 1016)
        assert not client.allocated(site.url(PARTIAL), PROOF, 0, 2032)
        assert client.stat(site.base, site.storage), number
    assert client.http.connections == 1


def test_the_client_is_the_first_to_close_an_idle_connection() -> None:
    """After 90 s. Go does not send a request again that met the end of its connection."""
    assert Limits().idle > 90


def test_requests_in_pieces_and_in_one_piece(site: Site) -> None:
    auth = {"Authorization": f"Bearer {site.token('admin')}"}
    request = spell_request("GET", site.url("sealed/s-t01000-7"), auth)
    whole = site.held("sealed/s-t01000-7")
    assert isinstance(whole, bytes)
    where = urlsplit(site.base)
    with socket.create_connection((where.hostname, where.port), 10) as connection:
        for byte in request:
            connection.sendall(bytes([byte]))
        connection.sendall(request + request)
        connection.shutdown(socket.SHUT_WR)
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    assert data.count(b"HTTP/1.1 200 OK\r\n") == data.count(whole) == 3
