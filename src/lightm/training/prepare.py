"""What is settled before a run is written: plan, sizes, split, classes, and that its folder is free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightm.datasets.dataset import Dataset
from lightm.datasets.split import Split, check_split, load_split, make_split
from lightm.errors import InputError
from lightm.files import LOCK, is_temporary
from lightm.nets.folder import OWN
from lightm.preparation.plan import Plan, load_plan, make_plan
from lightm.preparation.preprocess import PreprocessedCase
from lightm.progress import Progress
from lightm.training.config import TrainConfig


def own_name(thing: object) -> str:
    """The name under which an object of the caller's own stands in the files of its run."""
    return OWN + str(getattr(thing, "__name__", type(thing).__name__))


def check_own(where: Path, what: str, name: str, given: object | None) -> None:
    """Raise InputError where a run's network or loss is an object that was not given, or the other way round."""
    if name.startswith(OWN) and given is None:
        raise InputError(
            f"{where}: its {what} '{name.removeprefix(OWN)}' is an object of your own, which no file holds; make it "
            f"again as it was and give it: {what}=... (in Python)"
        )
    if given is not None and name != own_name(given):
        raise InputError(f"{where}: its {what} is '{name.removeprefix(OWN)}', not {own_name(given).removeprefix(OWN)}")


def choose_plan(data: Dataset, given: Plan | Path | str | None, progress: Progress | None) -> Plan:
    """The plan given, else the data set's own `plan.yaml`, else a fresh one."""
    beside = data.root / "plan.yaml"
    if given is None and beside.is_file():
        given = beside
    if given is None:
        return make_plan(data, progress=progress)
    plan = given if isinstance(given, Plan) else load_plan(given)
    if plan.labels != data.labels or list(plan.channels) != list(data.channels):
        where = "the plan" if isinstance(given, Plan) else given
        raise InputError(
            f"{where}: made for labels {plan.labels} and channels {list(plan.channels)}, but the data set has "
            f"{data.labels} and {list(data.channels)}; make it anew with `lightm plan {data.root}`"
        )
    return plan


def with_sizes(plan: Plan, config: TrainConfig, patch: Sequence[int] | None = None, batch: int | None = None) -> Plan:
    """The plan with the sizes asked for: those given, else the configuration's, else its own."""
    wanted = patch if patch is not None else config.patch_size
    if wanted is not None:
        wanted = [wanted] if isinstance(wanted, int) else list(wanted)
        sizes = wanted * (plan.spatial_dims if len(wanted) == 1 else 1)
        if len(sizes) != plan.spatial_dims or any(size < 8 or size % 8 for size in sizes):
            raise InputError(
                f"patch size {wanted}: {plan.spatial_dims} sizes are needed, each a multiple of 8 (three poolings by 2)"
            )
        plan = plan.model_copy(update={"patch_size": sizes})
    batch = batch if batch is not None else config.batch_size
    if batch is not None:
        if batch < 1:
            raise InputError(f"batch size {batch}: must be 1 or more")
        plan = plan.model_copy(update={"batch_size": batch})
    return plan


def choose_split(data: Dataset, config: TrainConfig, given: Split | None = None) -> Split:
    """The split given, else the one named in the configuration, else a fresh draw over the cases with a label."""
    labelled = [case.id for case in data.cases if case.label is not None]
    if given is not None:
        return check_split(given, labelled, "the split")
    if config.split is not None:
        return load_split(Path(config.split), labelled)
    try:
        return make_split(labelled, seed=config.split_seed, folds=config.folds, fold=config.fold)
    except InputError as error:
        raise InputError(f"{data.root}: {error}") from error


def check_classes(data: Dataset, train: Sequence[PreprocessedCase], val: Sequence[PreprocessedCase]) -> None:
    """Raise InputError when a class occurs in no training case."""

    def found(cases: Sequence[PreprocessedCase]) -> set[int]:
        return {k for case in cases for k, voxels in case.foreground().items() if len(voxels)}

    in_train, anywhere = found(train), found([*train, *val])
    for k, name in enumerate(data.classes):
        if k == 0 or k in in_train:
            continue
        where = "only in validation cases" if k in anywhere else "in no training or validation case"
        raise InputError(
            f"{data.root / 'dataset.json'}: class '{name}' (label {data.values[k]}) occurs {where}, so it cannot be "
            "learnt; take it out of the labels, add cases that show it, or draw another split with --split-seed"
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
