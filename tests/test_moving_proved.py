"""Moves from a node of ours whose disk changed a bit: what is not proved is not moved."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from sectorfs.errors import NoSource
from sectorfs.index.protocol import Declaration
from sectorfs.stores.manifest import Manifest, leaf_hashes
from sectorfs.stores.rolls import make_roll
from sectorfs.stores.scan import file_facts
from sectorfs.types import SectorFile
from tests.moving_fixtures import CACHE, SEALED, two_nodes


@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_what_comes_from_a_node_with_a_wrong_bit_is_not_moved(
    tmp_path: Path, file: SectorFile
) -> None:
    async with two_nodes(tmp_path) as (here, away):
        path = await away.put("theirs", file)
        parts = {one.name: one for one in path.iterdir()} if path.is_dir() else {"": path}
        made = {
            name: Manifest.of_leaves(one.stat().st_size, leaf_hashes(one.read_bytes()))
            for name, one in parts.items()
        }
        roll = make_roll([(name, one.size, one.digest) for name, one in made.items()])
        facts = file_facts(str(away.path("theirs")), away.ids["theirs"], file)
        digest = roll.digest if file.file_type.is_directory else made[""].digest
        told = msgspec.structs.replace(facts, digest=digest)
        await away.index.declare([Declaration(file, away.ids["theirs"], True, told)])
        here.ids.update(away.ids)
        last = parts[max(parts)]
        right, times = last.read_bytes(), last.stat()
        last.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        os.utime(last, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(NoSource, match="gave wrong bytes"):
            await here.mover.move(file, here.ids["mine"])
        assert await here.holders(file) == {"theirs": True}
        assert here.litter() == []
        last.write_bytes(right)
        os.utime(last, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert (await here.mover.move(file, here.ids["mine"])).how == "fetched"
        assert await here.holders(file) == {"mine": True}
