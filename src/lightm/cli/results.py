"""Verbs that use a trained model: predict, evaluate, report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import lightm
from lightm.cli.common import Json, app, command, print_evaluation, print_json, progress_bar


@command("lightm:PredictOptions")
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
    with _prediction_progress() as progress:
        paths = lightm.predict(model, inputs, out, progress=progress, **given)
    if as_json:
        print_json([str(path) for path in paths])


@contextmanager
def _prediction_progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """What shows cases and the windows of the present case as bars; nothing when standard error is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()]
    columns += [rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn()]
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        total, present = bars.add_task("cases", total=None), bars.add_task("windows", total=None)

        def show(what: str, done: int, count: int) -> None:
            bars.update(present if what == "windows" else total, completed=done, total=count)
            if what != "windows":
                bars.reset(present, total=None)

        yield show


@command("lightm:EvaluateOptions")
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
    with progress_bar() as progress:
        result = lightm.evaluate(target, labels, progress=progress, **given)
    print_evaluation(result, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File; default RUN/report.html.")] = None,
) -> None:
    """Write the self-contained HTML report of a run.

    Example: lightm report runs/hippocampus
    """
    with progress_bar() as progress:
        typer.echo(str(lightm.report(run, out=out, progress=progress)))
