"""The verb that turns a model folder into a single file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lightm.cli.common import Json, app, echo


@app.command("pack", hidden=True)
@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Model folder, or the run folder that holds it.")],
    out: Annotated[Path, typer.Argument(help="File to write; its name ends in .safetensors.")],
    overwrite: Annotated[bool, typer.Option(help="Replace a file in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Write a trained model as a single file, which every verb takes in place of the folder.

    Example: lightm export runs/hippocampus hippocampus.safetensors
    """
    from lightm.api import export as run

    path = run(model, out, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps({"file": str(path), "bytes": path.stat().st_size}))
    else:
        echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
