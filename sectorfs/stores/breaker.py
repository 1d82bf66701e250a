"""When a source that fell silent is asked again: a circuit breaker, pure, with time passed in.

*Closed*: everybody may ask. After a failure it is *open*: nobody may, until a pause is over. Then
it is *half-open*: one caller becomes the probe and must say what came of it, everybody else is
still refused. An answer closes it; a probe that fails, or is not heard of for as long as the pause
was, opens it again for twice as long, up to a limit. Which failures count is the owner's business:
a disk that says EIO has answered, one that says nothing for a deadline has not.
"""

from __future__ import annotations

import math

CLOSED = "closed"
OPEN = "open"
HALF_OPEN = "half-open"


class Breaker:
    """The state of one source; times are of one monotonic clock, in seconds."""

    def __init__(self, *, pause: float, longest: float) -> None:
        assert 0 < pause <= longest
        self._first = pause
        self._longest = longest
        self._pause = pause
        self._state = CLOSED
        self._until = -math.inf  # open: refuses till then; half-open: the probe has till then
        self._reason = ""

    @property
    def state(self) -> str:
        """`CLOSED`, `OPEN` or `HALF_OPEN`."""
        return self._state

    @property
    def closed(self) -> bool:
        """True while everybody may ask."""
        return self._state == CLOSED

    @property
    def reason(self) -> str:
        """Why it is not closed; empty when it is."""
        return self._reason

    @property
    def until(self) -> float:
        """When the next one may ask, while it is not closed."""
        return self._until

    def may_admit(self, now: float) -> bool:
        """Whether `admit` would say yes."""
        return self._state == CLOSED or now >= self._until

    def admit(self, now: float) -> bool:
        """Whether this caller may ask. While not closed, one who may is the probe."""
        if not self.may_admit(now):
            return False
        if self._state == CLOSED:
            return True
        if self._state == HALF_OPEN:
            self._wait_longer()
        self._state = HALF_OPEN
        self._until = now + self._pause
        return True

    def answered(self) -> None:
        """The source gave an answer."""
        self._state = CLOSED
        self._pause = self._first
        self._until = -math.inf
        self._reason = ""

    def failed(self, now: float, reason: str) -> None:
        """The source failed; while it is open, others that were asked before do not count."""
        if self._state == OPEN:
            return
        if self._state == HALF_OPEN:
            self._wait_longer()
        self._state = OPEN
        self._until = now + self._pause
        self._reason = reason

    def withdrew(self) -> None:
        """The probe was called off, so that nobody knows: the next caller may be one."""
        if self._state == HALF_OPEN:
            self._state = OPEN
            self._until = -math.inf

    def _wait_longer(self) -> None:
        self._pause = min(2 * self._pause, self._longest)
