"""The command line: `sectorfs VERB …`.

Every verb takes ``--repo`` and ``--json``, before or after its name. Errors of the family are
printed as one line (or one JSON object) on stderr and become the documented exit code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from sectorfs import __version__
from sectorfs.cli import auth, node, output, storage
from sectorfs.cli.context import Settings, common
from sectorfs.errors import SectorFSError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sectorfs")
@common
def sectorfs(settings: Settings) -> None:
    """One mount over every storage path of a Filecoin storage cluster.

    Try it: sectorfs demo
    """


for command in (
    node.mount,
    node.serve,
    node.umount,
    node.status,
    node.demo,
    storage.storage,
    auth.auth,
    auth.config,
):
    sectorfs.add_command(command)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code."""
    as_json = "--json" in arguments
    try:
        result = sectorfs.main(list(arguments), prog_name="sectorfs", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except SectorFSError as error:
        output.print_error(error, as_json=as_json)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        if as_json:
            output.print_usage_error(error)
        else:
            error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        return 130


def main() -> None:
    """Entry point of the program."""
    sys.exit(run(sys.argv[1:]))
