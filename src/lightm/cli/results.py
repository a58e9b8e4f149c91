"""Verbs that use a trained model: predict, evaluate, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lightm.cli.common import Json, app, echo, print_evaluation, progress_bar


@app.command()
def predict(
    inputs: Annotated[Path, typer.Option("--input", "-i", help="Image, folder of images, DICOM, or data set.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the label maps.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="Model folder, or the run folder that holds it.")],
    overlap: Annotated[float, typer.Option(help="Overlap of neighbouring windows, 0 to below 1.")] = 0.5,
    tta: Annotated[bool, typer.Option(help="Average over mirrored copies (slower).")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace label maps in OUT.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dicom_seg: Annotated[bool, typer.Option("--dicom-seg", help="Write CASE.seg.dcm too (DICOM input).")] = False,
    as_json: Json = False,
) -> None:
    """Segment images with a trained model, back into each file's own geometry.

    Example: lightm predict -i scans/ -o segmentations/ -m runs/hippocampus/model
    """
    from lightm.infer import predict_folder

    folder = model / "model" if (model / "model" / "model.json").is_file() else model
    also = None
    if dicom_seg:
        from lightm.export.dicom_seg import seg_writer_of_model

        also = seg_writer_of_model(folder)
    with progress_bar() as progress:
        paths = predict_folder(
            folder, inputs, out, overlap=overlap, tta=tta, overwrite=overwrite, device=device, progress=progress,
            also=also,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps([str(path) for path in paths], indent=1))
    else:
        echo(f"{len(paths)} case(s) segmented into {out}")


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
    from lightm.evaluate import evaluate_folder

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
    from lightm.evaluate import write_report

    typer.echo(str(write_report(run, out=out)))
