"""The verb that says what networks cost: parameters, operations, memory, time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lightm.cli.common import Json, app, echo, progress_bar
from lightm.errors import InputError


@app.command()
def info(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="PRESET", help="Name of a network; not needed with --all.")
    ] = None,
    spatial: Annotated[
        str | None, typer.Option(help="Sizes of the image, Z Y X or Y X; default 128 128 128.", metavar="Z Y X")
    ] = None,
    in_channels: Annotated[int, typer.Option(help="Channels of the image.")] = 1,
    classes: Annotated[int, typer.Option(help="Classes, background included.")] = 3,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting of the preset: --set base_channels=16.")
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Run the network on this machine's CPU and time it.")
    ] = False,
    diagram: Annotated[Path | None, typer.Option(help="Draw the network into this SVG file.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Compare all networks.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="With --all: folder for CSV, Markdown, picture.")
    ] = None,
    runs: Annotated[
        list[Path] | None, typer.Option(help="With --all: run folder, or folder of runs, whose Dice is shown.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a network costs: parameters by source beside their formulas, operations with the scan, memory.

    Example: lightm info lightm-unet --spatial 128 128 128
    """
    from lightm.lab.complexity import compare, describe
    from lightm.lab.complexity.report import as_text

    names, shape = _name_and_sizes(words or [], spatial)
    options = dict(_option(text) for text in setting or [])
    if everything:
        wrong = [
            n for n, v in (("PRESET", names), ("--set", setting), ("--latency", latency), ("--diagram", diagram)) if v
        ]
        if wrong:
            raise InputError(f"--all compares all networks as they are; {', '.join(wrong)} cannot be given with it")
        from lightm.lab.bubbles import read_dice, write_comparison

        dice = read_dice(runs or [])
        with progress_bar() as progress:
            rows = compare(spatial=shape, in_channels=in_channels, out_channels=classes, dice=dice, progress=progress)
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1) if as_json else as_text(rows))
        if out is not None:
            echo("\n".join(map(str, write_comparison(rows, out))))
        return
    if out is not None or runs:
        raise InputError("--out and --runs belong to --all")
    if len(names) != 1:
        raise InputError(
            f"one network is needed, got {', '.join(names) or 'none'}: `lightm info lightm-unet`, or --all"
        )
    from lightm.api import info as run

    cost = run(names[0], spatial=shape, in_channels=in_channels, out_channels=classes, latency=latency, **options)
    if diagram is not None:
        from lightm.files import write_text
        from lightm.lab.complexity.diagram import draw_network

        svg = draw_network(names[0], spatial=shape, in_channels=in_channels, out_channels=classes, options=options)
        write_text(diagram, svg)
        echo(str(diagram))
    typer.echo(json.dumps(cost.to_dict(), indent=1) if as_json else describe(cost))


def _name_and_sizes(words: list[str], spatial: str | None) -> tuple[list[str], tuple[int, ...]]:
    """Names and sizes apart: of `--spatial 128 128 128` only the first number is the option's own."""
    numbers = [word for word in words if word.isdigit()]
    if numbers and spatial is None:
        raise InputError(f"{' '.join(numbers)}: sizes are given as --spatial {' '.join(numbers)}")
    try:
        given = " ".join([spatial or "128,128,128", *numbers]).replace("x", ",").replace(" ", ",")
        shape = [int(part) for part in given.split(",") if part]
    except ValueError as error:
        raise InputError(f"spatial size '{spatial}': write whole numbers, as --spatial 128 128 128") from error
    return [word for word in words if not word.isdigit()], tuple(shape)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set {text}: write name=value, e.g. --set parts=8 or --set 'encoder_layers=[1,2,2]'")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
