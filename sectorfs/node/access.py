"""How a command reaches a repo: through the node that runs on it, or directly while none does."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from sectorfs.config import Config, TimeoutsConfig
from sectorfs.errors import Unreachable
from sectorfs.index.catalog import Catalog
from sectorfs.index.feed import Feed
from sectorfs.node import connect, reports
from sectorfs.node.admin import Admin, LocalAdmin
from sectorfs.node.hashing import LocalHashing
from sectorfs.node.moves import local_moves
from sectorfs.node.repo import Repo
from sectorfs.node.rpc import NodeClient
from sectorfs.stores import storage_list
from sectorfs.stores.local import LocalStore
from sectorfs.stores.space_ledger import SpaceLedger
from sectorfs.stores.transfer import PeerClient
from sectorfs.wire import tokens
from sectorfs.wire.client import Client

STATUS_PATIENCE = 10.0
"""Seconds a running node may take to say how it is."""


@asynccontextmanager
async def open_admin(repo: Repo) -> AsyncIterator[Admin]:
    """The verbs on a repo."""
    api = repo.api()
    if api is not None:
        async with _node_client(repo, api) as client:
            yield client
    elif repo.holder() is not None:
        raise Unreachable("its node is starting or stopping", repo.root, "try again in a moment")
    else:
        async with _offline(repo) as admin:
            yield admin


async def status(repo: Repo) -> reports.StatusReport | None:
    """The status of the node on a repo; None when none runs."""
    api = repo.api()
    if api is None:
        return None
    async with _node_client(repo, api) as client:
        with trio.move_on_after(STATUS_PATIENCE):
            return await client.status()
    raise Unreachable("the node does not answer", api, "see its log")


@asynccontextmanager
async def _node_client(repo: Repo, api: str) -> AsyncIterator[NodeClient]:
    token = tokens.sign(repo.secret(create=False), ("admin",))
    url = f"{api}/rpc/v0"
    async with Client(TimeoutsConfig(), token=token) as client:

        async def post(body: bytes, patience: float) -> tuple[int, bytes]:
            return await client.post(url, body, patience=patience, limit=connect.ANSWER_LIMIT)

        yield NodeClient(url, post)


@asynccontextmanager
async def _offline(repo: Repo) -> AsyncIterator[LocalAdmin]:
    """The repo without a node: the same Index and paths, opened for one command."""
    repo.create()
    async with AsyncExitStack() as stack:
        stack.enter_context(repo.lock())
        config = repo.config()
        token = repo.admin_token(connect.keys(repo, config))
        index = await stack.enter_async_context(connect.open_index(repo, config, token))
        catalog = Catalog()
        feed = Feed(index, catalog, heartbeat=config.index.heartbeat, on_change=lambda _: None)
        await _load(feed)
        urls = repo.advertised() or [connect.base_url(config)]
        repo.write_advertised(urls)
        local = LocalStore(
            index,
            urls=tuple(urls),
            timeouts=config.timeouts,
            storage=config.storage,
            heartbeat=config.index.heartbeat,
            watch=False,
        )
        client = await stack.enter_async_context(peer_client(repo, config, token))
        known = storage_list.read_storage_list(str(repo.storage_json))
        await local.attach_all(known.paths)
        yield LocalAdmin(
            repo=repo,
            index=index,
            catalog=catalog,
            local=local,
            peers=PeerClient(client),
            config=config,
            caught_up=lambda: _load(feed),
            state=None,
            caching=None,
            hashing=LocalHashing(repo, None),
            moves=local_moves(
                index=index,
                local=local,
                client=client,
                space=SpaceLedger(local.paths, owner=_owner(repo)),
                owner=_owner(repo),
                own_urls=frozenset(urls),
                config=config,
            ),
        )


def _owner(repo: Repo) -> str:
    """Marks what a command leaves unfinished as this repo's: begun again, it clears that first."""
    return hashlib.sha256(f"{socket.gethostname()}:{repo.root}".encode()).hexdigest()[:32]


def peer_client(repo: Repo, config: Config, token: str) -> Client:
    """The way to other nodes."""
    theirs = connect.token_file(repo, config)
    return Client(config.timeouts, token=connect.credentials(token, theirs))


async def _load(feed: Feed) -> None:
    """Bring the catalog up to date with everything the Index has."""
    before = -1
    while not feed.catalog.loaded or feed.catalog.seq != before:
        before = feed.catalog.seq if feed.catalog.loaded else -1
        await feed.step(wait=0)
