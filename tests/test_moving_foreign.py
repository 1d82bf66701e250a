"""Moves and acquisitions from nodes of other programs: one tar, no listings, and a bare DELETE."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from sectorfs.errors import NoSource, Refused, SectorFSError, SourceFailed, Stale, Unreachable
from sectorfs.index.protocol import Declaration, FsStat, HealthReport, StorageInfo
from sectorfs.stores.manifest import Manifest, leaf_hashes
from sectorfs.stores.rolls import make_roll
from sectorfs.stores.scan import file_facts
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, StorageID
from tests.archive_fixtures import COMPLETE, FINALIZED, MTIME_NS, Foreign, foreign
from tests.moving_fixtures import CACHE, SEALED, Rig, content, rig, there

FAR = StorageID("elsewhere")
UPDATE_CACHE = SectorFile(FileType.UPDATE_CACHE, CACHE.sector)
LABELS = {name: data for name, data in COMPLETE.items() if "-layer-" in name or "tree-d" in name}
SMALL = {name: data for name, data in COMPLETE.items() if "tree-c" not in name}


def facts_of(files: dict[str, bytes]) -> Facts:
    members = tuple(MemberFacts(name, len(files[name]), MTIME_NS) for name in sorted(files))
    return Facts(sum(len(data) for data in files.values()), MTIME_NS, members)


class World:
    """A path here, and a node of another program whose storage declares its file."""

    def __init__(self, parts: Rig, node: Foreign, file: SectorFile) -> None:
        self.parts = parts
        self.node = node
        self.file = file
        self.to = parts.ids["mine"]
        self.mine = parts.path("mine") / str(file)

    async def move(self) -> str:
        return (await self.parts.mover.move(self.file, self.to)).how

    async def holders(self) -> dict[StorageID, bool]:
        """Storages that declare the file, and whether primary."""
        held = await self.parts.index.sector(self.file.sector)
        return {item.storage: item.primary for item in held if item.file == self.file}

    async def require_untouched(self) -> None:
        """The source is whole and declared, and nothing half is here."""
        assert not self.node.gone
        assert (await self.holders()).get(FAR) is True
        assert self.parts.litter() == []

    async def require_moved(self) -> None:
        assert self.node.gone
        assert await self.holders() == {self.to: True}
        assert content(self.mine) == self.node.files
        assert self.parts.litter() == []


@asynccontextmanager
async def world(
    root: Path, node: Foreign, file: SectorFile = CACHE, *, told: Facts | None = None
) -> AsyncIterator[World]:
    node.path = f"/remote/{file}"
    async with foreign(node) as url, rig(root, "mine") as parts:
        info = StorageInfo(storage=FAR, urls=(url,), can_store=True)
        await parts.index.attach(info, FsStat())
        await parts.index.report_health(FAR, HealthReport(stat=FsStat()))
        await parts.index.declare([Declaration(file, FAR, True, told)])
        yield World(parts, node, file)


def requests(node: Foreign, method: str) -> list[str]:
    return [one for one in node.requests if one.startswith(method)]


# --- what is moved ---


@pytest.mark.parametrize("kind", ["curio", "lotus"])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("file", [CACHE, UPDATE_CACHE])
async def test_a_directory_is_moved(
    tmp_path: Path, kind: str, told: bool, file: SectorFile
) -> None:
    files = FINALIZED | ({"snap-vproof.json": b"[]"} if file is UPDATE_CACHE else {})
    node = Foreign("", files, kind)
    async with world(tmp_path, node, file, told=facts_of(files) if told else None) as it:
        assert await it.move() == "fetched"
        await it.require_moved()
        assert requests(node, "DELETE") == [f"DELETE {node.path}?keep={it.to}"]
        # Every file was asked for, though all that are known of fit the minimal set.
        assert f"GET {node.path}" in node.requests
        assert not any("mincache" in one for one in node.requests)
        assert all(os.stat(it.mine / name).st_mtime_ns == MTIME_NS for name in files)
        held = await it.parts.index.sector(file.sector)
        assert [one.facts for one in held] == [file_facts(str(it.parts.path("mine")), it.to, file)]


@pytest.mark.parametrize("files", [COMPLETE, LABELS, {**FINALIZED, "batch.json": b"{}"}])
async def test_directories_between_two_steps_of_sealing_are_moved(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    async with world(tmp_path, Foreign("", files, "lotus"), told=facts_of(files)) as it:
        await it.move()
        await it.require_moved()


@pytest.mark.parametrize("kind", ["curio", "lotus"])
async def test_a_regular_file_is_moved(tmp_path: Path, kind: str) -> None:
    node = Foreign("", {"": b"sealed" * 1000}, kind)
    async with world(tmp_path, node, SEALED) as it:
        assert await it.move() == "fetched"
        assert it.mine.read_bytes() == node.files[""]
        assert node.gone
        assert await it.holders() == {it.to: True}


async def test_the_source_is_asked_to_delete_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Foreign("", FINALIZED)
    async with world(tmp_path, node) as it:
        seen: list[object] = []
        remove = it.parts.mover._peers.remove

        async def removing(*arguments: object, **options: object) -> None:
            seen.append((await it.holders(), content(it.mine), set(options)))
            await remove(*arguments, **options)  # type: ignore[arg-type]  # passed through

        monkeypatch.setattr(it.parts.mover._peers, "remove", removing)
        await it.move()
        assert seen == [({it.to: True}, FINALIZED, {"keep"})]


@pytest.mark.parametrize("mode", ["copy", "move"])
async def test_a_directory_is_acquired(tmp_path: Path, mode: str) -> None:
    async with world(tmp_path, Foreign("", FINALIZED)) as it:
        async with it.parts.acquirer.acquire(
            CACHE.sector,
            CACHE.file_type,
            0,
            path_type="storage",
            mode=mode,  # type: ignore[arg-type]  # a literal
            sector_size=2048,
        ) as found:
            assert content(Path(found.paths[FileType.CACHE])) == FINALIZED
        if mode == "move":
            await it.require_moved()
        else:
            await it.require_untouched()
            assert await it.holders() == {FAR: True, it.to: False}


# --- what is not ---


@pytest.mark.parametrize("files", [SMALL, {"p_aux": b"p" * 64}, {}])
async def test_what_may_not_be_all_is_not_moved(tmp_path: Path, files: dict[str, bytes]) -> None:
    """Curio leaves out what it does not know; after the move that would be lost."""
    async with world(tmp_path, Foreign("", files)) as it:
        with pytest.raises(NoSource, match="may not be all"):
            await it.move()
        await it.require_untouched()
        assert not there(it.mine)


@pytest.mark.parametrize("told", [COMPLETE, SMALL])
async def test_another_directory_than_was_declared_is_not_moved(
    tmp_path: Path, told: dict[str, bytes]
) -> None:
    """A file of it does not travel, or it has one that nobody declared."""
    sent = COMPLETE if told is SMALL else SMALL
    async with world(tmp_path, Foreign("", sent, "lotus"), told=facts_of(told)) as it:
        with pytest.raises(NoSource, match="tree-c"):
            await it.move()
        await it.require_untouched()
        assert not there(it.mine)


@pytest.mark.parametrize("breaks", [True, False])
async def test_a_tar_that_breaks_off_moves_nothing(tmp_path: Path, breaks: bool) -> None:
    for cut in (0, 100, 512, 600, 1024, 1536, 2048, 2600):
        root = tmp_path / f"{cut}"
        root.mkdir()
        async with world(root, Foreign("", FINALIZED, "lotus", cut=cut, breaks=breaks)) as it:
            with pytest.raises(NoSource):
                await it.move()
            await it.require_untouched()
            assert not there(it.mine)


async def test_the_next_node_of_the_storage_is_asked(tmp_path: Path) -> None:
    broken, good = Foreign(f"/remote/{CACHE}", FINALIZED, cut=700), Foreign("", FINALIZED)
    async with foreign(broken) as url, world(tmp_path, good) as it:
        info = await it.parts.index.info(FAR)
        await it.parts.index.detach(FAR, info.urls[0])
        await it.parts.index.attach(
            StorageInfo(storage=FAR, urls=(url, *info.urls), can_store=True), FsStat()
        )
        await it.parts.index.declare([Declaration(CACHE, FAR, True, None)])
        await it.move()
        await it.require_moved()
        assert not broken.gone


# --- again ---


async def test_a_move_goes_on_where_an_earlier_one_ended(tmp_path: Path) -> None:
    """After the rename: what is there is compared with a tar that goes nowhere."""
    node = Foreign("", FINALIZED)
    async with world(tmp_path, node) as it:
        node.keeps = True
        with pytest.raises(SourceFailed):
            await it.move()
        assert await it.holders() == {FAR: True, it.to: True}
        await it.parts.index.drop([Declaration(CACHE, it.to, True, None).key])
        node.keeps = False
        inode = it.mine.stat().st_ino
        assert await it.move() == "was there"
        assert it.mine.stat().st_ino == inode
        await it.require_moved()


@pytest.mark.parametrize("change", ["content", "more", "less"])
async def test_what_else_lies_there_stays_and_so_does_the_source(
    tmp_path: Path, change: str
) -> None:
    async with world(tmp_path, Foreign("", FINALIZED)) as it:
        it.node.keeps = True
        with pytest.raises(SourceFailed):
            await it.move()
        it.node.keeps = False
        if change == "less":
            (it.mine / "t_aux").unlink()
        else:
            (it.mine / ("t_aux" if change == "content" else "other")).write_bytes(b"t" * 100)
        with pytest.raises(Refused, match="something else"):
            await it.move()
        await it.require_untouched()


# --- a source that does not delete ---


async def test_a_source_that_keeps_its_copy_keeps_its_declaration(tmp_path: Path) -> None:
    async with world(tmp_path, Foreign("", FINALIZED)) as it:
        it.node.keeps = True
        with pytest.raises(SourceFailed):
            await it.move()
        assert await it.holders() == {FAR: True, it.to: True}
        assert content(it.mine) == FINALIZED


async def test_a_source_that_has_nothing_any_more_says_500_and_that_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, Foreign("", FINALIZED)) as it:
        drop = it.parts.index.index.drop

        async def dropping(keys: object) -> None:
            await drop(keys)  # type: ignore[arg-type]  # passed through
            it.node.gone = True  # by somebody else, at this moment

        monkeypatch.setattr(it.parts.index.index, "drop", dropping)
        await it.move()
        await it.require_moved()


async def test_an_index_that_fails_before_the_drop_leaves_both(tmp_path: Path) -> None:
    async with world(tmp_path, Foreign("", FINALIZED)) as it:
        it.parts.index.away_for = {"drop"}
        with pytest.raises(Unreachable):
            await it.move()
        it.parts.index.away_for = set()
        assert not it.node.gone
        assert await it.holders() == {FAR: True, it.to: True}


async def test_nothing_is_deleted_when_our_copy_changed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, Foreign("", FINALIZED)) as it:
        declare = it.parts.index.index.declare

        async def declaring(items: object) -> None:
            await declare(items)  # type: ignore[arg-type]  # passed through
            if there(it.mine / "p_aux"):
                (it.mine / "p_aux").unlink()

        monkeypatch.setattr(it.parts.index.index, "declare", declaring)
        with pytest.raises(Stale):
            await it.move()
        assert not it.node.gone
        assert (await it.holders())[FAR] is True


async def test_a_move_cancelled_while_it_is_deleted_keeps_the_declaration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, Foreign("", FINALIZED)) as it:
        asked = trio.Event()

        async def never(*arguments: object, **options: object) -> None:
            asked.set()
            await trio.sleep_forever()

        monkeypatch.setattr(it.parts.mover._peers, "remove", never)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.move)
            await asked.wait()
            assert await it.holders() == {it.to: True}
            nursery.cancel_scope.cancel()
        assert await it.holders() == {FAR: True, it.to: True}
        assert it.parts.mover.moves() == []


async def test_an_error_of_ours_is_no_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, Foreign("", FINALIZED)) as it:

        def full(*arguments: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        with caplog.at_level(logging.WARNING), pytest.raises(SectorFSError) as caught:
            await it.move()
        monkeypatch.undo()
        assert type(caught.value).__name__ == "DiskFull"
        assert "source" not in caplog.text
        await it.require_untouched()
        assert it.parts.space.claims(it.to) == ()


# --- what is proved ---


def with_digest(file: SectorFile, files: dict[str, bytes]) -> Facts:
    """The facts of a sector file with these bytes, and the digest of them."""
    made = {name: Manifest.of_leaves(len(data), leaf_hashes(data)) for name, data in files.items()}
    if not file.file_type.is_directory:
        return Facts(len(files[""]), MTIME_NS, None, made[""].digest)
    roll = make_roll([(name, one.size, one.digest) for name, one in made.items()])
    return msgspec.structs.replace(facts_of(files), digest=roll.digest)


def changed(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same with one bit of the last file the other way."""
    name = max(files)
    data = bytearray(files[name])
    data[len(data) // 2] ^= 4
    return {**files, name: bytes(data)}


@pytest.mark.parametrize("kind", ["curio", "lotus"])
@pytest.mark.parametrize(
    ("file", "files"), [(CACHE, FINALIZED), (SEALED, {"": os.urandom(3_000_000)})]
)
async def test_what_comes_with_a_wrong_bit_is_not_moved(
    tmp_path: Path, kind: str, file: SectorFile, files: dict[str, bytes]
) -> None:
    node = Foreign("", changed(files), kind)
    async with world(tmp_path, node, file, told=with_digest(file, files)) as it:
        with pytest.raises(NoSource, match="gave wrong bytes"):
            await it.move()
        await it.require_untouched()
        assert not there(it.mine)
        node.files = files
        assert await it.move() == "fetched"
        assert node.gone
        assert await it.holders() == {it.to: True}
