"""Verbs about weights from elsewhere: import-released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lightm.cli.common import Json, echo
from lightm.cli.options import command


def _options() -> Any:
    from lightm.api import ImportOptions

    return ImportOptions


@command(_options, "import-released")
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
    from lightm.api import import_released as run

    result = run(checkpoint, out, **given)
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
