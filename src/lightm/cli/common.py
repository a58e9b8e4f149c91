"""What the verbs share: the application, common options, progress and printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lightm.evaluation import Evaluation
    from lightm.pipeline import RunResult

app = typer.Typer(
    name="lightm",
    help="Medical image segmentation with Mamba U-Nets of about a million parameters. For research, not for clinical "
    "decisions.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Dataset = Annotated[
    Path, typer.Argument(help="Data set: nnU-Net raw or MSD layout, or a folder of images (then with --labels).")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="File; default DATASET/plan.yaml.")]
Labels = Annotated[Path | None, typer.Option(help="Folder of labels, when DATASET is a folder of images.")]


def echo(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A Rich bar on standard error for `progress(what, done, total)`; nothing when that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, Any] = {}
    live: list[Progress] = []

    def show(what: str, done: int, total: int) -> None:
        if not live:
            live.append(Progress(*columns, console=Console(stderr=True)))
            live[0].start()
        if what not in bars:
            bars[what] = live[0].add_task(what, total=total)
        live[0].update(bars[what], completed=done, total=total)
        if done >= total:  # let go of the terminal, which the training's own bar needs
            live[0].stop()
            live.clear()
            bars.clear()

    try:
        yield show
    finally:
        for progress in live:
            progress.stop()


def print_run(result: RunResult, *, as_json: bool) -> None:
    if result.report is None:
        typer.echo(json.dumps({"run": str(result.run_dir)}) if as_json else f"model: {result.model}")
        return
    if result.evaluation is not None:
        print_evaluation(result.evaluation, as_json)
    echo(f"report: {result.report}")


def print_evaluation(evaluation: Evaluation, as_json: bool) -> None:
    if as_json:
        typer.echo(evaluation.model_dump_json(indent=2))
        return
    from rich.console import Console

    from lightm.evaluation import format_table

    Console(width=None if sys.stdout.isatty() else 120).print(format_table(evaluation))
