"""Only regular files are opened, and small parts read at once leave nothing open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sectorfs.errors import NotFound
from sectorfs.stores.regular import open_regular, read_excerpt
from sectorfs.types import StorageID
from tests.wire_fixtures import open_fds

STORAGE = StorageID("st-1")


def test_an_excerpt(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to(path)
    before = open_fds()
    for name in (path, tmp_path / "link"):
        found = read_excerpt(str(name), [(8, 5), (0, 3), (10, 1), (99, 1), (0, 3)], STORAGE)
        assert found.pieces == (b"89", b"012", b"", b"", b"012")
        status = path.stat()
        assert (found.size, found.mtime_ns, found.inode) == (
            status.st_size,
            status.st_mtime_ns,
            status.st_ino,
        )
    assert open_fds() == before


def test_reads_that_come_short_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: whole(fd, min(count, 3), offset))
    assert read_excerpt(str(path), [(1, 8)], STORAGE).pieces == (b"12345678",)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = open_fds()
    for name in ("fifo", "."):
        with pytest.raises(NotFound, match="not a regular file"):
            open_regular(str(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        read_excerpt(str(tmp_path / "none"), [(0, 1)], STORAGE)
    assert open_fds() == before
