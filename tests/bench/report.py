"""Rows as JSON for programs and as a Markdown table for the README."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from tests.bench.machine import Machine
from tests.bench.runner import Row, Spread

SCHEMA = 2


@dataclass(frozen=True)
class Report:
    """One run."""

    schema: int
    started: str
    """RFC 3339, UTC."""
    seconds: float
    machine: Machine
    rows: list[Row]

    @property
    def failed(self) -> list[Row]:
        """Rows that went wrong; those left out did not."""
        return [row for row in self.rows if row.state == "failed"]

    @property
    def missed(self) -> list[Row]:
        """Rows that reached less than is promised."""
        return [row for row in self.rows if row.missed]


def encode(report: Report) -> bytes:
    """The report as JSON, one value a line."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def decode(data: bytes) -> Report:
    """The report that was encoded."""
    return msgspec.json.decode(data, type=Report)


def write(report: Report, path: Path) -> None:
    """Write the JSON, and the directory it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(report))


def markdown(report: Report) -> str:
    """The table, with the machine below it."""
    lines = [
        "| work | sectorfs | peer | ratio | promised |",
        "| --- | --- | --- | --- | --- |",
        *(_line(row) for row in report.rows),
        "",
        *_footer(report),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    if row.ours_spread is None or row.peer_spread is None or row.ratio_spread is None:
        reason = f"{row.state}: {_cell(row.reason)}"
        return f"| {row.title} | – | {row.peer} | {reason} | {_promise(row)} |"
    ours, theirs = figure(row.ours_spread, row.unit), figure(row.peer_spread, row.unit)
    figures = f"{ours} | {row.peer}: {theirs} | {ratio(row.ratio_spread)}"
    return f"| {row.title} | {figures} | {_promise(row)} |"


def _promise(row: Row) -> str:
    if row.at_least is None:
        return ""
    return f"{row.at_least:g}: {'**missed**' if row.missed else 'met'}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def figure(spread: Spread, unit: str) -> str:
    """Median and quartiles of a rate."""
    return f"{number(spread.median)} {unit} ({number(spread.low)}–{number(spread.high)})"


def ratio(spread: Spread) -> str:
    """Median and quartiles of a ratio."""
    return f"**{spread.median:.2f}** ({spread.low:.2f}–{spread.high:.2f})"


def number(value: float) -> str:
    """Three digits are all that such a figure is worth; thousands apart."""
    if value < 100:
        return f"{value:.3g}"
    digits = len(str(int(value)))
    return f"{round(value, 3 - digits):,.0f}".replace(",", " ")


def _footer(report: Report) -> list[str]:
    machine = report.machine
    pairs = sorted({len(row.pairs) for row in report.rows if row.pairs})
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = [
        f"Median (quartiles) of {'/'.join(map(str, pairs)) or 'no'} pairs taken in turn after a "
        "warm-up; the ratio is the median of ours / theirs pair by pair: above 1 sectorfs is "
        "faster.",
        f"{machine.cores} cores ({machine.processor}), {machine.memory / 2**30:.0f} GiB, Linux "
        f"{machine.kernel}, {machine.distribution}, files on {machine.file_system}; Python "
        f"{machine.python}; native modules {'built' if machine.native_modules else 'not built'}.",
        f"{versions}.",
        f"{report.started}, {report.seconds:.0f} s, load average at the start "
        f"{machine.load[0]:.2f}.",
    ]
    return lines + [f"**Doubtful: {warning}.**" for warning in machine.warnings]
