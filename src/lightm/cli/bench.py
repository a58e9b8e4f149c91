"""The verb that measures speed and memory on this machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightm.cli.common import Json, echo, progress_bar
from lightm.cli.options import command

if TYPE_CHECKING:
    from lightm.lab.bench import Row


def _options() -> Any:
    from lightm.api import BenchOptions

    return BenchOptions


@command(_options)
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
    from lightm.api import bench as run

    with progress_bar() as progress:
        rows = run(what, progress=progress, **given)
    _print(rows, as_json)
    for path in (given.get("out"), given.get("plot")):
        if path is not None:
            echo(f"written: {path}")


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
