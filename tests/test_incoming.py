"""What comes into a storage path while its disk hangs, others write, or power may go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from sectorfs.errors import Refused, SectorFSError, StorageUnavailable
from sectorfs.stores.incoming import Incoming
from sectorfs.stores.lanes import Lane
from sectorfs.types import SectorFile
from tests.gates import Gate
from tests.local_fixtures import until
from tests.moving_fixtures import CACHE, MEMBERS, OWNER, SEALED, clone, rig, there

WHOLE = b"sector" * 10_000


async def test_what_was_there_already_is_synced_before_the_source_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page cache of a destination that nobody synced is no copy."""
    async with rig(tmp_path, "one", "two") as parts:
        source = await parts.put("one", CACHE)
        target = parts.path("two") / str(CACHE)
        target.parent.mkdir()
        clone(source, target)
        synced: dict[str, bool] = {}
        fsync = os.fsync

        def syncing(fd: int) -> None:
            synced.setdefault(os.readlink(f"/proc/self/fd/{fd}"), source.exists())
            fsync(fd)

        monkeypatch.setattr(os, "fsync", syncing)
        moved = await parts.mover.move(CACHE, parts.ids["two"])
        assert moved.how == "was there"
        for path in (*(target / name for name in MEMBERS), target, target.parent):
            assert synced.get(str(path)) is True, path


async def test_a_commit_given_up_never_shows_a_later_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk hung in the last step of one attempt and goes on during the next one."""
    async with rig(tmp_path, "one") as parts:
        (path,) = parts.store.paths()
        final = parts.path("one") / str(CACHE)
        first = Incoming(path, Lane(path.path, deadline=0.2), CACHE, owner=OWNER)
        await first.begin()
        gate = Gate(
            monkeypatch, "fsync", lambda fd: os.readlink(f"/proc/self/fd/{fd}") == first.where
        )
        with pytest.raises(StorageUnavailable):
            await first.commit(10**18)
        await first.discard()
        second = Incoming(path, Lane(path.path, deadline=5), CACHE, owner=OWNER)
        await second.begin()
        writer = await second.create("p_aux")
        gate.opened.set()
        await until(gate.passed.is_set)
        await until(lambda: first._lane.busy == 0)
        assert not there(final)
        writer.close()
        await second.discard()
        assert parts.litter() == []


@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_a_commit_given_up_puts_nothing_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: SectorFile
) -> None:
    """Nobody discarded it, either: the disk hung for that as well."""
    async with rig(tmp_path, "one") as parts:
        (path,) = parts.store.paths()
        incoming = Incoming(path, Lane(path.path, deadline=0.2), file, owner=OWNER)
        await incoming.begin()
        writer = await incoming.create("p_aux" if file == CACHE else "")
        await incoming.end(writer, 0, 10**18)
        writer.close()
        gate = Gate(monkeypatch, "utime" if file == CACHE else "stat", lambda *_, **__: True)
        with pytest.raises(StorageUnavailable):
            await incoming.commit(10**18)
        gate.opened.set()
        await until(lambda: incoming._lane.busy == 0)
        assert not there(parts.path("one") / str(file))
        await incoming.discard()
        assert parts.litter() == []


async def test_discarding_never_empties_what_gets_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that was given up goes on while its directory is being discarded."""
    async with rig(tmp_path, "one") as parts:
        (path,) = parts.store.paths()
        final = parts.path("one") / str(CACHE)
        incoming = Incoming(path, Lane(path.path, deadline=5), CACHE, owner=OWNER)
        await incoming.begin()
        for name, data in MEMBERS.items():
            writer = await incoming.create(name)
            with writer as fd:
                os.write(fd, data)
            await incoming.end(writer, len(data), 10**18)
            writer.close()
        gate = Gate(monkeypatch, "unlink", lambda name, **k: name in MEMBERS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(incoming.discard)
            await until(gate.met.is_set)
            with pytest.raises(SectorFSError):
                await incoming.commit(10**18)
            gate.opened.set()
        assert not there(final)
        assert parts.litter() == []


async def test_a_late_discard_spares_what_a_later_attempt_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sectorfs.stores.incoming.DISCARD_SECONDS", 0.1)
    async with rig(tmp_path, "one") as parts:
        (path,) = parts.store.paths()
        first = Incoming(path, Lane(path.path, deadline=5), SEALED, owner=OWNER)
        await first.begin()
        gate: Gate = Gate(
            monkeypatch, "open", lambda name, *_, **__: name == "fetching" and not gate.met.is_set()
        )
        await first.discard()
        assert gate.met.is_set()
        second = Incoming(path, Lane(path.path, deadline=5), SEALED, owner=OWNER)
        await second.begin()
        writer = await second.create("")
        gate.opened.set()
        await until(lambda: first._lane.busy == 0)
        await second.end(writer, 0, 10**18)
        writer.close()
        await second.commit(10**18)
        assert there(parts.path("one") / str(SEALED))


async def test_a_file_that_comes_at_the_last_moment_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program shares the path, and writes between the look and the rename."""
    async with rig(tmp_path, "one", "two") as parts:
        await parts.put("one", SEALED)
        target = parts.path("two") / str(SEALED)
        exists = "sectorfs.stores.incoming.exists"

        def look(name: str, dir_fd: int) -> bool:
            target.write_bytes(b"of somebody else")
            return False

        monkeypatch.setattr(exists, look)
        with pytest.raises(Refused):
            await parts.mover.move(SEALED, parts.ids["two"])
        assert target.read_bytes() == b"of somebody else"
        assert (parts.path("one") / str(SEALED)).read_bytes() == WHOLE
