"""A running node: the composition root, the only place that knows every class.

`open_node` builds everything in one exit stack, bottom to top, and takes it down in reverse; the
one long-lived nursery belongs to it. The server answers before any path is scanned, and the mount
is there as soon as the catalog is; paths on slow disks are attached behind both.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from sectorfs import __version__
from sectorfs.config import Config, parse_listen
from sectorfs.errors import BadConfig, NotFound, Refused, SectorFSError, Unreachable
from sectorfs.fuse import mounts
from sectorfs.fuse.operations import Mount, SectorOperations
from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.feed import Feed
from sectorfs.index.protocol import SectorIndex
from sectorfs.index.rpc import index_methods
from sectorfs.node import connect, leftovers, reports, rpc, unmount
from sectorfs.node.admin import LocalAdmin
from sectorfs.node.moves import local_moves, move_methods
from sectorfs.node.repo import Repo
from sectorfs.node.stop import LastResort
from sectorfs.server.routes import make_handler
from sectorfs.stores import metadata, storage_list
from sectorfs.stores.copies import Copies
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local import LocalStore
from sectorfs.stores.protocol import OpenFile
from sectorfs.stores.remote import RemoteStore
from sectorfs.stores.space_ledger import SpaceLedger
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import Facts, SectorFile, StorageID
from sectorfs.wire.client import Client
from sectorfs.wire.jsonrpc import Dispatcher
from sectorfs.wire.messages import Limits
from sectorfs.wire.server import serve

log = logging.getLogger(__name__)

PEER_REQUESTS = 64
"""Requests at a time to one peer; fetches have their own, lower bound."""
MOUNT_SECONDS = 15.0
"""A new mount must answer within this time."""
ATTACH_SECONDS = 2.0
"""A start waits so long for its paths; a disk that hangs is attached behind."""
CATCH_UP_SECONDS = 5.0
"""A verb waits so long for its effect to be seen in the catalog."""


class Node:
    """The parts of a running node that its status shows."""

    def __init__(
        self,
        *,
        repo: Repo,
        config: Config,
        api: str,
        catalog: Catalog,
        feed: Feed,
        local: LocalStore,
        store: RemoteStore,
        admin: LocalAdmin,
    ) -> None:
        self.repo = repo
        self.config = config
        self.api = api
        self.catalog = catalog
        self.feed = feed
        self.local = local
        self.store = store
        self.admin = admin
        self.operations: SectorOperations | None = None
        self.mount: Mount | None = None

    def on_change(self, changes: Sequence[FileChange]) -> None:
        """The catalog changed: tell the kernel."""
        if self.operations is not None:
            self.operations.notifications.changed(changes)

    async def status(self) -> reports.StatusReport:
        """What the node does now."""
        files = self.operations.handles.open_files if self.operations else 0
        storages = await self._storages()
        problems = [f"storage {item.storage}: {item.error}" for item in storages if item.error]
        problems += [f"not attached: {why}" for why in self.local.waiting().values()]
        if not self.feed.connected:
            problems.append(f"the Index at {self.config.index.url} does not answer")
        return reports.StatusReport(
            running=True,
            version=__version__,
            pid=os.getpid(),
            repo=str(self.repo.root),
            api=self.api,
            mount=reports.MountReport(path=self.mount.path, mode="ro", passthrough="off")
            if self.mount
            else None,
            index=reports.IndexReport(
                url=self.config.index.url,
                connected=self.feed.connected,
                seq=self.catalog.seq,
                age=self.feed.age if math.isfinite(self.feed.age) else None,
            ),
            storages=storages,
            files=reports.FilesReport(open=files, passthrough=0, daemon=files, stream=0),
            fetches=[
                reports.FetchReport(
                    sector=fetch.file.sector.name,
                    file_type=fetch.file.file_type.dir_name,
                    member=fetch.member,
                    done=fetch.done,
                    size=fetch.size,
                    source=fetch.source,
                )
                for fetch in self.store.fetches()
            ],
            scans=await self.admin.scans(),
            problems=problems,
        )

    async def _storages(self) -> list[reports.StorageReport]:
        """Of the Index, or of the catalog while the Index is away."""
        if self.feed.connected:
            try:
                return await self.admin.storages()
            except Unreachable:
                log.debug("status: the Index does not answer, showing the catalog")
        return self.admin.storages_known()


async def run_node(
    repo: Repo,
    config: Config,
    mountpoint: Path | None,
    ready: Callable[[], None] | None = None,
) -> None:
    """Run a node until SIGTERM, SIGINT, or until its mount is unmounted."""
    resort = LastResort(lambda: _release(repo, mountpoint))
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_stop_on_signal, nursery.cancel_scope, resort)
            async with open_node(repo, config, mountpoint) as node:
                ended = trio.Event()
                async with trio.open_nursery() as serving:
                    if node.mount is not None:
                        serving.start_soon(_serve_mount, node.mount, ended)
                        await _wait_answer(node.mount.path)
                    repo.write_api(node.api)
                    try:
                        log.info("node %s is ready", node.api)
                        if ready is not None:
                            ready()
                        await ended.wait()
                    finally:
                        repo.remove_api()
            nursery.cancel_scope.cancel()
    finally:
        resort.call_off()


async def _serve_mount(mount: Mount, ended: trio.Event) -> None:
    """Answer the kernel; the node ends with its mount."""
    await mount.run()
    ended.set()


async def _wait_answer(mountpoint: str) -> None:
    """Return once the mount answers; the kernel's own request goes through the loop."""
    lane = Lane(mountpoint, deadline=MOUNT_SECONDS, width=1)
    await lane.run(lambda: os.stat(mountpoint), what="first look at the mount")


async def _stop_on_signal(
    scope: trio.CancelScope,
    resort: LastResort,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            resort.arm()
            scope.cancel()
            return


def _release(repo: Repo, mountpoint: Path | None) -> None:
    """What the last resort does: no request may hang in a mount of ours."""
    if mountpoint is None:
        return
    mount = mounts.find_mount(mountpoint)
    if mount is not None and mount.source == unmount.source_of(repo):
        mounts.abort(mount.minor)
        mounts.detach(mountpoint)


@asynccontextmanager
async def open_node(repo: Repo, config: Config, mountpoint: Path | None) -> AsyncIterator[Node]:
    """Build a node, running when the block begins; `mount.run` is left to the caller."""
    repo.create()
    async with AsyncExitStack() as stack:
        stack.enter_context(repo.lock())
        known = storage_list.read_storage_list(str(repo.storage_json))
        if mountpoint is not None:
            _check_place(mountpoint, repo, config, known.paths)
            mounts.clear_dead_mount(
                mountpoint,
                lambda mount: mount.source != unmount.source_of(repo) and unmount.is_served(mount),
            )
        listeners, api, advertise = await _listen(config)
        stack.push_async_callback(_close, listeners)
        secret = connect.keys(repo, config)
        token = repo.admin_token(secret)
        own_url = f"{advertise}/remote"
        index = await stack.enter_async_context(connect.open_index(repo, config, token))
        await index.storages()  # an Index that cannot be reached, or refuses us, is said at once
        client = await stack.enter_async_context(
            Client(
                config.timeouts,
                token=connect.read_token(config.peers.token_file, repo) or token,
                per_peer=PEER_REQUESTS,
            )
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)

        catalog = Catalog()
        node: Node  # set before the feed runs

        def on_change(changes: Sequence[FileChange]) -> None:
            node.on_change(changes)

        feed = Feed(index, catalog, heartbeat=config.index.heartbeat, on_change=on_change)
        local = LocalStore(
            index,
            urls=(own_url,),
            timeouts=config.timeouts,
            storage=config.storage,
            heartbeat=config.index.heartbeat,
            holders=lambda file: _holders(catalog, file),
            declared=lambda file, storage: _declared(catalog, file, storage),
            account=lambda path: space.stat(path),
            on_attach=lambda path: moves.remover.clear_leftovers(path),
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
        store = RemoteStore(
            nursery=nursery,
            catalog=catalog,
            index=index,
            local=local,
            peers=peers,
            copies=copies,
            parallel=config.peers.parallel,
            cutoff=config.index.cutoff,
            own_urls=frozenset((own_url,)),
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
        )
        node = Node(
            repo=repo,
            config=config,
            api=api,
            catalog=catalog,
            feed=feed,
            local=local,
            store=store,
            admin=admin,
        )
        handler = make_handler(
            local,
            secret=secret,
            rpc=Dispatcher(
                [
                    *(index_methods(index) if connect.embedded(config) else ()),
                    *rpc.node_methods(admin, node.status),
                    *move_methods(moves),
                ]
            ),
            health=lambda: {"version": __version__, "index": feed.connected},
            status=lambda: f"sectorfs {__version__} at {api}\n",
            deadline=config.timeouts.disk,
            remover=moves.remover,
        )
        limits = Limits(
            write_progress=config.timeouts.progress, body_progress=config.timeouts.progress
        )
        await nursery.start(partial(serve, handler, listeners, limits=limits))
        nursery.start_soon(client.keep_tidy)
        await nursery.start(feed.run)
        await nursery.start(local.run)
        old = [url for url in repo.advertised() if url != own_url]
        repo.write_advertised([*old, own_url])
        attached = await _attach(nursery, local, (str(copies.root), *known.paths))
        nursery.start_soon(_forget_old_urls, attached, node, index, old, own_url)
        if mountpoint is not None:
            await _mount(stack, node, mountpoint)
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


async def _mount(stack: AsyncExitStack, node: Node, mountpoint: Path) -> None:
    config = node.config
    node.operations = SectorOperations(
        node.catalog,
        node.store,
        config.mount,
        cutoff=config.index.cutoff,
        local_path=node.admin.file_path,
        filesystem=node.local.filesystem,
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


async def _listen(config: Config) -> tuple[list[trio.SocketListener], str, str]:
    """Bind the server's port; returns the listeners, the own address, and the advertised one."""
    host, port = parse_listen(config.node.listen)
    if host in connect.WILDCARDS and not config.node.advertise:
        raise BadConfig(
            "listening on every address needs node.advertise",
            f"node.listen = {config.node.listen!r}",
            "say under which URL other nodes reach this one: --advertise http://10.0.0.5:8480",
        )
    try:
        listeners = await _bind(host, port)
    except (OSError, UnicodeError) as exc:  # the latter for names that can be no host's
        reason = getattr(exc, "strerror", None) or str(exc)
        raise Refused(
            f"cannot listen: {reason}", config.node.listen, "choose another --listen host:port"
        ) from exc
    bound = listeners[0].socket.getsockname()[1]
    if host in connect.WILDCARDS:
        # Of the same family: a listener on every IPv6 address takes no IPv4 connections.
        host = "::1" if listeners[0].socket.family == socket.AF_INET6 else "127.0.0.1"
    api = connect.node_url(host, bound)
    return listeners, api, config.node.advertise.rstrip("/") or api


async def _bind(host: str, port: int) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(port, host=host or None)
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE or leftovers.release_port(port) is None:
            raise
    return await trio.open_tcp_listeners(port, host=host or None)


async def _close(listeners: Sequence[trio.SocketListener]) -> None:
    for listener in listeners:
        await listener.aclose()


async def _open_copies(repo: Repo, config: Config) -> Copies:
    """The cache path, made at first use, with nothing unfinished left in it."""
    root = repo.cache_path(config)
    lane = Lane(str(root), deadline=config.timeouts.disk)

    def make() -> StorageID:
        if not (root / metadata.METADATA_NAME).exists():
            return metadata.init_cache_path(str(root)).storage
        return metadata.read_metadata(str(root)).info.storage

    copies = Copies(root, await lane.run(make, what="open the cache path"), lane)
    await copies.clear_leftovers()
    return copies


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


def _holders(catalog: Catalog, file: SectorFile) -> Sequence[StorageID]:
    entry = catalog.entry(file)
    return [item.storage for item in entry.declarations] if entry else ()


def _declared(catalog: Catalog, file: SectorFile, storage: StorageID) -> Facts | None:
    entry = catalog.entry(file)
    for item in entry.declarations if entry else ():
        if item.storage == storage:
            return item.facts
    return None


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
    before = _declared(feed.catalog, file, opened.storage)
    local.note(opened.storage, file)
    await feed.wait_until(lambda catalog: _declared(catalog, file, opened.storage) != before)


async def _forget_old_urls(
    attached: trio.Event, node: Node, index: SectorIndex, old: Sequence[str], own: str
) -> None:
    """Detach this node's paths from URLs it had before; then forget them."""
    await attached.wait()
    done: set[StorageID] = set()
    while old:
        for path in node.local.paths():
            if path.attached and path.storage not in done:
                try:
                    for url in old:
                        await _detach(index, path.storage, url)
                except SectorFSError as exc:
                    log.warning("%s: old URLs not detached yet: %s", path.path, exc)
                else:
                    done.add(path.storage)
        if done >= {path.storage for path in node.local.paths()} and not node.local.waiting():
            break
        await trio.sleep(1)
    node.repo.write_advertised([own])


async def _detach(index: SectorIndex, storage: StorageID, url: str) -> None:
    try:
        await index.detach(storage, url)
    except NotFound:
        return
    log.info("storage %s: detached from the old URL %s", storage, url)
