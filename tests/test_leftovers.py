"""The port of a killed process, one thread of which hangs on a disk that does not answer."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sectorfs.node import leftovers
from tests.cluster import until
from tests.hung_disk import hung_disk

VICTIM = """
import pathlib, socket, sys, threading
one, two = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
other = socket.socketpair()
print(one.getsockname()[1], two.getsockname()[1], flush=True)
threading.Thread(target=pathlib.Path(sys.argv[1]).read_bytes).start()
"""


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Two ports that a killed process, which cannot end, listens on."""
    with hung_disk(tmp_path) as disk:
        (disk.source / "file").write_bytes(b"x")
        disk.hang("read")
        command = [sys.executable, "-c", VICTIM, str(disk.path / "file")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout:
            one, two = map(int, process.stdout.readline().split())
        until("the thread to hang", lambda: disk.waiting("read"))
        process.kill()
        stat = Path(f"/proc/{process.pid}/stat")
        until("a zombie", lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
        yield one, two
    process.wait(10)


def is_taken(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as exc:
        return exc.errno == errno.EADDRINUSE
    return False


@pytest.mark.mount
def test_the_port_of_a_killed_process_is_released(ports: tuple[int, int]) -> None:
    one, two = ports
    assert is_taken(one)
    assert leftovers.release_port(one) is not None
    assert not is_taken(one)
    assert is_taken(two)
    before = len(os.listdir("/proc/self/fd"))
    assert leftovers.release_port(one) is None
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.mount
def test_without_the_right_to_it_the_port_stays_taken(
    ports: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "_SYS_PIDFD_GETFD", -1)  # a kernel that does not know it
    assert leftovers.release_port(ports[0]) is None

    def refuse(process: int, flags: int = 0) -> int:
        raise OSError(errno.EINVAL, "an older kernel knows no threads here")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert leftovers.release_port(ports[0]) is None
    assert is_taken(ports[0])


def test_a_living_process_keeps_its_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert leftovers.release_port(port) is None
        socket.create_connection(("127.0.0.1", port), 5).close()
