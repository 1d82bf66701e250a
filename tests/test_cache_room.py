"""Room for what comes: made by evicting, within the limits unless somebody cannot read without."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from sectorfs.config import CacheLimits
from sectorfs.errors import DiskFull
from sectorfs.stores import cache_room
from sectorfs.stores.blocks import Identity
from sectorfs.stores.cache_room import CacheRoom
from sectorfs.stores.fetch_rules import SMALL
from sectorfs.types import FileType
from tests.cache_fixtures import SECOND, SIZE, CacheRig, cache_rig
from tests.local_fixtures import sector_file, until
from tests.moving_fixtures import there

ONE, TWO = (sector_file(FileType.SEALED, number) for number in (1, 2))
LARGE = SMALL + SIZE


async def room_of(rig: CacheRig, *, kept: bool = True) -> CacheRoom:
    await rig.notes.read()
    keeper = rig.keeper if kept else None
    return CacheRoom(rig.copies, rig.parts.store, rig.parts.space, keeper)


async def test_copies_go_for_a_large_file(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(LARGE)) as rig:
        copy = await rig.copy(ONE)
        room = await room_of(rig)
        async with room.reserve(TWO, None, LARGE):
            assert not there(copy)
            assert [claim.file for claim in rig.parts.space.claims(rig.copies.storage)] == [TWO]
        assert not rig.parts.space.claims(rig.copies.storage)


async def test_small_files_wait_for_nobody_to_go(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(1)) as rig:
        copy = await rig.copy(ONE)
        room = await room_of(rig)
        async with room.reserve(TWO, None, SMALL):
            assert there(copy)


async def test_beyond_the_limits_only_what_is_needed_comes(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(LARGE)) as rig:
        rig.busy.add(ONE)
        copy = await rig.copy(ONE)
        room = await room_of(rig)
        with pytest.raises(DiskFull, match="within its limits"):
            async with room.reserve(TWO, None, LARGE):
                pytest.fail("there is no room")
        async with room.reserve(TWO, None, LARGE, needed=True):
            assert there(copy)


async def test_who_needs_it_does_not_wait_long_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_room, "NEEDED_PATIENCE", 0.05)
    async with cache_rig(tmp_path, CacheLimits(LARGE)) as rig:
        copy = await rig.copy(ONE)
        room = await room_of(rig)
        answer, remove = trio.Event(), rig.parts.remover.remove

        async def slowly(*args: object, **kwargs: object) -> object:
            await answer.wait()
            return await remove(*args, **kwargs)  # type: ignore[arg-type]  # what it was given

        monkeypatch.setattr(rig.parts.remover, "remove", slowly)
        async with room.reserve(TWO, None, LARGE, needed=True):
            assert there(copy)
        answer.set()
        await until(lambda: not there(copy))  # it goes on all the same


async def test_what_is_there_of_a_file_is_not_asked_for_again(tmp_path: Path) -> None:
    """Else a file that takes most of the limit could never be gone on with."""
    async with cache_rig(tmp_path, CacheLimits(LARGE + SIZE)) as rig:
        rig.busy |= {ONE, TWO}
        kept = await rig.copies.partial(ONE, None, Identity(LARGE, SECOND))
        await kept.write([(0, os.urandom(SMALL))])
        await kept.sync()
        room = await room_of(rig)
        with pytest.raises(DiskFull):
            async with room.reserve(TWO, None, LARGE):
                pytest.fail("there is no room")
        async with room.reserve(ONE, None, LARGE):
            pass
        kept.close()
        assert await rig.copies.begun_bytes(ONE, None) >= SMALL
        await rig.copies.remove_partials(ONE)
        assert await rig.copies.begun_bytes(ONE, None) == 0


async def test_without_a_keeper_only_the_disk_counts(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(1)) as rig:
        room = await room_of(rig, kept=False)
        async with room.reserve(TWO, None, LARGE):
            pass
