"""Verbs that make data, look at it and train: demo, phantom, check, plan, train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lightm.cli.common import Dataset, Json, Labels, app, echo, print_run, progress_bar, sizes
from lightm.errors import InputError, LightMError


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
        result = run(
            out,
            max_time=max_time,
            cases=cases,
            size=size,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
            say=echo,
        )
    print_run(result, as_json=False)


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
    from lightm.datasets.phantoms import make_phantoms

    default = {"vessels": 96, "xray": 256}.get(kind, 64)
    with progress_bar() as progress:
        folder = make_phantoms(
            kind, out, cases=cases, size=default if size is None else size, seed=seed, progress=progress
        )
    echo(f"{cases} {kind} phantoms in {folder}")


@app.command()
def check(dataset: Dataset, labels: Labels = None, as_json: Json = False) -> None:
    """Read every file of a data set and name every problem.

    Example: lightm check data/Dataset004_Hippocampus
    """
    from lightm.datasets.check import check_dataset

    with progress_bar() as progress:
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
    from lightm.datasets.dataset import open_dataset
    from lightm.preparation.plan import make_plan

    data = open_dataset(dataset, labels=labels)
    path = data.root / "plan.yaml" if out is None else out
    with progress_bar() as progress:
        made = make_plan(data, patch_size=sizes(patch_size), batch_size=batch_size, memory_gb=memory, progress=progress)
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
    network: Annotated[str | None, typer.Option(help="Network preset or peer; default lightm-small.")] = None,
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
    on_nan: Annotated[
        str | None, typer.Option(help="At a loss or gradient that is NaN: stop (default) or skip.")
    ] = None,
    nan_limit: Annotated[int | None, typer.Option(help="Steps that --on-nan skip may skip; default 10.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to continue.")] = None,
    test: Annotated[bool, typer.Option(help="Predict and score the test cases and write the report.")] = True,
    as_json: Json = False,
) -> None:
    """Train a network; then predict and score the test cases and write report.html.

    Example: lightm train data/Dataset004_Hippocampus -o runs/hippocampus --max-time 15m
    """
    from lightm import training as package
    from lightm.pipeline import finish_run
    from lightm.training.config import read_user_config

    given: dict[str, Any] = {k: v for k, v in {
        "labels": labels, "network": network, "recipe": recipe, "loss": loss, "epochs": epochs, "max_time": max_time,
        "patience": patience, "lr": lr, "batch_size": batch_size, "patch_size": sizes(patch_size), "seed": seed,
        "split_seed": split_seed, "folds": folds, "fold": fold, "split": split, "plan": plan, "workers": workers,
        "device": device, "on_nan": on_nan, "nan_limit": nan_limit,
    }.items() if v is not None}  # fmt: skip
    with progress_bar() as progress:
        if resume is not None:
            wrong = sorted(set(given) - {"epochs", "max_time", "patience", "workers"})
            wrong += [n for n, v in (("DATASET", dataset), ("out", out), ("config", config)) if v is not None]
            if wrong:
                raise InputError(
                    f"--resume continues a run as it was started; {', '.join(wrong)} cannot change. Only --epochs, "
                    "--max-time, --patience and --workers can"
                )
            trained = package.resume_training(resume, progress=progress, say=echo, **given)
        else:
            if dataset is None:
                raise InputError("no data set: `lightm train DATASET`, or `lightm train --resume RUN`")
            options = {**(read_user_config(config) if config is not None else {}), **given}
            trained = package.train_model(dataset, out, progress=progress, say=echo, **options)
        echo(f"trained {trained.epochs} epochs in {trained.train_seconds:.0f} s ({trained.reason})")
        if not test:
            typer.echo(json.dumps({"run": str(trained.run_dir)}) if as_json else f"model: {trained.run_dir / 'model'}")
            return
        result = finish_run(trained, progress=progress, say=echo)
    print_run(result, as_json=as_json)
