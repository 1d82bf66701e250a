"""The last resort of a stop: a process whose loop or disk hangs still leaves no mount behind.

SIGTERM and SIGINT are blocked in every thread, and one thread that does nothing else takes them
with `sigwait`. A loop that hangs in the kernel, or in a calculation, would never get to them: it
only hears of them. Whatever the loop then does, the process is gone after a bounded time, or at
once with the second signal.

Nothing here waits for what the loop may hold: not for the lock of a log handler that it hangs in,
nor for an unmount. Only a call that keeps the interpreter's own lock could hold this up, and no
call that may wait does.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

PATIENCE = 4.0
"""Seconds an orderly stop may take."""
RELEASE_SECONDS = 1.0
"""Seconds that letting go of the mount may take after that."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class LastResort:
    """Takes the signals to stop: tells the loop first, and ends the process when that is no use."""

    def __init__(
        self,
        release: Callable[[], None],
        *,
        patience: float = PATIENCE,
        release_seconds: float = RELEASE_SECONDS,
    ) -> None:
        self._release = release
        self._patience = patience
        self._release_seconds = release_seconds
        self._over = False
        self._may_end = threading.Event()

    @contextmanager
    def listening(self, stop: Callable[[signal.Signals], object]) -> Iterator[None]:
        """Call `stop`, in a thread, at the first signal; the block is the time for the whole stop.

        Threads that are older than the block would take the signals themselves: use it first.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        thread = threading.Thread(target=self._listen, args=(stop,), name="stop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over = True
            assert thread.ident is not None
            signal.pthread_kill(thread.ident, signal.SIGTERM)  # wakes this thread, nobody else
            self._may_end.set()
            thread.join()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _listen(self, stop: Callable[[signal.Signals], object]) -> None:
        number = signal.sigwait(SIGNALS)
        if not self._over:
            stop(signal.Signals(number))
            again = signal.sigtimedwait(SIGNALS, self._patience)
            if not self._over:
                self._leave("was told twice" if again else f"took longer than {self._patience:g} s")
        self._may_end.wait()  # a signal must not be sent to a thread that is no more

    def _leave(self, why: str) -> None:
        threading.Thread(target=self._let_go, args=(why,), daemon=True).start()
        threading.Event().wait(self._release_seconds)
        os._exit(1)

    def _let_go(self, why: str) -> None:
        try:
            self._release()
            log.error("stop %s: leaving without it\n%s", why, _where_all_are())
        finally:
            os._exit(1)


def _where_all_are() -> str:
    """A traceback of every thread."""
    fd = os.memfd_create("threads")  # on the way to a full pipe it would keep the lock of all
    faulthandler.dump_traceback(fd)
    return os.pread(fd, 1 << 16, 0).decode(errors="replace")
