"""The command line: flags, output, exit codes, and what bad input gets for an answer."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from rich.console import Console

from sectorfs import __version__
from sectorfs.cli import main, output
from sectorfs.cli.context import run_async
from sectorfs.config import Config
from sectorfs.errors import BadInput, NotFound
from sectorfs.node import reports
from sectorfs.node.repo import Repo
from sectorfs.types import SectorID, parse_size
from sectorfs.wire import tokens
from tests.cluster import cluster, until, write, write_cache

STORAGE_KEYS = {
    *("storage", "path", "urls", "weight", "can_seal", "can_store", "max_storage", "groups"),
    *("allow_to", "allow_types", "deny_types", "allow_miners", "deny_miners"),
    *("capacity", "available", "fs_available", "reserved", "used"),
    *("healthy", "error", "last_heartbeat", "files", "nodes"),
}
FILE_KEYS = {"file_type", "size", "mtime_ns", "state", "locations"}
LOCATION_KEYS = {"storage", "primary", "urls", "path", "healthy", "digest"}
STATUS_KEYS = {
    *("running", "version", "pid", "repo", "api", "mount", "index", "storages", "files"),
    *("fetches", "scans", "hashing", "verifying", "scrubs", "problems"),
}
RFC3339 = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"

Say = Callable[..., "Said"]


class Said(msgspec.Struct):
    """What a command line came to."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repo:
    """A repo that commands find by the environment."""
    found = Repo(tmp_path / "repo")
    monkeypatch.setenv("SECTORFS_PATH", str(found.root))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return found


@pytest.fixture
def say(repo: Repo, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command line in this process: an exception that leaves it fails the test."""

    def call(*arguments: str) -> Said:
        code = main.run(arguments)
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return call


@pytest.fixture(params=["on the node", "on the directory"])
def way(request: pytest.FixtureRequest, repo: Repo, tmp_path: Path) -> Iterator[str]:
    """The repo with and without a running node."""
    with cluster(tmp_path, "repo") as [node]:
        if request.param == "on the node":
            node.start()
        yield request.param


def fine(said: Said) -> Said:
    """It went well, and quietly."""
    assert said.code == 0, said
    assert said.err == "", said
    return said


def refused(say: Say, arguments: Sequence[str], code: int, *words: str) -> None:
    """An error of one line with these words, and the same as an object with ``--json``."""
    said = say(*arguments)
    assert said.code == code, said
    lines = said.err.splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("sectorfs"), said
    for word in words:
        assert word in lines[0], said
    said = say(*arguments, "--json")
    assert said.code == code, said
    shape = json.loads(said.err)
    assert set(shape) == {"error", "thing", "hint"}
    assert shape["error"]
    assert shape["thing"]


def disk(path: Path, number: int = 7) -> Path:
    """A directory with sector files of all three types."""
    write(path / "sealed" / f"s-t01000-{number}", b"sealed" * 100)
    write(path / "unsealed" / f"s-t01000-{number}", b"")
    (path / "cache").mkdir()
    write_cache(path / "cache" / f"s-t01000-{number}", {"p_aux": b"a" * 64, "t_aux": b"b" * 10})
    return path


def listing(path: Path) -> dict[str, tuple[int, int]]:
    """Everything below a directory, with size and time."""
    return {
        str(found.relative_to(path)): (found.lstat().st_size, found.lstat().st_mtime_ns)
        for found in sorted(path.rglob("*"))
    }


# --- help and shared options ---


def commands(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, *path, name)


@pytest.mark.parametrize(
    ("path", "command"),
    [pytest.param(*found, id=" ".join(found[0]) or "-") for found in commands(main.sectorfs)],
)
def test_help_of_each_verb_has_an_example(
    say: Say, path: tuple[str, ...], command: click.Command
) -> None:
    said = fine(say(*path, "--help"))
    assert said.out == say(*path, "-h").out
    for option in ("--repo", "--json"):
        assert option in said.out
    if not isinstance(command, click.Group):
        assert f"Example: sectorfs {' '.join(path)}" in said.out


def test_every_verb_is_there() -> None:
    found = {" ".join(path) for path, command in commands(main.sectorfs)}
    assert found >= {
        *("mount", "serve", "umount", "status", "demo"),
        *(f"storage {verb}" for verb in ("attach", "detach", "redeclare", "list", "find")),
        *("auth create-token", "config check", "config show"),
    }


@pytest.mark.parametrize("arguments", [[], ["storage"], ["auth"], ["config"]])
def test_no_verb_shows_the_help(say: Say, arguments: list[str]) -> None:
    said = say(*arguments)
    assert said.code == 2
    assert said.out == ""
    assert "Commands:" in said.err


def test_both_ways_to_start_the_program_are_alike(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("sectorfs")
    for arguments in (["--version"], ["status", "--json"], ["storage", "find", "x"], ["x"]):
        results = [
            subprocess.run(
                [*start, "--repo", str(tmp_path), *arguments], capture_output=True, text=True
            )
            for start in ([str(program)], [sys.executable, "-m", "sectorfs"])
        ]
        assert results[0].returncode == results[1].returncode
        assert (results[0].stdout, results[0].stderr) == (results[1].stdout, results[1].stderr)
        assert "Traceback" not in results[0].stderr


def test_version(say: Say) -> None:
    assert fine(say("--version")).out == f"sectorfs, version {__version__}\n"


def test_repo_stands_before_or_after_the_verb_or_in_the_environment(
    say: Say, repo: Repo, tmp_path: Path
) -> None:
    other, third = tmp_path / "other", tmp_path / "third"

    def used(*arguments: str) -> str:
        shown: str = fine(say(*arguments)).json()["config"]
        return str(Path(shown).parent)

    assert used("config", "check", "--json") == str(repo.root)
    assert used("--repo", str(other), "config", "check", "--json") == str(other)
    assert used("config", "--repo", str(other), "check", "--json") == str(other)
    assert used("config", "check", "--json", "--repo", str(other)) == str(other)
    assert used("--repo", str(third), "--json", "config", "check", "--repo", str(other)) == str(
        other
    )


def test_repo_is_in_the_home_directory_by_default(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SECTORFS_PATH")
    shown = fine(say("config", "check", "--json")).json()
    assert shown == {"config": f"{tmp_path}/home/.sectorfs/config.toml", "ok": True}
    monkeypatch.setenv("SECTORFS_PATH", "")
    assert fine(say("config", "check", "--json")).json() == shown


@pytest.mark.parametrize("place", ["before", "after"])
def test_json_stands_before_or_after_the_verb(say: Say, place: str) -> None:
    arguments = ["storage", "list"]
    arguments.insert(0 if place == "before" else 2, "--json")
    assert fine(say(*arguments)).json() == []


# --- bad command lines and bad files ---

USAGE = [
    (["nonsense"], "No such command 'nonsense'"),
    (["storage", "nonsense"], "No such command 'nonsense'"),
    (["storage", "list", "--nonsense"], "No such option"),
    (["status", "extra"], "unexpected extra argument"),
    (["mount"], "MOUNTPOINT"),
    (["mount", ""], "an empty path"),
    (["umount", ""], "an empty path"),
    (["storage", "attach"], "PATH"),
    (["storage", "attach", ""], "an empty path"),
    (["storage", "attach", "bare", "--init"], "--seal"),
    (["storage", "attach", "bare", "--weight", "3"], "--init"),
    (["storage", "attach", "bare", "--store"], "--init"),
    (["storage", "attach", "bare", "--groups", "a"], "--init"),
    *(
        (["storage", "attach", "bare", "--init", "--store", f"--max-storage={text}"], repr(text))
        for text in ("-1", "inf", "nan", "1e30", "10XiB", "", "99999999999999999999", "9EiB")
    ),
    *(
        (["storage", "attach", "bare", "--init", "--store", f"--weight={text}"], "--weight")
        for text in ("-1", "x", "1.5", "9223372036854775808")
    ),
    (["storage", "attach", "bare", "--init", "--store", "--allow-types", "x"], "'x'"),
    (["storage", "attach", "bare", "--init", "--store", "--deny-types", "Sealed"], "'Sealed'"),
    (["storage", "attach", "bare", "--init", "--store", "--allow-miners", "1000"], "'1000'"),
    (["storage", "attach", "bare", "--init", "--store", "--deny-miners", "t01000,x"], "'x'"),
    (["storage", "redeclare"], "--all"),
    (["storage", "redeclare", "x", "--all"], "--all"),
    (["storage", "find"], "SECTOR"),
    *(
        (["storage", "find", text], "s-t01000-7")
        for text in (
            "x",
            "s-t01000",
            "s-f01000-7",
            "s-t01000-7.tmp",
            "s-t01000-07",
            "../x",
            "s-t0-",
        )
    ),
    (["storage", "find", "s-t01000-99999999999999999999"], "s-t01000-7"),
    (["storage", "find", "s-t01000-9999999999999999999"], "out of range"),
    (["auth", "create-token"], "--perm"),
    (["auth", "create-token", "--perm", "write"], "'write'"),
    *(
        (["auth", "create-token", "--perm", "read", f"--expires={text}"], text)
        for text in ("0d", "30", "-1d", "1w", "1.5h", "9999999999d")
    ),
    (["mount", "/m", "-o", "rw"], "'rw'"),
    (["mount", "/m", "-o", "uid=x"], "'uid=x'"),
    (["mount", "/m", "-o", "uid=99999999999"], "mount.uid"),
    (["mount", "/m", "-o", "uid=-1"], "'uid=-1'"),
    (["serve", "--listen", "nonsense"], "'nonsense'"),
    (["serve", "--listen", "127.0.0.1:65536"], "'127.0.0.1:65536'"),
    (["serve", "--listen", "127.0.0.1:"], "'127.0.0.1:'"),
    (["serve", "--listen", "0.0.0.0:0"], "node.advertise"),
    (["serve", "--listen", "[::]:0"], "node.advertise"),
    (["serve", "--listen", ":0"], "node.advertise"),
    (["serve", "--advertise", "ftp://x"], "'ftp://x'"),
    (["serve", "--advertise", "http://x:y"], "'http://x:y'"),
    (["serve", "--index", "nonsense"], "'nonsense'"),
    (["serve", "--index", ""], "index.url"),
    (["mount", "/m\udcff"], "UTF-8"),
    (["storage", "attach", "/x/\udcff", "--init", "--store"], "UTF-8"),
    (["storage", "find", "s-\udcff"], "UTF-8"),
    (["--repo", "\udcff", "status"], "UTF-8"),
]


@pytest.mark.parametrize(
    ("arguments", "word"), [pytest.param(*row, id=ascii(" ".join(row[0]))) for row in USAGE]
)
def test_bad_command_line(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    refused(say, arguments, 2, word)
    assert listing(tmp_path / "bare") == {}


CONFIGS = [
    ("[node]\nfoo = 1\n", "'node.foo'"),
    ("[nonsense]\n", "'nonsense'"),
    ("foo = 1\n", "'foo'"),
    ("node = 1\n", "node: "),
    ("[node]\nlisten = 1\n", "node.listen"),
    ('[node]\nlisten = "x"\n', "'x'"),
    ('[node]\nadvertise = "x"\n', "node.advertise"),
    ('[index]\nurl = "https://x/rpc/v0"\n', "index.url"),
    ("[index]\nheartbeat = 60\n", "index.cutoff"),
    ("[index]\nheartbeat = 0\n", "index.heartbeat"),
    ("[timeouts]\nconnect = nan\n", "timeouts.connect"),
    ("[timeouts]\nconnect = inf\n", "timeouts.connect"),
    ("[timeouts]\ndisk = -1\n", "timeouts.disk"),
    ('[timeouts]\ndisk = "1"\n', "timeouts.disk"),
    ("[peers]\nparallel = 0\n", "peers.parallel"),
    ("[peers]\nparallel = 1.5\n", "peers.parallel"),
    ('[peers]\ntoken_file = "a\\u0000b"\n', "peers.token_file"),
    ('[mount]\ntypes = ["x"]\n', "mount.types"),
    ('[mount]\npassthrough = "yes"\n', "mount.passthrough"),
    ('[mount]\npassthrough_storages = { "a/b" = "off" }\n', "mount.passthrough_storages"),
    ('[cache]\nmax_size = "many"\n', "not a size"),
    ('[cache]\nmax_size = "10%"\n', "not a size"),
    ('[cache]\nmin_free = "100%"\n', "not a share"),
    ('[cache]\nmin_free = "-1%"\n', "not a share"),
    ('[cache]\nmin_free = "%"\n', "not a share"),
    ('[mount]\nallow_other = "yes"\n', "mount.allow_other"),
    ("[mount]\nuid = -1\n", "mount.uid"),
    ('[cache]\npath = ""\n', "cache.path"),
    ('[cache]\npath = "a\\u0000b"\n', "cache.path"),
    ("a =", "not TOML"),
    ("\udcff", "not TOML"),
]


@pytest.mark.parametrize(
    ("text", "word"), [pytest.param(*row, id=ascii(row[0])) for row in CONFIGS]
)
def test_bad_config(say: Say, repo: Repo, text: str, word: str) -> None:
    repo.create()
    repo.config_toml.write_text(text, errors="surrogateescape")
    for verb in (["config", "check"], ["config", "show"], ["storage", "list"], ["serve"]):
        refused(say, verb, 2, str(repo.config_toml), word)


def test_config_that_cannot_be_read(say: Say, repo: Repo) -> None:
    repo.create()
    repo.config_toml.mkdir()
    refused(say, ["config", "check"], 2, "config.toml", "cannot be read")


def test_config_check_and_show(say: Say, repo: Repo) -> None:
    repo.create()
    repo.config_toml.write_text("[index]\nheartbeat = 1\n[timeouts]\ndisk = 2.5\n")
    assert fine(say("config", "check")).out == f"{repo.config_toml}: ok\n"
    shown = fine(say("config", "show")).out
    assert msgspec.toml.decode(shown, type=Config) == repo.config()
    assert fine(say("config", "show", "--json")).json()["timeouts"]["disk"] == 2.5
    assert fine(say("config", "show", "--defaults", "--json")).json()["timeouts"]["disk"] == 15


def break_secret(repo: Repo) -> None:
    (repo.root / "secret").write_text("short")


def block_secret(repo: Repo) -> None:
    (repo.root / "secret").mkdir()


def break_index(repo: Repo) -> None:
    repo.index_db.write_text("garbage" * 1000)


def break_storage_json(repo: Repo) -> None:
    repo.storage_json.write_text("{")


def relative_storage_json(repo: Repo) -> None:
    repo.storage_json.write_text('{"StoragePaths": [{"Path": "rel"}]}')


def shape_storage_json(repo: Repo) -> None:
    repo.storage_json.write_text('{"StoragePaths": {}}')


def lose_token_file(repo: Repo) -> None:
    url = "http://127.0.0.1:1/rpc/v0"
    repo.config_toml.write_text(f'[index]\nurl = "{url}"\ntoken_file = "nowhere"\n')
    repo.secret(create=True)


def lose_secret(repo: Repo) -> None:
    repo.config_toml.write_text('[index]\nurl = "http://127.0.0.1:1/rpc/v0"\n')


def lose_index(repo: Repo) -> None:
    lose_secret(repo)
    repo.secret(create=True)


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (break_secret, 2, ["secret", "copy the secret file"]),
        (block_secret, 1, ["secret", "Is a directory"]),
        (break_index, 2, ["index.db", "no SQLite database"]),
        (break_storage_json, 2, ["storage.json", "is not JSON"]),
        (relative_storage_json, 2, ["storage.json", "not an absolute path: 'rel'"]),
        (shape_storage_json, 2, ["storage.json", "StoragePaths"]),
        (lose_token_file, 2, ["nowhere", "token cannot be read"]),
        (lose_secret, 2, ["secret", "copy it from the index node"]),
        (lose_index, 5, ["http://127.0.0.1:1/rpc/v0", "cannot connect"]),
    ],
)
@pytest.mark.parametrize("verb", ["storage list", "serve --listen 127.0.0.1:0"])
def test_damaged_repo(
    say: Say,
    repo: Repo,
    damage: Callable[[Repo], object],
    code: int,
    words: list[str],
    verb: str,
) -> None:
    repo.create()
    damage(repo)
    before = {path.name: path.read_bytes() for path in repo.root.iterdir() if path.is_file()}
    refused(say, verb.split(), code, *words)
    after = {name: (repo.root / name).read_bytes() for name in before}
    assert after == before, "something was lost"
    assert repo.holder() is None


@pytest.mark.parametrize("verb", ["status", "storage list", "config check", "auth create-token"])
def test_repo_that_is_a_file(say: Say, repo: Repo, verb: str) -> None:
    repo.root.write_text("x")
    extra = ["--perm", "read"] if "auth" in verb else []
    refused(say, [*verb.split(), *extra], 2, str(repo.root))
    refused(say, ["--repo", str(repo.root), *verb.split(), *extra], 2, str(repo.root))


def test_environment_that_names_no_directory(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECTORFS_PATH", "/x/\udcff")
    refused(say, ["status"], 2, "SECTORFS_PATH")
    monkeypatch.setenv("SECTORFS_PATH", "~nobody-of-this-name/x")
    refused(say, ["status"], 2, "SECTORFS_PATH")


def test_working_directory_that_is_gone(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    refused(say, ["umount", "x"], 3, "No such file or directory")


# --- storage verbs ---


def test_paths_are_attached_listed_found_scanned_and_detached(
    say: Say, repo: Repo, tmp_path: Path, way: str
) -> None:
    root = disk(tmp_path / "disk1")
    settings = ["--init", "--store", "--seal", "--weight", "7", "--max-storage", "1.5T"]
    settings += ["--groups", "a,b", "--allow-to", "c", "--allow-types", "sealed,unsealed,cache"]
    settings += ["--deny-types", "key", "--allow-miners", "t01000", "--deny-miners", "t02000,f03"]
    made = fine(say("storage", "attach", str(root), *settings, "--json")).json()
    assert set(made) == {"storage", "path"}
    assert made["path"] == str(root)

    found = fine(say("storage", "list", "--json")).json()
    [shown] = [item for item in found if item["path"] == str(root)]
    assert set(shown) == STORAGE_KEYS
    assert re.fullmatch(RFC3339, shown["last_heartbeat"])
    assert shown["storage"] == made["storage"]
    assert (shown["can_seal"], shown["can_store"], shown["weight"]) == (True, True, 7)
    assert shown["max_storage"] == 3 * 2**39
    assert (shown["groups"], shown["allow_to"]) == (["a", "b"], ["c"])
    assert shown["allow_types"] == ["sealed", "unsealed", "cache"]
    assert (shown["deny_types"], shown["allow_miners"]) == (["key"], ["t01000"])
    assert shown["deny_miners"] == ["t02000", "f03"]
    assert shown["files"] == {"unsealed": 1, "sealed": 1, "cache": 1}
    assert shown["error"] is None
    assert shown["healthy"] is True
    assert shown["capacity"] >= shown["fs_available"] >= shown["available"] >= 0

    sector = fine(say("storage", "find", "s-t01000-7", "--json")).json()
    assert set(sector) == {"sector", "files"}
    assert sector["sector"] == "s-t01000-7"
    assert [file["file_type"] for file in sector["files"]] == ["unsealed", "sealed", "cache"]
    assert [file["size"] for file in sector["files"]] == [0, 600, 74]
    for file in sector["files"]:
        assert set(file) == FILE_KEYS
        [location] = file["locations"]
        assert set(location) == LOCATION_KEYS
        where = root / file["file_type"] / "s-t01000-7"
        assert file["mtime_ns"] == where.stat().st_mtime_ns
        assert file["state"] == "local"
        assert location["path"] == str(where)
        assert location["storage"] == made["storage"]
        assert location["primary"] is True
        assert location["healthy"] is True
        assert location["urls"] == shown["urls"] != []

    for text in (fine(say("storage", "list")).out, fine(say("storage", "find", "s-t01000-7")).out):
        assert made["storage"] in text
        assert str(root) in text

    (root / "sealed" / "s-t01000-7").unlink()
    write(root / "sealed" / "s-t01000-8", b"x")
    for target in (str(root), made["storage"]):
        counts = fine(say("storage", "redeclare", target, "--drop-missing", "--json")).json()
        assert set(counts) == {"entries", "declared", "dropped", "odd"}
    until("the new file", lambda: say("storage", "find", "s-t01000-8").code == 0)
    fine(say("storage", "redeclare", "--all"))
    types = [
        file["file_type"] for file in say("storage", "find", "s-t01000-7", "--json").json()["files"]
    ]
    assert types == ["unsealed", "cache"]

    before = listing(root)
    fine(say("storage", "detach", str(root)))
    assert say("storage", "find", "s-t01000-7").code == 3
    assert listing(root) == before
    assert json.loads(repo.storage_json.read_text()) == {"StoragePaths": []}
    refused(say, ["storage", "detach", str(root)], 3, str(root), "see storage list")
    refused(say, ["storage", "redeclare", str(root)], 3, str(root))
    assert fine(say("storage", "attach", str(root), "--json")).json() == made
    detached = fine(say("storage", "detach", made["storage"], "--json")).json()
    assert detached["detached"] == made["storage"]
    refused(say, ["storage", "find", "s-t01000-7"], 3, "s-t01000-7", "no storage declares")


def test_paths_that_cannot_be_attached(say: Say, repo: Repo, tmp_path: Path, way: str) -> None:
    one, two, bare = tmp_path / "one", tmp_path / "two", tmp_path / "bare"
    bare.mkdir()
    refused(say, ["storage", "attach", str(bare)], 4, str(bare), "--init")
    assert listing(bare) == {}
    refused(say, ["storage", "attach", str(tmp_path / "none")], 4, "none", "--init")
    fine(say("storage", "attach", str(one), "--init", "--store"))
    refused(say, ["storage", "attach", str(one), "--init", "--store"], 4, "without --init")

    inside = one / "inside"
    for arguments in (["--init", "--store"], ["--init", "--seal"]):
        refused(say, ["storage", "attach", str(inside), *arguments], 4, str(inside), str(one))
    assert not inside.exists(), "something was written below a storage path"
    refused(say, ["storage", "attach", str(tmp_path), "--init", "--store"], 4, "overlaps")
    assert not (tmp_path / "sectorstore.json").exists()

    two.mkdir()
    (two / "sectorstore.json").write_bytes((one / "sectorstore.json").read_bytes())
    refused(say, ["storage", "attach", str(two)], 4, str(two), str(one), "detach")
    for text, word in (
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "'ID'"),
        ('{"ID": "a/b"}', "'a/b'"),
        ('{"ID": "a", "Weight": -1}', "'Weight'"),
        ('{"ID": "a", "CanSeal": 1}', "'CanSeal'"),
        ('{"ID": "a", "Groups": "x"}', "'Groups'"),
    ):
        (bare / "sectorstore.json").write_text(text)
        refused(say, ["storage", "attach", str(bare)], 2, str(bare / "sectorstore.json"), word)
        assert (bare / "sectorstore.json").read_text() == text
    (bare / "sectorstore.json").unlink()

    refused(say, ["storage", "attach", "/dev/null", "--init", "--store"], 1, "/dev/null")
    refused(say, ["storage", "attach", "/proc/x", "--init", "--store"], 3, "/proc/x")
    refused(say, ["storage", "attach", f"/tmp/{'a' * 300}", "--init", "--store"], 1, "too long")
    refused(say, ["storage", "attach", f"{repo.root}/cache", "--init", "--store"], 4, "cache path")
    refused(say, ["storage", "attach", f"{repo.root}/cache/x", "--init", "--store"], 4, "cache")
    shown = fine(say("storage", "list", "--json")).json()
    assert [item["path"] for item in shown if item["can_store"]] == [str(one)]
    assert json.loads(repo.storage_json.read_text()) == {"StoragePaths": [{"Path": str(one)}]}


def test_cache_path_is_neither_attached_nor_detached_by_hand(
    say: Say, repo: Repo, tmp_path: Path
) -> None:
    with cluster(tmp_path, "repo") as [node]:
        node.start()
        cache = f"{repo.root}/cache"
        refused(say, ["storage", "attach", cache], 4, cache, "cache path")
        # It is attached by itself, a moment after the node announced itself.
        [shown] = until("the cache path", lambda: say("storage", "list", "--json").json())
        assert (shown["path"], shown["can_store"], shown["can_seal"]) == (cache, False, False)
        for target in (cache, shown["storage"]):
            refused(say, ["storage", "detach", target], 4, target, "cache path")
        assert not repo.storage_json.exists()


def test_path_under_another_name_is_one_path(
    say: Say, repo: Repo, tmp_path: Path, way: str
) -> None:
    root, link = tmp_path / "disk1", tmp_path / "link"
    link.symlink_to(root)
    first = fine(say("storage", "attach", str(root), "--init", "--store", "--json")).json()
    second = fine(say("storage", "attach", str(link), "--json")).json()
    assert first["storage"] == second["storage"]
    assert json.loads(repo.storage_json.read_text()) == {"StoragePaths": [{"Path": str(root)}]}
    fine(say("storage", "detach", str(root)))
    assert json.loads(repo.storage_json.read_text()) == {"StoragePaths": []}


def test_disk_that_is_away_is_not_initialised_again(
    say: Say, repo: Repo, tmp_path: Path, way: str
) -> None:
    """The mount point of a disk that is not mounted must not become a storage path."""
    root, disk_ = tmp_path / "mnt", tmp_path / "disk"
    fine(say("storage", "attach", str(root), "--init", "--store"))
    root.rename(disk_)
    root.mkdir()
    refused(say, ["storage", "attach", str(root), "--init", "--store"], 4, str(root), "already")
    assert listing(root) == {}


def test_relative_paths_and_names_without_a_slash(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = fine(say("storage", "attach", "disk1", "--init", "--store", "--json")).json()
    assert made["path"] == str(tmp_path / "disk1")
    fine(say("storage", "redeclare", "disk1"))
    fine(say("storage", "redeclare", "./disk1/"))
    fine(say("storage", "detach", "disk1"))


def test_default_weight_is_ten(say: Say, tmp_path: Path) -> None:
    fine(say("storage", "attach", str(tmp_path / "a"), "--init", "--seal"))
    [shown] = fine(say("storage", "list", "--json")).json()
    assert (shown["weight"], shown["max_storage"]) == (10, 0)
    assert (shown["can_seal"], shown["can_store"]) == (True, False)


@contextmanager
def read_only_disk(path: Path) -> Iterator[Path]:
    """A file system with sector files that takes no writes."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path)], check=True)
    try:
        disk(path)
        (path / "sectorstore.json").write_text('{"ID": "read-only", "CanStore": true}')
        subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.mount
def test_read_only_disk_is_attached(say: Say, tmp_path: Path, way: str) -> None:
    with read_only_disk(tmp_path / "ro") as path:
        before = listing(path)
        fine(say("storage", "attach", str(path)))
        [found] = [
            item for item in fine(say("storage", "list", "--json")).json() if item["can_store"]
        ]
        assert (found["storage"], found["healthy"]) == ("read-only", True)
        assert found["files"] == {"unsealed": 1, "sealed": 1, "cache": 1}
        assert listing(path) == before
        fine(say("storage", "detach", str(path)))
        refused(say, ["storage", "attach", str(path / "x"), "--init", "--store"], 6, "Read-only")


def test_verbs_on_the_directory_and_a_node_started_later_agree(
    say: Say, repo: Repo, tmp_path: Path
) -> None:
    """What was done without a node is what a node finds, and the other way round."""

    def shown() -> Any:
        found = [item for item in say("storage", "list", "--json").json() if item["can_store"]]
        keep = ("storage", "path", "weight", "files", "healthy")
        return [{key: item[key] for key in keep} for item in found]

    def urls() -> list[str]:
        return [url for item in say("storage", "list", "--json").json() for url in item["urls"]]

    for number in (1, 2):
        path = disk(tmp_path / f"disk{number}", number)
        fine(say("storage", "attach", str(path), "--init", "--store", "--weight", str(number)))
    before = shown()
    assert len(before) == 2
    with cluster(tmp_path, "repo") as [node]:
        node.start()
        until("the node to agree", lambda: shown() == before)
        until(
            "the address it had without a node to be gone",
            lambda: urls() == [f"{repo.api()}/remote"] * 3,
        )
        fine(say("storage", "detach", str(tmp_path / "disk1")))
        write(tmp_path / "disk2" / "sealed" / "s-t01000-9", b"later")
        until("the new file", lambda: say("storage", "find", "s-t01000-9").code == 0)
        # The node's own view follows the Index a moment later.
        until("its count", lambda: [item["files"]["sealed"] for item in shown()] == [2])
        after = shown()
        node.stop()
    assert shown() == after
    assert say("storage", "find", "s-t01000-1").code == 3
    assert say("storage", "find", "s-t01000-9").code == 0


def test_command_while_another_holds_the_repo(say: Say, repo: Repo, tmp_path: Path) -> None:
    repo.create()
    code = "from pathlib import Path\nfrom sectorfs.node.repo import Repo\nimport sys\n"
    code += "with Repo(Path(sys.argv[1])).lock():\n    print(flush=True)\n    sys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(repo.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        refused(say, ["storage", "list"], 5, str(repo.root), "try again")
        refused(say, ["serve"], 4, str(repo.root), f"process {other.pid}")
        other.kill()


def test_progress_on_a_terminal_shows_errors_as_one_line(repo: Repo, tmp_path: Path) -> None:
    """On a terminal a verb runs beside its progress bar; its error is the same."""
    code, text = on_terminal(repo, "storage", "attach", str(tmp_path))
    assert code == 4, text
    assert f"sectorfs: {tmp_path}: is not a storage path" in text
    assert "Traceback" not in text
    code, text = on_terminal(repo, "storage", "attach", str(tmp_path / "new"), "--init", "--store")
    assert code == 0, text
    assert "attached" in text
    code, text = on_terminal(repo, "storage", "list")
    assert code == 0, text


def on_terminal(repo: Repo, *arguments: str) -> tuple[int, str]:
    """Run a command with a terminal for its output."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "sectorfs", "--repo", str(repo.root), *arguments]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        said = b""
        with suppress(OSError):  # EIO: the last one left the terminal
            while piece := os.read(master, 4096):
                said += piece
    os.close(master)
    return process.returncode, " ".join(said.decode().split())


# --- status, umount, auth ---


def test_status_without_a_node(say: Say, repo: Repo) -> None:
    said = say("status", "--json")
    assert (said.code, said.json(), said.err) == (5, {"running": False}, "")
    said = say("status")
    assert (said.code, said.out) == (5, "")
    assert said.err.startswith(f"sectorfs: {repo.root}: no node runs")
    assert len(said.err.splitlines()) == 1
    assert not repo.root.exists(), "asking made a repo"


def test_status_of_a_node(say: Say, repo: Repo, tmp_path: Path) -> None:
    with cluster(tmp_path, "repo") as [node]:
        node.start()
        path = node.disk()
        until("the cache path", lambda: len(say("storage", "list", "--json").json()) == 2)
        shown = fine(say("status", "--json")).json()
        assert set(shown) == STATUS_KEYS
        assert (shown["running"], shown["version"]) == (True, __version__)
        assert (shown["pid"], shown["repo"]) == (node.pid(), str(repo.root))
        assert shown["api"] == repo.api()
        assert shown["mount"] is None
        assert set(shown["index"]) == {"url", "connected", "seq", "age"}
        assert (shown["index"]["url"], shown["index"]["connected"]) == ("sqlite", True)
        assert [set(item) for item in shown["storages"]] == [STORAGE_KEYS] * 2
        ways = ("open", "passthrough", "daemon", "stream", "kept")
        assert shown["files"] == dict.fromkeys(ways, 0)
        assert (shown["fetches"], shown["scans"], shown["problems"]) == ([], [], [])
        text = fine(say("status")).out
        for word in (str(node.pid()), str(path), repo.api(), "connected"):
            assert str(word) in text


def test_node_that_does_not_answer(say: Say, repo: Repo, tmp_path: Path) -> None:
    """A repo whose holder announces an address where nobody is."""
    repo.create()
    repo.secret(create=True)
    with repo.lock():
        repo.write_api("http://127.0.0.1:1")
        for verb in (["status"], ["storage", "list"]):
            refused(say, verb, 5, "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("target", "code", "word"),
    [("/nowhere", 3, "nothing is mounted"), ("/proc", 4, "not a mount of sectorfs (proc)")],
)
def test_umount_of_what_is_not_ours(say: Say, target: str, code: int, word: str) -> None:
    refused(say, ["umount", target], code, target, word)


@pytest.mark.parametrize("permission", ["read", "admin"])
def test_create_token_prints_the_token_alone(say: Say, repo: Repo, permission: str) -> None:
    out = fine(say("auth", "create-token", "--perm", permission)).out
    token = out.removesuffix("\n")
    assert "\n" not in token
    allowed = tokens.claims(repo.secret(create=False), token).permissions
    assert ("admin" in allowed) == (permission == "admin")
    assert "read" in allowed
    assert (repo.root / "secret").stat().st_mode & 0o777 == 0o600


def test_token_expires(say: Say, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    token = fine(say("auth", "create-token", "--perm", "read", "--expires", "2h")).out.strip()
    body = token.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    assert set(claims) == {"Allow", "exp"}
    assert abs(claims["exp"] - 7200 - os.stat(repo.root / "secret").st_mtime) < 60


def test_token_without_the_secret_of_a_remote_index(say: Say, repo: Repo) -> None:
    repo.create()
    repo.config_toml.write_text('[index]\nurl = "http://127.0.0.1:1/rpc/v0"\n')
    refused(say, ["auth", "create-token", "--perm", "read"], 2, "secret", "index node")
    assert not (repo.root / "secret").exists()


def test_demo_wants_an_empty_directory(say: Say, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    refused(say, ["demo", "--once", str(tmp_path / "full")], 4, str(tmp_path / "full"), "empty")
    refused(say, ["demo", "--once", str(tmp_path / "full" / "x")], 2, "x")
    assert list(listing(tmp_path / "full")) == ["x"]


# --- what is printed ---


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("1b", 1),
        ("1k", 1024),
        ("1KB", 1000),
        ("10TiB", 10 * 2**40),
        ("10 tb", 10**13),
        ("1.5T", 3 * 2**39),
        ("0.000001TiB", 1099511),
        ("8388607TiB", 8388607 * 2**40),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", "1e3", "inf", "nan", "1.", ".5", "1XB", "1_000", "9223372036854775808"]
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**39, "1.5 TiB"),
        (2**70, "1024.0 EiB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "." * 20 + " 0%"), (0.5, "#" * 10 + "." * 10 + " 50%"), (2.0, "#" * 20 + " 200%")],
)
def test_progress_bars(share: float, text: str) -> None:
    assert output.bar(share) == text


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_error(NotFound("a\nb", "c\n\nd", "e"), as_json=False)
    assert capsys.readouterr().err == "sectorfs: c d: a b (e)\n"


def test_status_for_people_shows_what_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    report = reports.StatusReport(
        running=True,
        version="1",
        pid=7,
        repo="/r",
        api="http://a:1",
        mount=reports.MountReport(
            path="/sectors", mode="ro", passthrough="off", passthrough_reason="too [old]"
        ),
        index=reports.IndexReport(url="http://i:1/rpc/v0", connected=False, seq=3, age=None),
        storages=[],
        files=reports.FilesReport(open=5, passthrough=0, daemon=5, stream=0),
        fetches=[
            reports.FetchReport(
                sector=SectorID(1000, 7).name,
                file_type="cache",
                member="p_aux",
                done=1024,
                size=4096,
                source="http://[::1]:8480/remote",
            )
        ],
        scans=[reports.ScanReport(path="/disk[1]", done=10)],
        hashing=reports.HashReport(
            state="hashing",
            paused=False,
            left_files=8000,
            left_bytes=250 << 40,
            rate=200_000_000,
            seconds_left=1_374_390,
        ),
        verifying=[],
        scrubs=[],
        problems=["storage [x]: sick"],
    )
    output.print_status(Console(width=120), report)
    report.index = reports.IndexReport(url="u", connected=False, seq=3, age=61.5)
    output.print_status(Console(width=120), report)
    text = capsys.readouterr().out
    for words in (
        "/sectors (ro), every read through the daemon: too [old]",
        "5 (5 through it)",
        "http://i:1/rpc/v0: never seen, change 3",
        "away for 62 s",
        "fetching cache/s-t01000-7/p_aux from http://[::1]:8480/remote #####............... 25%",
        "scanning /disk[1]: 10 entries",
        "under way, 8000 files, 250.0 TiB left, 190.7 MiB/s, 15 days",
        "storage [x]: sick",
    ):
        assert words in text, text


def test_first_deliberate_error_of_a_group_is_raised() -> None:
    async def fail() -> None:
        raise BaseExceptionGroup(
            "", [KeyError("x"), ExceptionGroup("", [BadInput("wrong", "thing")])]
        )

    with pytest.raises(BadInput, match="wrong"):
        run_async(fail)

    async def crash() -> None:
        raise ExceptionGroup("", [KeyError("x")])

    with pytest.raises(KeyError):
        run_async(crash)


def test_interrupt_is_130(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main.sectorfs, "main", interrupt)
    assert say("status").code == 130
