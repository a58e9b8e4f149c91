"""The verb that makes public downloads readable: convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lightm.cli.common import Json, echo, progress_bar
from lightm.cli.options import command


def _options() -> Any:
    from lightm.api import ConvertOptions

    return ConvertOptions


@command(_options)
def convert(
    layout: Annotated[str, typer.Argument(help="lits, montgomery-shenzhen, msd or folder.")],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder that the download was unpacked to.")],
    out: Annotated[Path, typer.Argument(help="Data set to write, in nnU-Net's raw layout.")],
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Convert a public download (LiTS, Montgomery and Shenzhen, the Decathlon, two folders) without loss.

    Example: lightm convert lits downloads/LiTS Dataset029_LiTS
    """
    from lightm.api import convert as run

    with progress_bar() as progress:
        result = run(layout, source, out, progress=progress, **given)
    for problem in result.problems:
        echo(f"{problem.severity}: {problem}")
    for remark in result.remarks:
        echo(f"note: {remark}")
    if as_json:
        content = {
            "folder": str(result.folder),
            "train": result.train,
            "test": result.test,
            "problems": [str(problem) for problem in result.problems],
            "remarks": result.remarks,
        }
        typer.echo(json.dumps(content, indent=1))
        return
    typer.echo(f"{result.train} training and {result.test} test case(s): {result.folder}")
