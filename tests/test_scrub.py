"""What a look at every byte of a sector file finds: every state, on files of every kind."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

from sectorfs.errors import Unreachable
from sectorfs.stores.manifest import BLOCK, LEAF, Manifest, leaf_hashes
from sectorfs.stores.medium import CHUNK, Hashes, Medium
from sectorfs.types import FileType, MemberFacts, SectorFile
from tests.cluster_fixtures import noise
from tests.hung_disk import hung_disk
from tests.local_fixtures import sector_file
from tests.scrub_fixtures import SIZE, ScrubRig, cache_files, flip, scrub_rig, two_scrub_rigs

SEALED = sector_file(FileType.SEALED, 7)
CACHE = sector_file(FileType.CACHE, 7)
UNSEALED = sector_file(FileType.UNSEALED, 7)
PIECE = sector_file(FileType.PIECE, 7, miner=0)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[ScrubRig]:
    async with scrub_rig(tmp_path, "disk", "other") as found:
        yield found


# --- well, or not known ---


async def test_what_was_hashed_and_is_as_it_was_is_ok(node: ScrubRig) -> None:
    await node.put("disk", SEALED, noise("sealed", SIZE), hashed=True)
    await node.put("disk", CACHE, cache_files("cache"), hashed=True)
    assert await node.states("disk", SEALED) == {"": "ok"}
    assert await node.states("disk", CACHE) == dict.fromkeys(cache_files("cache"), "ok")
    assert node.meter.bytes == SIZE + sum(map(len, cache_files("cache").values()))


async def test_what_was_never_hashed_is_unproved_once_and_told_from_then_on(
    node: ScrubRig,
) -> None:
    await node.put("disk", SEALED, noise("sealed", SIZE))
    await node.put("disk", CACHE, cache_files("cache"))
    assert await node.states("disk", SEALED) == {"": "unproved"}
    assert await node.states("disk", CACHE) == dict.fromkeys(cache_files("cache"), "unproved")
    for file in (SEALED, CACHE):
        facts = node.catalog.declared(file, node.parts.ids["disk"])
        assert facts is not None
        assert len(facts.digest) == 32
        assert set((await node.states("disk", file)).values()) == {"ok"}
    flip(node.parts.path("disk") / str(SEALED), 8 * (BLOCK + 5))
    assert await node.states("disk", SEALED) == {"": "damaged"}


async def test_unproved_files_stay_so_while_nothing_can_be_kept(node: ScrubRig) -> None:
    await node.put("disk", SEALED, noise("sealed", SIZE))
    node.manifests.root.parent.mkdir(exist_ok=True)
    node.manifests.root.write_bytes(b"no directory")
    for _ in range(2):
        assert await node.states("disk", SEALED) == {"": "unproved"}
    facts = node.catalog.declared(SEALED, node.parts.ids["disk"])
    assert facts is not None
    assert not facts.digest, "nobody could ask for what proves it"


async def test_while_the_index_is_away_files_are_looked_at(node: ScrubRig) -> None:
    await node.put("disk", SEALED, noise("sealed", SIZE))
    await node.sync()
    node.parts.index.away = True
    found = await node.examiner.examine(node.path("disk"), SEALED, node.meter)
    assert found.state == "unproved"
    (node.parts.path("disk") / str(SEALED)).unlink()
    with pytest.raises(Unreachable):
        await node.examiner.examine(node.path("disk"), SEALED, node.meter)


async def test_a_manifest_alone_proves_and_its_digest_is_declared(node: ScrubRig) -> None:
    await node.put("disk", SEALED, noise("sealed", SIZE), hashed=True)
    await node.put("disk", CACHE, cache_files("cache"), hashed=True)
    for file in (SEALED, CACHE):
        known = node.catalog.declared(file, node.parts.ids["disk"])
        await drop(node, file)
        await node.declare("disk", file)
        assert set((await node.states("disk", file)).values()) == {"ok"}
        assert node.catalog.declared(file, node.parts.ids["disk"]) == known


async def drop(node: ScrubRig, file: SectorFile) -> None:
    """Have the Index forget a file; the mirror does not know yet."""
    entry = node.catalog.entry(file)
    assert entry is not None
    await node.parts.index.drop([one.key for one in entry.declarations])


async def test_the_digest_of_the_same_content_elsewhere_proves_a_copy(node: ScrubRig) -> None:
    data = noise("sealed", SIZE)
    source = await node.put("disk", SEALED, data, hashed=True)
    times = source.stat().st_mtime_ns
    copy = node.parts.path("other") / str(SEALED)
    copy.parent.mkdir()
    copy.write_bytes(data)
    os.utime(copy, ns=(times, times))
    await node.declare("other", SEALED, primary=False)
    assert await node.states("other", SEALED) == {"": "ok"}
    flip(copy, 77)
    assert await node.states("other", SEALED) == {"": "damaged"}


# --- damage ---


async def test_every_one_of_a_thousand_bits_is_found(node: ScrubRig) -> None:
    """At rest, in files of all kinds; each look sees all the bits flipped since the last."""
    draw = Random(1000)
    data = {SEALED: noise("sealed", SIZE), PIECE: noise("piece", 3 * BLOCK + 11)}
    for file, content in data.items():
        await node.put("disk", file, content, hashed=True)
    files = cache_files("cache")
    await node.put("disk", CACHE, files, hashed=True)
    targets = [(file, "", len(content)) for file, content in data.items()]
    targets += [(CACHE, name, len(content)) for name, content in files.items()]
    left = 1000
    while left:
        flipped: dict[tuple[object, str], set[int]] = {}
        for _ in range(min(left, 40)):
            file, name, size = draw.choice(targets)
            bit = draw.randrange(8 * size)
            where = node.parts.path("disk") / str(file)
            flip(where / name if name else where, bit)
            flipped.setdefault((file, name), set()).symmetric_difference_update({bit})
            left -= 1
        for file, name, _ in targets:
            bits = flipped.get((file, name), set())
            found = await node.examine("disk", file)
            (one,) = [one for one in found.findings if (one.member or "") == name]
            assert one.state == ("damaged" if bits else "ok")
            assert set(one.bad) == {bit // 8 // BLOCK for bit in bits}
            where = node.parts.path("disk") / str(file)
            for bit in bits:
                flip(where / name if name else where, bit)


async def test_ten_thousand_damaged_blocks_are_named(tmp_path: Path) -> None:
    """A file that lost everything, and says so in one range."""
    async with scrub_rig(tmp_path, "disk") as node:
        blocks = 10_000
        where = await node.put("disk", PIECE, b"x")
        os.truncate(where, blocks * BLOCK)
        os.utime(where, ns=(10**18, 10**18))
        part = MemberFacts("", blocks * BLOCK, 10**18)
        leaves = leaf_hashes(bytes(LEAF)) * (blocks * BLOCK // LEAF)
        manifest = Manifest.of_leaves(part.size, leaves)
        await node.manifests.save(node.key("disk", PIECE, part), manifest)
        await node.declare("disk", PIECE, manifest.digest)
        with where.open("r+b") as stream:
            for block in range(blocks):
                os.pwrite(stream.fileno(), b"!", block * BLOCK + block % 1000)
        os.utime(where, ns=(10**18, 10**18))
        found = await node.examine("disk", PIECE)
        assert found.findings[0].bad == tuple(range(blocks))
        assert found.wanted[""].outline.digest == manifest.digest


async def test_damage_is_located_by_what_another_holder_knows(tmp_path: Path) -> None:
    """Of what was never hashed here: by the manifest, and by the roll, of another node."""
    async with two_scrub_rigs(tmp_path) as (ours, theirs):
        data, files = noise("sealed", SIZE), cache_files("cache")
        for file, content in ((SEALED, data), (CACHE, files)):
            await theirs.put("theirs", file, content, hashed=True)
            await ours.put("mine", file, content)
            digest = await ours.hash("mine", file, keep=False)
            assert digest
        root = ours.parts.path("mine")
        assert await ours.states("mine", SEALED) == {"": "ok"}
        flip(root / str(SEALED), 8 * 3 * BLOCK)
        (found,) = (await ours.examine("mine", SEALED)).findings
        assert (found.state, found.bad, found.located) == ("damaged", (3,), True)
        flip(root / str(CACHE) / "p_aux", 3)
        states = await ours.states("mine", CACHE)
        assert states == dict.fromkeys(files, "ok") | {"p_aux": "damaged"}


async def test_damage_that_nobody_can_locate_is_told_all_the_same(node: ScrubRig) -> None:
    where = await node.put("disk", SEALED, noise("sealed", SIZE))
    await node.hash("disk", SEALED, keep=False)
    flip(where, 8 * 3 * BLOCK)
    (found,) = (await node.examine("disk", SEALED)).findings
    assert (found.state, len(found.bad), found.located) == ("damaged", SIZE // BLOCK, False)
    where = await node.put("disk", CACHE, cache_files("cache"))
    await node.hash("disk", CACHE, keep=False)
    flip(where / "p_aux", 3)
    findings = (await node.examine("disk", CACHE)).findings
    assert {one.state for one in findings} == {"damaged"}
    assert not any(one.located for one in findings)


async def test_damage_is_never_hashed_as_if_it_were_right(node: ScrubRig) -> None:
    where = await node.put("disk", SEALED, noise("sealed", SIZE))
    await node.hash("disk", SEALED, keep=False)
    flip(where, 5)
    for _ in range(3):
        assert await node.states("disk", SEALED) == {"": "damaged"}


# --- changed ---


async def test_a_file_that_is_not_what_was_declared_has_changed(
    node: ScrubRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sectorfs.stores.scrub.SETTLE", 0.01)
    where = await node.put("disk", SEALED, noise("sealed", SIZE), hashed=True)
    os.utime(where, ns=(1, 1))
    (found,) = (await node.examine("disk", SEALED)).findings
    assert (found.state, found.detail) == ("changed", "is not what was declared")
    await node.declare("disk", SEALED)
    assert await node.states("disk", SEALED) == {"": "unproved"}


async def test_other_bytes_than_the_newest_primary_copy_has(node: ScrubRig) -> None:
    await node.put("disk", SEALED, noise("new", SIZE), hashed=True)
    where = await node.put("other", SEALED, noise("old", SIZE))
    os.utime(where, ns=(1, 1))
    await node.hash("other", SEALED)
    (found,) = (await node.examine("other", SEALED)).findings
    assert found.state == "changed"
    assert "newest primary" in found.detail
    assert await node.states("disk", SEALED) == {"": "ok"}


async def test_a_digest_that_the_bytes_hashed_here_never_had(node: ScrubRig) -> None:
    for file, content in ((SEALED, noise("sealed", SIZE)), (CACHE, cache_files("cache"))):
        await node.put("disk", file, content, hashed=True)
        await node.declare("disk", file, b"?" * 32)
        (found,) = [one for one in (await node.examine("disk", file)).findings if not one.member]
        assert (found.state, found.member) == ("changed", None)


# --- incomplete ---


async def test_files_that_are_cut_off_or_lost_are_incomplete(node: ScrubRig) -> None:
    files = cache_files("cache")
    await node.put("disk", sector_file(FileType.SEALED, 8), noise("cut", SIZE - 1), hashed=True)
    assert await node.states("disk", sector_file(FileType.SEALED, 8)) == {"": "incomplete"}
    await node.put("disk", SEALED, noise("sealed", SIZE), hashed=True)
    lost = {name: data for name, data in files.items() if name != "t_aux"}
    await node.put("disk", CACHE, lost, hashed=True)
    states = await node.states("disk", CACHE)
    assert states == dict.fromkeys(lost, "ok") | {"t_aux": "incomplete"}


async def test_an_empty_directory_is_incomplete(node: ScrubRig) -> None:
    await node.put("disk", SEALED, noise("sealed", SIZE))
    await node.put("disk", CACHE, {})
    states = await node.states("disk", CACHE)
    assert states == dict.fromkeys(cache_files("cache"), "incomplete")


async def test_what_is_declared_and_gone_is_incomplete_and_what_was_dropped_is_nothing(
    node: ScrubRig,
) -> None:
    where = await node.put("disk", SEALED, noise("sealed", SIZE), hashed=True)
    where.unlink()
    (found,) = (await node.examine("disk", SEALED)).findings
    assert found.state == "incomplete"
    assert "not there" in found.detail or "no such" in found.detail
    await drop(node, SEALED)
    found_now = await node.examiner.examine(node.path("disk"), SEALED, node.meter)
    assert found_now.findings == ()


async def test_trailers_of_unsealed_files_are_read(node: ScrubRig) -> None:
    data = noise("unsealed", SIZE)
    full = bytes.fromhex("0410109004000000")
    where = await node.put("disk", UNSEALED, data + full, hashed=True)
    assert await node.states("disk", UNSEALED) == {"": "ok"}
    where.write_bytes(data + b"\xff" * 8)
    os.utime(where, ns=(1, 1))
    await node.hash("disk", UNSEALED)
    (found,) = (await node.examine("disk", UNSEALED)).findings
    assert found.state == "damaged"
    assert "bitmap" in found.detail


async def test_nothing_is_missed_where_sectors_are_sealed(tmp_path: Path) -> None:
    async with scrub_rig(tmp_path) as node:
        await node.parts.add("disk", can_seal=True)
        await node.sync()
        await node.put("disk", CACHE, {"sc-02-data-layer-1.dat": b"half"}, hashed=True)
        assert await node.states("disk", CACHE) == {"sc-02-data-layer-1.dat": "ok"}


# --- unreadable ---


@pytest.mark.mount
async def test_blocks_that_the_disk_does_not_give_are_named(tmp_path: Path) -> None:
    with hung_disk(tmp_path) as disk:
        async with scrub_rig(tmp_path) as node:
            await node.parts.add("hung")
            await node.sync()
            await node.put("hung", PIECE, noise("piece", 24 * BLOCK), hashed=True)
            disk.fail("read", after=13 * BLOCK, only="s-t00-7")
            (found,) = (await node.examine("hung", PIECE)).findings
            assert found.state == "unreadable"
            assert found.bad[-1] == 23
            assert set(found.bad).isdisjoint(range(8)), "what came before the disk failed"
            assert found.located
            disk.go()
            assert await node.states("hung", PIECE) == {"": "ok"}


@pytest.mark.mount
async def test_a_disk_that_hangs_costs_one_deadline(tmp_path: Path) -> None:
    with hung_disk(tmp_path) as disk:
        async with scrub_rig(tmp_path) as node:
            await node.parts.add("hung")
            await node.sync()
            await node.put("hung", SEALED, noise("sealed", SIZE), hashed=True)
            node.path("hung").lane.deadline = 1
            disk.hang("read")
            (found,) = (await node.examine("hung", SEALED)).findings
            assert found.state == "unreadable"
            disk.go()


# --- what is not what it seems ---


async def test_of_two_primary_copies_that_differ_none_is_called_damaged(node: ScrubRig) -> None:
    """Before both were hashed nobody knows which one is."""
    data = noise("sealed", SIZE)
    first = await node.put("disk", SEALED, data)
    flip(first, 9)
    await node.hash("disk", SEALED)
    second = await node.put("other", SEALED, data)
    times = first.stat().st_mtime_ns
    os.utime(second, ns=(times, times))
    await node.declare("other", SEALED)
    found = await node.examine("other", SEALED)
    assert [one.state for one in found.findings] == ["changed"]
    assert found.wanted == {}, "nobody may overwrite it"


async def test_a_manifest_of_other_bytes_is_removed(node: ScrubRig) -> None:
    where = await node.put("disk", SEALED, noise("sealed", SIZE))
    digest = await node.hash("disk", SEALED, keep=False)
    facts = where.stat()
    part = MemberFacts("", facts.st_size, facts.st_mtime_ns)
    stale = Manifest.of_leaves(SIZE, leaf_hashes(noise("other", SIZE)))
    await node.manifests.save(node.key("disk", SEALED, part), stale)
    assert digest != stale.digest
    assert await node.states("disk", SEALED) == {"": "ok"}
    assert await node.manifests.load(node.key("disk", SEALED, part)) is None


async def test_a_disk_that_is_unmounted_lost_no_file(node: ScrubRig) -> None:
    await node.put("disk", SEALED, noise("sealed", SIZE), hashed=True)
    root = node.parts.path("disk")
    root.rename(root.with_name("away"))
    root.mkdir()
    found = await node.examine("disk", SEALED)
    assert [one.state for one in found.findings] == ["unreadable"]
    assert not node.path("disk").available


async def test_a_block_that_was_read_wrongly_once_is_no_damage(
    node: ScrubRig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await node.put("disk", SEALED, noise("sealed", SIZE), hashed=True)
    original, calls = Medium.hashes, []

    async def hashes(self: Medium, offset: int, length: int) -> Hashes:
        found = await original(self, offset, length)
        calls.append(offset)
        if len(calls) > 1:
            return found
        return Hashes(found.leaves, bytes(32) + found.blocks[32:])

    monkeypatch.setattr(Medium, "hashes", hashes)
    assert await node.states("disk", SEALED) == {"": "ok"}
    assert "was read wrongly once" in caplog.text
    assert len(calls) == SIZE // CHUNK + 1
