"""What kind of node a peer is, told by how it answers: nobody says so, and no one is asked for it.

Our nodes have a header of their own in every answer with bytes, and answer HEAD. Those of lotus and
Curio know no HEAD and give ranges of files. The first ones of lotus pass over ranges, send every
file whole and without its length.
"""

from __future__ import annotations

import enum

from sectorfs.wire.response import Response

MAX_PEERS = 4096
OCTETS = "application/octet-stream"
TAR = "application/x-tar"


class NodeKind(enum.StrEnum):
    """The kinds, as people are shown them."""

    OURS = "sectorfs"
    RANGES = "lotus or Curio"
    WHOLE = "early lotus: files whole only"


class NodeKinds:
    """The kinds of the peers that answered, by host and port; the longest unheard are forgotten."""

    def __init__(self, ours: str) -> None:
        """`ours` is the name of the header."""
        self._ours = ours
        self._known: dict[str, NodeKind] = {}

    def of(self, peer: str) -> NodeKind | None:
        """The kind of a peer; None before it was seen."""
        return self._known.get(peer)

    def saw(self, peer: str, method: str, response: Response, *, ranged: bool) -> None:
        """A peer answered; `ranged`: it was asked for a range."""
        kind = self._judge(method, response, ranged=ranged)
        if kind is None:
            return
        known = self._known.pop(peer, None)
        if known is NodeKind.WHOLE and kind is NodeKind.RANGES and not _is_range(response):
            kind = known  # it knows no HEAD, which is true of both
        while len(self._known) >= MAX_PEERS:
            del self._known[next(iter(self._known))]
        self._known[peer] = kind

    def _judge(self, method: str, response: Response, *, ranged: bool) -> NodeKind | None:
        if self._ours in response.headers:
            return NodeKind.OURS
        if method == "HEAD":
            return NodeKind.RANGES if response.status == 405 else None
        content = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if response.status == 206 and ranged:
            return NodeKind.RANGES
        if response.status == 200 and ranged and content == OCTETS:
            whole = "accept-ranges" not in response.headers
            return NodeKind.WHOLE if whole else NodeKind.RANGES
        return NodeKind.RANGES if response.status == 200 and content == TAR else None


def _is_range(response: Response) -> bool:
    return response.status == 206 or "accept-ranges" in response.headers
