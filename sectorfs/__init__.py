"""sectorfs: one mount over every storage path of a cluster."""

__version__ = "0.1.0"
