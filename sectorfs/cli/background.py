"""``--daemon``: the node in the background, its start reported by the command in the foreground."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from sectorfs.errors import SectorFSError


class _Failure(msgspec.Struct):
    what: str
    thing: str
    hint: str
    exit_code: int


class StartFailed(SectorFSError):
    """What the process in the background said before it ended."""

    def __init__(self, failure: _Failure) -> None:
        super().__init__(failure.what, failure.thing, failure.hint)
        self.exit_code = failure.exit_code  # type: ignore[misc]  # the child's, not the class's


_READY = b"ready\n"

Ready = Callable[[str], None]
"""Called once the work goes on in the background, with a remark for whoever started it."""


def in_background(log: Path, work: Callable[[Ready], None]) -> str:
    """Run `work(ready)` in a process of its own session; return its remark once it called `ready`.

    Must be called before the process has threads. Errors before `ready` are raised here again.
    """
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        os._exit(_child(log, writer, work))
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    if said == b"":
        raise StartFailed(_Failure("node ended without a word", str(log), "see the log", 1))
    if not said.startswith(_READY):
        raise StartFailed(msgspec.json.decode(said, type=_Failure))
    return said.removeprefix(_READY).decode()


def _child(log: Path, writer: int, work: Callable[[Ready], None]) -> int:
    os.setsid()
    os.chdir("/")
    _redirect(log)
    pipe = open(writer, "wb", buffering=0)  # noqa: SIM115 - lives as long as the start takes

    def ready(remark: str) -> None:
        pipe.write(_READY + remark.encode())
        pipe.close()

    try:
        work(ready)
    except SectorFSError as error:
        print(f"sectorfs: {error}", file=sys.stderr, flush=True)
        if not pipe.closed:
            failure = _Failure(error.what, error.thing, error.hint, error.exit_code)
            pipe.write(msgspec.json.encode(failure))
        return error.exit_code
    except BaseException:  # this process has nobody above it: the log must tell
        traceback.print_exc()
        return 1
    return 0


def _redirect(log: Path) -> None:
    """Standard input from nowhere, output into the log."""
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(out)
