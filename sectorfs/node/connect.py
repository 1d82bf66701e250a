"""The ways out of a node: to its Index and, for a command, to the node that runs on a repo."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sectorfs.config import Config, NodeConfig, parse_listen
from sectorfs.errors import BadConfig, Unreachable
from sectorfs.index.protocol import SectorIndex
from sectorfs.index.rpc import RpcIndex
from sectorfs.index.sqlite import SqliteIndex
from sectorfs.node.repo import Repo
from sectorfs.node.token_file import TokenFile
from sectorfs.wire import tokens
from sectorfs.wire.client import Client
from sectorfs.wire.credentials import SECRET_HINT, Credentials
from sectorfs.wire.jsonrpc import NotJsonRpc

log = logging.getLogger(__name__)

ANSWER_LIMIT = 256 << 20
"""Bytes of one answer of an Index: a page of a thousand sector directories fits many times."""
WILDCARDS = ("", "0.0.0.0", "::")
"""Addresses to listen on that nobody can connect to."""
LONG_POLLS = 64
"""Requests at a time to one node over RPC; a long poll occupies one."""


def embedded(config: Config) -> bool:
    """True when the node's own SQLite file is its Index."""
    return config.index.url == "sqlite"


def keys(repo: Repo, config: Config) -> tokens.Secret:
    """The cluster's secret; a node with a remote Index never makes one of its own."""
    return repo.secret(create=embedded(config))


def read_token(path: str, repo: Repo) -> str | None:
    """The token in a file named by the configuration; None when none is named."""
    if not path:
        return None
    file = repo.root / path
    try:
        return Path(file).read_text().strip()
    except OSError as exc:
        raise BadConfig(f"token cannot be read: {exc.strerror}", file) from exc


def credentials(own: str, theirs: TokenFile | None) -> Credentials:
    """The tokens that peers are asked with: `own`, and that of the file in the configuration."""
    if theirs is None:
        return Credentials(own, hint=f"{SECRET_HINT}, or name a token of theirs: peers.token_file")
    hint = f"neither the token in {theirs.path} nor one of this cluster's secret is of theirs"
    return Credentials(own, theirs.token, hint=hint)


def token_file(repo: Repo, config: Config) -> TokenFile | None:
    """The file with a token for nodes of another cluster, if the configuration names one."""
    name = config.peers.token_file
    return TokenFile(repo.root / name) if name else None


@asynccontextmanager
async def open_index(repo: Repo, config: Config, admin_token: str) -> AsyncIterator[SectorIndex]:
    """The Index of this node: its own file, or another node's over JSON-RPC."""
    if embedded(config):
        async with SqliteIndex.open(repo.index_db, cutoff=config.index.cutoff) as index:
            yield index
        return
    token = read_token(config.index.token_file, repo) or admin_token
    async with Client(config.timeouts, token=token, per_peer=LONG_POLLS) as client:
        url = config.index.url

        async def post(body: bytes, patience: float) -> tuple[int, bytes]:
            return await client.post(url, body, patience=patience, limit=ANSWER_LIMIT)

        yield RpcIndex(url, post)


async def greet(index: SectorIndex, repo: Repo, config: Config) -> bool:
    """Ask the Index once at a start, which one that refuses us, or is none, ends with the reason.

    False for one that is away and has answered this node before: nodes of a cluster come up in any
    order. One that never did is rather a mistake in the settings.
    """
    try:
        await index.storages()
    except NotJsonRpc:
        raise
    except Unreachable as exc:
        if not repo.knows_index(config.index.url):
            raise
        log.warning("%s; starting without it, with this node's own files", exc)
        return False
    if not embedded(config):
        repo.note_index(config.index.url)
    return True


def base_url(config: Config) -> str:
    """The URL under which a node that never ran will be reached, as far as its settings tell."""
    if config.node.advertise:
        return f"{config.node.advertise.rstrip('/')}/remote"
    host, port = parse_listen(config.node.listen)
    if host in WILDCARDS or port == 0:
        host, port = parse_listen(NodeConfig().listen)
    return f"{node_url(host, port)}/remote"


def node_url(host: str, port: int) -> str:
    """``http://host:port``, with brackets where the host needs them."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
