"""Verifying a sector file that nobody has in memory, beside reading it with ``cat``.

Ours hashes every byte and compares it with what it was; the first time, before anything counts, it
makes what there is to compare with. The time is the node's own, from the order to the verdict.
"""

from __future__ import annotations

import os
from pathlib import Path

from sectorfs.node.verify import VerifyOrder
from tests.bench.processes import seconds
from tests.bench.runner import Side, Work
from tests.bench.stage import BIG, BIG_FILE, Stage
from tests.cluster_fixtures import ask

MB = 1e6
PROMISED = 0.9


def ours(stage: Stage) -> float:
    """As `sectorfs sector verify`."""
    file_type, sector = BIG_FILE.parts
    node = stage.holder
    _forget()
    order = VerifyOrder(files=[(file_type, sector)])
    report = ask(node, lambda admin: admin.verifying.verify(order))
    assert report.bytes == BIG
    return BIG / MB / report.seconds


def cat(stage: Stage) -> float:
    """The program, on the disk itself."""
    path = stage.view("bare") / BIG_FILE
    _forget()
    return BIG / MB / seconds("cat", path)


def _forget() -> None:
    """Have nothing of any disk in memory."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


WORKS: tuple[Work[Stage], ...] = (
    Work(
        "scrub",
        "verify a file of the disk",
        "MB/s",
        Side("sectorfs", ours),
        (Side("cat", cat, PROMISED),),
    ),
)
