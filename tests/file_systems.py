"""Real file systems for tests: ext4, xfs and btrfs on loop devices, and tmpfs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster_fixtures import mounted

KINDS = ("ext4", "xfs", "btrfs", "tmpfs")
_MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
SIZE = "512M"
"""Of a file system unless said otherwise: xfs takes no less than 300 MiB."""


def why_not(kind: str) -> str:
    """Why this machine cannot have such a file system; nothing when it can."""
    if kind in _MAKE and shutil.which(_MAKE[kind][0]) is None:
        return f"{_MAKE[kind][0]} is not installed"
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "--quiet", kind], capture_output=True, check=False)
    known = Path("/proc/filesystems").read_text().split()
    return "" if kind in known else f"this kernel has no {kind}"


@contextmanager
def file_system(root: Path, kind: str, *, name: str = "", size: str = SIZE) -> Iterator[Path]:
    """A file system of its own at ``root/name`` (else ``root/kind``) for the time of the block."""
    at = root / (name or kind)
    if kind == "tmpfs":
        with mounted("-t", "tmpfs", "-o", f"size={size}", "none", at=at):
            yield at
        return
    image = at.with_name(f"{at.name}.img")
    subprocess.run(["truncate", "-s", size, image], check=True)
    subprocess.run([*_MAKE[kind], image], check=True, capture_output=True)
    with mounted("-o", "loop", str(image), at=at):
        yield at
