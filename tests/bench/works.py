"""Everything that is measured: what, by whom, in which unit.

Every figure is a rate: more is better.
"""

from __future__ import annotations

from tests.bench import (
    codecs,
    hashing,
    local,
    proofs,
    remote,
    requests,
    resume,
    scale,
    scrub,
    streams,
)
from tests.bench.runner import Work
from tests.bench.stage import Stage

WORKS: tuple[Work[Stage], ...] = (
    *local.WORKS,
    *remote.WORKS,
    *requests.WORKS,
    *streams.WORKS,
    *resume.WORKS,
    *codecs.WORKS,
    *hashing.WORKS,
    *proofs.WORKS,
    *scrub.WORKS,
    *scale.WORKS,
)
