"""Two and three nodes, real processes and real mounts: one tree, the same everywhere."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import Node, cluster, digest, tree, until, write, write_cache
from tests.cluster_fixtures import (
    OLD_NS,
    attach,
    cache_of,
    configure,
    free_port,
    holds,
    leftovers,
    listing,
    locations,
    metric,
    mounted,
    noise,
    put,
    put_sparse,
    rescan,
    seen,
    shows,
    state,
    storages,
)

pytestmark = pytest.mark.mount

SECTORS = 200
MEMBERS = {"p_aux": 64, "t_aux": 317, "sc-02-data-tree-r-last.dat": 4_681}
SPARSE = 64 << 20
SOON = 2.0
"""Seconds from the declaration of a change to its being seen on another node."""


# --- one tree ---


class Pair:
    """Two mounted nodes, each with storage paths of its own."""

    def __init__(self, nodes: list[Node], disks: list[Path]) -> None:
        self.first, self.second = self.nodes = nodes
        self.disks = disks
        self.before = [listing(disk) for disk in disks]
        self.sources = {name: path for disk in disks for name, path in _files(disk).items()}

    def remote(self, name: str) -> tuple[Node, Node]:
        """The node that holds a file, and the one that does not."""
        held = self.sources[name].is_relative_to(self.disks[0])
        return (self.first, self.second) if held else (self.second, self.first)


def _files(disk: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(disk)): path
        for path in sorted(disk.rglob("*"))
        if path.is_file() and path.parent != disk
    }


def _fill(disks: list[Path]) -> None:
    """Sector files spread so that the files of some sectors are on one disk, of others on both."""
    for number in range(SECTORS):
        sector = f"s-t01000-{number}"
        mtime_ns = OLD_NS + number * 1_000_000_007
        for shift, kind in enumerate(("unsealed", "sealed")):
            disk = disks[(number // (2 if shift else 3)) % 2]
            data = noise(f"{kind}/{sector}", 1_000 + 97 * number)
            put(disk / kind / sector, data, mtime_ns)
        folder = disks[number % 2] / "cache" / sector
        for name, size in MEMBERS.items():
            put(folder / name, noise(f"{sector}/{name}", size), mtime_ns)
        os.utime(folder, ns=(mtime_ns, mtime_ns))
    put(disks[0] / "unsealed" / "s-t01000-900", b"")
    put(disks[1] / "unsealed" / "s-t01000-901", b"")
    put_sparse(disks[0] / "sealed" / "s-t01000-902", SPARSE, b"end of the sparse file")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("pair")
    disks = [root / "disk-first", root / "disk-second"]
    _fill(disks)
    with cluster(root, "first", "second") as nodes:
        first, second = nodes
        for node in nodes:
            configure(node)
        first.start(mount=True)
        second.start(mount=True, index=first)
        for node, disk in zip(nodes, disks, strict=True):
            attach(node, disk)
        found = Pair(nodes, disks)
        for node in nodes:
            until(
                f"all sectors on {node.name}",
                lambda node=node: (
                    len(os.listdir(node.mountpoint / "cache")) == SECTORS
                    and len(os.listdir(node.mountpoint / "sealed")) == SECTORS + 1
                    and len(os.listdir(node.mountpoint / "unsealed")) == SECTORS + 2
                ),
            )
        yield found


def test_every_file_is_listed_with_the_size_and_time_of_its_source(pair: Pair) -> None:
    for node in pair.nodes:
        shown = _files(node.mountpoint)
        assert sorted(shown) == sorted(pair.sources)
        for name, path in shown.items():
            here, source = path.stat(), pair.sources[name].stat()
            assert (here.st_size, here.st_mtime_ns) == (source.st_size, source.st_mtime_ns), name
            assert here.st_blocks == -(-here.st_size // 512), name
            assert stat.S_IMODE(here.st_mode) == 0o444, name
        for folder in (node.mountpoint / "cache").iterdir():
            assert (
                folder.stat().st_mtime_ns
                == pair.sources[f"cache/{folder.name}/p_aux"].parent.stat().st_mtime_ns
            )
            assert stat.S_IMODE(folder.stat().st_mode) == 0o555


def test_both_mounts_show_the_same_bytes(pair: Pair) -> None:
    expected = {name: digest(path) for name, path in pair.sources.items()}
    for node in pair.nodes:
        assert tree(node.mountpoint) == expected
        seen("every directory to be put into place", lambda node=node: not leftovers(node))


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"{command}: {result.stderr}"
    assert result.stderr == ""
    return result.stdout


def test_ls_finds_and_sums_every_file(pair: Pair) -> None:
    mountpoint = pair.second.mountpoint
    lines = _run("ls", "-l", "--time-style=full-iso", str(mountpoint / "sealed")).splitlines()[1:]
    assert len(lines) == SECTORS + 1
    for line in lines:
        fields = line.split()
        source = pair.sources[f"sealed/{fields[8]}"]
        assert fields[0] == "-r--r--r--"
        assert int(fields[4]) == source.stat().st_size
    big = _run("find", str(mountpoint), "-type", "f", "-size", "+1M").splitlines()
    assert big == [str(mountpoint / "sealed" / "s-t01000-902")]
    empty = _run("find", str(mountpoint), "-type", "f", "-size", "0").split()
    assert sorted(Path(path).name for path in empty) == ["s-t01000-900", "s-t01000-901"]
    sums = _run("sha256sum", *(str(path) for path in (mountpoint / "sealed").iterdir()))
    for line in sums.splitlines():
        checksum, _, path = line.partition("  ")
        assert checksum == digest(pair.sources[f"sealed/{Path(path).name}"])


@pytest.mark.parametrize("tool", ["cp", "tar", "rsync"])
def test_tools_copy_the_whole_tree(pair: Pair, tmp_path: Path, tool: str) -> None:
    source, copy = pair.second.mountpoint, tmp_path / "copy"
    copy.mkdir()
    match tool:
        case "cp":
            _run("cp", "-r", "--preserve=timestamps", f"{source}/.", str(copy))
        case "tar":
            archive = tmp_path / "all.tar"
            _run("tar", "--format=posix", "-cf", str(archive), "-C", str(source), ".")
            _run("tar", "-xf", str(archive), "-C", str(copy))
        case "rsync":
            _run("rsync", "-a", f"{source}/", str(copy))
            again = _run("rsync", "-a", "--checksum", "--itemize-changes", f"{source}/", str(copy))
            assert not [line for line in again.splitlines() if line.startswith(">")]
    copied = _files(copy)
    assert sorted(copied) == sorted(pair.sources)
    for name, path in copied.items():
        original = pair.sources[name]
        assert path.stat().st_mtime_ns == original.stat().st_mtime_ns, name
        assert digest(path) == digest(original), name


def test_a_file_that_was_read_is_a_declared_copy_with_the_time_of_its_source(pair: Pair) -> None:
    for name in ("sealed/s-t01000-7", "unsealed/s-t01000-900", "cache/s-t01000-11/p_aux"):
        owner, reader = pair.remote(name)
        kind, sector, *_ = name.split("/")
        for path in sorted((reader.mountpoint / kind).glob(f"{sector}/*")) or [
            reader.mountpoint / name
        ]:
            path.read_bytes()
        copies = until(
            "the copy to be declared",
            lambda owner=owner, reader=reader, kind=kind, sector=sector: (
                found
                if cache_of(reader) in (found := locations(owner, f"{kind}/{sector}"))
                else None
            ),
        )
        assert [copy.primary for copy in copies.values()].count(True) == 1
        assert not copies[cache_of(reader)].primary
        report = reader.json("storage", "find", sector)
        file = next(item for item in report["files"] if item["file_type"] == kind)
        places = {place["storage"]: place for place in file["locations"]}
        copy = Path(places[cache_of(reader)]["path"])
        assert file["state"] == "cached"
        assert not places[cache_of(reader)]["primary"]
        assert places[cache_of(reader)]["healthy"]
        source = pair.sources[name].parent if kind == "cache" else pair.sources[name]
        assert file["mtime_ns"] == source.stat().st_mtime_ns
        assert copy.stat().st_mtime_ns == source.stat().st_mtime_ns


def test_reading_writes_nothing_but_the_cache_path(pair: Pair) -> None:
    for node in pair.nodes:
        for number in range(20):
            (node.mountpoint / "sealed" / f"s-t01000-{number}").read_bytes()
    assert [listing(disk) for disk in pair.disks] == pair.before


def test_locations_name_every_copy(pair: Pair) -> None:
    name = "sealed/s-t01000-8"
    owner, _ = pair.remote(name)
    for node in pair.nodes:
        raw = os.getxattr(node.mountpoint / name, "user.sectorfs.locations")
        found = {place["storage"]: place for place in json.loads(raw)}
        primary = [place for place in found.values() if place["primary"]]
        assert len(primary) == 1
        assert primary[0]["urls"] == [f"{owner.repo.api()}/remote/{name}"]
        assert primary[0]["healthy"]
        assert primary[0]["path"] == (str(pair.sources[name]) if node is owner else None)


def test_df_shows_the_disks_below(pair: Pair) -> None:
    known = storages(pair.first)
    for node in pair.nodes:
        # A node's own two paths lie on one file system; that the other node's do, it cannot know.
        owned = [item for item in known.values() if item.urls == [f"{node.repo.api()}/remote"]]
        far = [item for item in known.values() if item not in owned]
        assert (len(owned), len(far)) == (2, 2)
        shown = os.statvfs(node.mountpoint)
        wanted = owned[0].capacity + sum(item.capacity for item in far)
        assert shown.f_blocks * shown.f_frsize == wanted // shown.f_frsize * shown.f_frsize
        assert 0 < shown.f_bavail <= shown.f_blocks


# --- changes ---


Live = tuple[Node, Node, Path]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Two mounted nodes, and the first one's disk; each test has a sector of its own."""
    with cluster(tmp_path_factory.mktemp("live"), "first", "second") as nodes:
        first, second = nodes
        for node in nodes:
            configure(node)
        first.start(mount=True)
        second.start(mount=True, index=first)
        disk = first.root / "disk"
        attach(first, disk)
        yield first, second, disk


@pytest.mark.parametrize("name", ["sealed/s-t01000-1", "cache/s-t01000-1", "update/s-t01000-1"])
def test_a_new_file_appears_on_the_other_node(
    live: Live, name: str, record_property: Callable[[str, object], None]
) -> None:
    first, second, disk = live
    shown = second.mountpoint / name
    assert not shown.exists()
    if name.startswith("cache"):
        write_cache(disk / name, {"p_aux": b"aux", "t_aux": b"more"})
        shown = shown / "p_aux"
        data = b"aux"
    else:
        data = noise(name, 100_000)
        write(disk / name, data)
    until("the declaration", lambda: locations(first, name), 15)
    took = seen("the file on the other node", lambda: shows(shown, data))
    record_property("seconds_after_declaration", took)
    assert took < SOON
    assert (second.mountpoint / name).name in os.listdir((second.mountpoint / name).parent)


def test_a_file_written_slowly_appears_once_it_is_whole(live: Live) -> None:
    first, second, disk = live
    name = "unsealed/s-t01000-2"
    (disk / "unsealed").mkdir(exist_ok=True)
    shown = second.mountpoint / name
    with (disk / name).open("wb") as stream:
        for part in range(8):
            stream.write(noise(f"part {part}", 50_000))
            stream.flush()
            holds("no half file is shown", lambda: not shown.exists(), 0.2)
    whole = b"".join(noise(f"part {part}", 50_000) for part in range(8))
    seen("the whole file", lambda: shown.exists())
    assert shown.read_bytes() == whole
    assert (first.mountpoint / name).read_bytes() == whole


def test_a_file_grown_after_its_declaration_is_shown_whole(live: Live) -> None:
    first, second, disk = live
    name = "sealed/s-t01000-3"
    write(disk / name, b"begin")
    seen("the first part", lambda: shows(second.mountpoint / name, b"begin"))
    with (disk / name).open("ab") as stream:
        stream.write(b" and end")
    for node in (second, first):
        seen("all of it", lambda node=node: shows(node.mountpoint / name, b"begin and end"))


@pytest.mark.parametrize("name", ["sealed/s-t01000-4", "cache/s-t01000-4"])
def test_a_removed_file_vanishes(live: Live, name: str) -> None:
    first, second, disk = live
    if name.startswith("cache"):
        write_cache(disk / name, {"p_aux": b"aux"})
    else:
        write(disk / name, b"here")
    for node in (first, second):
        seen("the file", lambda node=node: (node.mountpoint / name).exists())
    if name.startswith("cache"):
        shutil.rmtree(disk / name)
    else:
        (disk / name).unlink()
    until("the drop", lambda: not locations(first, name), 15)
    assert seen("its end", lambda: not (second.mountpoint / name).exists()) < SOON
    assert not (first.mountpoint / name).exists()
    assert "s-t01000-4" not in os.listdir((second.mountpoint / name).parent)


@pytest.mark.parametrize("new", [b"of another size", b"content B"])
@pytest.mark.parametrize("member", [None, "p_aux"])
def test_a_replaced_file_is_seen_while_an_open_one_stays(
    live: Live, new: bytes, member: str | None
) -> None:
    first, second, disk = live
    old = b"content A"
    sector = f"s-t01000-5{len(new)}"
    name = f"cache/{sector}/{member}" if member else f"sealed/{sector}"
    source = disk / name
    write(source, old)
    for node in (first, second):
        seen("the old content", lambda node=node: shows(node.mountpoint / name, old))
    before = source.stat().st_mtime_ns
    with (first.mountpoint / name).open("rb") as here, (second.mountpoint / name).open("rb") as far:
        assert here.read(3) == far.read(3) == old[:3]
        write(source, new)
        assert source.stat().st_mtime_ns > before
        # Where it lies, the next open sees it at once; elsewhere once it was declared.
        assert (first.mountpoint / name).read_bytes() == new
        seen("the new content", lambda: shows(second.mountpoint / name, new))
        holds("it stays new", lambda: shows(second.mountpoint / name, new), 0.5)
        assert (second.mountpoint / name).stat().st_size == len(new)
        assert (second.mountpoint / name).stat().st_mtime_ns == source.stat().st_mtime_ns
        for stream in (here, far):
            stream.seek(0)
            assert stream.read() == old
    copies = locations(first, str(Path(name).parent) if member else name)
    assert [copy.primary for copy in copies.values()].count(True) == 1


def test_a_copy_outlives_its_source_until_there_is_a_new_one(live: Live) -> None:
    first, second, disk = live
    name = "sealed/s-t01000-60"
    write(disk / name, b"old content")
    seen("the file", lambda: shows(second.mountpoint / name, b"old content"))
    seen("the copy", lambda: cache_of(second) in locations(first, name))
    (disk / name).unlink()
    seen("the drop", lambda: list(locations(first, name)) == [cache_of(second)])
    for node in (first, second):
        assert (node.mountpoint / name).read_bytes() == b"old content"
    write(disk / name, b"new content")
    for node in (first, second):
        seen("the new content", lambda node=node: shows(node.mountpoint / name, b"new content"))
        holds("it stays", lambda node=node: shows(node.mountpoint / name, b"new content"), 0.3)


@pytest.mark.parametrize("damage", ["removed", "cut", "changed"])
@pytest.mark.parametrize("member", [None, "p_aux"])
def test_a_copy_that_was_tampered_with_is_fetched_again(
    live: Live, damage: str, member: str | None
) -> None:
    _, second, disk = live
    sector = f"s-t01000-61{['removed', 'cut', 'changed'].index(damage)}"
    name = f"cache/{sector}/{member}" if member else f"sealed/{sector}"
    data = noise(name, 50_000)
    write(disk / name, data)
    seen("the file", lambda: shows(second.mountpoint / name, data))
    seen("the copy", lambda: state(second.mountpoint / name) == "cached")
    copy = second.repo.root / "cache" / name
    match damage:
        case "removed":
            copy.unlink()
        case "cut":
            os.truncate(copy, 20_000)
        case "changed":
            copy.write_bytes(bytes(50_000))
    assert (second.mountpoint / name).read_bytes() == data
    seen("a whole copy", lambda: shows(copy, data) and state(second.mountpoint / name) == "cached")
    assert (disk / name).read_bytes() == data


def test_a_directory_that_grows_is_shown_and_copied_whole(live: Live) -> None:
    first, second, disk = live
    name = "cache/s-t01000-62"
    write_cache(disk / name, {"p_aux": b"first"})
    seen("the first file", lambda: shows(second.mountpoint / name / "p_aux", b"first"))
    seen("the copy", lambda: cache_of(second) in locations(first, name))
    write(disk / name / "t_aux", b"second")
    shown = second.mountpoint / name
    seen("the second file", lambda: shows(shown / "t_aux", b"second"))
    assert sorted(os.listdir(shown)) == ["p_aux", "t_aux"]
    assert (shown / "p_aux").read_bytes() == b"first"
    copy = second.repo.root / "cache" / name
    seen("the whole copy", lambda: copy.is_dir() and len(os.listdir(copy)) == 2)
    seen("its declaration", lambda: state(shown) == "cached")
    (disk / name / "p_aux").unlink()
    seen("the first file's end", lambda: os.listdir(shown) == ["t_aux"])
    assert (shown / "t_aux").read_bytes() == b"second"


def test_a_directory_changed_while_half_of_it_was_read_is_not_mixed(live: Live) -> None:
    _, second, disk = live
    name = "cache/s-t01000-63"
    write_cache(disk / name, {"p_aux": b"old aux", "t_aux": b"t", "sc-02-data-tree-d.dat": b"d"})
    shown = second.mountpoint / name
    seen("a file of it", lambda: shows(shown / "p_aux", b"old aux"))
    write(disk / name / "p_aux", b"new aux")
    wanted = (disk / name / "p_aux").stat().st_mtime_ns
    seen("the change", lambda: (shown / "p_aux").stat().st_mtime_ns == wanted)
    assert (shown / "t_aux").read_bytes() == b"t"
    assert (shown / "sc-02-data-tree-d.dat").read_bytes() == b"d"
    assert state(shown) in ("remote", "partial")
    assert (shown / "p_aux").read_bytes() == b"new aux"
    seen("the whole copy", lambda: state(shown) == "cached")
    assert (second.repo.root / "cache" / name / "p_aux").read_bytes() == b"new aux"


def test_twenty_opens_of_one_file_fetch_it_once(live: Live) -> None:
    first, second, disk = live
    name, size = "sealed/s-t01000-6", 16 << 20
    put(disk / name, noise(name, size))
    rescan(first)
    seen("the file", lambda: (second.mountpoint / name).exists())
    before = metric(second, "sectorfs_fetched_bytes_total")
    readers = [
        subprocess.Popen(["sha256sum", str(second.mountpoint / name)], stdout=subprocess.PIPE)
        for _ in range(20)
    ]
    sums = {reader.communicate(timeout=60)[0].split()[0].decode() for reader in readers}
    assert all(reader.returncode == 0 for reader in readers)
    assert sums == {digest(disk / name)}
    assert metric(second, "sectorfs_fetched_bytes_total") - before == size
    assert metric(first, "sectorfs_http_sent_bytes_total") >= size


# --- sharing, moving, leaving ---


def test_a_directory_attached_on_two_nodes_is_read_in_place(tmp_path: Path) -> None:
    with cluster(tmp_path, "first", "second") as nodes:
        first, second = nodes
        for node in nodes:
            configure(node)
        first.start(mount=True)
        second.start(mount=True, index=first)
        disk = tmp_path / "shared"
        name = "sealed/s-t01000-1"
        put(disk / name, b"on a shared disk")
        storage = attach(first, disk)
        second.call("storage", "attach", str(disk))
        known = storages(first)[storage]
        assert sorted(known.urls) == sorted(f"{node.repo.api()}/remote" for node in nodes)
        for node in nodes:
            seen("both URLs", lambda node=node: state(node.mountpoint / name) == "shared")
            assert (node.mountpoint / name).read_bytes() == b"on a shared disk"
            assert metric(node, "sectorfs_fetched_bytes_total") == 0
        assert list(locations(first, name)) == [storage]
        # New files are seen by both and declared once.
        write(disk / "sealed" / "s-t01000-2", b"another")
        for node in nodes:
            seen(
                "the new file",
                lambda node=node: shows(node.mountpoint / "sealed/s-t01000-2", b"another"),
            )
        # The node with the Index dies: the other still reads in place.
        first.kill()
        for number, data in ((1, b"on a shared disk"), (2, b"another")):
            assert (second.mountpoint / f"sealed/s-t01000-{number}").read_bytes() == data
        assert metric(second, "sectorfs_fetched_bytes_total") == 0


def test_detaching_one_of_two_urls_keeps_the_storage_and_the_last_ends_it(tmp_path: Path) -> None:
    with cluster(tmp_path, "first", "second") as nodes:
        first, second = nodes
        for node in nodes:
            configure(node)
        first.start(mount=True)
        second.start(mount=True, index=first)
        disk = tmp_path / "shared"
        name = "sealed/s-t01000-1"
        put(disk / name, b"here")
        storage = attach(second, disk)
        first.call("storage", "attach", str(disk))
        second.call("storage", "detach", str(disk))
        assert storages(first)[storage].urls == [f"{first.repo.api()}/remote"]
        seen("one URL", lambda: state(second.mountpoint / name) == "remote")
        assert (second.mountpoint / name).read_bytes() == b"here"
        first.call("storage", "detach", storage)
        assert storage not in storages(first)
        for node in nodes:
            # What the second node fetched is a copy, and now the only one.
            seen("the copy", lambda node=node: storage not in locations(node, name))
            assert (node.mountpoint / name).read_bytes() == b"here"
        assert (disk / name).read_bytes() == b"here"
        assert (disk / "sectorstore.json").exists()


def test_the_last_detach_takes_the_sectors_out_of_every_mount(live: Live, tmp_path: Path) -> None:
    first, second, _ = live
    disk, name = tmp_path / "disk", "piece/s-t01000-7"
    put(disk / name, b"here")
    attach(first, disk)
    seen("the file", lambda: (second.mountpoint / name).exists())
    first.call("storage", "detach", str(disk))
    assert seen("its end", lambda: not (second.mountpoint / name).exists()) < SOON
    assert "piece" not in os.listdir(second.mountpoint)
    assert (disk / name).read_bytes() == b"here"


def test_a_node_that_comes_back_under_another_url_leaves_none_behind(tmp_path: Path) -> None:
    with cluster(tmp_path, "first", "second") as nodes:
        first, second = nodes
        for node in nodes:
            configure(node)
        first.start(mount=True)
        second.start(index=first)
        disk = tmp_path / "disk"
        name = "sealed/s-t01000-1"
        put(disk / name, b"here")
        storage = attach(second, disk)
        mine = {storage, cache_of(second)}
        before = f"{second.repo.api()}/remote"
        assert all(storages(first)[one].urls == [before] for one in mine)
        for arguments, kill in (((), True), (("--advertise", "http://localhost:{port}"), False)):
            second.kill() if kill else second.stop()
            port = free_port()
            wanted = f"http://127.0.0.1:{port}/remote"
            if arguments:
                arguments = tuple(argument.format(port=port) for argument in arguments)
                wanted = f"http://localhost:{port}/remote"
            second.start("--listen", f"127.0.0.1:{port}", *arguments, index=first)
            seen(
                "the new URL alone",
                lambda wanted=wanted: all(storages(first)[one].urls == [wanted] for one in mine),
            )
            seen(
                "it to be healthy there",
                lambda: all(storages(first)[one].healthy for one in mine),
            )
        assert (first.mountpoint / name).read_bytes() == b"here"


# --- what the mount says of a file ---


def test_states_tell_where_a_file_is(tmp_path: Path) -> None:
    with cluster(tmp_path, "first", "second") as nodes:
        first, second = nodes
        for node in nodes:
            configure(node)
        first.start(mount=True)
        second.start(mount=True, index=first)
        disk = tmp_path / "disk"
        name, other = "sealed/s-t01000-1", "sealed/s-t01000-2"
        put(disk / name, b"one")
        put(disk / other, b"two")
        attach(second, disk)
        shown = first.mountpoint / name
        seen("the file", shown.exists)
        assert state(second.mountpoint / name) == "local"
        assert state(shown) == "remote"
        shown.read_bytes()
        seen("the copy", lambda: state(shown) == "cached")
        assert os.getxattr(shown, "user.sectorfs.storage").decode() == cache_of(first)
        assert state(second.mountpoint / name) == "local"
        second.kill()
        seen("the loss", lambda: state(first.mountpoint / other) == "unavailable")
        assert state(shown) == "cached"
        assert os.listxattr(shown) == []


# --- the sparse file of 3 GiB ---


@pytest.mark.long
def test_a_sparse_file_of_three_gibibytes(live: Live) -> None:
    first, second, disk = live
    name = "sealed/s-t01000-8"
    put_sparse(disk / name, 3 << 30, b"the end")
    rescan(first)
    seen("the file", lambda: (second.mountpoint / name).exists())
    expected = digest(disk / name)
    for node in (first, second):
        assert (node.mountpoint / name).stat().st_size == 3 << 30
        assert digest(node.mountpoint / name) == expected


def test_a_disk_mounted_read_only_is_served(tmp_path: Path) -> None:
    with cluster(tmp_path, "first", "second") as nodes:
        first, second = nodes
        for node in nodes:
            configure(node)
        first.start(mount=True)
        second.start(index=first)
        disk, shown = tmp_path / "disk", tmp_path / "read-only"
        put(disk / "sealed" / "s-t01000-1", b"here")
        attach(second, disk)
        second.call("storage", "detach", str(disk))
        with mounted("--bind", "-o", "ro", str(disk), at=shown):
            second.call("storage", "attach", str(shown))
            seen("the file", lambda: shows(first.mountpoint / "sealed/s-t01000-1", b"here"))
            second.call("storage", "detach", str(shown))
