"""The verb that measures speed and memory on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightm.cli.common import Json, app, echo, progress_bar
from lightm.errors import InputError

if TYPE_CHECKING:
    from lightm.lab.bench import Row


@app.command()
def bench(
    what: Annotated[
        str, typer.Argument(help="op, layer, network, scaling, all, or one operator or layer such as selective_scan.")
    ] = "network",
    size: Annotated[int | None, typer.Option(help="Edge of the cube; default 96 for networks, else 64.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds; every case is measured once in each.")] = 5,
    networks: Annotated[
        str | None,
        typer.Option(help="Names with commas: presets; baselines such as unetr; dynunet-6: six stages at any size."),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Network to compare with; default dynunet.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Measure training steps instead of inference.")] = False,
    scaling_sizes: Annotated[str | None, typer.Option("--sizes", help="Edges for scaling, e.g. 32,64,96.")] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each case in a process of its own.")] = True,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="CSV file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot of scaling: .svg, .png or .pdf.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's choice.")] = None,
    as_json: Json = False,
) -> None:
    """Measure time and peak memory of operators, layers and networks against baselines and the machine's roofline.

    Example: lightm bench network --size 64 --networks lightm-unet,dynunet --out bench.csv
    """
    names = None if networks is None else [name.strip() for name in networks.split(",") if name.strip()]
    if threads is not None and threads < 1:
        raise InputError(f"threads {threads}: at least one is needed")
    from lightm.lab.bench import run
    from lightm.lab.bench.suite import SCALING_SIZES

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    with progress_bar() as progress:
        rows = run(
            what,
            size=size,
            repeats=repeats,
            networks=names,
            baseline=baseline,
            train=train,
            sizes=SCALING_SIZES if scaling_sizes is None else _edges(scaling_sizes),
            memory=memory,
            out=out,
            plot=plot,
            progress=progress,
            say=(lambda text: None) if progress is not None else echo,
        )
    _print(rows, as_json)
    for path in (out, plot):
        if path is not None:
            echo(f"written: {path}")


def _edges(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError as error:
        raise InputError(f"sizes '{text}': write whole numbers with commas, e.g. 32,64,96") from error


def _print(rows: list[Row], as_json: bool) -> None:
    from lightm.lab.bench.records import HEADINGS, cells, format_json, format_markdown

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
