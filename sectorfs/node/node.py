"""A running node: the composition root, the only place that knows every class.

`open_node` builds everything in one exit stack, bottom to top, and takes it down in reverse; the
one long-lived nursery belongs to it. The server answers before any path is scanned, and the mount
is there as soon as the catalog is; paths on slow disks are attached behind both.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from sectorfs import __version__
from sectorfs.config import Config, rate_of
from sectorfs.errors import DiskError, Refused, SectorFSError, StorageUnavailable
from sectorfs.fuse import backing, mounts
from sectorfs.fuse.operations import Mount, SectorOperations
from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.feed import Feed
from sectorfs.index.protocol import SectorIndex
from sectorfs.index.rpc import index_methods
from sectorfs.node import addresses, connect, rpc, unmount
from sectorfs.node.admin import LocalAdmin
from sectorfs.node.caching import LocalCaching, MountReaders, caching_methods
from sectorfs.node.hashing import LocalHashing, hashing_methods
from sectorfs.node.moves import local_moves, move_methods
from sectorfs.node.own_files import OwnFiles
from sectorfs.node.repo import Repo
from sectorfs.node.scrubbing import make_scrubbing
from sectorfs.node.status import Node
from sectorfs.node.verify import verify_methods
from sectorfs.server.routes import make_handler
from sectorfs.stores import metadata, storage_list
from sectorfs.stores.cache import CacheKeeper
from sectorfs.stores.cache_notes import CacheNotes
from sectorfs.stores.copies import Copies
from sectorfs.stores.guesses import Guesses
from sectorfs.stores.hasher import Hasher
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local import LocalStore
from sectorfs.stores.manifest_store import ManifestStore
from sectorfs.stores.places import most_requests
from sectorfs.stores.protocol import OpenFile
from sectorfs.stores.remote import RemoteStore
from sectorfs.stores.space_ledger import SpaceLedger
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.wanted import Wanted
from sectorfs.types import SectorFile, StorageID, parse_size
from sectorfs.wire.client import Client
from sectorfs.wire.jsonrpc import Dispatcher
from sectorfs.wire.messages import Limits
from sectorfs.wire.rates import Rates
from sectorfs.wire.server import serve

log = logging.getLogger(__name__)

OTHER_REQUESTS = 64
"""Requests at a time to one peer beside those for bytes of files, whose order `Places` decides.

Each of these may ask for what proves its bytes while it waits."""
ATTACH_SECONDS = 2.0
"""A start waits so long for its paths; a disk that hangs is attached behind."""
CATCH_UP_SECONDS = 5.0
"""A verb waits so long for its effect to be seen in the catalog."""


@asynccontextmanager
async def open_node(repo: Repo, config: Config, mountpoint: Path | None) -> AsyncIterator[Node]:
    """Build a node, running when the block begins; `mount.run` is left to the caller."""
    repo.create()
    backing.raise_descriptor_limit()
    async with AsyncExitStack() as stack:
        stack.enter_context(repo.lock())
        known = storage_list.read_storage_list(str(repo.storage_json))
        if mountpoint is not None:
            _check_place(mountpoint, repo, config, known.paths)
            mounts.clear_dead_mount(
                mountpoint,
                lambda mount: mount.source != unmount.source_of(repo) and unmount.is_served(mount),
            )
        listeners, api, advertise = await addresses.listen(config)
        stack.push_async_callback(addresses.close, listeners)
        secret = connect.keys(repo, config)
        token = repo.admin_token(secret)
        theirs = connect.token_file(repo, config)
        own_url = f"{advertise}/remote"
        index = await stack.enter_async_context(connect.open_index(repo, config, token))
        present = await connect.greet(index, repo, config)
        client = await stack.enter_async_context(
            Client(
                config.timeouts,
                token=connect.credentials(token, theirs),
                per_peer=2 * most_requests(config.peers.parallel) + OTHER_REQUESTS,
                rates=Rates(
                    peer=rate_of(config.peers.max_rate), node=rate_of(config.fetch.max_rate)
                ),
            )
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)

        catalog = Catalog()
        guesses = Guesses(catalog, usual=parse_size(config.mount.sector_size))
        node: Node  # set before the feed runs

        def on_change(changes: Sequence[FileChange]) -> None:
            node.on_change(changes)

        feed = Feed(
            index,
            catalog,
            heartbeat=config.index.heartbeat,
            on_change=on_change,
            on_reload=lambda: local.compare(),
        )
        local = LocalStore(
            index,
            urls=(own_url,),
            timeouts=config.timeouts,
            storage=config.storage,
            heartbeat=config.index.heartbeat,
            holders=catalog.holders,
            declared=catalog.declared,
            account=lambda path: space.stat(path),
            on_attach=lambda path: moves.remover.clear_leftovers(path),
            on_lost=lambda storage: node.lose(storage),
        )
        peers = PeerClient(client)
        copies = await _open_copies(repo, config)
        space = SpaceLedger(local.paths, owner=copies.storage)
        moves = local_moves(
            index=index,
            local=local,
            client=client,
            space=space,
            owner=copies.storage,
            own_urls=frozenset((own_url,)),
            config=config,
        )
        keeper = CacheKeeper(
            nursery,
            copies,
            CacheNotes(copies.root, copies.storage, deadline=config.timeouts.disk),
            local,
            moves.remover,
            config.cache.limits(),
            readers=MountReaders(
                copies.storage, lambda: node.handles, lambda file: store.let_go(file)
            ),
            busy=lambda file: store.is_busy(file),
            promised=partial(_promised, local, space, copies.storage),
        )
        manifests = ManifestStore(repo.manifests, deadline=config.timeouts.disk)
        stack.callback(manifests.close)
        store = RemoteStore(
            nursery=nursery,
            catalog=catalog,
            index=index,
            local=local,
            peers=peers,
            copies=copies,
            parallel=config.peers.parallel,
            patience=config.timeouts.first_byte,
            cutoff=config.index.cutoff,
            own_urls=frozenset((own_url,)),
            fetch=config.fetch,
            space=space,
            keeper=keeper,
            guesses=guesses,
            on_change=on_change,
            manifests=manifests,
        )
        hasher = Hasher(
            catalog=catalog,
            index=index,
            manifests=manifests,
            paths=local.paths,
            config=config.hash,
            paused=repo.hashing_paused(),
            urls=local.urls,
            peers=peers,
        )
        hashing = LocalHashing(repo, hasher)
        caching = LocalCaching(catalog=catalog, feed=feed, store=store, keeper=keeper)
        scrubbing = make_scrubbing(
            repo,
            config,
            index=index,
            catalog=catalog,
            local=local,
            peers=peers,
            manifests=manifests,
            turns=moves.turns,
            own_url=own_url,
            caught_up=lambda: _caught_up(index, feed),
            on_repaired=lambda file, member: node.repaired(file, member),
        )
        admin = LocalAdmin(
            repo=repo,
            index=index,
            catalog=catalog,
            local=local,
            peers=peers,
            config=config,
            caught_up=lambda: _caught_up(index, feed),
            state=store.state,
            moves=moves,
            caching=caching,
            verifying=scrubbing.verifying,
            hashing=hashing,
        )
        node = Node(
            repo=repo,
            config=config,
            api=api,
            catalog=catalog,
            feed=feed,
            local=local,
            store=store,
            keeper=keeper,
            verifying=scrubbing.verifying,
            admin=admin,
            hasher=hasher,
        )
        handler = make_handler(
            local,
            secret=secret,
            rpc=Dispatcher(
                [
                    *(index_methods(index) if connect.embedded(config) else ()),
                    *rpc.node_methods(admin, node.status, secret),
                    *move_methods(moves),
                    *caching_methods(caching),
                    *verify_methods(scrubbing.verifying),
                    *hashing_methods(hashing),
                ]
            ),
            health=lambda: {"version": __version__, "index": feed.connected},
            status=lambda: f"sectorfs {__version__} at {api}\n",
            deadline=config.timeouts.disk,
            manifests=manifests,
            missed=hasher.asked,
            remover=moves.remover,
        )
        limits = Limits(
            write_progress=config.timeouts.progress, body_progress=config.timeouts.progress
        )
        await scrubbing.recover()
        await nursery.start(copies.clear_leftovers)
        await nursery.start(partial(serve, handler, listeners, limits=limits))
        nursery.start_soon(client.keep_tidy)
        if theirs is not None:
            nursery.start_soon(partial(theirs.watch, deadline=config.timeouts.disk))
        if present:
            await nursery.start(feed.run)
        else:
            nursery.start_soon(feed.run)
        await nursery.start(local.run)
        nursery.start_soon(keeper.run)
        nursery.start_soon(_settle, feed, store)
        nursery.start_soon(store.learner.run)
        nursery.start_soon(hasher.run)
        old = [url for url in repo.advertised() if url != own_url]
        repo.write_advertised([*old, own_url])
        attached = await _attach(nursery, local, (str(copies.root), *known.paths))
        nursery.start_soon(scrubbing.run, feed)
        nursery.start_soon(
            OwnFiles(
                local,
                catalog,
                answered=lambda: math.isfinite(feed.age),
                on_change=on_change,
                heartbeat=config.index.heartbeat,
                look=config.storage.look,
            ).run
        )
        nursery.start_soon(
            partial(
                addresses.forget_old_urls,
                attached,
                repo=repo,
                index=index,
                local=local,
                old=old,
                own=own_url,
            )
        )
        if mountpoint is not None:
            await _mount(stack, node, mountpoint, guesses)
        yield node


def _check_place(
    mountpoint: Path, repo: Repo, config: Config, storage_paths: Sequence[str]
) -> None:
    """`Refused` for a mount that would hide what its own node reads: each would wait for the other.

    By name alone, for a disk may hang.
    """
    target = Path(mounts.canonical(mountpoint))
    paths = [repo.cache_path(config), *(Path(path) for path in storage_paths)]
    for path in (repo.root, Path(os.path.realpath(repo.root)), *paths):
        if path.is_relative_to(target):
            raise Refused(f"would hide {path} from its own node", mountpoint, "choose another")
    for path in paths:
        if target.is_relative_to(path):
            raise Refused(f"lies inside {path}", mountpoint, "choose a directory of its own")


async def _mount(stack: AsyncExitStack, node: Node, mountpoint: Path, guesses: Guesses) -> None:
    config = node.config
    node.operations = SectorOperations(
        node.catalog,
        node.store,
        config.mount,
        cutoff=config.index.cutoff,
        guess=guesses.size,
        local_path=node.admin.file_path,
        is_pinned=node.keeper.is_pinned,
        filesystem=node.local.filesystem,
        local_file_system=node.local.file_system,
        on_stale=partial(_recheck, node.feed, node.local),
    )
    mount = Mount(
        mountpoint,
        node.operations,
        source=unmount.source_of(node.repo),
        allow_other=config.mount.allow_other,
    )
    # Noted before it is there: whoever finds the mount finds its node.
    node.repo.write_mountpoint(mount.path)
    node.mount = await stack.enter_async_context(mount)


async def _open_copies(repo: Repo, config: Config) -> Copies:
    """The cache path, made at first use; one that was used before need not answer."""
    root = repo.cache_path(config)
    lane = Lane(str(root), deadline=config.timeouts.disk)
    known = repo.cache_storage(config)

    def make() -> StorageID:
        if (root / metadata.METADATA_NAME).exists():
            return metadata.read_metadata(str(root)).info.storage
        wanted.require(root)
        return metadata.init_cache_path(str(root)).storage

    trouble: SectorFSError = StorageUnavailable("the cache path does not answer", root)
    with trio.move_on_after(ATTACH_SECONDS if known is not None else math.inf), Wanted() as wanted:
        try:
            storage = await lane.run(make, what="open the cache path")
        except (DiskError, StorageUnavailable) as exc:
            if known is None:
                raise
            trouble = exc
        else:
            repo.write_cache_storage(config, storage)
            return Copies(root, storage, lane)
    assert known is not None
    log.error("nothing is fetched until the cache path's disk answers: %s", trouble)
    return Copies(root, known, lane)


async def _attach(nursery: trio.Nursery, local: LocalStore, paths: Sequence[str]) -> trio.Event:
    """Attach the node's paths, so that the first reader finds what lies here.

    The event is set when each was tried, which may be later.
    """
    done = trio.Event()

    async def attach() -> None:
        await local.attach_all(paths)
        done.set()

    nursery.start_soon(attach)
    with trio.move_on_after(ATTACH_SECONDS):
        await done.wait()
    return done


async def _settle(feed: Feed, store: RemoteStore) -> None:
    """Once it is known what there is, look through what an earlier run left."""
    await feed.wait_until(lambda catalog: catalog.loaded and math.isfinite(feed.age))
    await store.settle()


async def _promised(local: LocalStore, space: SpaceLedger, storage: StorageID) -> int:
    """Bytes still to come of what is being fetched into a storage path of this node."""
    paths = [path for path in local.paths() if path.storage == storage and path.available]
    return sum([(await space.stat(path)).reserved for path in paths])


async def _caught_up(index: SectorIndex, feed: Feed) -> None:
    """Wait until the catalog shows what the Index acknowledged so far, within reason."""
    page = await index.snapshot(limit=1)
    with trio.move_on_after(CATCH_UP_SECONDS):
        await feed.wait_seq(page.seq)


async def _recheck(
    feed: Feed, local: LocalStore, file: SectorFile, member: str | None, opened: OpenFile
) -> None:
    """A file here is not as it was declared: have it looked at, and wait until the catalog knows.

    Gives no result: whoever waits has a limit of its own.
    """
    before = feed.catalog.declared(file, opened.storage)
    local.note(opened.storage, file)
    await feed.wait_until(lambda catalog: catalog.declared(file, opened.storage) != before)
