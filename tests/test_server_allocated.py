"""Whether a range of an unsealed sector is here, as peers ask it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sectorfs.errors import DiskError, PermissionRefused, SectorFSError, StorageUnavailable
from sectorfs.stores.directories import OpenDirectory
from sectorfs.stores.lanes import Descriptor
from sectorfs.stores.protocol import OpenFile
from sectorfs.stores.trailer import PartialFile
from sectorfs.types import SectorFile
from sectorfs.wire.tokens import sign
from tests.archive_fixtures import SECRET, Served, served
from tests.wire_fixtures import FolderFiles, fds_return_to, open_fds

SIZE = 2048
UNPADDED = 2032
TYPES = ("unsealed", "sealed", "cache")


def fill(root: Path) -> None:
    """Sector 7 with its first half there, 8 with all of it, 9 with nothing, 10 damaged."""
    for name in TYPES:
        (root / name).mkdir()
    for number in (7, 9):
        descriptor = Descriptor(
            os.open(root / f"unsealed/s-t01000-{number}", os.O_RDWR | os.O_CREAT)
        )
        partial = PartialFile.create(descriptor, sector_size=SIZE, thing="test")
        if number == 7:
            partial.mark(0, 1024)
        descriptor.close()
    (root / "unsealed/s-t01000-8").write_bytes(bytes(SIZE))
    (root / "unsealed/s-t01000-10").write_bytes(bytes(SIZE) + b"\x00\x04\x00\x00\x00")
    (root / "unsealed/s-t01000-11").write_bytes(bytes(SIZE - 1))
    (root / "sealed/s-t01000-7").write_bytes(bytes(SIZE))


def path(
    sector: object = 7,
    file_type: str = "unsealed",
    *,
    proof: object = 0,
    offset: object = 0,
    size: object = 127,
) -> str:
    name = f"s-t01000-{sector}" if isinstance(sector, int) else sector
    return f"/remote/{file_type}/{name}/{proof}/allocated/{offset}/{size}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fill(tmp_path)
    return tmp_path


ALLOCATED = [
    path(7),
    path(7, size=1016),
    path(7, offset=508, size=508),
    path(7, offset=1015, size=1),
    path(7, size=0),
    path(7, offset=1, size=1),
    path(7, proof=5),
    path(7, proof=15),
    path(8, size=UNPADDED),
    path(8, offset=UNPADDED - 1, size=1),
]
MISSING = [
    path(7, size=1017),
    path(7, offset=1016, size=1),
    path(7, offset=1016, size=1016),
    path(9),
    path(8, size=UNPADDED + 1),
    path(8, offset=UNPADDED, size=1),
    path(8, offset=4 * 10**18, size=4 * 10**18),
]


@pytest.mark.parametrize(
    ("target", "status"),
    [*((target, 200) for target in ALLOCATED), *((target, 416) for target in MISSING)],
)
async def test_allocated_or_not(root: Path, target: str, status: int) -> None:
    before = open_fds()
    async with served(FolderFiles(root)) as node:
        answer = await node.ask(target)
        assert answer.status == status
        assert answer.body == b""  # Go's clients would not read it, and connect anew
        head = await node.ask(target, method="HEAD")
        assert (head.status, head.body) == (status, b"")
    await fds_return_to(before)


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (path("x"), 404),
        (path("s-t01000-7.tmp"), 404),
        (path(7, "other"), 404),
        (path(12), 404),
        (path(7, "sealed"), 400),
        (path(7, "cache"), 400),
        (path(7, proof="x"), 400),
        (path(7, proof=20), 400),
        (path(7, proof=-1), 400),
        (path(7, proof=""), 400),
        (path(7, proof=9), 400),
        (path(7, offset="x"), 400),
        (path(7, offset=-1), 400),
        (path(7, offset="0x1"), 400),
        (path(7, offset="1.0"), 400),
        (path(7, offset="١"), 400),
        (path(7, offset=2**63), 400),
        (path(7, offset=2**63 - 1, size=1), 400),
        (path(7, offset="9" * 5000), 400),
        (path(7, size=""), 400),
        (path(7, size="x"), 400),
        (path(7, size=-1), 400),
        (path(7, size=10**30), 400),
        (path(8, proof=1), 400),
        (path(7) + "/x", 404),
        (path(7).replace("allocated", "other"), 404),
    ],
)
async def test_what_is_no_such_question(root: Path, target: str, status: int) -> None:
    before = open_fds()
    async with served(FolderFiles(root)) as node:
        target = target.replace("١", "%D9%A1")
        answer = await node.ask(target)
        assert answer.status == status
        assert answer.body.count(b"\n") == 1
    await fds_return_to(before)


@pytest.mark.parametrize("number", [10, 11])
async def test_a_damaged_file_is_the_servers_fault_and_says_what(root: Path, number: int) -> None:
    before = open_fds()
    async with served(FolderFiles(root)) as node:
        answer = await node.ask(path(number))
        assert answer.status == 502
        assert f"unsealed/s-t01000-{number}" in answer.body.decode()
        assert (await node.ask(path(7))).status == 200
    await fds_return_to(before)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StorageUnavailable("no answer", "/mnt/x"), 503),
        (DiskError("input/output error", "/mnt/x"), 500),
        (PermissionRefused("open: permission denied", "/mnt/x"), 403),
    ],
)
async def test_a_file_that_cannot_be_opened(root: Path, error: SectorFSError, status: int) -> None:
    class Failing(FolderFiles):
        async def open_file(self, file: SectorFile, member: str | None = None) -> OpenFile:
            raise error

        async def open_directory(self, *arguments: object, **named: object) -> OpenDirectory:
            raise error

    async with served(Failing(root)) as node:
        for target in (path(7), "/remote/sealed/s-t01000-7", "/remote/cache/s-t01000-7"):
            answer = await node.ask(target)
            assert (answer.status, answer.body) == (status, f"{error}\n".encode())


async def test_errors_of_the_disk(root: Path) -> None:
    class Broken(FolderFiles):
        async def open_file(self, file: SectorFile, member: str | None = None) -> OpenFile:
            opened = await super().open_file(file, member)
            opened.close()
            return opened

    async with served(Broken(root)) as node:
        assert (await node.ask(path(7))).status == 500  # EBADF is nothing a client did


async def test_who_may_ask(root: Path) -> None:
    async with served(FolderFiles(root)) as node:
        weak = ("Authorization", f"Bearer {sign(SECRET, [])}")
        assert (await node.ask(path(7), weak)).status == 403
        assert (await node.ask(path(7), ("Authorization", "Bearer x"))).status == 401
        assert await _post(node) == 405


async def _post(node: Served) -> int:
    return (await node.ask(path(7), method="POST")).status
