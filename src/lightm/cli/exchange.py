"""Verbs that exchange data and models with other programs: convert, import-released, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import lightm
from lightm.cli.common import Json, app, command, echo, print_json, progress_bar


@command("lightm.api:ConvertOptions")
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
    with progress_bar() as progress:
        result = lightm.convert(layout, source, out, progress=progress, **given)
    for problem in result.problems:
        echo(f"{problem.severity}: {problem}")
    for remark in result.remarks:
        echo(f"note: {remark}")
    if as_json:
        print_json(
            {
                "folder": str(result.folder),
                "train": result.train,
                "test": result.test,
                "problems": [str(problem) for problem in result.problems],
                "remarks": result.remarks,
            }
        )
        return
    typer.echo(f"{result.train} training and {result.test} test case(s): {result.folder}")


@command("lightm.api:ImportOptions", "import-released")
def import_released(
    checkpoint: Annotated[Path, typer.Argument(help="State dict (.safetensors, .pth, .pt) or nnU-Net checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Model folder to write.")],
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Convert weights of LightM-UNet's released code into a model folder, without executing anything in the file.

    Example: lightm import-released checkpoint_final.pth models/lung --labels background=0,lung=1
    """
    result = lightm.import_released(checkpoint, out, **given)
    if as_json:
        print_json(
            {
                "folder": str(result.folder),
                "network": result.network,
                "parameters": result.parameters,
                "plan": result.plan.model_dump(mode="json", exclude={"fingerprint"}),
                "remarks": result.remarks,
            }
        )
        return
    for remark in result.remarks:
        echo(f"note: {remark}")
    network, plan = result.network, result.plan
    echo(
        f"{network['spatial_dims']}D, {network['in_channels']} channel(s), {result.parameters:,} parameters; labels "
        f"{', '.join(f'{name}={value}' for name, value in plan.targets.items())}; spacing {plan.spacing_mm} mm"
    )
    typer.echo(f"model: {result.folder}")


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
    path = lightm.export(model, out, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps({"file": str(path), "bytes": path.stat().st_size}))
    else:
        echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
