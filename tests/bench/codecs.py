"""Padding and piece commitments, one thread, beside the digest everybody has: plain sha256sum.

Ours work on bytes in memory and sha256sum on a file in the page cache; that costs it a few per
cent. Rates count the bytes that go in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from sectorfs.stores import commp, fr32, fr32_integers
from tests.bench.processes import program, seconds
from tests.bench.runner import Side, Work
from tests.bench.stage import Stage

MB = 1e6
SLOW = ("portable", "hashlib")
SLOW_PART = 16
"""Ways without the processor's help get one part in so many: they would take most of a minute."""


def _rate(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    call()
    return count / MB / (time.perf_counter() - start)


def pad(stage: Stage) -> float:
    """127 bytes to 128, by the fastest way built."""
    data = stage.payload.read_bytes()
    out = bytearray(fr32.padded(len(data)))
    return _rate(lambda: fr32.pad_into(data, out), len(data))


def unpad(stage: Stage) -> float:
    """128 bytes to 127, by the fastest way built."""
    data = fr32.pad(stage.payload.read_bytes())
    return _rate(lambda: fr32.unpad(data), len(data))


def pad_integers(stage: Stage) -> float:
    """Padding where the native module was not built."""
    data = _first_part(stage.payload.read_bytes(), fr32.CHUNK)
    out = bytearray(fr32.padded(len(data)))
    return _rate(lambda: fr32_integers.pad(data, out), len(data))


def commit(stage: Stage) -> float:
    """A piece commitment of unpadded bytes: pads, then hashes."""
    data = stage.payload.read_bytes()
    return _rate(lambda: commp.commit(data), len(data))


def tree(method: str, stage: Stage) -> float:
    """The trees over padded bytes, by one way to hash."""
    data = bytes(fr32.pad(stage.payload.read_bytes()))
    if method in SLOW:
        data = _first_part(data, commp.BLOCK)
    whole = len(data) // commp.BLOCK * commp.BLOCK
    return _rate(lambda: commp.roots(memoryview(data)[:whole], commp.BLOCK, method=method), whole)


def _first_part(data: bytes, unit: int) -> bytes:
    return data[: len(data) // SLOW_PART // unit * unit]


def sha256sum(stage: Stage) -> float:
    """The program, over the same bytes."""
    path = stage.payload
    size = path.stat().st_size
    return size / MB / seconds(program("sha256sum"), path)


PEERS = (Side("sha256sum", sha256sum),)


def _work(name: str, title: str, ours: str, call: Callable[[Stage], float]) -> Work[Stage]:
    return Work(name, title, "MB/s", Side(ours, call), PEERS)


WORKS: tuple[Work[Stage], ...] = (
    _work("fr32-pad", "fr32: pad", "sectorfs", pad),
    _work("fr32-unpad", "fr32: unpad", "sectorfs", unpad),
    _work("fr32-python", "fr32: pad, without the native module", "sectorfs", pad_integers),
    _work("commp", "CommP, padding included", "sectorfs", commit),
    *(
        _work(
            f"commp-{method}",
            f"CommP's tree alone, {method}",
            "sectorfs",
            partial(tree, method),
        )
        for method in commp.METHODS
    ),
)
