"""What holds for all tests."""

from __future__ import annotations

# The first of all imports: they have to come before pyfuse3, which some tests import by themselves.
import sectorfs.fuse.inodes
import sectorfs.fuse.kernel  # noqa: F401
