"""`sectorfs sector piece`: unpadded bytes through real nodes, their peers, and without any node."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from sectorfs.stores import fr32, rle
from sectorfs.stores.manifest import Manifest, leaf_hashes
from sectorfs.stores.rle import Runs
from tests.cli_fixtures import Say, refused, sayer
from tests.cluster import SECTORFS, Node, cluster, until, write
from tests.cluster_fixtures import (
    attach,
    configure,
    facts_of,
    false_peer,
    locations,
    octets,
    put,
)
from tests.cluster_fixtures import declare_at as declare
from tests.faulty_peer import Flipping, faulty_peers

SIZE = 8 << 20
END = fr32.unpadded(SIZE)
CLIENT = random.Random("piece").randbytes(END)
PADDED = bytes(fr32.pad(CLIENT))


def partial(allocated: Runs) -> bytes:
    """An unsealed file with a trailer."""
    bitmap = rle.encode(allocated)
    return PADDED + bitmap + len(bitmap).to_bytes(4, "little")


class Pair:
    """Two nodes, one of which has unsealed sectors."""

    def __init__(self, tmp_path: Path, asker: Node, owner: Node) -> None:
        self.asker = asker
        self.owner = owner
        self.disk = tmp_path / "disk"
        write(self.disk / "unsealed/s-t01000-1", partial(Runs.span(0, SIZE)))
        write(self.disk / "unsealed/s-t01000-2", PADDED)
        write(self.disk / "unsealed/s-t01000-3", partial(Runs.of([(0, 1024), (4096, SIZE)])))
        write(self.disk / "sealed/s-t01000-4", PADDED)
        for node in (asker, owner):
            configure(node)
        asker.start()
        owner.start(index=asker)
        attach(owner, self.disk)
        until("the sectors", lambda: locations(asker, "unsealed/s-t01000-3"))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with cluster(tmp_path, "asker", "owner") as [asker, owner]:
        yield Pair(tmp_path, asker, owner)


@pytest.fixture(scope="module")
def gappy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that has a file with gaps."""
    root = tmp_path_factory.mktemp("gappy")
    with cluster(root, "node") as [node]:
        configure(node)
        node.start()
        write(root / "disk/unsealed/s-t01000-1", partial(Runs.of([(0, 1024), (4096, SIZE)])))
        write(root / "disk/sealed/s-t01000-4", PADDED)
        attach(node, root / "disk")
        yield node


@pytest.fixture
def say(gappy: Node, capfd: pytest.CaptureFixture[str]) -> Say:
    """Verbs on that node."""
    return sayer(gappy.repo, capfd)


def command(node: Node, sector: str, offset: int, size: int) -> list[str]:
    """The command line."""
    where = ["--offset", str(offset), "--size", str(size)]
    return [*SECTORFS, "--repo", str(node.repo.root), "sector", "piece", sector, *where]


def piece(node: Node, sector: str, offset: int, size: int) -> bytes:
    """The bytes that it prints."""
    result = subprocess.run(command(node, sector, offset, size), capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr == b""
    return result.stdout


@pytest.mark.parametrize("by", ["owner", "asker"])
def test_ranges_here_and_from_a_peer(pair: Pair, by: str) -> None:
    node = pair.owner if by == "owner" else pair.asker
    assert piece(node, "s-t01000-1", 0, END) == CLIENT
    assert piece(node, "s-t01000-2", 1_000_001, 5_000_003) == CLIENT[1_000_001:6_000_004]
    assert piece(node, "s-t01000-2", END - 1, 1) == CLIENT[-1:]
    assert piece(node, "s-t01000-1", 3, 0) == b""
    assert piece(node, "s-t01000-3", 4064, 2000) == CLIENT[4064:6064]


def test_the_owners_disk_serves_while_no_node_runs(pair: Pair) -> None:
    """The owner's own Index is the asker's; with that one gone, nobody can say where it lies."""
    pair.owner.stop()
    # Its Index is named on the command line of a node; a repo without one finds it in its settings.
    configure(pair.owner, index={"url": f"{pair.asker.repo.api()}/rpc/v0"})
    assert piece(pair.owner, "s-t01000-1", 77, 1_000_000) == CLIENT[77:1_000_077]


def test_own_copy_is_read_when_the_peers_are_gone(pair: Pair, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    write(mine / "unsealed/s-t01000-1", partial(Runs.span(0, SIZE)))
    attach(pair.asker, mine)
    pair.owner.kill()
    assert piece(pair.asker, "s-t01000-1", 100, 1000) == CLIENT[100:1100]


def test_peer_has_what_the_own_copy_lacks(pair: Pair, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    write(mine / "unsealed/s-t01000-1", partial(Runs.span(0, 1024)))
    attach(pair.asker, mine)
    assert piece(pair.asker, "s-t01000-1", 100, 100_000) == CLIENT[100:100_100]


def test_owner_that_is_down(pair: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    pair.owner.kill()
    say = sayer(pair.asker.repo, capfd)
    said = say("sector", "piece", "s-t01000-1", "--offset", "0", "--size", "10")
    refused(said, 5, "unsealed/s-t01000-1: no node that has it answers")


def test_peers_of_other_kinds(pair: Pair) -> None:
    """No HEAD, and sizes only in the answers to ranges."""

    def lotus(peer: object) -> object:
        def answer(connection: object, path: str) -> None:
            head = peer.heads[-1]  # type: ignore[attr-defined]  # a FalsePeer
            if head.startswith("HEAD"):
                reply = b"HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 0\r\n\r\n"
            else:
                [span] = [
                    line for line in head.lower().split("\r\n") if line.startswith("range: bytes=")
                ]
                first, last = map(int, span.removeprefix("range: bytes=").split("-"))
                extent = f"content-range: bytes {first}-{last}/{SIZE}\r\n".encode()
                body = PADDED[first : last + 1]
                reply = octets(len(body), "206 Partial Content", extent) + body
            connection.sendall(reply)  # type: ignore[attr-defined]  # a socket

        return answer

    with false_peer(lotus) as peer:  # type: ignore[arg-type]  # shapes of the fixture
        declare(pair.asker, "foreign", peer.url, {"unsealed/s-t01000-9": None})
        assert piece(pair.asker, "s-t01000-9", 55, 5000) == CLIENT[55:5055]


def test_reader_that_has_enough_ends_it_quietly(pair: Pair) -> None:
    with subprocess.Popen(
        command(pair.asker, "s-t01000-1", 0, END), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10) == CLIENT[:10]
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_full_disk_is_told(pair: Pair) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            command(pair.asker, "s-t01000-1", 0, 100), stdout=full, stderr=subprocess.PIPE
        )
    assert result.returncode == 1
    assert b"standard output: cannot be written: No space left" in result.stderr
    assert result.stderr.count(b"\n") == 1


def resident_peak(pid: int) -> int:
    """Most resident memory of a process so far, in KiB; 0 once it ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^VmHWM:\s+([0-9]+) kB", status, re.MULTILINE)
    return int(found[1]) if found else 0


def test_memory_does_not_grow_with_the_range(tmp_path: Path) -> None:
    with cluster(tmp_path, "node") as [node]:
        node.start()
        disk = tmp_path / "disk"
        (disk / "unsealed").mkdir(parents=True)
        with (disk / "unsealed/s-t01000-1").open("wb") as file:
            file.truncate(512 << 20)  # zeros are padded zeros
        attach(node, disk)
        size = 400_000_000
        process = subprocess.Popen(
            command(node, "s-t01000-1", 1, size), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        read = most = 0
        while data := process.stdout.read(1 << 20):
            read += len(data)
            assert not data.strip(b"\0")
            # Not ru_maxrss: a child's begins with the pages of the pytest it was forked from.
            most = max(most, resident_peak(process.pid))
        assert read == size
        process.wait(30)
        assert process.stderr is not None
        assert process.stderr.read() == b""
        process.stdout.close()
        process.stderr.close()
        assert process.returncode == 0
        assert 0 < most < 150_000, "KiB"


@pytest.mark.parametrize(
    ("sector", "offset", "size", "code", "word"),
    [
        ("s-t01000-1", "0", "1017", 3, "bytes 1016 to 1017 are not unsealed"),
        ("s-t01000-1", "1100", "5000", 3, "bytes 1100 to 4064 are not unsealed"),
        ("s-t01000-1", "0", str(END + 1), 2, f"the sector ends at {END}"),
        ("s-t01000-1", str(END), "1", 2, f"the sector ends at {END}"),
        ("s-t01000-1", str(2**63 - 1), str(2**63 - 1), 2, "no range of unpadded bytes"),
        ("s-t01000-1", str(2**63), "1", 2, "--offset"),
        ("s-t01000-1", "0", str(2**64), 2, "--size"),
        ("s-t01000-1", "-1", "1", 2, "--offset"),
        ("s-t01000-1", "0", "-1", 2, "--size"),
        ("s-t01000-1", "0x10", "1", 2, "--offset"),
        ("s-t01000-1", "", "1", 2, "--offset"),
        ("s-t01000-9", "0", "1", 3, "no storage declares any file of it"),
        ("s-t01000-4", "0", "1", 3, "unsealed/s-t01000-4: no storage has its unsealed file"),
        ("s-t01000-01", "0", "1", 2, "not a sector name"),
        ("unsealed/s-t01000-1", "0", "1", 2, "not a sector name"),
        ("", "0", "1", 2, "not a sector name"),
    ],
)
def test_bad_input(say: Say, sector: str, offset: str, size: str, code: int, word: str) -> None:
    arguments = ["sector", "piece", sector, f"--offset={offset}", f"--size={size}"]
    said = say(*arguments)
    refused(said, code, word)
    assert said.out == ""
    said = say(*arguments, "--json")
    assert said.code == code
    assert set(json.loads(said.err)) == {"error", "thing", "hint"}


def test_offset_and_size_must_be_said(say: Say) -> None:
    refused(say("sector", "piece", "s-t01000-1", "--offset", "0"), 2, "--size")
    refused(say("sector", "piece", "s-t01000-1", "--size", "0"), 2, "--offset")
    refused(say("sector", "piece", "--size", "0", "--offset", "0"), 2, "SECTOR")


def test_wrong_bits_of_a_node_are_never_written(pair: Pair, tmp_path: Path) -> None:
    name = "unsealed/s-t01000-6"
    made = Manifest.of_leaves(SIZE, leaf_hashes(PADDED))
    with faulty_peers(tmp_path / "peers", "a bad", "b good") as peers:
        for peer in peers:
            put(peer.root / name, PADDED)
            peer.prove(name, made)
            facts = msgspec.structs.replace(facts_of(peer.root / name), digest=made.digest)
            declare(pair.asker, peer.root.name.replace(" ", "-"), peer.url, {name: facts})
        until("the sector", lambda: len(locations(pair.asker, name)) == 2)
        flips = peers[0].fault = Flipping(lambda number, first: True)
        result = subprocess.run(
            command(pair.asker, "s-t01000-6", 100, END - 200), capture_output=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout == CLIENT[100 : END - 100]
        assert flips.flipped
        peers[1].die()
        result = subprocess.run(
            command(pair.asker, "s-t01000-6", 100, 1000), capture_output=True, timeout=60
        )
        assert result.returncode != 0
        assert result.stdout == b""
        assert b"gave wrong bytes of unsealed/s-t01000-6" in result.stderr
