"""A token in a file: read at the start, read again when it is another one, never waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from sectorfs.errors import BadConfig
from sectorfs.node import token_file
from sectorfs.node.token_file import TokenFile
from tests.wire_fixtures import wait_until


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "LOOK_SECONDS", 0.01)


async def watched(file: TokenFile, change: Callable[[], object], token: str) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: file.watch(deadline=0.2))
        change()
        await wait_until(lambda: file.token() == token)
        nursery.cancel_scope.cancel()


async def test_another_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("one\n")
    file = TokenFile(path)
    assert file.token() == "one"
    await watched(file, lambda: path.write_text("second\n"), "second")

    def replace() -> None:
        path.with_name("new").write_text("third!\n")
        path.with_name("new").replace(path)

    await watched(file, replace, "third!")


@pytest.mark.parametrize("bad", [b"", b" \n", b"\xff\xfe", b"a\nb"])
async def test_what_is_no_token_leaves_the_last_one(
    tmp_path: Path, bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "token"
    path.write_bytes(bad)
    with pytest.raises(BadConfig, match="token cannot be read"):
        TokenFile(path)
    path.write_text("good")
    file = TokenFile(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: file.watch(deadline=1))
        path.write_bytes(bad)
        await wait_until(lambda: "stays as it was" in caplog.text)
        os.unlink(path)
        await wait_until(lambda: "No such file" in caplog.text)
        assert file.token() == "good"
        path.write_text("better")
        await wait_until(lambda: file.token() == "better")
        nursery.cancel_scope.cancel()
    assert len(caplog.records) <= 4  # not one for each look


async def test_a_disk_that_hangs_holds_up_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "token"
    path.write_text("good")
    file = TokenFile(path)
    path.unlink()
    os.mkfifo(path)  # whoever reads it waits for somebody who writes
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: file.watch(deadline=0.1))
        await wait_until(lambda: "stays as it was" in caplog.text)
        assert file.token() == "good"
        nursery.cancel_scope.cancel()
    with path.open("w") as pipe:  # lets the thread go
        pipe.write("late")
