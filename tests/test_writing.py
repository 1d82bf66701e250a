"""Files are synced while they come, so that no sync takes as long as a disk that hangs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sectorfs.stores import writing
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.writing import SteadyWrites
from sectorfs.types import SectorFile
from tests.moving_fixtures import CACHE, SEALED, content, two_nodes


async def test_every_so_many_bytes_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SYNC_EVERY", 100)
    steps: list[str] = []
    lane = Lane("disk", deadline=5)
    descriptor = Descriptor(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT))
    monkeypatch.setattr(os, "fdatasync", lambda fd: steps.append("sync"))
    run = SteadyWrites(lane.finish, descriptor)
    for done in (40, 80, 120, 130, 260, 260):
        await run(lambda done=done: steps.append(str(done)), what="write")
        run.wrote(done)
    descriptor.close()
    assert steps == ["40", "80", "120", "sync", "130", "260", "sync", "260"]


BIG = b"sector" * 500_000


@pytest.mark.parametrize(("file", "whole"), [(SEALED, BIG), (CACHE, {"p_aux": b"p", "t_aux": BIG})])
async def test_what_is_moved_from_another_node_is_synced_as_it_comes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: SectorFile,
    whole: bytes | dict[str, bytes],
) -> None:
    monkeypatch.setattr(writing, "SYNC_EVERY", 1)
    monkeypatch.setattr("sectorfs.wire.response.HOP", 100_000)
    synced: list[int] = []
    fdatasync = os.fdatasync

    def syncing(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", syncing)
    async with two_nodes(tmp_path) as (here, away):
        await away.put("theirs", file, whole)
        here.ids.update(away.ids)
        await here.mover.move(file, here.ids["mine"])
        assert len(synced) >= 3
        assert content(here.path("mine") / str(file)) == whole
