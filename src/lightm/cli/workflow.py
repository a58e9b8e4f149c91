"""The verbs from data to report: demo, phantoms, check, plan, train, resume, predict, evaluate, report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import lightm
from lightm.cli.common import Json, app, command, echo, print_evaluation, print_json, print_run, progress_bar
from lightm.errors import InputError

Dataset = Annotated[
    Path, typer.Argument(help="Data set: nnU-Net raw or MSD layout, or a folder of images (then with --labels).")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.")] = Path("runs/demo"),
    max_time: Annotated[str, typer.Option(help="Time to train: 90s, 5m, 1h.")] = "6m",
    cases: Annotated[int, typer.Option(help="Number of phantoms.")] = 60,
    size: Annotated[int, typer.Option(help="Voxels along an axis, about.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of phantoms and training.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier demo in OUT.")] = False,
) -> None:
    """Make liver phantoms, train, predict, evaluate and report.

    Example: lightm demo -o runs/demo
    """
    from lightm.pipeline import demo as run

    with progress_bar() as progress:
        result = run(out, max_time=max_time, cases=cases, size=size, seed=seed, overwrite=overwrite, progress=progress)
    print_run(result, as_json=False)


@app.command("phantom", hidden=True)
@app.command()
def phantoms(
    kind: Annotated[str, typer.Argument(help="liver, vessels, xray or brain.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, in the nnU-Net raw layout.")],
    cases: Annotated[int, typer.Option(help="Number of cases.")] = 20,
    size: Annotated[int | None, typer.Option(help="Voxels along an axis; default 64, vessels 96, xray 256.")] = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same files.")] = 0,
) -> None:
    """Make synthetic scans with labels.

    Example: lightm phantoms liver data/Dataset900_Liver --cases 24 --size 64 --seed 1
    """
    with progress_bar() as progress:
        folder = lightm.phantoms(kind, out, cases=cases, size=size, seed=seed, progress=progress)
    echo(f"{cases} {kind} phantoms in {folder}")


@app.command()
def check(
    dataset: Dataset,
    labels: Annotated[Path | None, typer.Option(help="Folder of labels, when DATASET is a folder of images.")] = None,
    channels: Annotated[str | None, typer.Option(help="Names of the channels: CT, or T1,T2.")] = None,
    trust_image_geometry: Annotated[bool, typer.Option(help="Take labels to lie where the image does.")] = False,
    as_json: Json = False,
) -> None:
    """Read every file of a data set and name every problem.

    Example: lightm check data/Dataset004_Hippocampus
    """
    with progress_bar() as progress:
        result = lightm.check(
            dataset,
            labels=labels,
            channels=None if channels is None else [name.strip() for name in channels.split(",")],
            trust_image_geometry=trust_image_geometry,
            progress=progress,
        )
    if as_json:
        problems = [
            {
                "severity": p.severity,
                "case": p.case,
                "file": p.file and str(p.file),
                "message": p.message,
                "hint": p.cure,
            }
            for p in result.problems
        ]
        print_json({"ok": result.ok, "problems": problems, "summary": result.summary})
    else:
        for problem in result.problems:
            typer.echo(f"{problem.severity}: {problem}")
        summary = dict(result.summary)
        name, training, test = (summary.pop(key) for key in ("name", "training_cases", "test_cases"))
        typer.echo(f"{name}: {training} training cases, {test} test cases")
        for key, value in summary.items():
            typer.echo(f"{key}: {value}")
    if not result.ok:
        raise typer.Exit(InputError.exit_code)


@command("lightm.api:PlanOptions")
def plan(
    dataset: Dataset,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File; default DATASET/plan.yaml.")] = None,
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Look at a data set and write its plan: spacing, patch, batch, normalization.

    Example: lightm plan data/Dataset004_Hippocampus -o plan.yaml
    """
    with progress_bar() as progress:
        made = lightm.plan(dataset, out=out, progress=progress, **given)
    path = Path(dataset) / "plan.yaml" if out is None else out
    typer.echo(made.model_dump_json(indent=1) if as_json else f"{path}\n{path.read_text(encoding='utf-8')}")


@command("lightm:TrainConfig")
def train(
    dataset: Annotated[Path | None, typer.Argument(help="Data set; not needed with --resume.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/DATASET-NETWORK.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with any of these options.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to resume, as `lightm resume` does.")] = None,
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Train a network; then predict and score the test cases and write report.html.

    Example: lightm train data/Dataset004_Hippocampus -o runs/hippocampus --max-time 15m
    """
    if resume is not None:
        from lightm.training.config import ResumeOptions

        can_change = ResumeOptions.model_fields
        wrong = sorted(set(given) - set(can_change))
        wrong += [n for n, v in (("DATASET", dataset), ("out", out), ("config", config)) if v is not None]
        if wrong:
            raise InputError(
                f"--resume continues a run as it was started; {', '.join(wrong)} cannot change. Only "
                f"{', '.join(can_change)} can"
            )
        _resume(resume, given, as_json)
        return
    if dataset is None:
        raise InputError("no data set: `lightm train DATASET`, or `lightm resume RUN`")
    with progress_bar() as progress:
        result = lightm.train(dataset, out, config=config, progress=progress, **given)
    print_run(result, as_json=as_json)


@command("lightm.training.config:ResumeOptions")
def resume(
    run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: Json = False, *, given: dict[str, Any]
) -> None:
    """Resume an interrupted or ended training from its last checkpoint, and do what `lightm train` does after it.

    Example: lightm resume runs/hippocampus --max-time 30m
    """
    _resume(run, given, as_json)


def _resume(run_dir: Path, given: dict[str, Any], as_json: bool) -> None:
    with progress_bar() as progress:
        result = lightm.resume(run_dir, progress=progress, **given)
    print_run(result, as_json=as_json)


@command("lightm:PredictOptions")
def predict(
    inputs: Annotated[
        list[Path],
        typer.Option("--input", "-i", help="Image, folder, DICOM, data set, or list (.txt, .csv); may be repeated."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the label maps.")],
    model: Annotated[
        list[Path],
        typer.Option(
            "--model", "-m", help="Model folder or file, or the run folder that holds it; several are averaged."
        ),
    ],
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Segment images with a trained model, or with the mean of several, back into each file's own geometry.

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
