"""One training run, from a data set to a run folder with a trained model."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightm.config_io import read_json
from lightm.datasets.cases import Dataset
from lightm.datasets.discovery import open_dataset
from lightm.datasets.split import (
    ALL,
    Split,
    load_split,
)
from lightm.errors import InputError, LightMError
from lightm.files import LOCK, disk_refusals, is_temporary, locked_folder, remove_temporaries
from lightm.labels import check_regions, each_value
from lightm.losses import SegmentationLoss, create_loss, knowing_regions
from lightm.losses.base import CustomLoss
from lightm.nets import create, save_model
from lightm.nets.folder import OWN
from lightm.ops.checks import implementations
from lightm.preparation.cache import PreprocessedCase, default_cache_dir
from lightm.preparation.plan import Plan, load_plan
from lightm.preparation.preprocess import preprocess_dataset
from lightm.progress import Progress
from lightm.training.checkpoint_io import BEST, load_checkpoint, newest_checkpoint
from lightm.training.config import ResumeOptions, TrainConfig, load_config
from lightm.training.loaders import PatchLoaders
from lightm.training.loop import Training
from lightm.training.record import Loss, Run, TrainResult, WholeCases, run_record, write_json
from lightm.training.settle import (
    check_sizes,
    choose_plan,
    choose_split,
    fitting_plan,
    hash_of,
    keep_rare,
    on_device,
    open_data,
    used_by,
    with_sizes,
)

_log = logging.getLogger(__name__)


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
    fabric, chosen_here = on_device(settings)  # before anything is read
    data = open_dataset(dataset, **settings.reading)
    update: dict[str, Any] = {
        **chosen_here,
        "dataset": str(Path(dataset).resolve()),
        "labels": None if settings.labels is None else str(Path(settings.labels).resolve()),
        **{key: None for key in ("plan", "split") if objects[key] is not None},
    }
    for key in ("network", "loss"):
        if objects[key] is not None:
            update.update({key: own_name(objects[key]), f"{key}_options": {}})
    settings = settings.model_copy(update=update)
    name = f"{data.name}-{settings.network}".replace(":", "-")
    run_dir = Path(out) if out is not None else Path("runs") / name
    refuse_used_folder(run_dir)
    chosen = choose_plan(data, objects["plan"] or settings.plan, progress, fabric.device)
    settings = settings.resolved(chosen.spatial_dims)
    chosen = with_sizes(chosen, settings)
    check_sizes(chosen, settings, fabric.device, own=objects["network"] is not None)
    chosen = fitting_plan(chosen, settings, objects["network"])
    drawn = choose_split(data, settings, objects["split"])
    if objects["split"] is None and settings.split is None and drawn.kind != ALL:
        drawn = keep_rare(data, chosen, drawn, settings.group_by)
    seen = hash_of(data, used_by(drawn))
    return Run(run_dir, settings, fabric, data, chosen, drawn, seen, objects["network"], objects["loss"])


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
    changed = {k: v for k, v in options.model_dump().items() if v is not None}
    changed.update({k: str(Path(changed[k]).resolve()) for k in ("dataset", "labels") if k in changed})
    config = config.model_copy(update=changed)
    fabric, chosen_here = on_device(config)
    config = config.model_copy(update=chosen_here)
    data = open_data(run_dir, config)
    split = load_split(run_dir / "split.json", [case.id for case in data.cases])
    record, seen = run_dir / "run.json", hash_of(data, used_by(split))
    before = read_json(record).get("data_hash") if record.is_file() else None
    # Earlier versions kept the hash of all cases, also of those that a split leaves out.
    if before not in (None, seen) and before != hash_of(data, {case.id for case in data.cases}):
        raise InputError(
            f"{data.root}: the files of the cases have changed since the run {run_dir} was begun (data hash "
            f"{before[:12]}, now {seen[:12]}); give the data as they were (--dataset), or begin a new run"
        )
    plan = load_plan(run_dir / "plan.yaml")
    return Run(run_dir, config, fabric, data, plan, split, seen, network, loss, resume=True)


def train_model(dataset: Path | str, out: Path | str | None = None, **arguments: Any) -> TrainResult:
    """Train alone, without what `lightm.train` does with the model afterwards; arguments and errors as there."""
    return run_training(new_run(dataset, out, **arguments), arguments.get("progress"))


def resume_training(run_dir: Path | str, *, progress: Progress | None = None, **options: Any) -> TrainResult:
    """Resume the training alone; arguments and errors as those of `lightm.resume`."""
    return run_training(earlier_run(run_dir, ResumeOptions.of(None, options, "resume")), progress)


def run_training(
    run: Run,
    progress: Progress | None = None,
    score: Callable[[nn.Module, Sequence[str]], float] | None = None,
) -> TrainResult:
    """Train (or resume) a run and keep its best weights as a model folder.

    score(network, ids): mean DSC of whole cases, which is recorded now and then for a few of the validation cases.
    Its folder holds config.yaml, plan.yaml, split.json, history.csv, run.json, checkpoints/, tensorboard/ and model/.
    Raises InputError where another process trains there; LightMError when the training cannot go on (a loss that is
    not finite, a full disk, a dead worker process) and Interrupted at Ctrl-C and SIGTERM: the last checkpoint is kept
    then.
    """
    run_dir, config, plan, split = run.run_dir, run.config, run.plan, run.split
    with contextlib.ExitStack() as stack:
        if run.resume:
            stack.enter_context(locked_folder(run_dir, "training"))
        started = datetime.now(timezone.utc)
        net, criterion = build(run)  # before the long preprocessing, so that a bad name costs nothing
        ids = [*split.train, *split.val]
        cache, workers = default_cache_dir(), config.workers or 0
        cases = preprocess_dataset(run.data, plan, cache, case_ids=ids, workers=workers, progress=progress)
        by_id = {case.id: case for case in cases}
        train, val = [by_id[i] for i in split.train], [by_id[i] for i in split.val]
        check_classes(run.data, train, val)
        if not run.resume:
            stack.enter_context(locked_folder(run_dir, "training"))
            refuse_used_folder(run_dir)  # another run may have come first while the data were prepared
        for folder in (run_dir, run_dir / "checkpoints"):
            remove_temporaries(folder)
        if not run.resume:
            plan.save(run_dir / "plan.yaml")
            split.save(run_dir / "split.json")
        config.save(run_dir / "config.yaml")  # the last of the three: with it the run can be resumed
        record = run_record(run, net, started)
        write_json(run_dir / "run.json", record)
        try:
            result = fit(run, net, criterion, PatchLoaders(run, train, val), progress, _whole_cases(run, val, score))
        except BaseException:
            with contextlib.suppress(LightMError):  # a full disk; what ended the training is what to report
                write_json(run_dir / "run.json", {**record, "status": "interrupted"})
            raise
        record.update(
            status="finished",
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            train_seconds=round(result.train_seconds, 1),
            epochs=result.epochs,
            stopped_because=result.reason,
            skipped_steps=result.skipped_steps,
            operators=implementations(),
        )
        write_json(run_dir / "run.json", record)
        return result


def _whole_cases(
    run: Run, val: Sequence[PreprocessedCase], score: Callable[[nn.Module, Sequence[str]], float] | None
) -> WholeCases | None:
    """The validation cases to score whole; None where the run asks for none."""
    chosen, patch = val[: run.config.val_cases], run.plan.patch_size
    if not chosen:
        return None
    shapes = [case.meta["shape"] for case in chosen]
    # as the sliding window with its default overlap, half a patch
    windows = [
        prod(1 + max(0, -(-2 * (size - part) // part)) for size, part in zip(shape, patch, strict=True))
        for shape in shapes
    ]
    return WholeCases([case.id for case in chosen], windows, score)


def fit(
    run: Run,
    network: nn.Module,
    criterion: nn.Module,
    patches: PatchLoaders,
    progress: Progress | None = None,
    whole: WholeCases | None = None,
) -> TrainResult:
    """Fit the network in a prepared run folder and keep its best weights; a resumed run takes its newest checkpoint.

    Raises what `run_training` says.
    """
    config, plan, run_dir = run.config, run.plan, run.run_dir
    with disk_refusals(run_dir):  # of TensorBoard's files; all others name themselves
        training = Training(run, network, criterion, patches, whole)
        if run.resume and (start := newest_checkpoint(training.folder)) is not None:
            training.load(start)
        elif run.resume:
            _log.warning("%s: no checkpoint was kept before the interruption; the run starts anew", run_dir)
        reason = training.run(progress)
    state = training.state
    if run.fabric.is_global_zero:
        best = load_checkpoint(training.folder / BEST)
        weights = best["state_dict"].items()
        save_model(
            run_dir / "model",
            network={**_description(run), "options": config.network_options},
            state_dict={k.removeprefix("network."): tensor for k, tensor in weights if k.startswith("network.")},
            plan=plan.model_dump(mode="json"),
            training={
                "recipe": config.recipe,
                "loss": config.loss,
                "seed": config.seed,
                "epochs": state.epoch,
                "steps": state.step,
                "train_seconds": round(state.elapsed_s, 1),
                "mirror_axes": sorted(config.augment.mirror_axes) if config.augment.mirror_probability else [],
                "best_moving_pseudo_dice": state.best_dice,
                "best_epoch": best["epoch"],
                "data_hash": run.data_hash,
            },
        )
    run.fabric.barrier()
    return TrainResult(
        **vars(run),
        epochs=state.epoch,
        best_pseudo_dice=state.best_dice,
        train_seconds=state.elapsed_s,
        reason=reason,
        skipped_steps=state.skipped,
    )


def _description(run: Run) -> dict[str, Any]:
    """The arguments of `lightm.nets.create` for this run but for the network's options."""
    return {
        "name": run.config.network,
        "spatial_dims": run.plan.spatial_dims,
        "in_channels": len(run.plan.channels),
        "out_channels": len(run.plan.outputs),
        "image_size": run.plan.patch_size,
    }


def build(run: Run) -> tuple[nn.Module, nn.Module]:
    """Seed the global random generators, and return network and loss of a run: those given, else those it names."""
    random.seed(run.config.seed)
    np.random.seed(run.config.seed)  # noqa: NPY002 (networks may use it)
    torch.manual_seed(run.config.seed)
    network, loss = run.network, run.loss
    if network is None:
        network = create(**_description(run), **run.config.network_options)
    sizes = loss_sizes(run.plan)
    if loss is None:
        if run.plan.regions and "ce" in run.config.loss.lower().split("+"):
            _log.info("loss %s: of regions, ce is the binary cross-entropy of a sigmoid for each", run.config.loss)
        return network, create_loss(run.config.loss, **sizes, **run.config.loss_options)
    if not isinstance(loss, SegmentationLoss):
        return network, CustomLoss(loss, **sizes)
    return network, knowing_regions(loss, sizes["label_regions"], f"loss {type(loss).__name__}")


def loss_sizes(plan: Plan) -> dict[str, Any]:
    """The arguments of `lightm.loss` that follow from a plan."""
    regions = plan.label_regions or None
    return {"spatial_dims": plan.spatial_dims, "num_classes": len(plan.outputs), "label_regions": regions}


def own_name(thing: object) -> str:
    """The name under which an object of the caller's own stands in the files of its run."""
    return OWN + str(getattr(thing, "__name__", type(thing).__name__))


def check_own(where: Path, what: str, name: str, given: object | None) -> None:
    """Raise InputError where a run's network or loss is an object that was not given, or the other way round."""
    if name.startswith(OWN) and given is None:
        thing = f"{what} '{name.removeprefix(OWN)}' is an object of your own, which no file holds"
        raise InputError(f"{where}: its {thing}; make it again as it was and give it: {what}=... (in Python)")
    if given is not None and name != own_name(given):
        raise InputError(f"{where}: its {what} is '{name.removeprefix(OWN)}', not {own_name(given).removeprefix(OWN)}")


def check_classes(data: Dataset, train: Sequence[PreprocessedCase], val: Sequence[PreprocessedCase]) -> None:
    """Warn of classes or regions that no training case has, and of overlap that is lost; InputError where all lack."""

    def found(cases: Sequence[PreprocessedCase]) -> set[int]:
        return {data.values[k] for case in cases for k, voxels in case.foreground().items() if len(voxels)}

    in_train, anywhere = found(train), found([*train, *val])
    where = data.root / "dataset.json"
    if not in_train:
        raise InputError(
            f"{where}: the training cases hold background only, so there is nothing to learn; check the labels"
        )
    for value, written in check_regions(data.regions, data.regions_class_order).items() if data.regions else ():
        _log.warning("%s: where label %d is found, %d is written, which is in other regions", where, value, written)
    for name, values in data.targets.items():
        if in_train.isdisjoint(each_value(values)):
            cases = (
                "only in validation cases" if not anywhere.isdisjoint(each_value(values)) else "in no case that is used"
            )
            _log.warning(
                "%s: '%s' (label %s) occurs %s: the network cannot learn it, and will not find it; add cases that show "
                "it to training, or take it out of the labels",
                where,
                name,
                ", ".join(map(str, each_value(values))),
                cases,
            )


def refuse_used_folder(run_dir: Path) -> None:
    """Raise InputError when a new run cannot be written to `run_dir`."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir}: is a file; give a folder for the run")
    if (run_dir / "config.yaml").exists():
        raise InputError(
            f"{run_dir}: already holds a run; resume it with `lightm train --resume {run_dir}`, or give another "
            "folder with -o"
        )
    # A run killed within its first moments leaves its lock, and these before it could be resumed.
    left = {LOCK, "plan.yaml", "split.json"} if (run_dir / LOCK).exists() else set()
    if run_dir.exists() and any(path.name not in left and not is_temporary(path) for path in run_dir.iterdir()):
        raise InputError(f"{run_dir}: is not empty; give a new or an empty folder with -o")
