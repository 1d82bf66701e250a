"""What looks at the files of a path needs: paths, an Index and its mirror, manifests; no node."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from sectorfs.config import TimeoutsConfig
from sectorfs.index.catalog import Catalog
from sectorfs.index.feed import Feed
from sectorfs.index.protocol import Declaration, FsStat
from sectorfs.server.routes import make_handler
from sectorfs.stores import layout
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.manifest import Manifest, directory_digest, leaf_hashes
from sectorfs.stores.manifest_store import Key, ManifestStore
from sectorfs.stores.mending import Mender
from sectorfs.stores.others import Others
from sectorfs.stores.scan import file_facts
from sectorfs.stores.scrub import Examined, Examiner
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.verdicts import State
from sectorfs.types import MemberFacts, SectorFile
from sectorfs.wire import tokens
from sectorfs.wire.client import Client
from tests.cluster_fixtures import noise
from tests.moving_fixtures import SECRET, Rig, beat, no_rpc, rig, two_nodes
from tests.wire_fixtures import running

SIZE = 8 * layout.MIB
"""Bytes of a sector in these tests."""


class Freely:
    """A meter that never waits, and counts."""

    def __init__(self) -> None:
        self.bytes = 0

    async def turn(self, path: LocalPath, count: int) -> None:
        await trio.lowlevel.checkpoint()

    async def done(self, path: LocalPath, count: int, seconds: float) -> None:
        self.bytes += count
        await trio.lowlevel.checkpoint()


def cache_files(seed: str, sector_size: int = SIZE) -> dict[str, bytes]:
    """A finalized cache directory."""
    return {
        name: noise(f"{seed} {name}", lengths.high if name != "t_aux" else 317)
        for name, lengths in layout.finalized_cache(sector_size).items()
    }


class ScrubRig:
    """One node's parts."""

    def __init__(self, parts: Rig, client: Client, *, repo: str = "repo") -> None:
        self.parts = parts
        self.catalog = Catalog()
        index: Any = parts.index
        self.feed = Feed(index, self.catalog, heartbeat=3600, on_change=lambda _: None)
        self.meter = Freely()
        self.manifests = ManifestStore(parts.root / repo / "manifests", deadline=10)
        self.others = Others(
            catalog=self.catalog,
            local=parts.store,
            peers=PeerClient(client),
            manifests=self.manifests,
            own_urls=frozenset(parts.store.urls),
            cutoff=50,
        )
        self.repaired: list[tuple[SectorFile, str | None]] = []
        self.mender = Mender(
            parts.root / repo / "scrub" / "repairs",
            index=index,
            catalog=self.catalog,
            others=self.others,
            turns=parts.turns,
            owner="node-under-test",
            deadline=10,
            on_repaired=lambda file, member: self.repaired.append((file, member)),
        )
        self.examiner = Examiner(
            index=index, catalog=self.catalog, manifests=self.manifests, others=self.others
        )

    async def serve(self, *, task_status: trio.TaskStatus[str]) -> None:
        """Serve the files and manifests of the paths; tells the base URL."""
        handler = make_handler(
            self.parts.store,
            secret=SECRET,
            rpc=no_rpc,
            health=dict,
            status=str,
            deadline=5,
            manifests=self.manifests,
        )
        async with running(handler) as port:
            task_status.started(f"http://127.0.0.1:{port}/remote")
            await trio.sleep_forever()

    def path(self, name: str) -> LocalPath:
        """An attached path."""
        return next(one for one in self.parts.store.paths() if one.storage == self.parts.ids[name])

    async def sync(self) -> None:
        """Have the mirror know all that the Index knows."""
        await self.feed.step(wait=0)

    async def put(
        self,
        name: str,
        file: SectorFile,
        content: bytes | dict[str, bytes],
        *,
        primary: bool = True,
        hashed: bool = False,
    ) -> Path:
        """Write a file on a path and declare it; hashed: as the node does behind, too."""
        where = await self.parts.put(name, file, content, primary=primary)
        if hashed:
            await self.hash(name, file, primary=primary)
        await self.sync()
        return where

    async def hash(
        self, name: str, file: SectorFile, *, primary: bool = True, keep: bool = True
    ) -> bytes:
        """Make the manifests of a file and declare its digest; returned."""
        storage = self.parts.ids[name]
        root = self.parts.path(name)
        facts = file_facts(str(root), storage, file)
        digests = []
        parts = (MemberFacts("", facts.size, facts.mtime_ns),)
        for part in parts if facts.members is None else facts.members:
            data = (root / str(file) / part.name if part.name else root / str(file)).read_bytes()
            manifest = Manifest.of_leaves(part.size, leaf_hashes(data))
            digests.append((part.name, part.size, manifest.digest))
            if keep:
                await self.manifests.save(self.key(name, file, part), manifest)
        digest = directory_digest(digests) if facts.members is not None else digests[0][2]
        await self.declare(name, file, digest, primary=primary)
        return digest

    def key(self, name: str, file: SectorFile, part: MemberFacts) -> Key:
        """Where the manifest of a file is kept."""
        storage = self.parts.ids[name]
        return Key(storage, file, part.name or None, part.size, part.mtime_ns)

    async def declare(
        self, name: str, file: SectorFile, digest: bytes = b"", *, primary: bool = True
    ) -> None:
        """Declare a file as it lies there."""
        storage = self.parts.ids[name]
        facts = file_facts(str(self.parts.path(name)), storage, file)
        facts = msgspec.structs.replace(facts, digest=digest)
        await self.parts.index.declare([Declaration(file, storage, primary, facts)])
        await self.sync()

    async def examine(self, name: str, file: SectorFile) -> Examined:
        """Look at a file, with all that the Index knows."""
        await self.sync()
        found = await self.examiner.examine(self.path(name), file, self.meter)
        await self.sync()
        return found

    async def mend(self, name: str, file: SectorFile, *, primary: bool = True) -> Examined:
        """Look at a file, and repair what is damaged."""
        found = await self.examine(name, file)
        return await self.mender.mend(self.path(name), file, found, primary=primary)

    async def states(self, name: str, file: SectorFile) -> dict[str, State]:
        """What is found, by file."""
        found = await self.examine(name, file)
        return {one.member or "": one.state for one in found.findings}


@asynccontextmanager
async def scrub_rig(root: Path, *names: str, **changes: Any) -> AsyncIterator[ScrubRig]:
    """Paths by name on one node, and everything that looks at them."""
    async with rig(root, *names, **changes) as parts, a_client() as client:
        found = ScrubRig(parts, client)
        await found.sync()
        yield found
        found.manifests.close()


def a_client() -> Client:
    """The way to other nodes."""
    return Client(TimeoutsConfig(), token=tokens.sign(SECRET, ("read", "admin")))


@asynccontextmanager
async def two_scrub_rigs(root: Path) -> AsyncIterator[tuple[ScrubRig, ScrubRig]]:
    """Nodes with a path each, ``mine`` and ``theirs``; the second serves the first."""
    async with (
        two_nodes(root) as (here, away),
        a_client() as client,
        trio.open_nursery() as nursery,
    ):
        ours = ScrubRig(here, client, repo="ours")
        theirs = ScrubRig(away, client, repo="theirs")
        url = await nursery.start(theirs.serve)
        info = await away.index.info(away.ids["theirs"])
        old = info.urls[0]
        await away.index.attach(msgspec.structs.replace(info, urls=(url,)), FsStat())
        await away.index.detach(info.storage, old)
        await beat(away)
        await ours.sync()
        await theirs.sync()
        yield ours, theirs
        for one in (ours, theirs):
            one.manifests.close()
        nursery.cancel_scope.cancel()


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file, as a disk does: without a trace in its times."""
    times = path.stat()
    with path.open("r+b") as stream:
        stream.seek(bit // 8)
        (byte,) = stream.read(1)
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
