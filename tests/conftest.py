"""What holds for all tests."""

from __future__ import annotations

import signal

# The first of our imports: they come before pyfuse3, which some tests import by themselves.
import sectorfs.fuse.inodes
import sectorfs.fuse.kernel  # noqa: F401

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As below `&` of a shell: the processes under test would inherit it, and no test could end them
    # as a user does.
    signal.signal(signal.SIGINT, signal.default_int_handler)
