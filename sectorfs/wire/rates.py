"""Bytes per second from one peer and for the node: bulk work waits, readers never do.

What readers receive is charged all the same, so that bulk work makes room for them; what is owed is
bounded, so that bulk work goes on soon after they stop. Work that waits is served in the order it
came, in small pieces: no connection stands still so long that the other side gives it up.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

_BURST = 0.25
"""Seconds' worth of bytes that may be saved up."""
_DEBT = 2.0
"""Seconds' worth of bytes that may be owed."""
_PIECE = 64 * 1024
_PIECES = 16
"""Turns in a second, at high rates."""
_LARGEST = 8 << 20
_MAX_PEERS = 4096


class Bucket:
    """How much of a rate is used. Pure."""

    def __init__(self, rate: int, now: float) -> None:
        self.rate = rate
        self._level = rate * _BURST
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds until something may be taken."""
        self._fill(now)
        return -self._level / self.rate if self._level <= -1 else 0.0

    def charge(self, count: int, now: float) -> None:
        """`count` bytes were taken; or given back, if negative."""
        self._fill(now)
        self._level = max(self._level - count, -self.rate * _DEBT)

    def _fill(self, now: float) -> None:
        self._level = min(self._level + (now - self._at) * self.rate, self.rate * _BURST)
        self._at = now


class _Share:
    """A bucket, and who waits for it in order."""

    def __init__(self, rate: int) -> None:
        self.bucket = Bucket(rate, trio.current_time())
        self._lock = trio.Lock()

    async def take(self, count: int) -> None:
        async with self._lock:
            while (wait := self.bucket.wait(trio.current_time())) > 0:  # noqa: ASYNC110 - time alone fills it
                await trio.sleep(wait)
            self.charge(count)

    def charge(self, count: int) -> None:
        self.bucket.charge(count, trio.current_time())


class Throttle:
    """What bounds the bytes from one peer."""

    def __init__(self, shares: Sequence[_Share]) -> None:
        self._shares = shares
        slowest = min(share.bucket.rate for share in shares)
        self._piece = max(_PIECE, min(slowest // _PIECES, _LARGEST))

    async def turn(self) -> int:
        """Wait for a turn; the bytes that may be taken then, which are charged already."""
        taken: list[_Share] = []
        try:
            for share in self._shares:
                await share.take(self._piece)
                taken.append(share)
        except BaseException:
            for share in taken:
                share.charge(-self._piece)
            raise
        return self._piece

    def charge(self, count: int) -> None:
        """Bytes came without a turn, or fewer than the turn allowed (negative)."""
        for share in self._shares:
            share.charge(count)


class Rates:
    """The limits of a node; 0 for none."""

    def __init__(self, *, peer: int = 0, node: int = 0) -> None:
        self._peer = peer
        self._node = _Share(node) if node else None
        self._throttles: dict[str, Throttle] = {}

    def of(self, peer: str) -> Throttle | None:
        """What bounds the bytes from this peer, if anything does."""
        if not self._peer and self._node is None:
            return None
        found = self._throttles.pop(peer, None)
        if found is None:
            while len(self._throttles) >= _MAX_PEERS:
                del self._throttles[next(iter(self._throttles))]
            shares = [_Share(self._peer)] if self._peer else []
            found = Throttle([*shares, self._node] if self._node else shares)
        self._throttles[peer] = found
        return found
