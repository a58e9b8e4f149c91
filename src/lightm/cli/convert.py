"""The verb that makes public downloads readable: convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lightm.cli.common import Json, app, echo, progress_bar


@app.command()
def convert(
    layout: Annotated[str, typer.Argument(help="lits, montgomery-shenzhen, msd or folder.")],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder that the download was unpacked to.")],
    out: Annotated[Path, typer.Argument(help="Data set to write, in nnU-Net's raw layout.")],
    labels: Annotated[
        Path | None, typer.Option(help="For folder: label maps, when SRC is the folder of images.")
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="Link files that need no change, instead of copying.")] = False,
    trust_image_geometry: Annotated[
        bool, typer.Option("--trust-image-geometry", help="Give labels the image's place where theirs differs.")
    ] = False,
    skip_faulty: Annotated[bool, typer.Option("--skip-faulty", help="Leave faulty cases out, and name them.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Convert a public download (LiTS, Montgomery and Shenzhen, the Decathlon, two folders) without loss.

    Example: lightm convert lits downloads/LiTS Dataset029_LiTS
    """
    from lightm.datasets.convert import convert_dataset

    with progress_bar() as progress:
        result = convert_dataset(
            layout,
            source,
            out,
            labels=labels,
            link=link,
            trust_image_geometry=trust_image_geometry,
            skip_faulty=skip_faulty,
            overwrite=overwrite,
            progress=progress,
        )
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
