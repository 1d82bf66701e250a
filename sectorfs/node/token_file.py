"""A token in a file that is read again whenever it is another one.

Tokens of other clusters are made by their tools and put there by hand or by a timer. The file may
lie on a disk that hangs: after the start it is looked at by a task and in a thread, so that nobody
waits for it, and the token that was read last holds.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import trio

from sectorfs.errors import BadConfig, SectorFSError
from sectorfs.stores.lanes import Lane

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""So often it is looked at."""


class TokenFile:
    """The token of `peers.token_file`."""

    def __init__(self, path: Path) -> None:
        """Reads it: `BadConfig` when it holds none."""
        self.path = path
        try:
            self._seen, self._token = _read(path)
        except (OSError, ValueError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise BadConfig(f"token cannot be read: {why}", path) from exc

    def token(self) -> str:
        """The last one that could be read."""
        return self._token

    async def watch(self, *, deadline: float) -> None:
        """Read it again when it is another file; until cancelled."""
        lane = Lane(str(self.path), deadline=deadline)
        trouble = ""
        while True:
            await trio.sleep(LOOK_SECONDS)
            before, trouble = trouble, ""
            try:
                await lane.share(self._look, what="look at the token")
            except (SectorFSError, ValueError) as exc:
                trouble = str(exc)
                if trouble != before:
                    log.warning("%s: the token stays as it was: %s", self.path, exc)

    def _look(self) -> None:
        if _identity(self.path) != self._seen:
            self._seen, self._token = _read(self.path)
            log.info("%s: read again", self.path)


Identity = tuple[int, int, int]


def _identity(path: Path) -> Identity:
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path) -> tuple[Identity, str]:
    before = _identity(path)
    token = path.read_text(encoding="ascii").strip()  # files end in a newline
    if not token or not token.isprintable():
        raise ValueError("it holds none")
    return before, token
