"""Promised space at work: measured on real disks, shared by paths, counted in heartbeats."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from sectorfs.errors import DiskFull, NotFound, Refused
from sectorfs.stores.reservation import Claim
from sectorfs.types import StorageID
from tests.moving_fixtures import CACHE, OWNER, SEALED, UNSEALED, Rig, file_system, rig

MIB = 1 << 20


def claim(parts: Rig, name: str, size: int, **changes: object) -> Claim:
    values = {"storage": parts.ids[name], "file": SEALED, "size": size, "place": "fetching"}
    return Claim(**{**values, **changes})  # type: ignore[arg-type]  # fields by name


async def reserved(parts: Rig, name: str) -> int:
    return (await parts.store.stat(parts.ids[name])).reserved


async def available(parts: Rig, name: str) -> int:
    return (await parts.store.stat(parts.ids[name])).available


@pytest.mark.mount
async def test_promised_space_is_counted_until_it_is_written(tmp_path: Path) -> None:
    with file_system(tmp_path, "one", size="64M"):
        async with rig(tmp_path, "one") as parts:
            before = await available(parts, "one")
            async with parts.space.reserve([claim(parts, "one", 40 * MIB)]):
                assert await reserved(parts, "one") == 40 * MIB
                assert await available(parts, "one") <= before - 40 * MIB
                fetching = parts.path("one") / "sealed" / "fetching"
                fetching.mkdir(parents=True)
                partly = fetching / f"{SEALED.sector.name}.{OWNER}.in.tmp"
                partly.write_bytes(os.urandom(10 * MIB))
                assert await reserved(parts, "one") == 30 * MIB
                with pytest.raises(DiskFull):
                    async with parts.space.reserve([claim(parts, "one", 25 * MIB, file=UNSEALED)]):
                        raise AssertionError("was granted")
                async with parts.space.reserve([claim(parts, "one", 20 * MIB, file=UNSEALED)]):
                    assert await reserved(parts, "one") == 50 * MIB
            assert await reserved(parts, "one") == 0
            assert parts.space.claims(parts.ids["one"]) == ()


@pytest.mark.mount
async def test_two_paths_on_one_disk_share_its_room(tmp_path: Path) -> None:
    with file_system(tmp_path, "disk", size="32M"):
        async with rig(tmp_path, "disk/a", "disk/b") as parts:
            async with parts.space.reserve([claim(parts, "disk/a", 20 * MIB)]):
                assert await reserved(parts, "disk/b") == 0
                assert await available(parts, "disk/b") < 13 * MIB
                with pytest.raises(DiskFull):
                    async with parts.space.reserve([claim(parts, "disk/b", 20 * MIB)]):
                        raise AssertionError("was granted")


async def test_a_limit_counts_what_is_promised_and_what_came_since_it_was_measured(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path) as parts:
        await parts.add("one", max_storage=10 * MIB)
        (path,) = parts.store.paths()
        with pytest.raises(DiskFull):
            async with parts.space.reserve([claim(parts, "one", MIB)]):
                raise AssertionError("was granted before its use was known")
        path.used, path.used_at = await path.measure(), trio.current_time()
        async with parts.space.reserve([claim(parts, "one", 6 * MIB)]):
            assert await available(parts, "one") <= 4 * MIB
            with pytest.raises(DiskFull):
                async with parts.space.reserve([claim(parts, "one", 5 * MIB, file=UNSEALED)]):
                    raise AssertionError("was granted")
        # Written, and not yet measured.
        with pytest.raises(DiskFull):
            async with parts.space.reserve([claim(parts, "one", 5 * MIB, file=UNSEALED)]):
                raise AssertionError("was granted")
        path.used, path.used_at = await path.measure(), trio.current_time() + 1
        async with parts.space.reserve([claim(parts, "one", 5 * MIB, file=UNSEALED)]):
            pass


async def test_what_failed_or_was_cancelled_holds_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path) as parts:
        await parts.add("one", max_storage=10 * MIB)
        (path,) = parts.store.paths()
        path.used, path.used_at = 0, trio.current_time()
        with pytest.raises(ZeroDivisionError):
            async with parts.space.reserve([claim(parts, "one", 9 * MIB)]):
                raise ZeroDivisionError
        with trio.CancelScope() as scope:
            async with parts.space.reserve([claim(parts, "one", 9 * MIB)]):
                scope.cancel()
                await trio.sleep_forever()
        async with parts.space.reserve([claim(parts, "one", 9 * MIB)]):
            assert len(parts.space.claims(parts.ids["one"])) == 1


async def test_claims_that_make_no_sense(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        with pytest.raises(NotFound):
            async with parts.space.reserve([claim(parts, "one", 1, storage=StorageID("x"))]):
                raise AssertionError("was granted")
        async with parts.space.reserve([claim(parts, "one", 1)]):
            with pytest.raises(Refused):
                async with parts.space.reserve([claim(parts, "one", 1)]):
                    raise AssertionError("was granted twice")


async def test_a_heartbeat_tells_what_is_promised(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", heartbeat=0.05) as parts, trio.open_nursery() as nursery:
        await nursery.start(parts.store.run)
        async with parts.space.reserve([claim(parts, "one", MIB)]):
            await _until_reserved(parts, MIB)
        await _until_reserved(parts, 0)
        nursery.cancel_scope.cancel()


async def _until_reserved(parts: Rig, size: int) -> None:
    with trio.fail_after(10):
        while True:
            (status,) = await parts.index.index.storages()
            if status.stat.reserved == size:
                return
            await trio.sleep(0.02)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("final", "{sector}"),
        ("temporary", "{sector}.tmp"),
        ("fetching", "fetching/{sector}"),
        ("fetching", f"fetching/{{sector}}.{OWNER}.in.tmp"),
    ],
)
async def test_bytes_count_where_they_are_written(tmp_path: Path, place: str, name: str) -> None:
    async with rig(tmp_path, "one") as parts:
        target = parts.path("one") / "cache" / name.format(sector=CACHE.sector.name)
        target.mkdir(parents=True)
        (target / "p_aux").write_bytes(b"p" * 65536)
        async with parts.space.reserve([claim(parts, "one", MIB, file=CACHE, place=place)]):
            assert await reserved(parts, "one") == MIB - 65536


async def test_a_file_of_a_directory_is_counted_apart(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        target = parts.path("one") / "cache" / "fetching" / CACHE.sector.name
        target.mkdir(parents=True)
        (target / "p_aux.tmp").write_bytes(b"p" * 65536)
        (target / "t_aux.tmp").write_bytes(b"t" * 65536)
        async with parts.space.reserve([claim(parts, "one", MIB, file=CACHE, member="p_aux")]):
            assert await reserved(parts, "one") == MIB - 65536


@pytest.mark.parametrize(
    ("member", "name"), [("", "s-t01000-7.part"), ("p_aux", "s-t01000-7/p_aux.part")]
)
async def test_of_a_file_that_came_in_part_the_rest_is_promised(
    tmp_path: Path, member: str, name: str
) -> None:
    file = CACHE if member else SEALED
    async with rig(tmp_path, "one") as parts:
        part = parts.path("one") / file.file_type.dir_name / "fetching" / name
        part.parent.mkdir(parents=True)
        part.write_bytes(b"p" * 65536)
        os.truncate(part, MIB)
        async with parts.space.reserve([claim(parts, "one", MIB, file=file, member=member)]):
            assert await reserved(parts, "one") == MIB - 65536
