"""Which token each peer is asked with: ours, or that of a cluster with another secret.

A peer that refuses one is asked once more with the other, and from then on with the one it took. A
token of theirs comes first wherever there is one: a node of ours that refuses it learns nothing by
it, while our own would open our whole cluster to whoever reads along.
"""

from __future__ import annotations

from collections.abc import Callable

MAX_PEERS = 4096
SECRET_HINT = "copy the secret file from the index node"


class Credentials:
    """The tokens that a client has, and which of them a peer took."""

    def __init__(
        self, own: str, theirs: Callable[[], str] | None = None, *, hint: str = SECRET_HINT
    ) -> None:
        """`own` is of this cluster's secret; `hint` is for whoever has both refused."""
        self._own = own
        self._theirs = theirs
        self._takes_own: dict[str, bool] = {}
        """By host and port, for peers that refused one."""
        self.hint = hint

    def token(self, peer: str) -> str:
        """What to ask a peer with."""
        if self._theirs is None or self._takes_own.get(peer, False):
            return self._own
        return self._theirs()

    def refused(self, peer: str, token: str) -> str | None:
        """Another token for a peer that refused one; None when there is none."""
        if self._theirs is None:
            return None
        takes_own = token != self._own
        other = self._own if takes_own else self._theirs()
        if other == token:
            return None
        while len(self._takes_own) >= MAX_PEERS:
            del self._takes_own[next(iter(self._takes_own))]
        self._takes_own[peer] = takes_own
        return other
