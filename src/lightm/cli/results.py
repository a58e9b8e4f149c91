"""Verbs that use a trained model: predict, evaluate, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lightm.cli.common import Json, app, print_evaluation, progress_bar
from lightm.cli.options import command


def _predict_options() -> Any:
    from lightm.inference.folder import PredictOptions

    return PredictOptions


@command(_predict_options)
def predict(
    inputs: Annotated[
        list[Path],
        typer.Option("--input", "-i", help="Image, folder, DICOM, data set, or list (.txt, .csv); may be repeated."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the label maps.")],
    model: Annotated[
        Path, typer.Option("--model", "-m", help="Model folder or file, or the run folder that holds it.")
    ],
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Segment images with a trained model, back into each file's own geometry.

    A case that fails is reported and the others go on; the exit code is then 1.

    Example: lightm predict -i scans/ -o segmentations/ -m runs/hippocampus/model
    """
    from lightm.api import predict as run

    with _prediction_progress() as progress:
        paths = run(model, inputs, out, progress=progress, **given)
    if as_json:
        typer.echo(json.dumps([str(path) for path in paths], indent=1))


@contextmanager
def _prediction_progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """What shows cases and the windows of the present case as bars; nothing when standard error is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        total, present = bars.add_task("cases", total=None), bars.add_task("windows", total=None)

        def show(what: str, done: int, count: int) -> None:
            if what == "windows":
                bars.update(present, completed=done, total=count)
            else:
                bars.update(total, completed=done, total=count)
                bars.reset(present, total=None)

        yield show


def _evaluate_options() -> Any:
    from lightm.evaluation.folder import EvaluateOptions

    return EvaluateOptions


@command(_evaluate_options)
def evaluate(
    target: Annotated[Path, typer.Argument(help="Run folder, or a folder of predicted label maps.")],
    labels: Annotated[Path | None, typer.Option(help="Folder of true labels, when TARGET is no run.")] = None,
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Score label maps: DSC, IoU, HD95 and surface Dice per case and class, with bootstrap intervals.

    Example: lightm evaluate segmentations/ --labels data/Dataset004_Hippocampus/labelsTr -o scores/
    """
    from lightm.api import evaluate as run

    with progress_bar() as progress:
        result = run(target, labels, progress=progress, **given)
    print_evaluation(result, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File; default RUN/report.html.")] = None,
) -> None:
    """Write the self-contained HTML report of a run.

    Example: lightm report runs/hippocampus
    """
    from lightm.api import report as write

    with progress_bar() as progress:
        path = write(run, out=out, progress=progress)
    typer.echo(str(path))
