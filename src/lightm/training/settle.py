"""What a run trains with, settled before anything is written: device, data, plan and its sizes, and split."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

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
from lightm.labels import each_value
from lightm.memory import available_bytes
from lightm.nets import fitting_size
from lightm.preparation.cache import HASHES, FileHashes
from lightm.preparation.fingerprint import data_hash
from lightm.preparation.plan import MULTIPLE, Plan, load_plan, make_plan
from lightm.preparation.preprocess import cache_folder
from lightm.progress import Progress
from lightm.training.config import TrainConfig

_log = logging.getLogger(__name__)

# What training keeps for a voxel of a batch: 750 bytes in the smallest network measured, `unet`, and thousands in most.
_LEAST_BYTES_PER_VOXEL = 300


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
