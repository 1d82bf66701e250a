"""A node's edges: what it refuses at its start, how it stops, what it says over HTTP."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from sectorfs import __version__
from sectorfs.fuse import mounts
from sectorfs.wire import tokens
from tests.cluster import SECTORFS, Node, cluster, run, until, write
from tests.cluster_fixtures import configure

pytestmark = pytest.mark.mount


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node, not started."""
    with cluster(tmp_path, "node") as [found]:
        configure(found)
        yield found


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Node]]:
    """Two nodes, not started."""
    with cluster(tmp_path, "first", "second") as nodes:
        for found in nodes:
            configure(found)
        yield nodes


def refused(node: Node, code: int, *words: str, verb: tuple[str, ...] = ("serve",)) -> float:
    """A start that fails with one line holding these words; returns the seconds it took."""
    begin = time.monotonic()
    listen = () if "--listen" in verb else ("--listen", "127.0.0.1:0")
    result = run(*verb, *listen, repo=node.repo.root)
    took = time.monotonic() - begin
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("sectorfs: "), result.stderr
    for word in words:
        assert word in last, last
    assert node.repo.holder() is None
    assert not (node.repo.root / "api").exists()
    return took


def mount_verb(path: Path) -> tuple[str, ...]:
    return ("mount", str(path))


# --- an Index that is none ---


class Page(http.server.BaseHTTPRequestHandler):
    """Answers everything with a web page."""

    code = 200

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        page = b"<html><body>It works!</body></html>"
        self.send_response(self.code)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def web_server(code: int) -> Iterator[str]:
    """A web server that is no Index; its URL."""
    handler = type("Handler", (Page,), {"code": code})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/rpc/v0"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "code", "word"),
    [
        (200, 5, "JSON-RPC"),
        (404, 5, "JSON-RPC (HTTP 404)"),
        (500, 5, "JSON-RPC (HTTP 500)"),
        (401, 6, "copy the secret file from the index node"),
        (403, 6, "permission"),
    ],
)
def test_web_server_is_no_index(node: Node, status: int, code: int, word: str) -> None:
    node.repo.secret(create=True)
    with web_server(status) as url:
        refused(node, code, url, word, verb=("serve", "--index", url))
        listed = run("storage", "list", repo=node.repo.root)
        assert listed.returncode == 0, "the flag was for the node only"
        configure(node, index={"url": url})
        listed = run("storage", "list", "--json", repo=node.repo.root)
        assert listed.returncode == code
        assert url in json.loads(listed.stderr)["thing"]


def test_missing_secret_with_a_remote_index(node: Node) -> None:
    verb = ("serve", "--index", "http://127.0.0.1:1/rpc/v0")
    refused(node, 2, str(node.repo.root / "secret"), "copy it from the index node", verb=verb)
    assert not (node.repo.root / "secret").exists()


def test_secret_of_another_cluster(pair: list[Node]) -> None:
    first, second = pair
    first.start()
    second.repo.secret(create=True)
    url = f"{first.repo.api()}/rpc/v0"
    refused(second, 6, url, "copy the secret file", verb=("serve", "--index", url))
    assert first.alive()
    assert first.json("status")["storages"]


def test_token_that_may_only_read_cannot_be_a_nodes(pair: list[Node]) -> None:
    first, second = pair
    first.start()
    (second.repo.root / "secret").write_bytes((first.repo.root / "secret").read_bytes())
    token = first.call("auth", "create-token", "--perm", "read")
    (second.repo.root / "reader").write_text(token)
    url = f"{first.repo.api()}/rpc/v0"
    configure(second, index={"url": url, "token_file": "reader"})
    result = run(
        "storage", "attach", str(second.root / "d"), "--init", "--store", repo=second.repo.root
    )
    assert (result.returncode, "Traceback" in result.stderr) == (6, False), result.stderr
    assert "permission" in result.stderr.splitlines()[-1]


# --- a repo, a port, an address ---


def test_second_node_on_one_repo_names_the_first(node: Node) -> None:
    node.start()
    result = run("serve", "--listen", "127.0.0.1:0", repo=node.repo.root)
    assert result.returncode == 4
    [line] = result.stderr.splitlines()
    assert f"process {node.pid()}" in line
    assert str(node.repo.root) in line
    assert node.json("status")["pid"] == node.pid()


def test_taken_port(pair: list[Node]) -> None:
    first, second = pair
    first.start()
    taken = str(first.repo.api()).removeprefix("http://")
    refused(second, 4, taken, "in use", "--listen", verb=("serve", "--listen", taken))
    assert first.alive()


@pytest.mark.parametrize(
    "listen", ["a..b:0", f"{'a' * 70}.b:0", "no-such-host.invalid:0", "192.0.2.1:0"]
)
def test_address_that_is_not_ours(node: Node, listen: str) -> None:
    refused(node, 4, listen, "cannot listen", verb=("serve", "--listen", listen))


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", ":0"])
def test_wildcard_needs_an_advertised_url(node: Node, listen: str) -> None:
    refused(node, 2, "--advertise", verb=("serve", "--listen", listen))
    node.start("--listen", listen, "--advertise", "http://127.0.0.9:8480/")
    assert str(node.repo.api()).startswith(("http://127.0.0.1:", "http://[::1]:"))
    node.disk()
    urls = {url for storage in node.json("storage", "list") for url in storage["urls"]}
    assert urls == {"http://127.0.0.9:8480/remote"}


def test_node_comes_up_without_a_path_that_cannot_be_attached(node: Node) -> None:
    """One damaged path, one that is away, one twice: each is told, the others serve."""
    good, damaged, away, twin = (node.root / name for name in ("good", "damaged", "away", "twin"))
    for path in (good, damaged, away):
        node.call("storage", "attach", str(path), "--init", "--store")
    twin.mkdir()
    (twin / "sectorstore.json").write_bytes((good / "sectorstore.json").read_bytes())
    (damaged / "sectorstore.json").write_text("{")
    away.rename(node.root / "elsewhere")
    listed = json.loads(node.repo.storage_json.read_text())
    listed["StoragePaths"].append({"Path": str(twin)})
    node.repo.storage_json.write_text(json.dumps(listed))
    node.start()
    problems = [one for one in node.json("status")["problems"] if "not attached" in one]
    assert len(problems) == 3
    for word in (str(damaged / "sectorstore.json"), str(away), f"{twin}: storage"):
        assert word in " ".join(problems)
    assert f"is attached from {good} (detach that first)" in " ".join(problems)
    attached = [item["path"] for item in node.json("storage", "list") if item["can_store"]]
    assert set(attached) & {str(good), str(twin)} == {str(good)}
    assert (damaged / "sectorstore.json").read_text() == "{"
    assert json.loads(node.repo.storage_json.read_text()) == listed
    (node.root / "elsewhere").rename(away)
    until("the lost path", lambda: str(away) not in " ".join(node.json("status")["problems"]))


# --- mount points ---


def test_mount_point_that_is_none(node: Node) -> None:
    (node.root / "file").touch()
    refused(node, 32, "file", "not a directory", verb=mount_verb(node.root / "file"))
    refused(node, 32, "none", "create the directory", verb=mount_verb(node.root / "none"))


def test_mount_point_that_is_not_empty_shows_its_files_again(node: Node) -> None:
    node.mountpoint.mkdir()
    (node.mountpoint / "mine").write_text("still here")
    node.start(mount=True)
    assert sorted(os.listdir(node.mountpoint)) == ["cache", "sealed", "unsealed"]
    assert node.stop() == 0
    assert (node.mountpoint / "mine").read_text() == "still here"


def test_mount_point_of_another_node(pair: list[Node]) -> None:
    first, second = pair
    first.start(mount=True)
    verb = mount_verb(first.mountpoint)
    refused(second, 4, str(first.mountpoint), "sectorfs umount", verb=verb)
    assert "sealed" in os.listdir(first.mountpoint)
    first.kill()
    second.mountpoint = first.mountpoint
    second.start(mount=True)
    assert "sealed" in os.listdir(second.mountpoint)


def test_mount_point_of_something_else(node: Node) -> None:
    node.mountpoint.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(node.mountpoint)], check=True)
    try:
        refused(node, 4, str(node.mountpoint), "tmpfs", verb=mount_verb(node.mountpoint))
        assert mounts.find_mount(node.mountpoint) is not None
    finally:
        subprocess.run(["umount", str(node.mountpoint)], check=True)


def test_mount_that_would_hide_its_own_node(node: Node) -> None:
    refused(node, 4, str(node.root), str(node.repo.root), verb=mount_verb(node.root))
    refused(node, 4, "would hide", verb=mount_verb(node.repo.root))
    link = node.root / "link"
    link.symlink_to(node.root)
    refused(node, 4, "would hide", verb=mount_verb(link))
    path = node.root / "disks" / "one"
    node.call("storage", "attach", str(path), "--init", "--store")
    refused(node, 4, str(path), "would hide", verb=mount_verb(path.parent))
    (path / "sectors").mkdir()
    refused(node, 4, str(path), "lies inside", verb=mount_verb(path / "sectors"))
    (node.repo.root / "cache").mkdir(exist_ok=True)
    refused(node, 4, "lies inside", verb=mount_verb(node.repo.root / "cache" / "x"))


def test_mount_options(node: Node) -> None:
    node.start("-o", "ro,noatime,x-systemd.automount,uid=7,gid=8", mount=True)
    shown = (node.mountpoint / "sealed").stat()
    assert (shown.st_uid, shown.st_gid) == (7, 8)
    status = node.json("status")
    assert (status["mount"]["path"], status["mount"]["mode"]) == (str(node.mountpoint), "ro")


# --- in the background ---


def test_daemon_returns_when_the_mount_answers(node: Node) -> None:
    node.mountpoint.mkdir()
    command = ("mount", str(node.mountpoint), "--daemon", "--listen", "127.0.0.1:0")
    try:
        result = run(*command, repo=node.repo.root)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert sorted(os.listdir(node.mountpoint)) == ["cache", "sealed", "unsealed"]
        pid = node.json("status")["pid"]
        assert os.getsid(pid) == pid
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        assert "is ready" in node.repo.log.read_text()
        assert node.repo.log.stat().st_mode & 0o777 == 0o600
        again = run(*command, repo=node.repo.root)
        assert again.returncode == 4
        assert f"process {pid}" in again.stderr
        assert len(again.stderr.splitlines()) == 1
        ended = run("umount", str(node.mountpoint), "--json", repo=node.repo.root)
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["unmounted"] == str(node.mountpoint)
        assert mounts.find_mount(node.mountpoint) is None
        assert node.repo.holder() is None
    finally:
        run("umount", str(node.mountpoint), repo=node.repo.root)


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--listen", "192.0.2.1:0"], 4, "192.0.2.1:0"),
        (["-o", "rw"], 2, "rw"),
        ([], 32, "nowhere"),
    ],
)
def test_daemon_passes_on_what_failed(node: Node, options: list[str], code: int, word: str) -> None:
    node.repo.secret(create=True)
    target = "nowhere" if not options else "."
    listen = [] if "--listen" in options else ["--listen", "127.0.0.1:0"]
    command = ["mount", str(node.root / "m" / target), "--daemon", *options, *listen]
    (node.root / "m").mkdir()
    result = run(*command, repo=node.repo.root)
    assert result.returncode == code, result.stderr
    [line] = result.stderr.splitlines()
    assert line.startswith("sectorfs")
    assert word in line
    as_json = run(*command, "--json", repo=node.repo.root)
    assert as_json.returncode == code
    assert set(json.loads(as_json.stderr)) == {"error", "thing", "hint"}
    assert node.repo.holder() is None


def test_daemon_that_ends_without_a_word(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from pathlib import Path\nimport os, sys\n"
        "from sectorfs.cli.background import StartFailed, in_background\n"
        "def work(ready):\n    raise KeyError('lost')\n"
        "try:\n    in_background(Path(sys.argv[1]), work)\n"
        "except StartFailed as exc:\n    print(exc.exit_code, exc)\n"
    )
    log = node.root / "log"
    said = subprocess.run(
        [SECTORFS[0], "-c", code, str(log)], capture_output=True, text=True, check=True
    )
    assert said.stdout == f"1 {log}: node ended without a word (see the log)\n"
    assert "KeyError: 'lost'" in log.read_text()


# --- the end ---


@pytest.mark.parametrize("verb", ["serve", "mount"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_is_clean(node: Node, verb: str, number: signal.Signals) -> None:
    node.start(mount=verb == "mount")
    write(node.disk() / "sealed" / "s-t01000-1", b"x")
    begin = time.monotonic()
    node.send(number)
    assert node.process is not None
    assert node.process.wait(30) == 0
    assert time.monotonic() - begin < 5
    assert "Traceback" not in node.log()
    assert f"{number.name}: stopping" in node.log()
    assert not (node.repo.root / "api").exists()
    assert mounts.find_mount(node.mountpoint) is None
    assert node.repo.holder() is None
    assert run("status", repo=node.repo.root).returncode == 5


def test_unmount_by_others_ends_the_node(node: Node) -> None:
    node.start(mount=True)
    subprocess.run(["umount", str(node.mountpoint)], check=True)
    assert node.process is not None
    assert node.process.wait(30) == 0
    assert not (node.repo.root / "api").exists()
    assert "Traceback" not in node.log()


def test_killed_node_counts_as_none_and_its_repo_is_free(node: Node) -> None:
    node.start()
    api = node.repo.api()
    node.kill()
    assert (node.repo.root / "api").read_text() == f"{api}\n"
    result = run("status", "--json", repo=node.repo.root)
    assert (result.returncode, json.loads(result.stdout)) == (5, {"running": False})
    node.call("storage", "list")
    node.start()
    assert node.repo.api() != api


# --- HTTP ---


def ask(
    url: str, token: str | None = None, body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, lower(answer.headers), answer.read()
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.code, lower(answer.headers), answer.read()


def lower(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def call(api: str, token: str | None, method: str, *params: Any) -> int:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
    return ask(f"{api}/rpc/v0", token, body.encode())[0]


def own_address() -> str | None:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") else address


def test_health_metrics_and_status_page(node: Node) -> None:
    node.start()
    api = str(node.repo.api())
    code, headers, body = ask(f"{api}/health")
    assert (code, headers["content-type"]) == (200, "application/json")
    assert json.loads(body)["version"] == __version__
    code, headers, body = ask(f"{api}/metrics")
    assert code == 200
    assert headers["content-type"].startswith("text/plain")
    assert b"sectorfs_index_connected 1.0" in body
    code, _, body = ask(f"{api}/")
    assert code == 200
    assert __version__.encode() in body
    assert ask(f"{api}/nonsense")[0] == 404


def test_metrics_off_loopback_need_a_token(node: Node) -> None:
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    node.start("--listen", f"{address}:0")
    api = str(node.repo.api())
    reader = node.call("auth", "create-token", "--perm", "read").strip()
    assert ask(f"{api}/health")[0] == 200
    for path in ("/metrics", "/"):
        assert ask(f"{api}{path}")[0] == 401
        assert ask(f"{api}{path}", reader)[0] == 200


def test_tokens_open_what_they_say(node: Node) -> None:
    node.start()
    path = node.disk()
    write(path / "sealed" / "s-t01000-1", b"sealed")
    api = str(node.repo.api())
    file = f"{api}/remote/sealed/s-t01000-1"
    reader = node.call("auth", "create-token", "--perm", "read", "--expires", "1h").strip()
    admin = (node.repo.root / "token").read_text().strip()
    secret = node.repo.secret(create=False)
    expired = tokens.sign(secret, ("admin",), expires_seconds=-1)
    forged = tokens.sign(tokens.new_secret(), ("admin",))
    until("the file", lambda: ask(file, reader)[0] == 200)
    assert ask(file, reader)[2] == ask(file, admin)[2] == b"sealed"
    for wrong in (None, "", "x", expired, forged):
        assert ask(file, wrong)[0] == 401
        assert call(api, wrong, "Sectorfs.NodeStatus") == 401
    assert b"expired" in ask(file, expired)[2]
    assert call(api, reader, "Sectorfs.NodeStatus") == 200
    for method, params in (
        ("Sectorfs.NodeDetach", (str(path),)),
        ("Filecoin.StorageDetachLocal", (str(path),)),
        ("Filecoin.StorageDropSector", ()),
    ):
        assert call(api, reader, method, *params) == 403
    assert [item["path"] for item in node.json("storage", "list") if item["can_store"]] == [
        str(path)
    ]
