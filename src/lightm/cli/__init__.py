"""The command line: verbs only, each a thin shell over one public function.

Exit codes: 0 done; 1 the work failed; 2 wrong usage or wrong input. Nothing heavy is imported until a verb runs.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from lightm import __version__
from lightm.cli.common import app, echo
from lightm.errors import LightMError

# the order of these imports is the order of the verbs in the help
from lightm.cli import runs  # isort: skip
from lightm.cli import results  # isort: skip
from lightm.cli import compare  # isort: skip
from lightm.cli import bench  # isort: skip
from lightm.cli import weights  # isort: skip
from lightm.cli import info  # isort: skip
from lightm.cli import pack  # isort: skip
from lightm.cli import convert  # isort: skip

__all__ = ["app", "bench", "compare", "convert", "info", "main", "pack", "results", "runs", "weights"]


def main() -> None:
    """Run the command line; the console script `lightm`."""
    try:
        app()
    except LightMError as error:
        echo(f"lightm: error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        echo("lightm: interrupted")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more, such as the kernels chosen.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
    if version:
        typer.echo(f"lightm {__version__}")
        raise typer.Exit
