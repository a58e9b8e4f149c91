"""Verbs that compare and measure: compare, bench, info."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import lightm
from lightm.cli.common import Json, app, command, echo, print_json, progress_bar
from lightm.errors import InputError


@app.command()
def compare(
    experiment: Annotated[Path, typer.Argument(help="Experiment YAML, or the folder of a comparison.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default runs/NAME.")] = None,
    dataset: Annotated[Path | None, typer.Option(help="Data set to use instead of the experiment's.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Trainings side by side, on equal shares of the cores.")] = None,
    total_time: Annotated[str | None, typer.Option(help="Begin no training that would end later: 2h.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Train trials that failed once more.")] = False,
    only_report: Annotated[bool, typer.Option("--only-report", help="Train nothing; write tables and page.")] = False,
    as_json: Json = False,
) -> None:
    """Train a grid of networks, losses, recipes and seeds, and say what is better by how much.

    Finished trainings are kept: the same command again goes on.

    Example: lightm compare examples/quick.yaml
    """
    with progress_bar() as progress:
        if only_report:
            from lightm.lab.compare import write_results

            page = write_results(experiment if out is None else out, progress=progress)
            typer.echo(json.dumps({"page": str(page)}) if as_json else str(page))
            return
        options: dict[str, Any] = {"dataset": dataset, "jobs": jobs, "total_time": total_time, "retry": retry}
        result = lightm.compare(experiment, out, **options, progress=progress)
    failed = [record.id for record in result.comparison.failed]
    if as_json:
        print_json(
            {
                "folder": str(result.comparison.folder),
                "page": None if result.page is None else str(result.page),
                "finished": [found.record.id for found in result.comparison.finished],
                "failed": failed,
                "left": result.left,
            }
        )
    elif result.page is not None:
        table = result.comparison.folder / "tables" / "methods.md"
        typer.echo(f"{table.read_text(encoding='utf-8')}\n{result.page}")
    if failed:
        echo(f"{len(failed)} trials failed; `--retry` trains them again")
        raise typer.Exit(1)


@command("lightm.api:BenchOptions")
def bench(
    what: Annotated[
        str, typer.Argument(help="op, layer, network, scaling, all, or one operator or layer such as selective_scan.")
    ] = "network",
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Measure time, peak memory and the machine's roofline of operators, layers and networks.

    Example: lightm bench network --size 64 --networks lightm-unet,dynunet --out bench.csv
    """
    from lightm.lab.bench.records import HEADINGS, cells, format_json, format_markdown

    with progress_bar() as progress:
        rows = lightm.bench(what, progress=progress, **given)
    if as_json:
        typer.echo(format_json(rows))
    elif not sys.stdout.isatty() or not rows:
        typer.echo(format_markdown(rows))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(caption=format_markdown(rows).splitlines()[0])
        for index, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if index in (0, 2, 3) else "right")
        for row in rows:
            table.add_row(*cells(row))
        Console().print(table)
    for path in (given.get("out"), given.get("plot")):
        if path is not None:
            echo(f"written: {path}")


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
        others = {"PRESET": names, "--set": setting, "--latency": latency, "--diagram": diagram}
        if wrong := [name for name, value in others.items() if value]:
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
    image: dict[str, Any] = {"spatial": shape, "in_channels": in_channels, "out_channels": classes}
    cost = lightm.info(names[0], **image, latency=latency, **options)
    if diagram is not None:
        from lightm.files import write_text
        from lightm.lab.complexity.diagram import draw_network

        write_text(diagram, draw_network(names[0], **image, options=options))
        echo(str(diagram))
    typer.echo(json.dumps(cost.to_dict(), indent=1) if as_json else describe(cost))


def _name_and_sizes(words: list[str], spatial: str | None) -> tuple[list[str], tuple[int, ...]]:
    """Names and sizes apart: of `--spatial 128 128 128` only the first number is the option's own."""
    numbers = [word for word in words if word.isdigit()]
    if numbers and spatial is None:
        raise InputError(f"{' '.join(numbers)}: sizes are given as --spatial {' '.join(numbers)}")
    given = re.split("[x, ]", " ".join([spatial or "128,128,128", *numbers]))
    try:
        return [word for word in words if not word.isdigit()], tuple(int(part) for part in given if part)
    except ValueError as error:
        raise InputError(f"spatial size '{spatial}': write whole numbers, as --spatial 128 128 128") from error


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set {text}: write name=value, e.g. --set parts=8 or --set 'encoder_layers=[1,2,2]'")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
