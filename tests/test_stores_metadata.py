"""``sectorstore.json`` and ``storage.json``: what is read, kept, refused, and how it is written."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from sectorfs.errors import BadInput, NotFound, PermissionRefused, Refused
from sectorfs.index.protocol import StorageInfo
from sectorfs.stores import metadata as module
from sectorfs.stores.metadata import (
    MAX_FILE_BYTES,
    METADATA_NAME,
    Metadata,
    decode_metadata,
    encode_metadata,
    init_cache_path,
    init_path,
    read_metadata,
    write_metadata,
)
from sectorfs.stores.storage_list import (
    StorageList,
    read_storage_list,
    storage_list_file,
    write_storage_list,
)
from sectorfs.types import MAX_NUMBER, parse_storage_id

ID = "6b1cba4e-0d7b-4b0f-9f0c-2f8f8a4f7a11"


def decoded(**values: Any) -> StorageInfo:
    return decode_metadata(json.dumps({"ID": ID, **values}).encode(), "here").info


def test_a_file_as_lotus_writes_it() -> None:
    info = decoded(
        Weight=10,
        CanSeal=True,
        CanStore=False,
        MaxStorage=0,
        Groups=None,
        AllowTo=["a"],
        AllowTypes=[],
        DenyMiners=["t01000"],
    )
    assert info == StorageInfo(
        storage=parse_storage_id(ID),
        weight=10,
        can_seal=True,
        allow_to=("a",),
        deny_miners=("t01000",),
    )


def test_keys_in_any_case_and_missing_ones() -> None:
    info = decode_metadata(b'{"id": "x", "WEIGHT": 3, "canstore": true}', "here").info
    assert (info.storage, info.weight, info.can_store, info.can_seal) == ("x", 3, True, False)


@pytest.mark.parametrize("number", [0, MAX_NUMBER])
def test_the_limits_of_numbers(number: int) -> None:
    assert decoded(Weight=number, MaxStorage=number).max_storage == number


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe{}", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b"{}", "'ID'"),
        (b'{"ID": null}', "'ID'"),
        (b'{"ID": 5}', "'ID'"),
        (b'{"ID": ""}', "'ID'"),
        (b'{"ID": "../x"}', "'ID'"),
        (b'{"ID": "a.b"}', "'ID'"),
        (b'{"ID": "x", "Weight": -1}', "'Weight'"),
        (b'{"ID": "x", "Weight": 9223372036854775808}', "'Weight'"),
        (b'{"ID": "x", "Weight": 99999999999999999999999999}', "'Weight'"),
        (b'{"ID": "x", "Weight": 1.5}', "'Weight'"),
        (b'{"ID": "x", "Weight": "10"}', "'Weight'"),
        (b'{"ID": "x", "Weight": true}', "'Weight'"),
        (b'{"ID": "x", "MaxStorage": -1}', "'MaxStorage'"),
        (b'{"ID": "x", "MaxStorage": []}', "'MaxStorage'"),
        (b'{"ID": "x", "CanSeal": 1}', "'CanSeal'"),
        (b'{"ID": "x", "CanStore": "true"}', "'CanStore'"),
        (b'{"ID": "x", "Groups": "a"}', "'Groups'"),
        (b'{"ID": "x", "Groups": {"a": 1}}', "'Groups'"),
        (b'{"ID": "x", "AllowTo": [1]}', "'AllowTo'"),
        (b'{"ID": "x", "AllowTypes": [null]}', "'AllowTypes'"),
        (b'{"ID": "x", "DenyTypes": 0}', "'DenyTypes'"),
        (b'{"ID": "x", "AllowMiners": [[]]}', "'AllowMiners'"),
        (b'{"ID": "x", "DenyMiners": false}', "'DenyMiners'"),
    ],
)
def test_malformed_files_name_file_and_key(tmp_path: Path, text: bytes, named: str) -> None:
    (tmp_path / METADATA_NAME).write_bytes(text)
    with pytest.raises(BadInput) as caught:
        read_metadata(str(tmp_path))
    assert named in str(caught.value)
    assert str(tmp_path / METADATA_NAME) in str(caught.value)


def test_a_file_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_metadata(str(tmp_path))
    target = tmp_path / METADATA_NAME
    os.mkfifo(target)
    with pytest.raises(BadInput, match="not a regular file"):
        read_metadata(str(tmp_path))  # and it does not wait for a writer
    target.unlink()
    target.write_bytes(b" " * (MAX_FILE_BYTES + 1))
    with pytest.raises(BadInput, match="longer than"):
        read_metadata(str(tmp_path))


def test_unknown_keys_survive_and_the_spelling_is_that_of_lotus(tmp_path: Path) -> None:
    extra = {"Future": {"a": [1, 2]}, "big": 10**25, "nothing": None}
    text = json.dumps({"id": ID, "weight": 4, "Groups": ["a"], **extra})
    (tmp_path / METADATA_NAME).write_text(text)
    write_metadata(str(tmp_path), read_metadata(str(tmp_path)))
    written = (tmp_path / METADATA_NAME).read_text()
    assert json.loads(written) == {
        "ID": ID,
        "Weight": 4,
        "CanSeal": False,
        "CanStore": False,
        "MaxStorage": 0,
        "Groups": ["a"],
        **dict.fromkeys(("AllowTo", "AllowTypes", "DenyTypes", "AllowMiners", "DenyMiners")),
        **extra,
    }
    assert written.startswith('{\n  "ID": ')
    assert stat.S_IMODE((tmp_path / METADATA_NAME).stat().st_mode) == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == [METADATA_NAME]


def test_encode_then_decode_is_the_same() -> None:
    info = decoded(Weight=7, AllowTypes=["sealed"], DenyTypes=["cache"], AllowMiners=["t01"])
    metadata = Metadata(info=info, extra={"x": 1})
    assert decode_metadata(encode_metadata(metadata), "here") == metadata


def test_a_write_is_synced_before_it_is_renamed_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        order.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        real_fsync(fd)

    def rename(source: str, target: str) -> None:
        assert Path(source).parent == Path(target).parent
        order.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(module.os, "fsync", fsync)
    monkeypatch.setattr(module.os, "rename", rename)
    write_metadata(str(tmp_path), Metadata(info=decoded()))
    assert order == ["file", "rename", "directory"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / METADATA_NAME).write_text("old")

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_metadata(str(tmp_path), Metadata(info=decoded()))
    assert [entry.name for entry in tmp_path.iterdir()] == [METADATA_NAME]
    assert (tmp_path / METADATA_NAME).read_text() == "old"


def test_init(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    info = init_path(str(path), can_seal=False, can_store=True, groups=["g"], max_storage=5)
    assert read_metadata(str(path)).info == info
    assert (info.weight, info.groups, info.max_storage) == (10, ("g",), 5)
    assert len(info.storage) == 36
    assert info.storage[14] == "4"
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert [entry.name for entry in path.iterdir()] == [METADATA_NAME]


def test_init_of_a_cache_path(tmp_path: Path) -> None:
    info = init_cache_path(str(tmp_path))
    assert (info.can_seal, info.can_store, info.weight) == (False, False, 0)
    assert read_metadata(str(tmp_path)).info == info


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"can_store": False}, "neither seal nor store"),
        ({"weight": -1}, "weight"),
        ({"weight": 2**63}, "weight"),
        ({"max_storage": -1}, "max storage"),
        ({"allow_types": ["seald"]}, "seald"),
        ({"deny_types": [""]}, "file types"),
        ({"allow_miners": ["1000"]}, "1000"),
        ({"deny_miners": ["t0x"]}, "t0x"),
    ],
)
def test_init_with_bad_settings_makes_nothing(
    tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadInput, match=named):
        init_path(str(tmp_path / "new"), **{"can_seal": False, "can_store": True, **options})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"ID": "x"}'])
def test_init_of_an_initialised_path_changes_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METADATA_NAME).write_bytes(content)
    with pytest.raises(Refused, match="already initialised"):
        init_path(str(tmp_path), can_seal=True, can_store=True)
    assert (tmp_path / METADATA_NAME).read_bytes() == content


def test_init_does_not_replace_a_file_that_appears_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def appears(path: str) -> bool:
        Path(path).write_text("theirs")
        return False

    monkeypatch.setattr(module.os.path, "lexists", appears)
    with pytest.raises(Refused):
        init_path(str(tmp_path), can_seal=True, can_store=True)
    assert (tmp_path / METADATA_NAME).read_text() == "theirs"
    assert [entry.name for entry in tmp_path.iterdir()] == [METADATA_NAME]


@pytest.mark.parametrize("number", [1, 95])
def test_init_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def link(source: str, target: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.os, "link", link)
    info = init_path(str(tmp_path), can_seal=True, can_store=True)
    assert read_metadata(str(tmp_path)).info == info


def test_init_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFound):
        init_path(str(tmp_path / "file" / "x"), can_seal=True, can_store=True)


def test_init_where_nothing_may_be_written() -> None:
    with pytest.raises((PermissionRefused, NotFound)):
        init_path("/proc/nothing", can_seal=True, can_store=True)


# storage.json


def test_a_missing_list_is_empty(tmp_path: Path) -> None:
    assert read_storage_list(str(tmp_path / "storage.json")).paths == ()
    assert read_storage_list(str(tmp_path)).file == str(tmp_path / "storage.json")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage_list_file("~/x.json") == str(tmp_path / "x.json")
    assert storage_list_file("~") == str(tmp_path / "storage.json")


def test_unknown_keys_of_the_list_survive(tmp_path: Path) -> None:
    file = tmp_path / "storage.json"
    file.write_text('{"storagepaths": [{"path": "/a", "x": 1}, {"Path": "/b/"}], "y": [2]}')
    changed = read_storage_list(str(file)).adding("/c").removing("/b")
    write_storage_list(changed)
    assert json.loads(file.read_text()) == {
        "StoragePaths": [{"Path": "/a", "x": 1}, {"Path": "/c"}],
        "y": [2],
    }
    assert read_storage_list(str(file)).paths == ("/a", "/c")


def test_the_list_is_made_with_its_directories(tmp_path: Path) -> None:
    file = tmp_path / "new" / "storage.json"
    write_storage_list(StorageList(file=str(file)).adding("/a").adding("/a/"))
    assert file.read_text() == '{\n  "StoragePaths": [\n    {\n      "Path": "/a"\n    }\n  ]\n}\n'
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_duplicates_are_one_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "storage.json"
    file.write_text('{"StoragePaths": [{"Path": "/a"}, {"Path": "/a/"}, {"Path": "/b"}]}')
    assert read_storage_list(str(file)).paths == ("/a", "/b")
    assert "/a is listed twice" in caplog.text


def test_removing_what_is_not_there() -> None:
    with pytest.raises(NotFound, match="/x"):
        StorageList(file="/f").removing("/x")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[", "JSON"),
        ("[]", "object"),
        ('{"StoragePaths": {}}', "StoragePaths"),
        ('{"StoragePaths": ["/a"]}', r"StoragePaths\[0\]"),
        ('{"StoragePaths": [{"Path": "/a"}, {}]}', r"StoragePaths\[1\]\.Path"),
        ('{"StoragePaths": [{"Path": 5}]}', r"StoragePaths\[0\]\.Path"),
        ('{"StoragePaths": [{"Path": ""}]}', "absolute"),
        ('{"StoragePaths": [{"Path": "a/b"}]}', "absolute"),
        ('{"StoragePaths": [{"Path": "/a\\u0000"}]}', "absolute"),
    ],
)
def test_a_malformed_list(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "storage.json"
    file.write_text(text)
    with pytest.raises(BadInput, match=named) as caught:
        read_storage_list(str(file))
    assert str(file) in str(caught.value)


def test_a_null_list_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "storage.json"
    file.write_text('{"StoragePaths": null}')
    assert read_storage_list(str(file)).paths == ()


def test_a_list_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFound, match="cannot be read"):
        read_storage_list(str(tmp_path / "file" / "storage.json"))
    with pytest.raises(NotFound, match="cannot be written"):
        write_storage_list(StorageList(file=str(tmp_path / "file" / "x" / "storage.json")))
