"""The command line: verbs only, each a thin shell over the public function of its name.

Exit codes: 0 done; 1 the work failed; 2 wrong usage or wrong input. Nothing heavy is imported until a verb runs.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Annotated

import typer

from lightm import __version__
from lightm.cli import exchange, lab, workflow
from lightm.cli.common import app, echo
from lightm.errors import LightMError

__all__ = ["app", "exchange", "lab", "main", "workflow"]

_state = {"debug": False}


def main() -> None:
    """Run the command line; the console script `lightm`."""
    _settle_process()
    _state["debug"] = False
    try:
        app()
    except LightMError as error:
        if _state["debug"]:
            traceback.print_exc()
        echo(f"lightm: error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        echo("lightm: interrupted")
        sys.exit(130)


def _settle_process() -> None:
    """Set what is this program's to set, and not a library's: environment variables and others' loggers."""
    # Read once, when torch is loaded, and only if not set already. PyTorch's OpenMP threads otherwise spin while they
    # wait, in the way of the kernels' own threads and of autograd's; and large tensors are otherwise made of small
    # pages, each of which costs a fault when it is first written. Both are explained in src/lightm/ops/README.md.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # nibabel prints a line for each field of a header that it repairs; a fault that matters is an error of ours.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)


class _Messages(logging.Handler):
    """Shows the messages of this package on standard error, as they are; warnings are named as such."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            echo(("lightm: warning: " if record.levelno >= logging.WARNING else "") + self.format(record))
        except Exception:
            self.handleError(record)


def _show_messages(verbose: bool) -> None:
    logger = logging.getLogger("lightm")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _Messages)]
    logger.addHandler(_Messages())
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("lightm.ops").setLevel(logging.NOTSET if verbose else logging.WARNING)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more, such as the kernels chosen.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors, and all messages.")] = False,
) -> None:
    _state["debug"] = debug
    _show_messages(verbose or debug)
    if version:
        typer.echo(f"lightm {__version__}")
        raise typer.Exit
