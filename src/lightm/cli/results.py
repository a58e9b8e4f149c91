"""Verbs that use a trained model: predict, evaluate, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lightm.cli.common import Json, app, echo, print_evaluation, progress_bar
from lightm.errors import InputError


@app.command()
def predict(
    inputs: Annotated[
        list[Path],
        typer.Option("--input", "-i", help="Image, folder, DICOM, data set, or list (.txt, .csv); may be repeated."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the label maps.")],
    model: Annotated[
        Path, typer.Option("--model", "-m", help="Model folder or file, or the run folder that holds it.")
    ],
    overlap: Annotated[float, typer.Option(help="Overlap of neighbouring windows, 0 to below 1.")] = 0.5,
    tta: Annotated[bool, typer.Option(help="Average over mirrored copies (slower).")] = False,
    window: Annotated[str, typer.Option(help="patch: sliding windows; whole: the volume at once.")] = "patch",
    max_memory: Annotated[str | None, typer.Option(help="Limit of the process, such as 2GB.")] = None,
    postprocess: Annotated[bool, typer.Option(help="Clean the label maps up as the model says.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace label maps in OUT.")] = False,
    resume: Annotated[bool, typer.Option("--continue", help="Go on with an unfinished run in OUT.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Write probabilities/CASE.nii.gz too.")
    ] = False,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Write statistics.csv and .json: volumes, intensities, places.")
    ] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Write previews/CASE.png: slices with contours.")] = False,
    dicom_seg: Annotated[bool, typer.Option("--dicom-seg", help="Write CASE.seg.dcm too (DICOM input).")] = False,
    report: Annotated[Path | None, typer.Option(help="JSON file for times, checksums, versions and faults.")] = None,
    as_json: Json = False,
) -> None:
    """Segment images with a trained model, back into each file's own geometry.

    A case that fails is reported and the others go on; the exit code is then 1.

    Example: lightm predict -i scans/ -o segmentations/ -m runs/hippocampus/model
    """
    from lightm.inference import predict_folder
    from lightm.inference.budget import parse_memory

    also = None
    if window not in ("patch", "whole"):
        raise InputError(f"--window '{window}': expected 'patch' or 'whole'")
    limit = None if max_memory is None else parse_memory(max_memory)
    if dicom_seg:
        from lightm.export.dicom_seg import seg_writer_of_model

        also = seg_writer_of_model(model / "model" if (model / "model" / "model.json").is_file() else model)
    with _prediction_progress() as (progress, windows, say):
        paths = predict_folder(
            model, inputs, out, overlap=overlap, tta=tta, window="whole" if window == "whole" else "patch",
            postprocess=postprocess, max_memory=limit,
            overwrite=overwrite, resume=resume, device=device, statistics=statistics, preview=preview,
            save_probabilities=save_probabilities, report=report, progress=progress, windows=windows, say=say,
            also=also,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps([str(path) for path in paths], indent=1))


@contextmanager
def _prediction_progress() -> Iterator[
    tuple[Callable[[str, int, int], None] | None, Callable[[int, int], None] | None, Callable[[str], None]]
]:
    """What shows cases, the windows of the present case, and lines: bars on a terminal, else lines alone."""
    if not sys.stderr.isatty():
        yield None, None, echo
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
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as bars:
        total, present = bars.add_task("cases", total=None), bars.add_task("windows", total=None)

        def cases(what: str, done: int, count: int) -> None:
            bars.update(total, completed=done, total=count)
            bars.reset(present, total=None)

        yield (
            cases,
            lambda done, count: bars.update(present, completed=done, total=count),
            lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(help="Run folder, or a folder of predicted label maps.")],
    labels: Annotated[Path | None, typer.Option(help="Folder of true labels, when TARGET is no run.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for metrics.json and metrics.csv.")] = None,
    tolerance: Annotated[float, typer.Option(help="Tolerance of the surface Dice in mm.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Score label maps: DSC, IoU, HD95 and surface Dice per case and class, with bootstrap intervals.

    Example: lightm evaluate segmentations/ --labels data/Dataset004_Hippocampus/labelsTr -o scores/
    """
    from lightm.evaluation import evaluate_folder

    with progress_bar() as progress:
        if labels is None:
            from lightm.pipeline import score_run

            result = score_run(target, progress=progress)
        else:
            result = evaluate_folder(target, labels, out=out, nsd_tolerance_mm=tolerance, progress=progress)
    print_evaluation(result, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File; default RUN/report.html.")] = None,
) -> None:
    """Write the self-contained HTML report of a run.

    Example: lightm report runs/hippocampus
    """
    from lightm.evaluation import write_report

    typer.echo(str(write_report(run, out=out)))
