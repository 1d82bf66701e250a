"""Why a file is read from where it is: a word on every copy, and one of them chosen."""

from __future__ import annotations

from sectorfs.index.catalog import Entry
from sectorfs.index.content import present_facts
from sectorfs.index.protocol import Declaration, FsStat, StorageInfo, StorageStatus
from sectorfs.stores.prospects import Failure, Outlook, OwnPath, Prospect, prospects
from sectorfs.stores.sources import View
from sectorfs.types import Facts, FileType, StorageID
from tests.index_fixtures import digested
from tests.local_fixtures import sector_file

FILE = sector_file(FileType.SEALED, 7)
OWN = "http://own/remote"
FACTS = Facts(10, 5_000_000_001)
OTHER = Facts(11, 4_000_000_001)


class World:
    """Storages by name, and what the node knows of them."""

    def __init__(self) -> None:
        self.declared: list[Declaration] = []
        self.urls: dict[StorageID, tuple[str, ...]] = {}
        self.paths: dict[StorageID, OwnPath] = {}
        self.silent: dict[str, str] = {}
        self.failing: set[str] = set()
        self.barred: dict[str, str] = {}
        self.unhealthy: set[StorageID] = set()
        self.failures: dict[tuple[StorageID, str], Failure] = {}

    def hold(
        self, name: str, *, facts: Facts = FACTS, primary: bool = True, urls: tuple[str, ...] = ()
    ) -> None:
        storage = StorageID(name)
        self.urls[storage] = urls
        self.declared.append(Declaration(FILE, storage, primary, facts))

    def here(self, name: str, error: str = "") -> None:
        self.paths[StorageID(name)] = OwnPath(f"/{name}", error)

    def look(self) -> list[Prospect]:
        view = View(
            here=frozenset(name for name, path in self.paths.items() if not path.error),
            own_urls=frozenset((OWN,)),
            storage=self._status,
            healthy=lambda storage: storage not in self.unhealthy,
            latency=lambda url: 0.0,
            failing=self.failing.__contains__,
            barred=lambda file, source: source.url in self.barred,
        )
        outlook = Outlook(
            view=view,
            paths=self.paths,
            silent=lambda source: self.silent.get(source.url, ""),
            barred=lambda file, source: self.barred.get(source.url, ""),
            failure=lambda storage, url: self.failures.get((storage, url)),
        )
        return prospects(Entry(present_facts(self.declared), tuple(self.declared)), outlook)

    def _status(self, storage: StorageID) -> StorageStatus:
        return StorageStatus(
            info=StorageInfo(storage=storage, urls=self.urls[storage]),
            stat=FsStat(),
            error="",
            last_heartbeat_ns=0,
            heartbeat_age=0,
        )


def verdicts(found: list[Prospect]) -> dict[str, str]:
    return {f"{one.storage} {one.where}".rstrip(): one.against for one in found}


def test_a_copy_here_comes_before_peers() -> None:
    world = World()
    world.hold("peer", urls=("http://a", "http://b"))
    world.hold("mine", primary=False, urls=(OWN,))
    world.here("mine")
    assert verdicts(world.look()) == {
        "mine /mine": "",
        "peer http://a": "/mine comes first",
        "peer http://b": "/mine comes first",
    }


def test_a_path_that_is_away_says_why_and_a_peer_is_read() -> None:
    world = World()
    world.hold("mine", urls=(OWN,))
    world.here("mine", error="its disk is gone")
    world.hold("peer", urls=("http://a",))
    assert verdicts(world.look()) == {"peer http://a": "", "mine /mine": "its disk is gone"}


def test_what_is_silent_or_failed_is_said_and_the_next_one_read() -> None:
    world = World()
    for name in ("a", "b", "c", "d"):
        world.hold(name, urls=(f"http://{name}",))
    world.silent["http://a"] = "no first byte within 10 s"
    world.failing.add("http://c")
    world.unhealthy.add(StorageID("d"))
    assert verdicts(world.look()) == {
        "a http://a": "is left alone for a moment: no first byte within 10 s",
        "b http://b": "",
        "d http://d": "its storage is unhealthy, and http://b comes first",
        "c http://c": "failed lately, and http://b comes first",
    }


def test_the_only_source_is_read_however_unwell_it_is() -> None:
    world = World()
    world.hold("a", urls=("http://a",))
    world.failing.add("http://a")
    world.unhealthy.add(StorageID("a"))
    assert verdicts(world.look()) == {"a http://a": ""}


def test_nothing_is_chosen_where_nothing_can_be_read() -> None:
    world = World()
    world.hold("orphan")
    world.hold("a", urls=("http://a",))
    world.silent["http://a"] = "refused"
    assert verdicts(world.look()) == {
        "a http://a": "is left alone for a moment: refused",
        "orphan": "no node serves its storage",
    }


def test_a_copy_of_another_content_is_named_so() -> None:
    world = World()
    world.hold("new", urls=("http://new",))
    world.hold("old", facts=OTHER, primary=False, urls=("http://old",))
    world.hold("mine", facts=OTHER, primary=False, urls=(OWN,))
    world.here("mine")
    other = "holds another content: 11 bytes of 1970-01-01T00:00:04Z"
    assert verdicts(world.look()) == {
        "new http://new": "",
        "old http://old": other,
        "mine /mine": other,
    }


def test_a_copy_with_another_digest_is_named_so() -> None:
    world = World()
    world.hold("new", facts=digested(FACTS, 1), urls=("http://new",))
    world.hold("rotten", facts=digested(FACTS, 0xAB), urls=("http://rotten",))
    assert verdicts(world.look()) == {
        "new http://new": "",
        "rotten http://rotten": "holds another content: 10 bytes of 1970-01-01T00:00:05Z,"
        " digest abababababababab…",
    }


def test_each_way_has_its_own_last_failure() -> None:
    world = World()
    world.hold("shared", urls=(OWN, "http://a"))
    world.here("shared")
    here, there = Failure(1, "EIO"), Failure(2, "refused")
    world.failures = {(StorageID("shared"), ""): here, (StorageID("shared"), "http://a"): there}
    assert {one.where: one.failure for one in world.look()} == {"/shared": here, "http://a": there}
