"""Blocking calls in threads that may never come back.

A call that its waiter gives up runs on until the kernel lets it go. What it gives then is handed to
`discard`, in a thread, so that a late `os.open` leaks nothing and no `os.close` waits on the loop;
and its owner is told, because a disk that gives a late answer is a disk that answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Call(Generic[T]):
    """One call in a thread of its own, started by its making; state changes on the loop only."""

    def __init__(
        self,
        call: Callable[[], T],
        *,
        discard: Callable[[T], object] | None = None,
        ended: Callable[[Call[T]], object],
    ) -> None:
        self.began = trio.current_time()
        self.given_up = False
        """Nobody waits for it any more."""
        self._call = call
        self._discard = discard
        self._ended = ended
        self._done = trio.Event()
        self._results: list[T] = []  # one, or none when it raised
        self._error: BaseException | None = None
        self._token = trio.lowlevel.current_trio_token()
        trio.lowlevel.start_thread_soon(self._run, lambda outcome: outcome.unwrap())

    @property
    def done(self) -> bool:
        """True once it returned or raised."""
        return self._done.is_set()

    async def result(self) -> T:
        """Wait for its end; what it returned or raised."""
        await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def give_up(self) -> None:
        """Its waiter leaves without a result."""
        self.given_up = True
        if self.done:
            self._throw_away()

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as exc:  # its waiter gets it, whatever it is
            self._error = exc
        try:
            self._token.run_sync_soon(self._arrived)
        except trio.RunFinishedError:
            self._discard_all()

    def _arrived(self) -> None:
        self._done.set()
        self._ended(self)
        if self.given_up:
            self._throw_away()

    def _throw_away(self) -> None:
        if self._results and self._discard is not None:
            trio.lowlevel.start_thread_soon(self._discard_all, lambda outcome: outcome.unwrap())

    def _discard_all(self) -> None:
        if self._discard is not None:
            while self._results:
                self._discard(self._results.pop())
