"""The command line: verbs only, each a thin shell over one public function.

Exit codes: 0 done; 1 the work failed; 2 wrong usage or wrong input. Nothing heavy is imported until a verb runs.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightm import __version__
from lightm.errors import InputError, LightMError

if TYPE_CHECKING:
    from lightm.evaluate import Evaluation
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
Labels = Annotated[Path | None, typer.Option(help="Folder of labels, when DATASET is a folder of images.")]


def main() -> None:
    """Run the command line; the console script `lightm`."""
    try:
        app()
    except LightMError as error:
        _echo(f"lightm: error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _echo("lightm: interrupted")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more, such as the kernels chosen.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
    if version:
        typer.echo(f"lightm {__version__}")
        raise typer.Exit


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

    with _progress() as progress:
        result = run(
            out,
            max_time=max_time,
            cases=cases,
            size=size,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
            say=_echo,
        )
    _print_run(result, as_json=False)


@app.command()
def phantom(
    kind: Annotated[str, typer.Argument(help="liver, vessels or xray.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, in the nnU-Net raw layout.")],
    cases: Annotated[int, typer.Option(help="Number of cases.")] = 20,
    size: Annotated[int | None, typer.Option(help="Voxels along an axis; default 64, vessels 96, xray 256.")] = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same files.")] = 0,
) -> None:
    """Make synthetic scans with labels.

    Example: lightm phantom liver data/Dataset900_Liver --cases 24 --size 64 --seed 1
    """
    from lightm.data.phantoms import make_phantoms

    default = {"vessels": 96, "xray": 256}.get(kind, 64)
    with _progress() as progress:
        folder = make_phantoms(
            kind, out, cases=cases, size=default if size is None else size, seed=seed, progress=progress
        )
    _echo(f"{cases} {kind} phantoms in {folder}")


@app.command()
def check(dataset: Dataset, labels: Labels = None, as_json: Json = False) -> None:
    """Read every file of a data set and name every problem.

    Example: lightm check data/Dataset004_Hippocampus
    """
    from lightm.data.check import check_dataset

    with _progress() as progress:
        result = check_dataset(dataset, labels=labels, progress=progress)
    if as_json:
        problems = [
            {
                "severity": p.severity,
                "case": p.case,
                "file": p.file and str(p.file),
                "message": p.message,
                "cure": p.cure,
            }
            for p in result.problems
        ]
        typer.echo(json.dumps({"ok": result.ok, "problems": problems, "summary": result.summary}, indent=1))
    else:
        for problem in result.problems:
            typer.echo(f"{problem.severity}: {problem}")
        for key, value in result.summary.items():
            typer.echo(f"{key}: {value}")
    if not result.ok:
        raise typer.Exit(InputError.exit_code)


@app.command()
def plan(
    dataset: Dataset,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File; default DATASET/plan.yaml.")] = None,
    labels: Labels = None,
    patch_size: Annotated[str | None, typer.Option(help="Patch in voxels, z,y,x: 40,56,40.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Patches a step.")] = None,
    memory: Annotated[float | None, typer.Option(help="GB of memory to plan for; default: the machine's.")] = None,
    as_json: Json = False,
) -> None:
    """Look at a data set and write its plan: spacing, patch, batch, normalisation.

    Example: lightm plan data/Dataset004_Hippocampus -o plan.yaml
    """
    from lightm.data.dataset import open_dataset
    from lightm.data.plan import make_plan

    data = open_dataset(dataset, labels=labels)
    path = data.root / "plan.yaml" if out is None else out
    with _progress() as progress:
        made = make_plan(
            data, patch_size=_sizes(patch_size), batch_size=batch_size, memory_gb=memory, progress=progress
        )
    try:
        made.save(path)
    except LightMError as error:
        raise InputError(f"{error}, or give another file with -o") from error
    typer.echo(made.model_dump_json(indent=1) if as_json else f"{path}\n{path.read_text(encoding='utf-8')}")


@app.command()
def train(
    dataset: Annotated[Path | None, typer.Argument(help="Data set; not needed with --resume.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/DATASET-NETWORK.")] = None,
    labels: Labels = None,
    network: Annotated[str | None, typer.Option(help="Network preset; default lightm.")] = None,
    recipe: Annotated[str | None, typer.Option(help="default, paper, seed or released.")] = None,
    loss: Annotated[str | None, typer.Option(help="Loss, such as ce+dice or ce+arsl.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs.")] = None,
    max_time: Annotated[str | None, typer.Option(help="Wall-clock budget of the training: 90s, 15m, 2h.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after that many epochs without a better Dice.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Patches a step.")] = None,
    patch_size: Annotated[str | None, typer.Option(help="Patch in voxels, z,y,x: 40,56,40.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and patches.")] = None,
    split_seed: Annotated[int | None, typer.Option(help="Seed of the split.")] = None,
    folds: Annotated[int | None, typer.Option(help="Draw that many folds instead of 7:1:2.")] = None,
    fold: Annotated[int | None, typer.Option(help="The fold to test.")] = None,
    split: Annotated[Path | None, typer.Option(help="split.json of another run, to use the same split.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan to use instead of DATASET/plan.yaml.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with any of these options, and `settings`.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that prepare patches.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to continue.")] = None,
    test: Annotated[bool, typer.Option(help="Predict and score the test cases and write the report.")] = True,
    as_json: Json = False,
) -> None:
    """Train a network; then predict and score the test cases and write report.html.

    Example: lightm train data/Dataset004_Hippocampus -o runs/hippocampus --max-time 15m
    """
    from lightm import train as package
    from lightm.pipeline import finish_run
    from lightm.train.config import read_user_config

    given: dict[str, Any] = {k: v for k, v in {
        "labels": labels, "network": network, "recipe": recipe, "loss": loss, "epochs": epochs, "max_time": max_time,
        "patience": patience, "lr": lr, "batch_size": batch_size, "patch_size": _sizes(patch_size), "seed": seed,
        "split_seed": split_seed, "folds": folds, "fold": fold, "split": split, "plan": plan, "workers": workers,
        "device": device,
    }.items() if v is not None}  # fmt: skip
    with _progress() as progress:
        if resume is not None:
            wrong = sorted(set(given) - {"epochs", "max_time", "patience", "workers"})
            wrong += [n for n, v in (("DATASET", dataset), ("out", out), ("config", config)) if v is not None]
            if wrong:
                raise InputError(
                    f"--resume continues a run as it was started; {', '.join(wrong)} cannot change. Only --epochs, "
                    "--max-time, --patience and --workers can"
                )
            trained = package.resume_training(resume, progress=progress, say=_echo, **given)
        else:
            if dataset is None:
                raise InputError("no data set: `lightm train DATASET`, or `lightm train --resume RUN`")
            options = {**(read_user_config(config) if config is not None else {}), **given}
            trained = package.train_model(dataset, out, progress=progress, say=_echo, **options)
        _echo(f"trained {trained.epochs} epochs in {trained.train_seconds:.0f} s ({trained.reason})")
        if not test:
            typer.echo(json.dumps({"run": str(trained.run_dir)}) if as_json else f"model: {trained.run_dir / 'model'}")
            return
        result = finish_run(trained, progress=progress)
    _print_run(result, as_json=as_json)


@app.command()
def predict(
    inputs: Annotated[Path, typer.Option("--input", "-i", help="Image, folder of images, or data set.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the label maps.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="Model folder, or the run folder that holds it.")],
    overlap: Annotated[float, typer.Option(help="Overlap of neighbouring windows, 0 to below 1.")] = 0.5,
    tta: Annotated[bool, typer.Option(help="Average over mirrored copies (slower).")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace label maps in OUT.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Segment images with a trained model, back into each file's own geometry.

    Example: lightm predict -i scans/ -o segmentations/ -m runs/hippocampus/model
    """
    from lightm.infer import predict_folder

    folder = model / "model" if (model / "model" / "model.json").is_file() else model
    with _progress() as progress:
        paths = predict_folder(
            folder, inputs, out, overlap=overlap, tta=tta, overwrite=overwrite, device=device, progress=progress
        )
    if as_json:
        typer.echo(json.dumps([str(path) for path in paths], indent=1))
    else:
        _echo(f"{len(paths)} case(s) segmented into {out}")


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

    with _progress() as progress:
        if labels is None:
            from lightm.pipeline import score_run

            result = score_run(target, progress=progress)
        else:
            result = evaluate_folder(target, labels, out=out, nsd_tolerance_mm=tolerance, progress=progress)
    _print_evaluation(result, as_json)


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


def _sizes(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace("x", ",").replace(" ", ",").split(",") if part]
    except ValueError as error:
        raise InputError(f"patch size '{text}': write whole numbers as 40,56,40") from error


def _echo(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
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


def _print_run(result: RunResult, *, as_json: bool) -> None:
    if result.evaluation is not None:
        _print_evaluation(result.evaluation, as_json)
    _echo(f"report: {result.report}")


def _print_evaluation(evaluation: Evaluation, as_json: bool) -> None:
    if as_json:
        typer.echo(evaluation.model_dump_json(indent=2))
        return
    from rich.console import Console

    from lightm.evaluate import format_table

    Console(width=None if sys.stdout.isatty() else 120).print(format_table(evaluation))
