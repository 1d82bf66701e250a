"""``python -m sectorfs``."""

from sectorfs.cli.main import main

main()
