"""One training run, from a data set to a run folder with a trained model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from pydantic import Field, field_validator
from torch import Tensor, nn

from lightm.datasets.cases import Dataset
from lightm.datasets.discovery import open_dataset
from lightm.datasets.split import Split, load_split
from lightm.errors import InputError, LightMError
from lightm.files import locked_folder, remove_temporaries
from lightm.options import Options
from lightm.preparation.cache import PreprocessedCase, default_cache_dir
from lightm.preparation.plan import Plan, load_plan
from lightm.preparation.preprocess import preprocess_dataset
from lightm.progress import Progress
from lightm.training.config import TrainConfig, load_config, parse_duration
from lightm.training.fit import TrainResult, build, build_fabric, fit
from lightm.training.loaders import PatchLoaders
from lightm.training.prepare import (
    check_classes,
    check_own,
    choose_plan,
    choose_split,
    own_name,
    refuse_used_folder,
    with_sizes,
)
from lightm.training.record import run_record, write_json

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, K, *S), target (B, *S) class indices, 255 for voxels that must not count) -> scalar."""


@dataclass(frozen=True)
class Run:
    """A training that can begin or be resumed. network, loss: objects of one's own; None: what the config names."""

    run_dir: Path
    config: TrainConfig
    fabric: Fabric
    data: Dataset
    plan: Plan
    split: Split
    network: nn.Module | None = None
    loss: Loss | None = None
    resume: bool = False


class ResumeOptions(Options):
    """What may change when a run is resumed; all else is as it was started."""

    epochs: int | None = Field(None, ge=1, description="Epochs of the whole run.")
    max_time: str | float | None = Field(None, description="Time budget of the whole run: 90s, 15m, 2h.")
    patience: int | None = Field(None, ge=1, description="Epochs without a better EMA pseudo Dice before stopping.")
    workers: int | None = Field(None, ge=0, description="Processes that prepare patches.")
    postprocess: bool | None = Field(None, description="Choose post-processing on the validation cases.")
    test: bool | None = Field(None, description="Predict and score the test cases and write the report.")

    @field_validator("max_time")
    @classmethod
    def _seconds(cls, given: str | float | None) -> float | None:
        return None if given is None else parse_duration(given)


def new_run(
    dataset: Path | str,
    out: Path | str | None = None,
    *,
    config: TrainConfig | Mapping[str, Any] | Path | str | None = None,
    network: str | nn.Module | None = None,
    loss: str | Loss | None = None,
    plan: Plan | Path | str | None = None,
    split: Split | Path | str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Run:
    """Settle plan, split and configuration of a new run, and write nothing; arguments and errors as `lightm.train`."""
    objects: dict[str, Any] = {
        "network": None if isinstance(network, str) else network,
        "loss": None if isinstance(loss, str) else loss,
        "plan": plan if isinstance(plan, Plan) else None,
        "split": split if isinstance(split, Split) else None,
    }
    named = {"network": network, "loss": loss, "plan": plan, "split": split}
    options.update({key: value for key, value in named.items() if objects[key] is None})
    settings = TrainConfig.of(config, options, "train")
    fabric = build_fabric(settings.device, settings.precision)  # before anything is read
    labels = None if settings.labels is None else Path(settings.labels)
    data = open_dataset(Path(dataset), labels=labels)
    update: dict[str, Any] = {
        "dataset": str(Path(dataset).resolve()),
        "labels": None if labels is None else str(labels.resolve()),
        **{key: None for key in ("plan", "split") if objects[key] is not None},
    }
    for key in ("network", "loss"):
        if objects[key] is not None:
            update.update({key: own_name(objects[key]), f"{key}_options": {}})
    settings = settings.model_copy(update=update)
    name = f"{data.name}-{settings.network}".replace(":", "-")
    run_dir = Path(out) if out is not None else Path("runs") / name
    refuse_used_folder(run_dir)
    chosen = choose_plan(data, objects["plan"] or settings.plan, progress)
    settings = settings.resolved(chosen.spatial_dims)
    chosen = with_sizes(chosen, settings)
    drawn = choose_split(data, settings, objects["split"])
    return Run(run_dir, settings, fabric, data, chosen, drawn, objects["network"], objects["loss"])


def earlier_run(
    run_dir: Path | str, options: ResumeOptions, *, network: nn.Module | None = None, loss: Loss | None = None
) -> Run:
    """Read an interrupted or ended run; raises InputError for a folder without one, or whose data set has changed."""
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"{run_dir}: holds no run to resume (config.yaml is missing)")
    config = load_config(run_dir / "config.yaml")
    check_own(run_dir, "network", config.network, network)
    check_own(run_dir, "loss", config.loss, loss)
    config = config.model_copy(update={k: v for k, v in options.model_dump().items() if v is not None})
    fabric = build_fabric(config.device, config.precision)
    data = open_dataset(Path(config.dataset), labels=None if config.labels is None else Path(config.labels))
    split = load_split(run_dir / "split.json", [case.id for case in data.cases])
    return Run(run_dir, config, fabric, data, load_plan(run_dir / "plan.yaml"), split, network, loss, resume=True)


def train_model(dataset: Path | str, out: Path | str | None = None, **arguments: Any) -> TrainResult:
    """Train alone, without what `lightm.train` does with the model afterwards; arguments and errors as there."""
    return run_training(new_run(dataset, out, **arguments), arguments.get("progress"))


def resume_training(run_dir: Path | str, *, progress: Progress | None = None, **options: Any) -> TrainResult:
    """Resume the training alone; arguments and errors as those of `lightm.resume`."""
    return run_training(earlier_run(run_dir, ResumeOptions.of(None, options, "resume")), progress)


def run_training(run: Run, progress: Progress | None = None) -> TrainResult:
    """Train (or resume) a run and keep its best weights as a model folder.

    Its folder holds config.yaml, plan.yaml, split.json, history.csv, run.json, checkpoints/, tensorboard/ and model/.
    Raises InputError where another process trains there; LightMError when the training cannot go on (a loss that is
    not finite, a full disk, a dead worker process) and Interrupted at Ctrl-C and SIGTERM: the last checkpoint is kept
    then.
    """
    with contextlib.ExitStack() as stack:
        if run.resume:
            stack.enter_context(locked_folder(run.run_dir, "training"))
        started = datetime.now(timezone.utc)
        # before the long preprocessing, so that a bad name costs nothing
        net, criterion = build(run.config, run.plan, run.network, run.loss)
        cases = preprocess_dataset(
            run.data,
            run.plan,
            default_cache_dir(),
            case_ids=[*run.split.train, *run.split.val],
            workers=run.config.workers,
            progress=progress,
        )
        by_id = {case.id: case for case in cases}
        train_cases, val_cases = [by_id[i] for i in run.split.train], [by_id[i] for i in run.split.val]
        check_classes(run.data, train_cases, val_cases)
        if not run.resume:
            stack.enter_context(locked_folder(run.run_dir, "training"))
            refuse_used_folder(run.run_dir)  # another run may have come first while the data were prepared
        return _run_locked(run, net, criterion, train_cases, val_cases, started, progress)


def _run_locked(
    run: Run,
    net: nn.Module,
    criterion: nn.Module,
    train_cases: list[PreprocessedCase],
    val_cases: list[PreprocessedCase],
    started: datetime,
    progress: Progress | None,
) -> TrainResult:
    run_dir, config, plan, split = run.run_dir, run.config, run.plan, run.split
    for folder in (run_dir, run_dir / "checkpoints"):
        remove_temporaries(folder)
    if not run.resume:
        plan.save(run_dir / "plan.yaml")
        split.save(run_dir / "split.json")
    config.save(run_dir / "config.yaml")  # the last of the three: with it the run can be resumed
    record = run_record(config, plan, net, started, run_dir if run.resume else None)
    write_json(run_dir / "run.json", record)
    patches = PatchLoaders(
        train_cases,
        val_cases,
        config.settings,
        patch_size=plan.patch_size,
        batch_size=plan.batch_size,
        seed=config.seed,
        val_patches=config.val_patches,
        workers=config.workers,
    )
    try:
        result = fit(
            run.fabric, run_dir, config, plan, split, net, criterion, patches, resume=run.resume, progress=progress
        )
    except BaseException:
        with contextlib.suppress(LightMError):  # a full disk; what ended the training is what to tell
            write_json(run_dir / "run.json", {**record, "status": "interrupted"})
        raise
    record.update(
        status="finished",
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        train_seconds=round(result.train_seconds, 1),
        epochs=result.epochs,
        stopped_because=result.reason,
        skipped_steps=result.skipped_steps,
    )
    write_json(run_dir / "run.json", record)
    return result
