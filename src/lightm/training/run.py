"""One training run, from a data set to a run folder with a trained model."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timezone
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from lightm.config_io import read_json
from lightm.datasets.cases import Dataset
from lightm.datasets.discovery import open_dataset, values_in
from lightm.datasets.split import (
    ALL,
    NNUNET,
    Split,
    check_split,
    groups_of,
    keep_in_training,
    load_split,
    make_split,
)
from lightm.device import default_precision, default_workers, resolve_device
from lightm.errors import InputError, LightMError
from lightm.files import LOCK, disk_refusals, is_temporary, locked_folder, remove_temporaries
from lightm.labels import check_regions, each_value
from lightm.losses import SegmentationLoss, create_loss, knowing_regions
from lightm.losses.base import CustomLoss
from lightm.memory import available_bytes
from lightm.nets import create, fitting_size, save_model
from lightm.nets.folder import OWN
from lightm.ops.checks import implementations
from lightm.preparation.cache import HASHES, FileHashes, PreprocessedCase, default_cache_dir
from lightm.preparation.fingerprint import data_hash
from lightm.preparation.plan import MULTIPLE, Plan, load_plan, make_plan
from lightm.preparation.preprocess import cache_folder, preprocess_dataset
from lightm.progress import Progress
from lightm.training.checkpoint_io import BEST, load_checkpoint, newest_checkpoint
from lightm.training.config import ResumeOptions, TrainConfig, load_config
from lightm.training.loaders import PatchLoaders
from lightm.training.loop import Training
from lightm.training.record import Loss, Run, TrainResult, WholeCases, run_record, write_json

_log = logging.getLogger(__name__)

# What training keeps for a voxel of a batch: 750 bytes in the smallest network measured, `unet`, and thousands in most.
_LEAST_BYTES_PER_VOXEL = 300


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


def open_data(run_dir: Path, config: TrainConfig) -> Dataset:
    """Open the data set of a run; InputError that names the options where it is not where it was."""
    try:
        return open_dataset(config.dataset, **config.reading)
    except InputError as error:
        gone = [path for path in (config.dataset, config.labels) if path is not None and not Path(path).exists()]
        if not gone:
            raise
        where = "--labels" if gone == [config.labels] else "--dataset"
        raise InputError(
            f"{run_dir}: its data are no longer at {gone[0]}; say where they are now with {where}"
        ) from error


def used_by(split: Split) -> set[str]:
    """The cases of a split, whichever part they are in."""
    return {*split.train, *split.val, *split.test}


def hash_of(data: Dataset, case_ids: Collection[str]) -> str:
    """The data hash of these cases; hashes of unchanged files are taken from the cache."""
    hashes = FileHashes(cache_folder(data) / HASHES)
    found = data_hash([case for case in data.cases if case.id in case_ids], hashes.of)
    with contextlib.suppress(LightMError):  # a cache that cannot be written is said where it is needed
        hashes.save()
    return found


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


def on_device(config: TrainConfig) -> tuple[Fabric, dict[str, Any]]:
    """Return what a configuration trains on, and the settings that were left to the device; InputError as there."""
    where = resolve_device(config.device)
    precision = default_precision(where) if config.precision == "auto" else config.precision
    workers = default_workers(where) if config.workers is None else config.workers
    return build_fabric(where, precision), {"precision": precision, "workers": workers}


def build_fabric(
    device: str | torch.device = "cpu", precision: str = "32-true", *, devices: int | str = 1, strategy: str = "auto"
) -> Fabric:
    """Return the Fabric that a training runs on: where, on how many devices, and how precisely.

    device: as in `resolve_device`; with a number ("cuda:1") that device alone. precision: "32-true", "bf16-mixed", ...;
    devices, strategy: as in Fabric. Raises InputError for what this machine does not have.

    >>> build_fabric("cpu").device
    device(type='cpu')
    """
    where = resolve_device(device)
    chosen: Any = {"devices": devices if where.index is None else [where.index], "precision": precision}
    try:
        return Fabric(accelerator=where.type, strategy=strategy, **chosen)
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"device '{device}' with precision '{precision}': {error}") from error


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


def choose_plan(
    data: Dataset,
    given: Plan | Path | str | None,
    progress: Progress | None,
    device: torch.device | str = "cpu",
) -> Plan:
    """The plan given, else the data set's own `plan.yaml`, else a fresh one.

    Raises InputError for a plan of other labels or channels, and for a `plan.yaml` of the data set that was made before
    its files changed; one that is given may be of other data.
    """
    own = data.root / "plan.yaml"
    if given is None and not own.is_file():
        return make_plan(data, device=device, progress=progress)
    plan = given if isinstance(given, Plan) else load_plan(own if given is None else given)
    where = "the plan" if isinstance(given, Plan) else own if given is None else given
    regions = {name: list(values) for name, values in data.regions.items()}
    same = plan.labels == data.labels and (plan.regions, plan.regions_class_order) == (
        regions,
        list(data.regions_class_order),
    )
    if not same or list(plan.channels) != list(data.channels):
        raise InputError(
            f"{where}: made for labels {plan.regions or plan.labels} and channels {list(plan.channels)}, but the data "
            f"set has {regions or data.labels} and {list(data.channels)}; make it anew with `lightm plan {data.root}`"
        )
    if plan.fingerprint.data_hash != hash_of(data, {case.id for case in data.cases}):
        then, now = plan.fingerprint.cases, len(data.cases)
        if given is None:
            raise InputError(
                f"{where}: the data set has changed since this plan was made ({then} cases then, {now} now); make it "
                f"anew with `lightm plan {data.root}`, or use it as it is with --plan {own}"
            )
        _log.warning(
            "%s: this plan was made from other data (%d cases, %d here); it is used as it is", where, then, now
        )
    return plan


def with_sizes(plan: Plan, config: TrainConfig, patch: Sequence[int] | None = None, batch: int | None = None) -> Plan:
    """The plan with the sizes asked for: those given, else the configuration's, else its own."""
    wanted = patch if patch is not None else config.patch_size
    if wanted is not None:
        wanted = [wanted] if isinstance(wanted, int) else list(wanted)
        sizes = wanted * (plan.spatial_dims if len(wanted) == 1 else 1)
        if len(sizes) != plan.spatial_dims or min(sizes) < 1:
            raise InputError(
                f"patch size {wanted}: {plan.spatial_dims} sizes of at least 1 are needed, such as 64,64,64"
            )
        whole = [-(-size // MULTIPLE) * MULTIPLE for size in sizes]  # what a plan may hold
        if whole != sizes:
            before, now = (",".join(map(str, patch)) for patch in (sizes, whole))
            _log.warning("patch size %s is rounded up to %s, multiples of %d", before, now, MULTIPLE)
        plan = plan.model_copy(update={"patch_size": whole})
    batch = batch if batch is not None else config.batch_size
    if batch is not None:
        if batch < 1:
            raise InputError(f"batch size {batch}: must be 1 or more")
        plan = plan.model_copy(update={"batch_size": batch})
    return plan


def fitting_plan(plan: Plan, config: TrainConfig, network: nn.Module | None = None) -> Plan:
    """The plan with its patch rounded up to what the network can take, which is logged."""
    sizes = {"spatial_dims": plan.spatial_dims, "in_channels": len(plan.channels), "out_channels": len(plan.outputs)}
    options = {} if network is not None else config.network_options
    size = list(fitting_size(network or config.network, **sizes, image_size=plan.patch_size, **options))
    if size == list(plan.patch_size):
        return plan
    before, now = (",".join(map(str, patch)) for patch in (plan.patch_size, size))
    _log.warning("patch size %s is rounded up to %s, the next that network '%s' can take", before, now, config.network)
    return plan.model_copy(update={"patch_size": size})


def check_sizes(plan: Plan, config: TrainConfig, device: torch.device, *, own: bool = False) -> None:
    """Raise InputError, with the sizes, for a batch that no network could be trained on in the memory there is.

    A lower bound: what it lets through may still be too much. own: for a module of the caller's, which may be small.
    """
    voxels = plan.batch_size * prod(plan.patch_size)
    each = 4 * (len(plan.channels) + 2 * len(plan.outputs)) + 8  # image, logits, their gradients, and the labels
    if not own:
        each = max(each, _LEAST_BYTES_PER_VOXEL // (1 if config.precision.startswith("32") else 2))
    there = available_bytes() if device.type != "cuda" else torch.cuda.mem_get_info(device)[0]
    if there is not None and voxels * each > there:
        patch = ",".join(map(str, plan.patch_size))
        raise InputError(
            f"patch size {patch} with batch size {plan.batch_size}: training on {voxels:.3g} voxels at once needs at "
            f"least {voxels * each / 1e9:.3g} GB of memory, and {there / 1e9:.3g} GB are there on {device}; use a "
            "smaller --patch-size or --batch-size"
        )


def choose_split(data: Dataset, config: TrainConfig, given: Split | None = None) -> Split:
    """The split given, else the one named in the configuration, else a fresh draw over the cases with a label.

    Raises InputError for a split that does not fit, and for options of a draw beside a split that is given.
    """
    labelled = [case.id for case in data.cases if case.label is not None]
    drawn = [name for name in ("folds", "group_by", "split_seed") if getattr(config, name)]
    drawn += ["fold"] if config.fold is not None and (given is not None or config.fold == ALL) else []
    if drawn and (given is not None or config.split is not None):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in drawn)
        raise InputError(f"{options}: of a split that is drawn, but one is given (split); leave out one of them")
    if given is not None:
        return check_split(given, labelled, "the split")
    if config.split is not None:
        split = load_split(Path(config.split), labelled, None if isinstance(config.fold, str) else config.fold)
        if split.kind == NNUNET:
            _log.info("%s, fold %s: its validation cases choose the weights, and are scored", config.split, split.fold)
        return split
    try:
        fold = 0 if config.fold is None else config.fold
        return make_split(labelled, seed=config.split_seed, folds=config.folds, fold=fold, group_by=config.group_by)
    except InputError as error:
        raise InputError(f"{data.root}: {error}") from error


def keep_rare(data: Dataset, plan: Plan, split: Split, group_by: str | None = None) -> Split:
    """The split drawn, with a case of every class or region in training where there is one; what moves is logged.

    Label maps are read only where so few cases hold a class that validation and test might have all of them.
    """
    cases, apart = plan.fingerprint.class_cases, len(split.val) + len(split.test)
    of_value = {value: cases.get(name, 0) for name, value in plan.labels.items()}
    rare = [
        name
        for name, values in plan.targets.items()
        if 0 < max(of_value[value] for value in each_value(values)) <= apart
    ]

    def holder(name: str) -> Callable[[str], bool]:
        values = each_value(plan.targets[name])

        def holds(case_id: str) -> bool:
            label = data.case(case_id).label
            return label is not None and not values_in(label).isdisjoint(values)

        return holds

    holders = {name: holder(name) for name in rare}
    groups = groups_of([*split.train, *split.val, *split.test], group_by)
    for name, holds in holders.items():
        kept = keep_in_training(
            split, holds, [other for other in holders.values() if other is not holds], groups=groups
        )
        if moved := sorted(set(kept.train) - set(split.train)):
            _log.warning(
                "class '%s' would be in no training case by the split drawn: %s moves to training",
                name,
                ", ".join(moved),
            )
        split = kept
    return split


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
