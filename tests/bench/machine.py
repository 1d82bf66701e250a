"""The machine a benchmark ran on: what anybody needs to judge its figures, and how busy it was."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import sectorfs
from tests.bench.processes import program
from tests.bench.runner import LeftOut

BUSY_SHARE = 0.2
"""Of the processors' time: others who take more than this are in the way."""
LOOK = 1.0
"""Seconds the processors are looked at."""

VERSIONS = {
    "mergerfs": ("mergerfs", "-V"),
    "bindfs": ("bindfs", "-V"),
    "rclone": ("rclone", "--version"),
    "sshfs": ("sshfs", "-V"),
    "OpenSSH": ("ssh", "-V"),
    "curl": ("curl", "--version"),
    "fio": ("fio", "--version"),
    "coreutils": ("sha256sum", "--version"),
    "fuse3": ("fusermount3", "-V"),
}


@dataclass(frozen=True)
class Machine:
    """Described once, before anything is measured."""

    processor: str
    cores: int
    memory: int
    """Bytes."""
    kernel: str
    distribution: str
    python: str
    file_system: str
    """Type and source of the file system with the files."""
    native_modules: bool
    """The compiled padding and hashing are built."""
    versions: dict[str, str]
    """Of sectorfs and of the peers; the missing ones are left out."""
    load: tuple[float, float, float]
    """Load averages at the start."""
    busy: float
    """Share of the processors' time that others took just before the start."""
    warnings: list[str] = field(default_factory=list)


def describe(directory: Path) -> Machine:
    """This machine now; takes a second."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()
    busy = _busy()
    return Machine(
        processor=_first(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text()),
        cores=cores,
        memory=int(_first(r"^MemTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text())) * 1024,
        kernel=platform.release(),
        distribution=platform.freedesktop_os_release()["PRETTY_NAME"],
        python=platform.python_version(),
        file_system=_file_system(directory),
        native_modules=all(_is_built(name) for name in ("_fr32", "_commp", "_leaves")),
        versions={"sectorfs": _own_version()} | _versions(VERSIONS),
        load=load,
        busy=busy,
        warnings=judge(load[0], busy, cores=cores),
    )


def judge(load: float, busy: float, *, cores: int) -> list[str]:
    """What makes figures doubtful; nothing on a quiet machine."""
    warnings = []
    if busy > BUSY_SHARE:
        warnings.append(f"the machine is busy: others take {busy:.0%} of the processors' time")
    if load > cores / 2:
        warnings.append(f"the machine was busy a moment ago: load average {load:.2f}")
    return warnings


def share_busy(before: str, after: str) -> float:
    """Share of the time between two texts of ``/proc/stat`` that no processor idled."""
    first, second = (
        [int(number) for number in text.split("\n", 1)[0].split()[1:]] for text in (before, after)
    )
    spent = [late - early for early, late in zip(first, second, strict=True)]
    total = sum(spent[:8])  # what follows is counted in user time already
    return 1 - (spent[3] + spent[4]) / total if total else 0.0


def _busy() -> float:
    stat = Path("/proc/stat")
    before = stat.read_text()
    time.sleep(LOOK)
    return share_busy(before, stat.read_text())


def _file_system(directory: Path) -> str:
    command = ["findmnt", "--noheadings", "--output", "FSTYPE,SOURCE", "--target", str(directory)]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return " ".join(found.split()) or "unknown"


def _own_version() -> str:
    where = Path(__file__).parent
    commit = subprocess.run(
        ["git", "-C", where, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return f"{sectorfs.__version__} ({commit})" if commit else sectorfs.__version__


def _versions(commands: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    found = {}
    for name, (command, option) in commands.items():
        try:
            done = subprocess.run(
                [program(command), option], capture_output=True, text=True, check=False
            )
        except LeftOut:
            continue
        found[name] = version_in(done.stdout + done.stderr, name)
    return found


def version_in(text: str, name: str) -> str:
    """The number after a program's name, else the first one: some list their libraries before."""
    number = r"(\d+(?:\.\d+)+\w*)"
    match = re.search(rf"{re.escape(name)}\D*{number}", text, re.IGNORECASE)
    match = match or re.search(number, text)
    return match[1] if match else "unknown"


def _is_built(module: str) -> bool:
    return importlib.util.find_spec(f"sectorfs.stores.{module}") is not None


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else "0"
