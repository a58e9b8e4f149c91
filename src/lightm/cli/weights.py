"""Verbs about weights from elsewhere: import-released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lightm.cli.common import Json, app, echo, sizes
from lightm.errors import InputError


@app.command("import-released")
def import_released(
    checkpoint: Annotated[Path, typer.Argument(help="State dict (.safetensors, .pth, .pt) or nnU-Net checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Model folder to write.")],
    labels: Annotated[str | None, typer.Option(help="Labels: background=0,lung=1.")] = None,
    dataset_json: Annotated[Path | None, typer.Option(help="nnU-Net's dataset.json: labels and channels.")] = None,
    plans: Annotated[Path | None, typer.Option(help="nnU-Net's plans (JSON), or a plan.yaml of LightM.")] = None,
    configuration: Annotated[str | None, typer.Option(help="Of nnU-Net's plans: 2d, 3d_fullres, ...")] = None,
    spacing: Annotated[str | None, typer.Option(help="Voxel spacing in mm, z,y,x: 1,0.8,0.8.")] = None,
    patch_size: Annotated[str | None, typer.Option(help="Patch in voxels, z,y,x: 96,96,96.")] = None,
    groups: Annotated[int, typer.Option(help="Groups of GroupNorm, which the weights do not tell.")] = 8,
    overwrite: Annotated[bool, typer.Option(help="Replace a model in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Convert weights of LightM-UNet's released code into a model folder, without executing anything in the file.

    Example: lightm import-released checkpoint_final.pth models/lung --labels background=0,lung=1
    """
    from lightm.interchange.released import import_released as run

    result = run(
        checkpoint,
        out,
        labels=_labels(labels),
        dataset_json=dataset_json,
        plans=plans,
        configuration=configuration,
        spacing_mm=_spacing(spacing),
        patch_size=sizes(patch_size),
        groups=groups,
        overwrite=overwrite,
    )
    if as_json:
        content = {
            "folder": str(result.folder),
            "network": result.network,
            "parameters": result.parameters,
            "plan": result.plan.model_dump(mode="json", exclude={"fingerprint"}),
            "remarks": result.remarks,
        }
        typer.echo(json.dumps(content, indent=1))
        return
    for remark in result.remarks:
        echo(f"note: {remark}")
    network, plan = result.network, result.plan
    echo(
        f"{network['spatial_dims']}D, {network['in_channels']} channel(s), {result.parameters:,} parameters; labels "
        f"{', '.join(f'{name}={value}' for name, value in plan.labels.items())}; spacing {plan.spacing_mm} mm"
    )
    typer.echo(f"model: {result.folder}")


def _labels(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    labels: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        if not name.strip() or not value.strip().isdigit() or name.strip() in labels:
            raise InputError(f"labels '{text}': write each name once with its value, as background=0,lung=1")
        labels[name.strip()] = int(value)
    return labels


def _spacing(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace("x", ",").split(",")]
    except ValueError as error:
        raise InputError(f"spacing '{text}': write millimetres as 1,0.8,0.8") from error
