"""What holds for all tests."""

from __future__ import annotations

# The first of all imports: it has to come before pyfuse3, which some tests import by themselves.
import sectorfs.fuse.kernel  # noqa: F401
