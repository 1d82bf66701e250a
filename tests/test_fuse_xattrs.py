"""Every attribute of the interface, and what other names answer."""

from __future__ import annotations

import json
from typing import Literal

import pytest

from sectorfs.errors import NoAttribute, Unsupported
from sectorfs.fuse import xattrs
from sectorfs.fuse.inodes import Content, InodeKey
from sectorfs.fuse.xattrs import Subject
from sectorfs.stores.protocol import Checked, State
from sectorfs.types import Facts, SectorFile, StorageID
from tests.mount_fixtures import HERE, SLOW, DictCatalog, sector_file

FILE = sector_file("sealed/7")
KEY = InodeKey(FILE, None, Content(5, 6))


@pytest.fixture
def catalog() -> DictCatalog:
    catalog = DictCatalog()
    catalog.attach(HERE)
    catalog.attach(SLOW)
    catalog.declare(FILE, Facts(5, 6), HERE, primary=False)
    catalog.declare(FILE, Facts(5, 6), SLOW)
    catalog.declare(FILE, None, StorageID("unknown"))
    catalog.unhealthy.add(SLOW)
    return catalog


def local_path(file: SectorFile, storage: StorageID) -> str | None:
    return f"/disk/{file}" if storage == HERE else None


def read(
    catalog: DictCatalog, name: str, state: State = "local", key: InodeKey | None = KEY
) -> str:
    copies = xattrs.locations(catalog, FILE, local_path=local_path, now=0, cutoff=50)
    return xattrs.value(name.encode(), key, lambda file: Subject(file, state, copies)).decode()


def test_a_pinned_copy_says_so(catalog: DictCatalog) -> None:
    subject = Subject(FILE, "cached", (), pinned=True)
    assert xattrs.value(b"user.sectorfs.pinned", KEY, lambda file: subject) == b"1"


def test_locations_are_those_of_storage_find(catalog: DictCatalog) -> None:
    assert json.loads(read(catalog, "user.sectorfs.locations")) == [
        {
            "storage": "here",
            "primary": False,
            "urls": ["http://here:1/remote/sealed/s-t01000-7"],
            "path": "/disk/sealed/s-t01000-7",
            "healthy": True,
        },
        {
            "storage": "slow",
            "primary": True,
            "urls": ["http://slow:1/remote/sealed/s-t01000-7"],
            "path": None,
            "healthy": False,
        },
        {"storage": "unknown", "primary": True, "urls": [], "path": None, "healthy": False},
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("state", "local"),
        ("storage", "here"),
        ("file_type", "sealed"),
        ("miner", "1000"),
        ("number", "7"),
        ("read_path", "daemon"),
        ("verified", "no"),
        ("progress", "100"),
        ("pinned", "0"),
    ],
)
def test_each_attribute(catalog: DictCatalog, name: str, expected: str) -> None:
    assert read(catalog, f"user.sectorfs.{name}") == expected


@pytest.mark.parametrize(
    ("state", "progress"),
    [
        ("local", "100"),
        ("shared", "100"),
        ("cached", "100"),
        ("remote", "0"),
        ("unavailable", "0"),
    ],
)
def test_what_follows_from_the_state(catalog: DictCatalog, state: State, progress: str) -> None:
    assert read(catalog, "user.sectorfs.state", state) == state
    assert read(catalog, "user.sectorfs.progress", state) == progress


@pytest.mark.parametrize("how", ["blocks", "length", "no"])
def test_what_was_checked_is_told(how: Literal["blocks", "length", "no"]) -> None:
    subject = Subject(FILE, "cached", (), checked=Checked(how, b"\x0a" * 32))
    assert xattrs.value(b"user.sectorfs.verified", KEY, lambda file: subject) == how.encode()
    assert xattrs.value(b"user.sectorfs.digest", KEY, lambda file: subject) == b"0a" * 32


def test_what_nobody_knows_is_no_attribute(catalog: DictCatalog) -> None:
    for name, state in [("digest", "local"), ("progress", "partial")]:
        with pytest.raises(NoAttribute):
            read(catalog, f"user.sectorfs.{name}", "partial" if state == "partial" else "local")


def test_a_file_nobody_holds_has_no_storage() -> None:
    with pytest.raises(NoAttribute):
        read(DictCatalog(), "user.sectorfs.storage")
    assert read(DictCatalog(), "user.sectorfs.locations") == "[]"


def test_without_a_copy_here_the_healthy_primary_is_preferred(catalog: DictCatalog) -> None:
    catalog.drop(FILE, HERE)
    assert read(catalog, "user.sectorfs.storage") == "slow", "neither is healthy: the lower name"
    catalog.unhealthy.clear()
    catalog.attach(StorageID("unknown"))
    catalog.declare(FILE, None, SLOW, primary=False)
    assert read(catalog, "user.sectorfs.storage") == "unknown"


@pytest.mark.parametrize(
    "name", ["user.sectorfs.nothing", "user.sectorfs.", "user.other", "user.", "user.sectorfs.ä"]
)
def test_an_unknown_name_is_no_attribute(catalog: DictCatalog, name: str) -> None:
    with pytest.raises(NoAttribute):
        read(catalog, name)


def test_directories_above_the_sectors_have_none(catalog: DictCatalog) -> None:
    with pytest.raises(NoAttribute):
        read(catalog, "user.sectorfs.state", key=None)


@pytest.mark.parametrize(
    "name",
    ["security.capability", "system.posix_acl_access", "trusted.x", "", "USER.sectorfs.state"],
)
@pytest.mark.parametrize("key", [KEY, None])
def test_other_name_spaces_are_not_offered(
    catalog: DictCatalog, name: str, key: InodeKey | None
) -> None:
    with pytest.raises(Unsupported):
        read(catalog, name, key=key)
