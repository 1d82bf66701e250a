"""What tests of operators' verbs share: command lines in this process, and on terminals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sectorfs.cli import main
from sectorfs.node.repo import Repo
from tests.cluster import Node


class Said(msgspec.Struct):
    """What a command line came to."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Its standard output as JSON."""
        return json.loads(self.out)


Say = Callable[..., Said]


def sayer(repo: Repo, capfd: pytest.CaptureFixture[str]) -> Say:
    """Runs command lines on a repo in this process: an exception that leaves one fails the test."""

    def say(*arguments: str) -> Said:
        code = main.run([*arguments, "--repo", str(repo.root)])
        out, err = capfd.readouterr()
        return Said(code, out, err)

    return say


def fine(said: Said) -> Said:
    """It went well, and quietly."""
    assert said.code == 0, said
    assert said.err == "", said
    return said


def refused(said: Said, code: int, *words: str) -> None:
    """One line of error with these words."""
    assert said.code == code, said
    lines = said.err.splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("sectorfs"), said
    for word in words:
        assert word in lines[0], said


def on_terminal(node: Node, *arguments: str, columns: int) -> tuple[int, str]:
    """Run a command on a terminal of so many columns; its exit code and what is on the screen."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [sys.executable, "-m", "sectorfs", "--repo", str(node.repo.root), *arguments]
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment = {**plain, "TERM": "xterm-256color"}
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment
    ) as process:
        os.close(slave)
        said = b""
        with suppress(OSError):  # EIO: the last one left the terminal
            while piece := os.read(master, 4096):
                said += piece
    os.close(master)
    return process.returncode, said.decode().replace("\r\n", "\n")


def settings_of(path: Path) -> dict[str, Any]:
    """A path's ``sectorstore.json``."""
    found: dict[str, Any] = json.loads((path / "sectorstore.json").read_text())
    return found
