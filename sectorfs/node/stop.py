"""The last resort of a stop: a process whose loop or disk hangs still leaves no mount behind."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

PATIENCE = 4.0
"""Seconds an orderly stop may take."""


class LastResort:
    """A timer outside the loop. Armed at the signal to stop, called off when the stop is done."""

    def __init__(self, release: Callable[[], None], *, patience: float = PATIENCE) -> None:
        self._release = release
        self._patience = patience
        self._done = threading.Event()

    def arm(self) -> None:
        """Start the clock; at its end `release` runs and the process exits with 1."""
        threading.Thread(target=self._wait, name="last-resort", daemon=True).start()

    def call_off(self) -> None:
        """The stop went well."""
        self._done.set()

    def _wait(self) -> None:
        if self._done.wait(self._patience):
            return
        log.error("stop took longer than %g s: leaving without it", self._patience)
        try:
            self._release()
        finally:
            os._exit(1)
