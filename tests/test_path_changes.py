"""Changes of a path's settings: the rule, and the file on disk."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sectorfs.errors import BadInput, Refused, SectorFSError, StorageUnavailable
from sectorfs.index.protocol import StorageInfo
from sectorfs.stores.path_changes import PathChanges, changed, rewrite
from sectorfs.types import StorageID
from tests.cluster_fixtures import mounted

ID = StorageID("11111111-2222-3333-4444-555555555555")
BEFORE = StorageInfo(
    storage=ID, weight=10, can_store=True, groups=("old",), allow_types=("sealed",)
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", 0),
        ("weight", 2**63 - 1),
        ("max_storage", 10 << 40),
        ("can_seal", True),
        ("can_store", False),
        ("groups", ("a", "b")),
        ("groups", ()),
        ("allow_to", ("a",)),
        ("allow_types", ()),
        ("deny_types", ("update-cache", "key")),
        ("allow_miners", ("t01000", "f02")),
        ("deny_miners", ("t01000",)),
    ],
)
def test_one_setting_changes_and_the_others_stay(name: str, value: object) -> None:
    after = changed(BEFORE, PathChanges(**{name: value}), "path")
    assert after == msgspec.structs.replace(BEFORE, **{name: value})
    assert after != BEFORE


def test_entries_given_twice_are_one() -> None:
    assert changed(BEFORE, PathChanges(groups=("a", "b", "a")), "path").groups == ("a", "b")


def test_odd_entries_that_were_there_do_not_forbid_other_changes() -> None:
    odd = msgspec.structs.replace(BEFORE, deny_types=("sealde",), allow_miners=("alice",))
    assert changed(odd, PathChanges(weight=3), "path").deny_types == ("sealde",)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (PathChanges(), "nothing to change"),
        (PathChanges(allow_types=("sealed", "sealde")), "allow_types: unknown sector file type"),
        (PathChanges(deny_types=("",)), "deny_types"),
        (PathChanges(allow_miners=("1000",)), "allow_miners: not a miner's address"),
        (PathChanges(deny_miners=("t01000x",)), "deny_miners"),
        (PathChanges(deny_miners=("t09223372036854775808",)), "deny_miners"),
        (PathChanges(weight=-1), "weight"),
        (PathChanges(weight=2**63), "weight"),
        (PathChanges(max_storage=-1), "max_storage"),
        (PathChanges(max_storage=2**63), "max_storage"),
        (PathChanges(groups=("a,b",)), "groups"),
        (PathChanges(allow_to=("",)), "allow_to"),
        (PathChanges(groups=("a\nb",)), "groups"),
    ],
)
def test_nonsense_is_refused(changes: PathChanges, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        changed(BEFORE, changes, "path")


def write(path: Path, **values: Any) -> Path:
    path.mkdir(exist_ok=True)
    text = json.dumps({"ID": ID, "Weight": 10, "CanStore": True, **values})
    (path / "sectorstore.json").write_text(text)
    return path


def test_keys_of_other_programs_survive(tmp_path: Path) -> None:
    theirs = {"Owner": {"Deep": [1, 2.5, None, {"é": 2**70}]}, "zz": "last"}
    path = write(tmp_path / "path", **theirs)
    before, after = rewrite(str(path), ID, PathChanges(weight=7, groups=("a",)))
    assert (before.weight, after.weight) == (10, 7)
    found = json.loads((path / "sectorstore.json").read_text())
    assert {name: found[name] for name in theirs} == theirs
    assert (found["ID"], found["Weight"], found["Groups"]) == (ID, 7, ["a"])
    assert (found["CanStore"], found["AllowTo"]) == (True, None)
    assert [entry.name for entry in path.iterdir()] == ["sectorstore.json"]


def test_keys_in_any_case_are_one_key(tmp_path: Path) -> None:
    path = tmp_path / "path"
    path.mkdir()
    (path / "sectorstore.json").write_text(json.dumps({"id": ID, "WEIGHT": 4, "canstore": True}))
    before, _ = rewrite(str(path), ID, PathChanges(weight=5))
    assert before.weight == 4
    found = json.loads((path / "sectorstore.json").read_text())
    assert (found["Weight"], found["CanStore"]) == (5, True)
    assert "WEIGHT" not in found


def test_nothing_is_written_when_nothing_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "path")
    known = (path / "sectorstore.json").stat()
    before, after = rewrite(str(path), ID, PathChanges(weight=10, can_store=True))
    assert before == after
    now = (path / "sectorstore.json").stat()
    assert (now.st_ino, now.st_mtime_ns) == (known.st_ino, known.st_mtime_ns)


def test_refused_change_leaves_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "path")
    text = (path / "sectorstore.json").read_bytes()
    with pytest.raises(BadInput):
        rewrite(str(path), ID, PathChanges(allow_types=("x",)))
    assert (path / "sectorstore.json").read_bytes() == text


def test_disk_that_is_away_gets_no_file(tmp_path: Path) -> None:
    path = tmp_path / "path"
    path.mkdir()
    with pytest.raises(StorageUnavailable, match="is gone"):
        rewrite(str(path), ID, PathChanges(weight=1))
    assert list(path.iterdir()) == []
    with pytest.raises(StorageUnavailable, match="is gone"):
        rewrite(str(tmp_path / "none"), ID, PathChanges(weight=1))


def test_another_disk_in_its_place_is_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "path", ID="other")
    text = (path / "sectorstore.json").read_bytes()
    with pytest.raises(StorageUnavailable, match="holds storage other"):
        rewrite(str(path), ID, PathChanges(weight=1))
    assert (path / "sectorstore.json").read_bytes() == text


def test_linked_file_is_not_parted_from_what_it_names(tmp_path: Path) -> None:
    real = write(tmp_path / "real") / "sectorstore.json"
    path = tmp_path / "path"
    path.mkdir()
    (path / "sectorstore.json").symlink_to(real)
    with pytest.raises(Refused, match="is a link"):
        rewrite(str(path), ID, PathChanges(weight=1))
    assert json.loads(real.read_text())["Weight"] == 10


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"ID": 3}', b'{"ID": "a", "Weight": -1}'])
def test_malformed_file_is_left_as_it_is(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "path"
    path.mkdir()
    (path / "sectorstore.json").write_bytes(text)
    with pytest.raises(SectorFSError):
        rewrite(str(path), ID, PathChanges(weight=1))
    assert (path / "sectorstore.json").read_bytes() == text


@pytest.mark.mount
def test_disk_mounted_over_while_it_is_rewritten_keeps_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file goes where it was read, whatever the name means meanwhile."""
    path = write(tmp_path / "path")
    real_open = os.open

    def mount_then_open(name: Any, *arguments: Any, **options: Any) -> int:
        if str(name).endswith(".tmp"):
            monkeypatch.undo()
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path)], check=True)
        return real_open(name, *arguments, **options)

    monkeypatch.setattr(os, "open", mount_then_open)
    try:
        rewrite(str(path), ID, PathChanges(weight=1))
        assert list(path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(path)], check=True)
    assert json.loads((path / "sectorstore.json").read_text())["Weight"] == 1


@pytest.mark.mount
def test_full_disk_keeps_the_file_and_no_remains(tmp_path: Path) -> None:
    path = tmp_path / "path"
    with mounted("-t", "tmpfs", "-o", "size=8k", "tmpfs", at=path):
        write(path)
        with suppress(OSError), (path / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        text = (path / "sectorstore.json").read_bytes()
        with pytest.raises(OSError, match="No space"):
            rewrite(str(path), ID, PathChanges(weight=1))
        assert (path / "sectorstore.json").read_bytes() == text
        assert sorted(entry.name for entry in path.iterdir()) == ["filler", "sectorstore.json"]
