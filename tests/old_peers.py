"""Stand-ins for the nodes of other programs, by era, each over real storage paths.

* ``sector-storage`` (2020): three types; a file is copied into the answer without a length, ranges
  are passed over; a directory is a tar with everything in it that nobody closes.
* ``lotus`` (2022): five types; Go's file server for files (ranges, conditions); the same tar, and
  500 for a range of a directory.
* ``curio``: seven types; a closed tar of the files on its list, fewer for ``mincache``; stash.

All of them: ``admin`` or 401, HEAD 405, 500 without a word for whatever goes wrong, no listing.
They attach and declare themselves over lotus' RPC, which has no word on sizes and times. What they
do follows the reference, and none of it uses our own server, tar or tokens.

They are `FaultyPeer`, so that any fault can befall them.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import tarfile
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from tests import go_http
from tests.faulty_peer import Answer, Asked, Fault, FaultyPeer, HangUp, Span, good
from tests.go_http import Chunked, Request

Era = Literal["sector-storage", "lotus", "curio"]
ERAS: tuple[Era, ...] = ("sector-storage", "lotus", "curio")

TYPES = ("unsealed", "sealed", "cache", "update", "update-cache", "piece", "key")
"""By the bit of their flag."""
KNOWN: dict[Era, int] = {"sector-storage": 3, "lotus": 5, "curio": 7}
"""How many of them each era knows."""
DIRECTORIES = ("cache", "update-cache")
SIZES = (2 << 10, 8 << 20, 512 << 20, 32 << 30, 64 << 30)
"""Of a sector, by the number of its seal proof modulo 5."""

_MINIMAL = re.compile(
    r"p_aux|t_aux|sc-02-data-tree-r-last(-([0-9]|1[0-5]))?\.dat|snap-vproof\.json"
)
_FULL = re.compile(
    r"sc-02-data-(layer-([1-9]|1[01])|tree-c-([0-9]|1[0-5])|tree-d)\.dat"
    r"|batch\.json|commit-phase1-output"
)
_SECTOR = re.compile(r"s-t0([0-9]+)-([0-9]+)")  # as Sscanf: whatever follows is passed over
_STASH = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Index:
    """lotus' client of an Index, over JSON-RPC."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._token = token

    def call(self, method: str, *params: object) -> Any:
        """The result of ``Filecoin.<method>``."""
        request = urllib.request.Request(
            self._url,
            json.dumps(
                {"jsonrpc": "2.0", "id": 1, "method": f"Filecoin.{method}", "params": params}
            ).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]


class OldPeer(FaultyPeer):
    """A node of another program. Its first storage path is `root`."""

    def __init__(self, era: Era, root: Path, *, secret: bytes = bytes(32)) -> None:
        self.era = era
        self.secret = secret
        """Its cluster's key: tokens are signed with it."""
        self.requests: list[Request] = []
        self.pax = False
        """Whether every file of a tar has a PAX header with its size, as those beyond 8 GiB do."""
        self.paths: dict[str, Path] = {}
        """Storage paths by id."""
        self.declared: dict[tuple[str, str], list[str]] = {}
        """The ids of the paths that have a file, by type and name."""
        self._index: Index | None = None
        self._beat = threading.Event()
        super().__init__(root)
        try:
            self.open_path(root)
        except BaseException:
            self.close()
            raise

    @property
    def types(self) -> tuple[str, ...]:
        """The types it knows."""
        return TYPES[: KNOWN[self.era]]

    @property
    def storage(self) -> str:
        """The id of its first path."""
        return next(iter(self.paths))

    # --- its storage paths ---

    def open_path(self, path: Path) -> str:
        """``OpenPath``: read the metadata (made here where there is none), make directories, scan.

        `ValueError` for an odd name, as in the originals.
        """
        path.mkdir(parents=True, exist_ok=True)
        metadata = path / "sectorstore.json"
        if not metadata.exists():
            fields: dict[str, object] = {"ID": str(uuid.uuid4()), "Weight": 10}
            metadata.write_text(
                json.dumps({**fields, "CanSeal": False, "CanStore": True}, indent=2)
            )
        storage = str(self._metadata(path)["ID"])
        if storage in self.paths:
            raise ValueError(f"path with ID '{storage}' already opened")
        if self.era == "curio" and self._metadata(path).get("CanSeal"):
            shutil.rmtree(path / "stash", ignore_errors=True)
            (path / "stash").mkdir()
        self.paths[storage] = path
        if self._index is not None:
            self._attach(storage)
        self.redeclare()
        return storage

    def redeclare(self) -> None:
        """Look through all paths; tell the Index of what came, and of what went."""
        for storage, path in self.paths.items():
            for kind in self.types:
                (path / kind).mkdir(exist_ok=True)
                for name in sorted(os.listdir(path / kind)):
                    if name == "fetching":
                        continue
                    match = _SECTOR.match(name)
                    if match is None:
                        raise ValueError(f"parse sector id {name}")
                    self._declare(storage, kind, f"s-t0{match[1]}-{match[2]}")
        for (kind, name), holders in list(self.declared.items()):
            for storage in list(holders):
                if not (self.paths[storage] / kind / name).exists():
                    self._drop(storage, kind, name)

    def attach(self, url: str, token: str, *, heartbeat: float = 1.0) -> None:
        """Join the cluster of an Index, and tell it of our health so often."""
        self._index = Index(url, token)
        for storage in self.paths:
            self._attach(storage)
        for (kind, name), holders in self.declared.items():
            for storage in holders:
                self._tell("StorageDeclareSector", storage, kind, name, self._primary(storage))

        def beat(_: socket.socket) -> None:
            while not self._beat.wait(heartbeat):
                with suppress(OSError, RuntimeError):  # an Index may be away
                    self.report_health()

        self._begin(beat, self._listener)

    def report_health(self) -> None:
        """A heartbeat. The first era's error is an interface, of which JSON makes null or {}."""
        error = None if self.era == "sector-storage" else ""
        for storage, path in self.paths.items():
            report = {"Stat": self._stat(path), "Err": error}
            self._known_index().call("StorageReportHealth", storage, report)

    def close(self) -> None:
        """End every thread."""
        self._beat.set()
        super().close()

    def _known_index(self) -> Index:
        assert self._index is not None
        return self._index

    def _attach(self, storage: str) -> None:
        data = self._metadata(self.paths[storage])
        info: dict[str, Any] = {"ID": storage, "URLs": [self.url]}
        info |= {key: data.get(key) for key in ("Weight", "CanSeal", "CanStore")}
        if self.era != "sector-storage":
            info["MaxStorage"] = data.get("MaxStorage", 0)
            names = ("Groups", "AllowTo", "AllowTypes", "DenyTypes", "AllowMiners", "DenyMiners")
            info |= {key: data.get(key) for key in names}
        self._known_index().call("StorageAttach", info, self._stat(self.paths[storage]))

    def _declare(self, storage: str, kind: str, name: str) -> None:
        holders = self.declared.setdefault((kind, name), [])
        if storage not in holders:
            holders.append(storage)
            if self._index is not None:
                self._tell("StorageDeclareSector", storage, kind, name, self._primary(storage))

    def _drop(self, storage: str, kind: str, name: str) -> None:
        holders = self.declared[kind, name]
        holders.remove(storage)
        if not holders:
            del self.declared[kind, name]
        if self._index is not None:
            self._tell("StorageDropSector", storage, kind, name)

    def _tell(self, method: str, storage: str, kind: str, name: str, *more: object) -> None:
        match = _SECTOR.match(name)
        assert match is not None
        sector = {"Miner": int(match[1]), "Number": int(match[2])}
        self._known_index().call(method, storage, sector, 1 << TYPES.index(kind), *more)

    def _primary(self, storage: str) -> bool:
        return bool(self._metadata(self.paths[storage]).get("CanStore"))

    def _metadata(self, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((path / "sectorstore.json").read_text())
        return found

    def _stat(self, path: Path) -> dict[str, int]:
        found = os.statvfs(path)
        free, all_of_it = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
        stat = {"Capacity": all_of_it, "Available": free, "Reserved": 0}
        if self.era == "sector-storage":
            return stat
        return {**stat, "FSAvailable": free, "Max": 0, "Used": 0}

    # --- its routes ---

    def _one(self, connection: socket.socket, data: bytes) -> bytes:
        request, rest = go_http.read_request(connection, data)
        self.requests.append(request)
        with ExitStack() as opened:
            answer = self._authorised(request, opened)
            asked = Asked(request.method, request.path.removeprefix("/remote/"), _spans(request))
            self.asked.append(asked)
            (self.fault or good)(self, connection, asked, answer)
            if request.path.startswith("/remote/stash/") and answer.status == "200 OK":
                self._stash(request.path.rpartition("/")[2]).unlink()
        if request.headers.get("connection", "").lower() == "close":
            raise HangUp
        return rest

    def _authorised(self, request: Request, opened: ExitStack) -> Answer:
        allowed = go_http.permissions(request, self.secret)
        if allowed is None:
            return go_http.say("401 Unauthorized")
        if not request.path.startswith("/remote/"):
            return go_http.not_routed()
        if "admin" not in allowed:
            text = json.dumps({"Error": "unauthorized: missing admin permission"})
            return go_http.say("401 Unauthorized", f"{text}\n")
        return self._routed(request, opened)

    def _routed(self, request: Request, opened: ExitStack) -> Answer:
        """The first route that fits; a path that fits some route gets 405 for another method."""
        names = request.path.removeprefix("/remote/").split("/")
        found: list[tuple[str, Callable[[], Answer]]] = []
        if "" in names:
            return go_http.not_routed()
        if len(names) == 2:
            first, last = names
            if first == "stat":
                found.append(("GET", lambda: self._space(last)))
            if first == "vanilla" and last in self._proofs():
                found.append(("POST", lambda: self._no_proof(request)))
            if first == "stash" and self.era == "curio":
                found.append(("GET", lambda: self._stashed(last, opened)))
                found.append(("POST", go_http.failed))  # registered to a wrong handler
            found.append(("GET", lambda: self._file(request, first, last, opened)))
            found.append(("DELETE", lambda: self._delete(request, first, last)))
        if len(names) == 6 and names[3] == "allocated" and self.era != "sector-storage":
            found.append(("GET", lambda: self._allocated(names)))
        for method, answer in found:
            if method == request.method:
                return answer()
        return go_http.wrong_method() if found else go_http.not_routed()

    def _proofs(self) -> tuple[str, ...]:
        eras: dict[Era, tuple[str, ...]] = {"lotus": ("single",)}
        eras["curio"] = ("single", "porep", "snap")
        return eras.get(self.era, ())

    def _space(self, storage: str) -> Answer:
        if storage not in self.paths:
            return go_http.say("404 Not Found")
        return go_http.say("200 OK", json.dumps(self._stat(self.paths[storage])) + "\n")

    def _no_proof(self, request: Request) -> Answer:
        try:
            json.loads(request.body)
        except ValueError as exc:
            return go_http.say("500 Internal Server Error", f"{exc}\n")
        return go_http.say("500 Internal Server Error", "generate vanilla proof: no prover\n")

    def _local(self, kind: str, name: str) -> Path | None:
        """Where it has a file; None for any of the many reasons not to."""
        match = _SECTOR.match(name)
        if kind not in self.types or match is None:
            return None
        name = f"s-t0{int(match[1])}-{int(match[2])}"
        for storage in self.declared.get((kind, name), ()):
            return self.paths[storage] / kind / name
        return None

    def _file(self, request: Request, kind: str, name: str, opened: ExitStack) -> Answer:
        path = self._local(kind, name)
        if path is None or not path.exists():
            return go_http.failed()
        oldest = self.era == "sector-storage"
        if path.is_dir():
            if "range" in request.headers and not oldest:
                return go_http.failed()
            return self._tar(path, minimal="mincache" in request.query, opened=opened)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        opened.callback(os.close, fd)
        if oldest:
            return go_http.copied(fd)
        return go_http.served(request, fd, empty_ranges=self.era == "lotus")

    def _tar(self, path: Path, *, minimal: bool, opened: ExitStack) -> Answer:
        parts: list[bytes | tuple[int, Span]] = []
        padding = b""
        for name in sorted(os.listdir(path)):
            one = path / name
            if self.era == "curio" and (one.is_dir() or not _travels(name, minimal)):
                continue
            info = tarfile.TarFile(fileobj=io.BytesIO(), mode="w").gettarinfo(str(one), name)
            info.mtime = int(info.mtime)
            if self.pax:
                info.pax_headers = {"size": str(info.size)}
            parts.append(padding + info.tobuf(tarfile.PAX_FORMAT))
            padding = b""
            if one.is_dir():
                break  # it cannot be read as a file, and there the archive ends
            fd = os.open(one, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            parts.append((fd, (0, info.size)))
            padding = bytes(-info.size % 512)
        if self.era == "curio":
            parts.append(padding + bytes(1024))
        return Chunked("200 OK", {"Content-Type": "application/x-tar"}, parts, 0)

    def _delete(self, request: Request, kind: str, name: str) -> Answer:
        keep: list[str] = []
        if self.era != "sector-storage":
            keep = request.query.get("keep", [""])[0].split(".")
        if self._local(kind, name) is None:
            return go_http.failed()
        for storage in list(self.declared.get((kind, name), ())):
            if storage in keep:
                continue
            self._drop(storage, kind, name)
            path = self.paths[storage] / kind / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return go_http.say("200 OK")

    def _allocated(self, names: list[str]) -> Answer:
        kind, name, proof, _, offset, size = names
        path = self._local(kind, name)
        if kind != "unsealed" or path is None or not path.exists():
            return go_http.failed()
        try:
            if not 0 <= int(proof) < 20:
                raise ValueError(proof)
            start, length = _padded(int(offset)), _padded(int(size))
            runs = _allocated_runs(path, SIZES[int(proof) % 5])
        except ValueError:
            return go_http.failed()
        if any(low <= start and start + length <= high for low, high in runs):
            return go_http.say("200 OK")
        return go_http.say("416 Requested Range Not Satisfiable")

    def _stash(self, name: str) -> Path:
        return self.root / "stash" / f"{name}.tmp"

    def _stashed(self, name: str, opened: ExitStack) -> Answer:
        if not _STASH.fullmatch(name):
            return go_http.say("400 Bad Request", "invalid UUID\n")
        if not self._stash(name).exists():
            return go_http.failed()
        fd = os.open(self._stash(name), os.O_RDONLY | os.O_CLOEXEC)
        opened.callback(os.close, fd)
        return go_http.copied(fd)


def _spans(request: Request) -> tuple[Span, ...]:
    """The ranges asked for, as far as they name both ends."""
    pairs = re.findall(r"([0-9]+)-([0-9]+)", request.headers.get("range", ""))
    return tuple((int(first), int(last) - int(first) + 1) for first, last in pairs)


def _travels(name: str, minimal: bool) -> bool:
    if _MINIMAL.fullmatch(name):
        return True
    return not minimal and _FULL.fullmatch(name) is not None


def _padded(size: int) -> int:
    return size + size // 127


def _allocated_runs(path: Path, sector_size: int) -> list[Span]:
    """Starts and ends of what the trailer of an unsealed file says is there."""
    data = path.read_bytes()[sector_size:] if path.stat().st_size < 1 << 30 else b""
    if path.stat().st_size == sector_size:
        return [(0, sector_size)]
    length = int.from_bytes(data[-4:], "little")
    if len(data) != length + 4:
        raise ValueError("inconsistent length")
    return list(_runs(data[:-4]))


def _runs(data: bytes) -> Iterator[Span]:
    """RLE+: the ends of its set runs."""
    bits = "".join(f"{byte:08b}"[::-1] for byte in data)
    at, position, value = 3, 0, bits[2:3] == "1"
    while at < len(bits) and "1" in bits[at:]:
        if bits[at] == "1":
            run, at = 1, at + 1
        elif bits[at + 1] == "1":
            run, at = int(bits[at + 2 : at + 6][::-1], 2), at + 6
        else:
            run, at, shift, more = 0, at + 2, 0, True
            while more:
                octet = int(bits[at : at + 8].ljust(8, "0")[::-1], 2)
                run |= (octet & 127) << shift
                more, shift, at = octet > 127, shift + 7, at + 8
        if value:
            yield position, position + run
        position, value = position + run, not value


# --- more faults, of chunked bodies ---


def ends_after(count: int) -> Fault:
    """End a body after so many bytes as if that were all: the disk failed, and Go's handler
    returned. Where a length was announced, Go hangs up."""

    def fault(peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer) -> None:
        peer.send(connection, answer.head())
        left = count
        for piece in Answer.pieces(answer):
            part = piece[:left]
            if isinstance(answer, Chunked) and part:
                part = b"%x\r\n%b\r\n" % (len(part), part)
            peer.send(connection, part)
            left -= len(piece)
            if left <= 0:
                break
        if not isinstance(answer, Chunked):
            raise HangUp
        peer.send(connection, b"0\r\n\r\n")

    return fault


@contextmanager
def old_peers(root: Path, eras: Mapping[str, Era], **options: Any) -> Iterator[dict[str, OldPeer]]:
    """Stand-ins by name, each over a directory of that name below `root`."""
    peers: dict[str, OldPeer] = {}
    try:
        for name, era in eras.items():
            peers[name] = OldPeer(era, root / name, **options)
        yield peers
    finally:
        for peer in peers.values():
            peer.close()
