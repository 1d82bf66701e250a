"""Users of a mount in processes of their own: what hangs there hangs no test.

``python mount_clients.py ask`` carries out one operation per line of its input and says how long it
took. ``python mount_clients.py read FILE…`` opens every file, says so, and at a line of its input
reads them all at once, a thread for each, with a line per file as its read ends; ``open-read`` does
all of it at once. Nothing of sectorfs is imported here: such a process starts fast.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any


def _read(path: str) -> int:
    with open(path, "rb", buffering=0) as file:
        return _drain(file)


def _drain(file: IO[bytes]) -> int:
    total = 0
    while data := file.read(1 << 16):
        total += len(data)
    return total


OPERATIONS: dict[str, Callable[[str], object]] = {
    "ls": lambda path: sorted(os.listdir(path)),
    "stat": lambda path: os.stat(path).st_size,
    "df": lambda path: os.statvfs(path).f_blocks,
    "read": _read,
    "locations": lambda path: os.getxattr(path, "user.sectorfs.locations").decode(),
}


def timed(path: str, operation: Callable[[], object]) -> dict[str, Any]:
    """Carry out an operation: what it gave or its errno, and how long it took."""
    started = time.monotonic()
    answer: dict[str, Any] = {"path": path, "error": 0}
    try:
        answer["result"] = operation()
    except OSError as exc:
        answer["error"] = exc.errno
    answer["seconds"] = time.monotonic() - started
    return answer


def ask() -> None:
    for line in sys.stdin:
        name, path = json.loads(line)
        print(json.dumps(timed(path, partial(OPERATIONS[name], path))), flush=True)


def at_once(operations: Sequence[tuple[str, Callable[[], object]]]) -> None:
    """Carry out all of them, a thread for each; a line as each ends."""

    def one(path: str, operation: Callable[[], object]) -> None:
        os.write(1, (json.dumps(timed(path, operation)) + "\n").encode())

    threads = [threading.Thread(target=one, args=operation) for operation in operations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read_opened(paths: Sequence[str]) -> None:
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb", buffering=0)) for path in paths]
        print(json.dumps({"opened": len(files)}), flush=True)
        sys.stdin.readline()
        at_once([(path, partial(_drain, file)) for path, file in zip(paths, files, strict=True)])


class Client:
    """One such process, seen from the test."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def do(self, operation: str, path: Path, *, patience: float = 20) -> dict[str, Any]:
        """Have an operation carried out; fails when it takes longer than `patience`."""
        self.send(operation, path)
        return self.answer(patience)

    def send(self, operation: str, path: Path) -> None:
        """Have an operation carried out, whose `answer` comes later."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([operation, str(path)]).encode() + b"\n")

    def begin(self) -> None:
        """Let a process that opened its files read them."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")

    def end(self) -> None:
        """Kill it: its files are closed."""
        self._process.kill()
        self._process.wait(10)

    def answer(self, patience: float = 20) -> dict[str, Any]:
        """The next line it prints."""
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(read_line(self._process.stdout, patience))
        return answer


def read_line(stream: IO[bytes], patience: float) -> bytes:
    """One line of an unbuffered pipe, within so many seconds."""
    deadline = time.monotonic() + patience
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no line within {patience:g} s, only {line!r}"
        piece = os.read(stream.fileno(), 1)
        assert piece, f"ended after {line!r}"
        line += piece
    return line


class Clients:
    """The processes of one test."""

    def __init__(self, root: Path) -> None:
        self._log = root / "clients.log"
        self._processes: list[subprocess.Popen[bytes]] = []

    def asker(self) -> Client:
        """A process for one operation after the other."""
        return self._start("ask")

    def readers(self, paths: Sequence[Path]) -> Client:
        """A process that has all these files open, and reads them when told to `begin`."""
        client = self._start("read", *map(str, paths))
        client.answer()
        return client

    def openers(self, paths: Sequence[Path]) -> Client:
        """A process that opens and reads every file at once."""
        return self._start("open-read", *map(str, paths))

    def run(self, *command: str, patience: float) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, however it ends; one that takes too long fails the test.

        `subprocess.run` would wait for a killed process that cannot die.
        """
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._processes.append(process)
        try:
            out, errors = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired as exc:
            raise AssertionError(f"{command} did not end within {patience:g} s") from exc
        return subprocess.CompletedProcess(
            command, process.returncode, out.decode(), errors.decode()
        )

    def _start(self, *arguments: str) -> Client:
        with self._log.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, __file__, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        self._processes.append(process)
        return Client(process)

    def kill(self) -> None:
        """Kill all of them; those that hang in a mount end with it."""
        for process in self._processes:
            process.kill()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()

    def reap(self) -> None:
        """Wait for their ends, once the mounts are gone."""
        for process in self._processes:
            process.wait(10)


def main(mode: str, *paths: str) -> None:
    if mode == "ask":
        ask()
    elif mode == "read":
        read_opened(paths)
    else:
        at_once([(path, partial(_read, path)) for path in paths])


if __name__ == "__main__":
    main(*sys.argv[1:])
