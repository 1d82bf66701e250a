"""``python -m tests.bench``: measure, print the table, write the JSON."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests.bench import report as reports
from tests.bench.janitor import PREFIX, watched
from tests.bench.machine import describe
from tests.bench.runner import ENOUGH_PAIRS, PAIRS, Row, Side, Work, measure, select
from tests.bench.stage import NEEDED, Stage
from tests.bench.works import WORKS

MOST_PAIRS = 500
"""Each takes remote files of its own, which are hard links; ext4 allows 65 000 to a file."""
JSON = Path(__file__).parent.parent.parent / "build" / "bench.json"


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 when every row was measured or left out, 1 when one failed, 2 for bad use."""
    options = _parse(arguments)
    rows = select(WORKS, options.k, only=options.only)
    if not rows:
        words = " or ".join([*options.only, *options.k])
        print(f"no row's name contains {words}; --list shows all", file=sys.stderr)
        return 2
    if options.list:
        for work, peer in rows:
            print(f"{work.name:18} {peer.name:24} {work.title}")
        return 0
    problem = _problem(options.dir)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    if options.pairs < ENOUGH_PAIRS:
        print(f"warning: {options.pairs} pairs say little", file=sys.stderr)
    report = _run(rows, options.dir, options.pairs)
    print(reports.markdown(report), end="")
    reports.write(report, options.json)
    for row in report.missed:
        print(f"less than promised: {row.title}, beside {row.peer}", file=sys.stderr)
    print(f"written: {options.json}", file=sys.stderr)
    return 1 if report.failed else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench ARGS=…", description="Measure sectorfs beside its peers, in pairs."
    )
    parser.add_argument(
        "-k",
        action="append",
        default=[],
        metavar="WORD",
        help="only rows whose work or peer contains the word; may be given again",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="only the work of this name; may be given again",
    )
    parser.add_argument("--list", action="store_true", help="show the rows and measure nothing")
    parser.add_argument(
        "--pairs", type=_count, default=PAIRS, help=f"pairs that count (default {PAIRS})"
    )
    parser.add_argument(
        "--json", type=Path, default=JSON, metavar="FILE", help="default build/bench.json"
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the files go while it runs (default: the directory for temporary files)",
    )
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MOST_PAIRS:
        raise argparse.ArgumentTypeError(f"between 1 and {MOST_PAIRS}")
    return number


def _problem(directory: Path) -> str | None:
    """Why nothing can be measured there."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        return "mounts, the kernel's caches and /dev/fuse: run it as root"
    if not directory.is_dir():
        return f"{directory}: no such directory (choose another one with --dir)"
    free = shutil.disk_usage(directory).free
    if free < NEEDED:
        return f"{directory}: {free >> 20} MiB free, {NEEDED >> 20} needed (choose with --dir)"
    return None


def _run(
    rows: Sequence[tuple[Work[Stage], Side[Stage]]], directory: Path, pairs: int
) -> reports.Report:
    started, begin = datetime.now(UTC), time.monotonic()
    machine = describe(directory)
    for warning in machine.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    _interruptible()
    measured: list[Row] = []
    root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory)).resolve()
    with watched(root), Stage(root, links=2 * (pairs + 1) * len(rows)) as stage:
        for place, (work, peer) in enumerate(rows, 1):
            print(f"{place}/{len(rows)} {work.title}: {peer.name}", end=" ", file=sys.stderr)
            sys.stderr.flush()
            at = time.monotonic()
            row = measure(work, peer, stage, pairs=pairs)
            measured.append(row)
            result = reports.ratio(row.ratio_spread) if row.ratio_spread else row.reason
            print(f"{result} in {time.monotonic() - at:.0f} s", file=sys.stderr)
    return reports.Report(
        schema=reports.SCHEMA,
        started=started.isoformat(timespec="seconds").replace("+00:00", "Z"),
        seconds=time.monotonic() - begin,
        machine=machine,
        rows=measured,
    )


def _interruptible() -> None:
    """The first signal ends the run; the ones after it do not end the cleaning up."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for other in ends:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for each in ends:
        signal.signal(each, stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
