"""A sector directory has the same files for all who look: Index, mount, peers and moves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.errors import Refused
from sectorfs.stores.scan import file_facts
from sectorfs.stores.seen import see
from sectorfs.stores.set_aside import Expected, Place, set_aside
from sectorfs.stores.tar_writer import members_of
from tests.archive_fixtures import served
from tests.local_fixtures import make_path, make_store, put, switched_index
from tests.moving_fixtures import CACHE, content, file_system, rig, there
from tests.tar_fixtures import read

KINDS = ("file", "directory", "link", "link out", "link to directory", "link to nothing", "fifo")
NAMES = ("p_aux", "t_aux", ".hidden", "half.tmp", "sc-02-data-tree-d.dat", "ünicode")


def make(path: Path, kind: str) -> None:
    """One entry of a directory; what links name lies beside the directory."""
    beside = path.parent.with_name("outside")
    if kind == "file":
        path.write_bytes(b"x" * len(path.name))
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(beside / "file")
    elif kind == "link out":
        path.symlink_to(os.path.relpath(beside / "file", path.parent))
    elif kind == "link to directory":
        path.symlink_to(beside)
    else:
        path.symlink_to("nowhere")


@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(KINDS)))
def test_all_looks_agree(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, str]) -> None:
    root = tmp_path_factory.mktemp("looks")
    storage = make_path(root / "path")
    target = put(root / "path", CACHE, {})
    beside = target.with_name("outside")
    beside.mkdir()
    (beside / "file").write_bytes(b"linked")
    for name, kind in entries.items():
        make(target / name, kind)
    facts = file_facts(str(root / "path"), storage, CACHE)
    told = [(one.name, one.size, one.mtime_ns) for one in facts.members or ()]
    assert [(one.name, one.size, one.mtime_ns) for one in members_of(target)] == told
    try:
        moved = see(str(target), CACHE, str(target))
    except Refused:
        # Stricter: a move that left something behind would lose it.
        assert set(entries.values()) - {"file", "link", "link out"}
    else:
        assert moved.facts(CACHE) == facts


async def test_a_linked_file_is_sent_with_its_directory(tmp_path: Path) -> None:
    async with switched_index(tmp_path) as index:
        make_path(tmp_path / "path")
        target = put(tmp_path / "path", CACHE, {"p_aux": b"p" * 64})
        (tmp_path / "tree").write_bytes(b"of another disk")
        (target / "t_aux").symlink_to(tmp_path / "tree")
        store = make_store(index)
        await store.attach(str(tmp_path / "path"))
        async with served(store) as node:
            answer = await node.ask(f"/remote/{CACHE}")
            assert answer.status == 200
            assert read([answer.body])[0] == {"p_aux": b"p" * 64, "t_aux": b"of another disk"}
            for name in ("p_aux", "t_aux"):
                one = await node.ask(f"/remote/{CACHE}/files/{name}")
                assert one.body == (target / name).read_bytes()
        store.close()


@pytest.mark.mount
@pytest.mark.parametrize("own_disk", [False, True])
async def test_a_linked_file_is_moved_as_what_it_names(tmp_path: Path, own_disk: bool) -> None:
    with file_system(tmp_path, "two"):
        async with rig(tmp_path, "one", "two", "three") as parts:
            files = {"p_aux": b"p" * 64, "t_aux": b"t" * 64}
            source = await parts.put("one", CACHE, files)
            (tmp_path / "tree").write_bytes(b"of another disk")
            (source / "sc-02-data-tree-d.dat").symlink_to(tmp_path / "tree")
            await parts.store.redeclare()
            name = "two" if own_disk else "three"
            moved = await parts.mover.move(CACHE, parts.ids[name])
            assert moved.how == "copied"
            target = parts.path(name) / str(CACHE)
            assert content(target) == {**files, "sc-02-data-tree-d.dat": b"of another disk"}
            assert not any(path.is_symlink() for path in target.iterdir())
            assert not there(source)
            assert (tmp_path / "tree").read_bytes() == b"of another disk"
            assert parts.litter() == []


async def test_a_link_to_nothing_is_not_left_behind(tmp_path: Path) -> None:
    """Its disk may only be away: the directory stays, whole and declared."""
    async with rig(tmp_path, "one", "two") as parts:
        source = await parts.put("one", CACHE)
        (source / "layer").symlink_to(tmp_path / "away")
        with pytest.raises(Refused, match="'layer', which leads nowhere"):
            await parts.mover.move(CACHE, parts.ids["two"])
        place = Place(str(parts.path("one")), parts.ids["one"], CACHE, "node")
        with pytest.raises(Refused, match="leads nowhere"):
            set_aside(place, Expected(1, 1))
        assert await parts.holders(CACHE) == {"one": True}
        assert there(source / "layer")
        (tmp_path / "away").write_bytes(b"back")
        await parts.mover.move(CACHE, parts.ids["two"])
        assert (parts.path("two") / str(CACHE) / "layer").read_bytes() == b"back"
