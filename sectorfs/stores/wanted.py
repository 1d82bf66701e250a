"""Whether anybody still waits for a call in a thread: what nobody waits for shows nothing.

A thread that hangs in a disk cannot be ended, and goes on when the disk does, be it hours later.
Before each step that others would see, a rename above all, it therefore asks. A step that hangs
itself may still be done: the kernel holds the directory meanwhile, so that nothing comes before it,
and what it shows is whole.
"""

from __future__ import annotations

from types import TracebackType

from sectorfs.errors import StorageUnavailable


class Wanted:
    """True of a call for the ``with`` block around waiting for it."""

    def __init__(self) -> None:
        self._left = False  # set on the loop, read in threads

    def __enter__(self) -> Wanted:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left = True

    def require(self, thing: object) -> None:
        """In the call's thread: `StorageUnavailable` when nobody waits any more."""
        if self._left:
            raise StorageUnavailable("was given up", thing)
