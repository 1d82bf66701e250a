"""Where a node listens, under which URL others reach it, and what became of its former URLs."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence

import trio

from sectorfs.config import Config, parse_listen
from sectorfs.errors import BadConfig, NotFound, Refused, SectorFSError
from sectorfs.index.protocol import SectorIndex
from sectorfs.node import connect, leftovers
from sectorfs.node.repo import Repo
from sectorfs.stores.local import LocalStore
from sectorfs.types import StorageID

log = logging.getLogger(__name__)

FORGET_PAUSE = 1.0
"""Seconds between two tries to detach old URLs: paths attach, and the Index answers, any time."""


async def listen(config: Config) -> tuple[list[trio.SocketListener], str, str]:
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


async def close(listeners: Sequence[trio.SocketListener]) -> None:
    """Close every listener; one that is closed already is fine."""
    for listener in listeners:
        await listener.aclose()


async def forget_old_urls(
    attached: trio.Event,
    *,
    repo: Repo,
    index: SectorIndex,
    local: LocalStore,
    old: Sequence[str],
    own: str,
) -> None:
    """Detach this node's paths from URLs it had before; then forget them.

    `attached` is set once every path was tried.
    """
    await attached.wait()
    done: set[StorageID] = set()
    while old:
        for path in local.paths():
            if path.attached and path.storage not in done:
                try:
                    for url in old:
                        await _detach(index, path.storage, url)
                except SectorFSError as exc:
                    log.warning("%s: old URLs not detached yet: %s", path.path, exc)
                else:
                    done.add(path.storage)
        if done >= {path.storage for path in local.paths()} and not local.waiting():
            break
        await trio.sleep(FORGET_PAUSE)
    repo.write_advertised([own])


async def _detach(index: SectorIndex, storage: StorageID, url: str) -> None:
    try:
        await index.detach(storage, url)
    except NotFound:
        return
    log.info("storage %s: detached from the old URL %s", storage, url)
