"""`sectorfs sector …`: what is done to single sectors."""

from __future__ import annotations

import click

from sectorfs.cli.context import Settings, common


@click.group()
@common
def sector(settings: Settings) -> None:
    """Single sectors: their pieces."""
