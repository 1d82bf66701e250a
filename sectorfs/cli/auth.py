"""`sectorfs auth` and `sectorfs config`."""

from __future__ import annotations

import re

import click

from sectorfs.cli import output
from sectorfs.cli.context import Settings, common
from sectorfs.config import Config
from sectorfs.wire import tokens

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType[float]):
    """``90s``, ``15m``, ``12h`` or ``30d`` in seconds."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"([0-9]{1,9})([smhd])", str(value))
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is not a time such as 12h or 30d", param, ctx)
        return float(int(match[1]) * SECONDS[match[2]])


@click.group()
@common
def auth(settings: Settings) -> None:
    """Tokens of the cluster."""


@auth.command("create-token")
@click.option(
    "--perm",
    type=click.Choice(["read", "admin"]),
    required=True,
    help="What the bearer may do: read sector files, or change things too.",
)
@click.option("--expires", type=Duration(), help="Life time, for example 12h or 30d.")
@common
def create_token(settings: Settings, perm: str, expires: float | None) -> None:
    """Print a token signed with this repo's secret.

    Example: sectorfs auth create-token --perm read --expires 30d
    """
    settings.repo.create()
    embedded = settings.repo.config().index.url == "sqlite"
    secret = settings.repo.secret(create=embedded)
    click.echo(tokens.sign(secret, (perm,), expires_seconds=expires))


@click.group()
@common
def config(settings: Settings) -> None:
    """The settings in config.toml."""


@config.command("check")
@common
def check(settings: Settings) -> None:
    """Say whether config.toml can be used.

    Example: sectorfs config check
    """
    settings.repo.config()
    if settings.as_json:
        output.print_json({"config": str(settings.repo.config_toml), "ok": True})
    else:
        click.echo(f"{settings.repo.config_toml}: ok")


@config.command("show")
@click.option("--defaults", is_flag=True, help="Show the defaults instead.")
@common
def show(settings: Settings, defaults: bool) -> None:
    """Print the settings in force.

    Example: sectorfs config show
    """
    values = Config() if defaults else settings.repo.config()
    if settings.as_json:
        output.print_json(values)
    else:
        click.echo(values.toml(), nl=False)
